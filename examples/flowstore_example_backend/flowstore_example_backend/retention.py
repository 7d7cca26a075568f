"""Retention: deletes completed runs with all their state (RET)."""

from __future__ import annotations

from datetime import datetime

from flowstore_core.backend import ORPHAN_GRACE
from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder


class Retention(Folder):
    async def cleanup(self, cutoff: datetime) -> int:
        def clean(document: Document) -> bool:
            if document.run is None:
                _delete_orphans(document, cutoff, self._now() - ORPHAN_GRACE)
                return False
            completed_at = document.run.completed_at
            if completed_at is None or completed_at >= cutoff:
                return False
            document.clear()
            return True

        # One run per write, so that other writers run in between and a cancelled cleanup leaves no partial
        # run (RET-3).
        return sum([await self._change(run_id, clean) for run_id in tuple(self._documents)])


def _delete_orphans(document: Document, cutoff: datetime, grace_start: datetime) -> None:
    """Remove old keys and the old control record of a run that never started (RET-4)."""

    def is_old(created_at: datetime) -> bool:
        return created_at < cutoff and created_at <= grace_start

    document.keys = tuple(key for key in document.keys if not is_old(key.created_at))
    if document.control is not None and is_old(document.control.created_at):
        document.control = None
