"""The store, composed of one class per noun, and its variant with a lock for named stores."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any

from flowstore_core import PROPERTIES, Capability
from flowstore_memory.claims import Claims
from flowstore_memory.controls import Controls
from flowstore_memory.events import Events
from flowstore_memory.outputs import Outputs
from flowstore_memory.queues import Queues
from flowstore_memory.retention import Retention
from flowstore_memory.runs import Runs
from flowstore_memory.signals import Signals
from flowstore_memory.statistics import Statistics
from flowstore_memory.steps import Steps
from flowstore_memory.tags import Tags
from flowstore_memory.transfer import Transfer
from flowstore_memory.watching import Watch

CAPABILITIES = (frozenset(Capability) - PROPERTIES) | {Capability.VIRTUAL_CLOCK}


class MemoryStore(
    Runs,
    Steps,
    Claims,
    Queues,
    Watch,
    Controls,
    Signals,
    Outputs,
    Events,
    Transfer,
    Retention,
    Statistics,
    Tags,
):
    """Implements flowstore_core.FlowStore in the memory of this process, for one event loop."""

    backend = "memory"
    capabilities = CAPABILITIES

    async def ping(self) -> None:
        """Always succeeds: there is no server to reach."""

    async def aclose(self) -> None:
        """Has no resources to release; core rejects later calls."""


class SharedStore(MemoryStore):
    """A named MemoryStore, which event loops of several threads may have open at the same time."""


Operation = Callable[..., Coroutine[Any, Any, Any]]


def _locked(operation: Operation) -> Operation:
    # An operation never awaits, so no other task of this thread can find the lock held.
    @wraps(operation)
    async def locked(self: SharedStore, *arguments: Any, **named: Any) -> Any:
        with self._namespace.lock:
            return await operation(self, *arguments, **named)

    return locked


for _name, _operation in inspect.getmembers(MemoryStore, inspect.iscoroutinefunction):
    # These await, and take the lock themselves between two awaits.
    if _name not in ("cleanup", "wait_for_steps", "wait_for_run"):
        setattr(SharedStore, _name, _locked(_operation))
