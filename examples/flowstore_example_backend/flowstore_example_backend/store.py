"""The store, composed of one class per noun."""

from __future__ import annotations

from flowstore_example_backend.claims import Claims
from flowstore_example_backend.controls import Controls
from flowstore_example_backend.outputs import Outputs
from flowstore_example_backend.retention import Retention
from flowstore_example_backend.runs import Runs
from flowstore_example_backend.signals import Signals
from flowstore_example_backend.steps import Steps


class FolderStore(Runs, Steps, Claims, Controls, Signals, Outputs, Retention):
    """Implements the base protocols and OUTPUTS."""
