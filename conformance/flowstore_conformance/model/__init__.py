"""The executable specification of the contract.

A sequential in-memory store on virtual time. The suite compares the results and the state of every backend
with it. Core validates arguments (INP) before a call reaches a store, so the model validates none.
"""

from __future__ import annotations

from flowstore_conformance.model.controls import Controls
from flowstore_conformance.model.events import Events
from flowstore_conformance.model.outputs import Outputs
from flowstore_conformance.model.queues import Queues
from flowstore_conformance.model.retention import Retention
from flowstore_conformance.model.runs import Runs
from flowstore_conformance.model.signals import Signals
from flowstore_conformance.model.state import Run, State
from flowstore_conformance.model.statistics import Statistics
from flowstore_conformance.model.tags import Tags
from flowstore_conformance.model.transfer import Transfer


class Model(Controls, Queues, Signals, Outputs, Events, Transfer, Retention, Statistics, Tags, Runs):
    """Every operation of the contract as a synchronous method."""


__all__ = ["Model", "Run", "State"]
