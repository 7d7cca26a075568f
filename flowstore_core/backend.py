"""The SDK for authors of backends: everything that a plugin needs, in one import.

A plugin returns descriptors (``Backend``) from the hook ``flowstore_backends``::

    from flowstore_core.backend import Backend, StoreConfig, hookimpl

    @hookimpl
    def flowstore_backends() -> Sequence[Backend]:
        return [MyBackend()]

Records, statuses and errors come from ``flowstore_core``. A descriptor may also implement the protocols
below. They are optional: the command line and the conformance suite find each by its members.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from typing import Protocol, runtime_checkable

from flowstore_core.batching import (
    REQUEUE,
    BatchedOperation,
    Batcher,
    BatchError,
    BatchSource,
    BatchWorkers,
    PendingCall,
    TaskWorkers,
    ThreadWorker,
    Transfer,
    WorkLoop,
)
from flowstore_core.claims import lease_end
from flowstore_core.config import StoreConfig
from flowstore_core.diagnostics import Diagnostic, Severity, orphaned_rows, wrong_counters
from flowstore_core.errors import strip_driver_exceptions
from flowstore_core.fault_proxy import FaultKind, FaultProxy, ProxyOutageInjector, ProxyRelay, Streams
from flowstore_core.instrumentation import NO_OBSERVERS, Observer, Observers, Resolution, report_batch
from flowstore_core.limits import SMALLEST_LIMITS, StoreLimits
from flowstore_core.platforms import require_posix
from flowstore_core.plugins import Backend, hookimpl, hookspec
from flowstore_core.queues import not_accepted
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_core.runs import fold_ascii, search_matches
from flowstore_core.shielding import ShieldedTasks, run_to_completion
from flowstore_core.steps import superseded_by
from flowstore_core.timeseries import bucket_starts, percentile_ms
from flowstore_core.urls import StoreUrl, parse_url, redact
from flowstore_core.watching import WaitingCalls

__all__ = [
    "NO_OBSERVERS",
    "ORPHAN_GRACE",
    "REQUEUE",
    "SMALLEST_LIMITS",
    "Backend",
    "BatchError",
    "BatchSource",
    "BatchWorkers",
    "BatchedOperation",
    "Batcher",
    "Describable",
    "Diagnosable",
    "Diagnostic",
    "FaultInjectable",
    "FaultInjector",
    "FaultKind",
    "FaultProxy",
    "Fixable",
    "Limited",
    "Migratable",
    "NonDurableUrls",
    "Observer",
    "Observers",
    "OutageInjectable",
    "OutageInjector",
    "PendingCall",
    "ProxyOutageInjector",
    "ProxyRelay",
    "Resolution",
    "SchemaRevertible",
    "SchemaVersionAdjustable",
    "ScratchClearable",
    "Severity",
    "SharedClock",
    "ShieldedTasks",
    "StoreConfig",
    "StoreLimits",
    "StoreUrl",
    "Streams",
    "TaskWorkers",
    "ThreadWorker",
    "Transfer",
    "VariantUrls",
    "WaitingCalls",
    "WorkLoop",
    "WriteFailable",
    "WriteFailureInjector",
    "bucket_starts",
    "fold_ascii",
    "hookimpl",
    "hookspec",
    "lease_end",
    "not_accepted",
    "orphaned_rows",
    "parse_url",
    "percentile_ms",
    "redact",
    "report_batch",
    "require_posix",
    "run_to_completion",
    "search_matches",
    "strip_driver_exceptions",
    "superseded_by",
    "wrong_counters",
]


@runtime_checkable
class Limited(Protocol):
    """A backend whose stores hold less than the contract allows (LIM-1)."""

    @property
    def limits(self) -> StoreLimits:
        """The limits of its stores; a store's own ``limits`` override them."""
        ...


