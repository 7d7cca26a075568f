"""Outputs of a run (EVT-2)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_memory.state import OpenNamespace


class Outputs(OpenNamespace):
    async def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        self._runs[run_id.int].outputs[key] = value_json

    async def get_output(self, run_id: UUID, key: str) -> str | None:
        run = self._runs.get(run_id.int)
        return None if run is None else run.outputs.get(key)

    async def get_outputs(self, run_id: UUID) -> Mapping[str, str]:
        run = self._runs.get(run_id.int)
        found = {} if run is None else dict(sorted(run.outputs.items()))
        return MappingProxyType(found)
