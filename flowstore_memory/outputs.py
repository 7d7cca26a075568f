"""Outputs of a run (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_memory.state import OpenNamespace


class Outputs(OpenNamespace):
    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        self._runs[run_id.int].outputs[key] = value_json

    async def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        self._runs[run_id.int].outputs.update(outputs)

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        run = self._runs.get(run_id.int)
        return None if run is None else run.outputs.get(key)

    async def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        run = self._runs.get(run_id.int)
        outputs = {} if run is None else run.outputs
        keys = sorted(key for key in outputs if key.startswith(prefix) and (after is None or key > after))
        return MappingProxyType({key: outputs[key] for key in keys[:take]})

    async def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        run = self._runs.get(run_id.int)
        keys = [] if run is None else [key for key in run.outputs if key.startswith(prefix)]
        if run is not None:
            for key in keys:
                del run.outputs[key]
        return len(keys)
