"""Deleting runs (RET)."""

from __future__ import annotations

import asyncio
from datetime import datetime
from itertools import islice
from uuid import UUID

from flowstore_core import RunNotCompletedError, RunStatus
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_memory.queue_index import drop_deleted_runs
from flowstore_memory.state import OpenNamespace

BATCH = 200
"""Number of runs that are deleted before other tasks run (RET-3)."""


class Retention(OpenNamespace):
    async def cleanup(self, cutoff: datetime) -> int:
        with self._namespace.lock:
            over = iter([run.run_id for run in self._runs.values() if self._is_over(run.run_id, cutoff)])
        deleted = 0
        while batch := list(islice(over, BATCH)):
            with self._namespace.lock:
                for run_id in batch:
                    # Checked again, because a retry may have reopened the run (RET-2).
                    if self._is_over(run_id, cutoff):
                        self._delete(run_id)
                        deleted += 1
                self._namespace.wake()
            await asyncio.sleep(0)
        with self._namespace.lock:
            self._delete_orphans(cutoff)
            if deleted:
                drop_deleted_runs(self._namespace)
        return deleted

    async def delete_run(self, run_id: UUID) -> bool:
        run = self._runs.get(run_id.int)
        if run is None:
            return False
        if run.status is RunStatus.RUNNING:
            raise RunNotCompletedError(run_id)
        self._delete(run_id)
        drop_deleted_runs(self._namespace)
        self._namespace.wake()
        return True

    def _delete(self, run_id: UUID) -> None:
        # The control record and the keys are the only state outside of the run; the caller drops its entries
        # in the queues.
        del self._runs[run_id.int]
        self._namespace.controls.pop(run_id, None)
        self._namespace.delete_keys(run_id)

    def _is_over(self, run_id: UUID, cutoff: datetime) -> bool:
        run = self._runs.get(run_id.int)
        return run is not None and run.completed_at is not None and run.completed_at < cutoff

    def _delete_orphans(self, cutoff: datetime) -> None:
        """Delete old keys and control records whose run never started (RET-4)."""
        namespace = self._namespace
        latest = self._now() - ORPHAN_GRACE

        def is_old(created_at: datetime) -> bool:
            return created_at < cutoff and created_at <= latest

        for run_id in [run_id for run_id in namespace.keys_of if run_id.int not in namespace.runs]:
            kept = [key for key in namespace.keys_of[run_id] if not is_old(namespace.keys[key].created_at)]
            for key in set(namespace.keys_of[run_id]).difference(kept):
                del namespace.keys[key]
            if kept:
                namespace.keys_of[run_id] = kept
            else:
                del namespace.keys_of[run_id]
        for run_id, control in list(namespace.controls.items()):
            if run_id.int not in namespace.runs and is_old(control.created_at):
                del namespace.controls[run_id]
