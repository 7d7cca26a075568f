"""Idempotency keys and control records (IDM, CTL)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from uuid import UUID

from flowstore_core import FlowRunControlRecord

from flowstore_yourdb.data import OpenData


class Controls(OpenData):
    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        return self._data.keys.get((flow_id, trigger_key, idempotency_key))

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        # Repeating the registration of the same run returns True (IDM-2).
        return self._data.keys.setdefault((flow_id, trigger_key, idempotency_key), run_id) == run_id

    # Until configure_run, request_cancel and mark_timed_out exist, no run has a control record.

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        return None

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        return MappingProxyType({})
