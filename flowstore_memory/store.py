"""The store: one class per noun, put together."""

from __future__ import annotations

from flowstore_core import Capability
from flowstore_memory.claims import Claims
from flowstore_memory.controls import Controls
from flowstore_memory.events import Events
from flowstore_memory.outputs import Outputs
from flowstore_memory.retention import Retention
from flowstore_memory.runs import Runs
from flowstore_memory.signals import Signals
from flowstore_memory.statistics import Statistics
from flowstore_memory.steps import Steps

CAPABILITIES = frozenset(Capability) - {Capability.DURABLE, Capability.MULTI_PROCESS}


class MemoryStore(Runs, Steps, Claims, Controls, Signals, Outputs, Events, Retention, Statistics):
    """Everything of the contract, in the memory of this process."""

    backend = "memory"
    capabilities = CAPABILITIES

    async def ping(self) -> None:
        """Always answers: there is nothing to reach."""

    async def aclose(self) -> None:
        """Holds nothing to give back; core refuses every later call."""
