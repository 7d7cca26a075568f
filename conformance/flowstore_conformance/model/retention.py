"""Deleting terminal runs and orphans."""

from __future__ import annotations

from datetime import datetime, timedelta
from uuid import UUID

from flowstore_conformance.model.state import Base, Run
from flowstore_core import RunNotCompletedError

ORPHAN_MIN_AGE = timedelta(hours=1)
"""The minimum age of a key or control record that cleanup deletes although its run never started (RET-4)."""


class Retention(Base):
    """Deleting terminal runs and orphans."""

    def cleanup(self, cutoff: datetime) -> int:
        """Delete the runs completed before the cutoff with everything that belongs to them (RET-1, RET-2).

        Delete old keys and control records without a stored run, too (RET-4, IDM-4).
        """
        completed = [
            run_id
            for run_id, run in self.state.runs.items()
            if run.record is not None
            and run.record.completed_at is not None
            and run.record.completed_at < cutoff
        ]
        for run_id in completed:
            self._delete(run_id)
        for scope, (run_id, created_at) in list(self.state.keys.items()):
            if self._never_started(run_id) and self._is_stale(created_at, cutoff):
                del self.state.keys[scope]
        for run_id, run in list(self.state.runs.items()):
            control = run.control
            if control is not None and run.record is None and self._is_stale(control.created_at, cutoff):
                del self.state.runs[run_id]
        return len(completed)

    def delete_run(self, run_id: UUID) -> bool:
        """Delete a terminal run with everything that belongs to it (RET-5, IDM-4)."""
        record = self.get(run_id).record
        if record is None:
            return False
        if not record.status.is_terminal:
            raise RunNotCompletedError(run_id)
        self._delete(run_id)
        return True

    def _delete(self, run_id: UUID) -> None:
        """Delete everything that belongs to a run (RET-1)."""
        del self.state.runs[run_id]
        self.state.keys = {scope: key for scope, key in self.state.keys.items() if key[0] != run_id}

    def _never_started(self, run_id: UUID) -> bool:
        """Whether no run with this id is stored (RET-4)."""
        return self.state.runs.get(run_id, Run()).record is None

    def _is_stale(self, created_at: datetime, cutoff: datetime) -> bool:
        """Whether a key or control record is older than the cutoff and at least an hour old (RET-4)."""
        return created_at < cutoff and self.now - created_at >= ORPHAN_MIN_AGE
