"""The tags of runs (TAG)."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from flowstore_core.tags import merge_tags
from flowstore_memory.state import OpenNamespace


class Tags(OpenNamespace):
    async def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        run = self._runs[run_id.int]
        run.tags = merge_tags(run_id, run.tags, tags)
