"""The independent model of the contract: a plain, sequential store that the suite compares others with."""

from __future__ import annotations

from flowstore_conformance.model.claims import Claims
from flowstore_conformance.model.controls import Controls
from flowstore_conformance.model.records import Events, Outputs, Retention, Statistics
from flowstore_conformance.model.runs import Runs
from flowstore_conformance.model.signals import Signals
from flowstore_conformance.model.state import Run, State
from flowstore_conformance.model.steps import Steps


class Model(Controls, Steps, Claims, Signals, Outputs, Events, Retention, Statistics, Runs):
    """Every operation of the contract as a plain method, on virtual time."""


__all__ = ["Model", "Run", "State"]
