"""The SDK for authors of backends: everything that a plugin needs, in one import.

A plugin returns descriptors (``Backend``) from the hook ``flowstore_backends``::

    from flowstore_core.backend import Backend, StoreConfig, hookimpl

    @hookimpl
    def flowstore_backends() -> Sequence[Backend]:
        return [MyBackend()]

Records, statuses and errors come from ``flowstore_core``. A descriptor may also implement the protocols
below. They are optional: the command line finds each by its methods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from flowstore_core.instrumentation import NO_OBSERVERS, Observer, Observers, Resolution, report_batch
from flowstore_core.platforms import require_posix
from flowstore_core.plugins import Backend, hookimpl, hookspec
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_core.runs import fold_ascii, search_matches
from flowstore_core.shielding import ShieldedTasks, run_to_completion
from flowstore_core.steps import superseded_by
from flowstore_core.timeseries import bucket_starts, percentile_ms
from flowstore_core.urls import StoreUrl, parse_url, redact

__all__ = [
    "NO_OBSERVERS",
    "ORPHAN_GRACE",
    "REQUEUE",
    "Backend",
    "BatchError",
    "BatchSource",
    "BatchWorkers",
    "BatchedOperation",
    "Batcher",
    "Describable",
    "Diagnosable",
    "Diagnostic",
    "Fixable",
    "Migratable",
    "Observer",
    "Observers",
    "PendingCall",
    "Resolution",
    "Severity",
    "ShieldedTasks",
    "StoreConfig",
    "StoreUrl",
    "TaskWorkers",
    "ThreadWorker",
    "Transfer",
    "WorkLoop",
    "bucket_starts",
    "fold_ascii",
    "hookimpl",
    "hookspec",
    "lease_end",
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