@runtime_checkable
class SharedClock(Protocol):
    """A backend with SHARED_CLOCK (CLK-1)."""

    @property
    def max_skew(self) -> timedelta:
        """How far one wrong clock can move the clock of a store; a store's own ``max_skew`` overrides it.

        Zero if the clocks of processes do not matter, as with the clock of a server.
        """
        ...


@runtime_checkable
class Migratable(Protocol):
    """A backend with a versioned schema, for ``flowstore migrate``."""

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        """List every migration as (number, name, script), in order; the script applies and records it."""
        ...

    async def schema_version(self, config: StoreConfig) -> int:
        """Return the version of the schema; 0 if there is none. Creates and changes nothing."""
        ...

    async def migrate(self, config: StoreConfig) -> int:
        """Apply the missing migrations and return the version reached."""
        ...


@runtime_checkable
class Describable(Protocol):
    """A backend that has more to say about an existing store, for ``flowstore ping``."""

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """Return short facts about the store, by name. Changes nothing."""
        ...


@runtime_checkable
class Diagnosable(Protocol):
    """A backend that finds problems only it can see, for ``flowstore doctor``."""

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """Report the problems of the store, such as server settings or file permissions.

        Changes nothing, and also works if the store cannot be opened. Takes a few seconds at most,
        whatever the size of the store, unless ``thorough`` is set.
        """
        ...


@runtime_checkable
class Fixable(Protocol):
    """A backend that can fix problems that it reported, for ``flowstore doctor --fix``."""

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        """Fix the given problems and return one line for each action taken.

        ``findings`` are diagnostics of this backend whose ``fix`` is not None. Safe while other
        processes use the store.
        """
        ...


@runtime_checkable
class VariantUrls(Protocol):
    """A backend with option values that the conformance suite should try too."""

    def variants(self, url: str) -> Mapping[str, str]:
        """Return URLs of the store at ``url`` with other options, by a short name such as "pool of one".

        Choose values that change how the store works: the smallest pool, the smallest batch, a pooler mode.
        All variants must work on one namespace at once and have the capabilities of ``url``. The suite opens
        each check's stores with the given URL or with one of the variants, as the seed decides.
        """
        ...


@runtime_checkable
class NonDurableUrls(Protocol):
    """A backend with options under which its stores do not have DURABLE, for CON-5."""

    def non_durable_urls(self, url: str) -> Sequence[str]:
        """Return URLs of the store at ``url`` with such options, one for each option."""
        ...


class FaultInjector(Protocol):
    """Stands between the stores of one URL and their database, and injects one fault at a time.

    A request is what a store sends to the database and waits for: a statement, a commit, a command. An armed
    fault affects the next request after ``skip`` others, once. Arming replaces a fault that is armed.
    """

    @property
    def url(self) -> str:
        """The URL of the same namespace for stores whose requests pass through this injector."""
        ...

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        """Arm: the database executes the request, and the connection breaks before the reply arrives.

        With ``isolates`` no further request reaches the database until ``disarm``.
        """
        ...

    def hold_request(self, *, skip: int = 0) -> None:
        """Arm: the connection breaks, and the request reaches the database only on release_request.

        Requests inside an open transaction do not count: they take effect only with a later request.
        """
        ...

    def refuse_request(self, *, skip: int = 0) -> None:
        """Arm: the database refuses the request with an error that permits a retry, such as a deadlock.

        Requests inside an open transaction count; the error ends the transaction.
        """
        ...

    async def release_request(self) -> None:
        """Pass a held request on; return once the database has replied or refused it."""
        ...

    def disarm(self) -> bool:
        """End the fault. True if it had affected a request."""
        ...


@runtime_checkable
class FaultInjectable(Protocol):
    """A backend that lets the conformance suite lose, delay and refuse requests, for CON-2 and CON-3.

    Without it those checks are UNSUPPORTED.
    """

    def inject_faults(self, url: str) -> AbstractAsyncContextManager[FaultInjector]:
        """Make an injector for the store at ``url``, a scratch namespace; leaving the context closes it.

        Raises ConfigurationError, with the reason, if it cannot work with this URL.
        """
        ...


