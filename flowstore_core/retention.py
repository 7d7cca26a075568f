"""Retention: deleting what is over, whole (RET)."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Protocol

ORPHAN_GRACE = timedelta(hours=1)
"""How old a key or control whose run never started must be at least before cleanup takes it (RET-4)."""


class FlowRetentionStore(Protocol):
    """Cleanup of completed runs."""

    async def cleanup(self, cutoff: datetime) -> int:
        """Delete the runs completed strictly before ``cutoff`` with all that belongs to them; how many.

        Steps, attempts, outputs, events, claims, dispatches, controls, idempotency keys and waiters go
        with their run (RET-1). Running runs are never touched (RET-2). It works in bounded batches,
        atomic per run: stopped halfway, it has deleted whole runs only (RET-3). Keys and controls
        older than cutoff and than an hour whose run never started go too, uncounted (RET-4).
        """
        ...
