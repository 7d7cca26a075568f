"""The whole store: five protocols, their extensions, and FlowStore, which is all of them.

Each protocol is put together from the noun files, where the methods and their promises stand. An
engine takes a ``FlowStore`` from open_store; a backend may implement all of it or a part, and declares
the extensions that it offers as capabilities (see operations.py).
"""

from __future__ import annotations

from typing import Protocol

from flowstore_core.claims import DispatchLedger, Leases, StepClaims
from flowstore_core.controls import Deadlines, IdempotencyKeys, RunControls, Trigger
from flowstore_core.events import Events
from flowstore_core.outputs import Outputs
from flowstore_core.retention import FlowRetentionStore
from flowstore_core.runs import RunLifecycle
from flowstore_core.signals import Signals, SignalWaiters
from flowstore_core.statistics import Dashboard
from flowstore_core.status import Capability
from flowstore_core.steps import Recovery, StepAttempts, StepRuntime


class FlowRunStore(RunLifecycle, StepAttempts, DispatchLedger, Dashboard, Protocol):
    """Runs, attempts, the dispatch ledger and the dashboard."""


class FlowRunRuntimeStore(StepRuntime, StepClaims, Protocol):
    """What a running engine asks for: statuses, claims, skips."""


class FlowRunControlStore(RunControls, IdempotencyKeys, Protocol):
    """Cancel, time-out and idempotency keys."""


class FlowSignalStore(Signals, Protocol):
    """SignalWaiters and deliveries."""


class FlowStore(
    FlowRunStore,
    FlowRunRuntimeStore,
    FlowRunControlStore,
    FlowRetentionStore,
    FlowSignalStore,
    Leases,
    Trigger,
    Recovery,
    Deadlines,
    SignalWaiters,
    Events,
    Outputs,
    Protocol,
):
    """Every operation of the contract. A method of a capability that the backend lacks raises
    NotSupportedError; test ``capabilities`` before relying on one."""

    @property
    def backend(self) -> str:
        """The name of the backend, as ``flowstore backends`` lists it."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this store offers; it may depend on the URL."""
        ...

    async def ping(self) -> None:
        """Ask the database for a sign of life. Raises StoreUnavailableError."""
        ...

    async def aclose(self) -> None:
        """Close the store; idempotent. Later calls raise StoreClosedError (argument errors come first).

        Waits, bounded, for what cancelled calls have to give back (CON-4).
        """
        ...
