"""Outputs of a run: capability OUTPUTS (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder


class Outputs(Folder):
    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        def save(document: Document) -> None:
            document.existing_run(run_id)
            document.outputs[key] = value_json

        await self._change(run_id, save)

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        return (self._documents.get(run_id) or Document()).outputs.get(key)

    async def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        document = self._documents.get(run_id) or Document()
        return MappingProxyType(dict(sorted(document.outputs.items())))
