"""Outputs of a run: capability OUTPUTS (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder


class Outputs(Folder):
    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        await self.save_outputs(run_id, {key: value_json})

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        def save(document: Document) -> None:
            document.existing_run(run_id)
            document.outputs.update(outputs)

        await self._change(run_id, save)

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        return (self._documents.get(run_id) or Document()).outputs.get(key)

    async def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        outputs = (self._documents.get(run_id) or Document()).outputs
        keys = sorted(key for key in outputs if key.startswith(prefix) and (after is None or key > after))
        return MappingProxyType({key: outputs[key] for key in keys[:take]})

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        def delete(document: Document) -> int:
            keys = [key for key in document.outputs if key.startswith(prefix)]
            for key in keys:
                del document.outputs[key]
            return len(keys)

        return await self._change(run_id, delete)