class WriteFailureInjector(Protocol):
    """Stands between the stores of one URL and their database, and fails writes, as a full disk does.

    Requests that only read, begin or roll back are neither counted nor failed.
    """

    @property
    def url(self) -> str:
        """The URL of the same namespace for stores whose writes may fail."""
        ...

    def fail(self, *, skip: int = 0) -> None:
        """Fail every request after ``skip`` others: it has no effect, and the store gets an error."""
        ...

    def stop(self) -> bool:
        """Fail no further request. True if one has failed."""
        ...


class OutageInjector(Protocol):
    """Locks the database of one namespace, or makes it unavailable."""

    @property
    def url(self) -> str:
        """The URL of the namespace for stores that interruptions affect, with short timeouts."""
        ...

    @property
    def interruptions(self) -> Mapping[str, Callable[[], AbstractAsyncContextManager[None]]]:
        """Contexts in which the stores at ``url`` cannot reach their database, by a phrase for each.

        For example "the server does not answer". The namespace need not be usable afterwards.
        """
        ...

    def lock(self) -> AbstractAsyncContextManager[None]:
        """Hold a lock for which every write to a stored run waits, as another client may.

        Raises ConfigurationError, with the reason, if the database has no such locks.
        """
        ...


@runtime_checkable
class WriteFailable(Protocol):
    """A backend that lets the conformance suite fail a write in the middle, for CON-1.

    Without it that check is UNSUPPORTED.
    """

    def inject_write_failures(self, url: str) -> AbstractAsyncContextManager[WriteFailureInjector]:
        """Make an injector for the store at ``url``, a scratch namespace.

        It concerns the stores that open with its URL in this context.
        """
        ...


@runtime_checkable
class OutageInjectable(Protocol):
    """A backend that lets the conformance suite lock its database or make it unavailable.

    Stores wait for the lock, and their calls end with StoreUnavailableError in an interruption (CON-2).
    Without it those checks are UNSUPPORTED.
    """

    def inject_outages(self, url: str) -> AbstractAsyncContextManager[OutageInjector]:
        """Make an injector for the store at ``url``, a scratch namespace; leaving the context closes it.

        Raises ConfigurationError, with the reason, if it cannot work with this URL.
        """
        ...


@runtime_checkable
class SchemaVersionAdjustable(Protocol):
    """A backend that lets the conformance suite change the recorded version of a schema, for CON-6.

    Without it the checks of other schema versions are UNSUPPORTED.
    """

    def adjust_schema_version(self, url: str, difference: int) -> AbstractAsyncContextManager[None]:
        """Record a newer (1) or older (-1) version of the schema at ``url``, a scratch namespace.

        The newer version is one that this code does not work with. Nothing else changes, and leaving the
        context restores the version, also after a store has recorded it. No store is open at either moment.
        """
        ...


@runtime_checkable
class SchemaRevertible(Protocol):
    """A backend that lets the conformance suite create a store as an earlier release left it, for CON-6.

    Without it the checks of migrations are UNSUPPORTED.
    """

    def earlier_schema_versions(self) -> Sequence[int]:
        """List, oldest first, the versions that this code migrates and that can store all data of today."""
        ...

    async def revert_schema(self, url: str, version: int) -> None:
        """Replace the newest schema at ``url``, a scratch namespace, by an earlier one with the same data.

        Create its tables with the migrations up to ``version``, and copy the columns that both have. Copy
        counters and indexes too if the earlier version has them. No store is open meanwhile.
        """
        ...


@runtime_checkable
class ScratchClearable(Protocol):
    """A backend that can empty a scratch namespace, usually because making a new one takes longer.

    The conformance suite then uses a namespace for several checks, until one of them fails.
    """

    async def clear_scratch(self, url: str) -> None:
        """Delete everything in a namespace that ``scratch`` made.

        Stores may be open on it, and are used afterwards, but no call runs meanwhile.
        """
        ...
