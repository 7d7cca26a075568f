"""Retention: deleting terminal runs with all their data (RET)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

ORPHAN_GRACE = timedelta(hours=1)
"""Minimum age of a key or control record whose run never started before cleanup deletes it (RET-4)."""


class FlowRetentionStore(Protocol):
    """Cleanup of completed runs."""

    async def cleanup(self, cutoff: datetime) -> int:
        """Delete the runs completed strictly before ``cutoff`` and return their number.

        Deletes the steps, attempts, outputs, events, tags, claims, dispatches, controls, idempotency keys
        and waiters of each run with it (RET-1). Never touches a Running run (RET-2). Works in bounded
        batches, atomic per run: an interrupted cleanup, or one that raises, has deleted whole runs only
        (RET-3). Also deletes keys and control records older than ``cutoff`` and than one hour whose run never
        started; these are not counted (RET-4).
        """
        ...


class Deletion(Protocol):
    """Capability DELETION: deleting one run, whatever its age."""

    async def delete_run(self, run_id: UUID) -> bool:
        """Delete a terminal run with everything that belongs to it; True for the one call that did (RET-5).

        False if no run with this id is stored. Atomic: a read shows all of the run or nothing. Runs derived
        from it stay, as do a control record and keys whose run never started.

        Raises RunNotCompletedError, changing nothing, for a Running run.
        """
        ...
