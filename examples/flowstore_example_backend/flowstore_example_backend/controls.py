"""Run control and idempotency keys (CTL, IDM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import FlowRunControlRecord
from flowstore_example_backend.document import Control, Document, Key, RegisteredKey
from flowstore_example_backend.folder import Folder


class Controls(Folder):
    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        def configure(document: Document) -> None:
            control = document.control or Control(
                flow_id=flow_id,
                trigger_key=trigger_key,
                idempotency_key=None,
                timeout_at=None,
                created_at=self._now(),
            )
            document.control = replace(
                control,
                flow_id=flow_id,
                trigger_key=trigger_key,
                idempotency_key=idempotency_key,
                timeout_at=timeout_at,
            )

        await self._change(run_id, configure)

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        control = (self._documents.get(run_id) or Document()).control
        if control is None:
            return None
        by_user = control.cancelled_at is not None
        return FlowRunControlRecord(
            run_id=run_id,
            flow_id=control.flow_id,
            trigger_key=control.trigger_key,
            idempotency_key=control.idempotency_key,
            timeout_at=control.timeout_at,
            cancel_requested=by_user or control.timed_out_at is not None,
            cancel_reason=control.cancel_reason if by_user else control.timeout_reason,
            cancel_requested_at=control.cancelled_at if by_user else control.timed_out_at,
            timed_out_at=control.timed_out_at,
            created_at=control.created_at,
        )

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        # Nothing else runs in between: get_run_control waits for nothing.
        found = {run_id: await self.get_run_control(run_id) for run_id in run_ids}
        return MappingProxyType({run_id: one for run_id, one in found.items() if one is not None})

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        def cancel(document: Document) -> bool:
            control, run = document.control, document.run
            now = self._now()
            if control is None and run is not None:
                control = Control(
                    flow_id=run.flow_id,
                    trigger_key=run.trigger_key,
                    idempotency_key=None,
                    timeout_at=None,
                    created_at=now,
                )
            if control is None or control.cancelled_at is not None:
                return False
            document.control = replace(control, cancelled_at=now, cancel_reason=reason)
            return True

        return await self._change(run_id, cancel)

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        def time_out(document: Document) -> bool:
            control = document.control
            if control is None or control.timed_out_at is not None:
                return False
            if as_of is not None and (control.timeout_at is None or control.timeout_at > as_of):
                return False
            document.control = replace(control, timed_out_at=self._now(), timeout_reason=reason)
            return True

        return await self._change(run_id, time_out)

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        return self._run_id_of(Key(flow_id, trigger_key, idempotency_key))

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        key = Key(flow_id, trigger_key, idempotency_key)

        def register(document: Document) -> bool:
            # Keys span runs. Reading them here is safe, because one lock serializes all writes of the folder.
            holder = self._run_id_of(key)
            if holder is None:
                document.keys = (*document.keys, RegisteredKey(key, self._now()))
            return holder in (None, run_id)

        return await self._change(run_id, register)
