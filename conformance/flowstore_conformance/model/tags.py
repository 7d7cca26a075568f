"""Tags of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

from flowstore_conformance.model.state import Base
from flowstore_core import ConflictError

LIMIT = 32


class Tags(Base):
    """Changing tags."""

    def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        """Add, replace and, with None, remove tags; never more than the limit (TAG-2, UNK)."""
        run, record = self.require(run_id)
        kept = [(key, value) for key, value in record.tags if key not in tags]
        kept += [(key, value) for key, value in tags.items() if value is not None]
        if len(kept) > LIMIT:
            raise ConflictError("too many tags", run_id=run_id)
        run.record = replace(record, tags=tuple(sorted(kept)))
