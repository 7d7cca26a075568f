"""FlowStore, the complete store, and the five protocols that it combines with the optional capabilities.

The noun files define the methods and document their contract; this file composes them. An engine gets a
``FlowStore`` from open_store. A backend implements the five protocols and declares the extensions that it
offers as capabilities (see operations.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol

from flowstore_core.claims import DispatchLedger, Leases, StepClaims
from flowstore_core.controls import Deadlines, IdempotencyKeys, RunControls, Trigger
from flowstore_core.events import Events
from flowstore_core.limits import StoreLimits
from flowstore_core.outputs import Outputs
from flowstore_core.queues import Queues
from flowstore_core.retention import Deletion, FlowRetentionStore
from flowstore_core.runs import RunLifecycle
from flowstore_core.signals import Mailbox, Signals, SignalWaiters
from flowstore_core.statistics import Dashboard
from flowstore_core.status import Capability
from flowstore_core.steps import Recovery, StepAttempts, StepRuntime
from flowstore_core.tags import Tags
from flowstore_core.transfer import Transfer
from flowstore_core.watching import Watch


class FlowRunStore(RunLifecycle, StepAttempts, DispatchLedger, Dashboard, Protocol):
    """Runs, attempts, the dispatch ledger and the dashboard."""


class FlowRunRuntimeStore(StepRuntime, StepClaims, Protocol):
    """Step statuses, claims and skips, for a running engine."""


class FlowRunControlStore(RunControls, IdempotencyKeys, Protocol):
    """Cancellation, time-outs and idempotency keys."""


class FlowSignalStore(Signals, Protocol):
    """Signal waiters and their deliveries."""


class FlowStore(
    FlowRunStore,
    FlowRunRuntimeStore,
    FlowRunControlStore,
    FlowRetentionStore,
    FlowSignalStore,
    Leases,
    Trigger,
    Recovery,
    Queues,
    Watch,
    Deadlines,
    SignalWaiters,
    Mailbox,
    Events,
    Outputs,
    Deletion,
    Transfer,
    Tags,
    Protocol,
):
    """Every operation of the contract.

    A method whose capability the backend lacks raises NotSupportedError; check ``capabilities`` first.
    """

    @property
    def backend(self) -> str:
        """The backend's name, as listed by ``flowstore backends``."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The capabilities of this store; they may depend on the URL."""
        ...

    @property
    def limits(self) -> StoreLimits:
        """What this store holds (LIM-1)."""
        ...

    @property
    def max_skew(self) -> timedelta | None:
        """How far one wrong clock can move the clock of the store; None without SHARED_CLOCK (CLK-1)."""
        ...

    async def ping(self) -> None:
        """Make one round trip to the database. Raises StoreUnavailableError."""
        ...

    async def aclose(self) -> None:
        """Close the store; idempotent. Later calls raise StoreClosedError (argument errors come first).

        Waits, for a bounded time, until the effects of cancelled calls are undone (CON-4).
        """
        ...
