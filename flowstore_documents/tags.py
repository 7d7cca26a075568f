"""The tags of runs (TAG). Lists by tag are in runs.py."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from flowstore_core.tags import merge_tags
from flowstore_documents.access import Access
from flowstore_documents.run_state import change_run
from flowstore_documents.transactions import Transaction


class Tags(Access):
    async def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        async def change(tx: Transaction) -> None:
            run = await change_run(tx, run_id, tags=True)
            run.check_stored()
            run.tags = merge_tags(run_id, run.tags or (), tags)

        await self._write("set_tags", change)
