"""Control records, latches, deadlines, idempotency keys and the atomic trigger (CTL, IDM)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from uuid import UUID

from flowstore_core import (
    FlowRunControlRecord,
    FlowRunRecord,
    RunAlreadyExistsError,
    StepRequest,
    TriggerResult,
)
from flowstore_core.tags import NO_TAGS, order_tags
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.documents import ControlDocument, RunDocument
from flowstore_documents.idempotency_keys import find_key, register_key
from flowstore_documents.requests import keys_of_requests, settle_requests
from flowstore_documents.run_state import RunState, change_run, read_run
from flowstore_documents.runs import read_records
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction


class Controls(Access):
    async def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        async def configure(tx: Transaction) -> None:
            run = await change_run(tx, run_id, control=True)
            _configure(tx, run, flow_id, trigger_key, idempotency_key, timeout_at, await tx.now())

        await self._write("configure_run", configure)

    async def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        async def read(tx: Transaction) -> FlowRunControlRecord | None:
            control = (await read_run(tx, run_id, control=True)).control
            return None if control is None else await _control_record(tx, run_id, control)

        return await self._read("get_run_control", read)

    async def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        async def read(tx: Transaction) -> Mapping[UUID, FlowRunControlRecord]:
            # One read of all, before those of each run.
            wanted = [key for run_id in run_ids for key in (keys.gate(run_id), keys.control(run_id))]
            await tx.read(wanted, expect=False)
            found = {}
            for run_id in run_ids:
                control = (await read_run(tx, run_id, control=True)).control
                if control is not None:
                    found[run_id] = await _control_record(tx, run_id, control)
            return MappingProxyType(found)

        return await self._read("get_run_controls", read)

    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        async def cancel(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, control=True)
            now = await tx.now()
            if run.control is None:
                if run.run is None:
                    return False
                run.control = ControlDocument(run.run.flow_id, run.run.trigger_key, now)
            elif run.control.cancelled_at is not None:
                return False
            run.control.cancelled_at = now
            run.control.cancel_reason = tx.text(reason)
            return True

        return await self._write("request_cancel", cancel)

    async def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        async def mark(tx: Transaction) -> bool:
            control = (await change_run(tx, run_id, control=True)).control
            if control is None or control.timed_out_at is not None:
                return False
            if as_of is not None and (control.timeout_at is None or control.timeout_at > as_of):
                return False
            control.timed_out_at = await tx.now()
            control.timeout_reason = tx.text(reason)
            return True

        return await self._write("mark_timed_out", mark)

    async def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        async def extend(tx: Transaction) -> bool:
            control = (await change_run(tx, run_id, control=True)).control
            if control is None:
                return False
            control.timeout_at = timeout_at
            control.timed_out_at = control.timeout_reason = None
            return True

        return await self._write("extend_deadline", extend)

    async def get_runs_to_stop(
        self, *, as_of: datetime | None = None, take: int = 100
    ) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            at = as_of
            if at is None:
                await finish_intents(tx)
                at = await tx.now()
            due = Range(keys.DEADLINES, keys.DEADLINES + keys.after_time(at), take, keys_only=True)
            latched = keys.prefix_range(keys.LATCHED, take, keys_only=True)
            await finish_intents(tx, ahead=[due, latched])
            # A latch moves a run to the other index. Without snapshots a long range is read again: in this
            # order a run that is latched meanwhile is found, perhaps in both.
            found = {key[-24:] for one in (due, latched) for key, _ in await tx.scan(one)}
            runs = await read_records(tx, [keys.parse_run(key) for key in sorted(found)[:take]])
            # Without snapshots a run may have ended after the index was read.
            return tuple(run for run in runs if not run.status.is_terminal)

        return await self._read("get_runs_to_stop", read)

    async def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        scope = keys.key_scope(flow_id, trigger_key, idempotency_key)

        async def find(tx: Transaction) -> UUID | None:
            return await find_key(tx, scope)

        return await self._read("find_run_id_by_idempotency_key", find)

    async def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        scope = keys.key_scope(flow_id, trigger_key, idempotency_key)

        async def register(tx: Transaction) -> bool:
            found = await find_key(tx, scope)
            if found is not None:
                return found == run_id
            run, now = await change_run(tx, run_id), await tx.now()
            register_key(tx, run_id, scope, now)
            if run.run is None:
                tx.put(keys.keys_tick(run_id))
                tx.put(keys.orphan(now, run_id, scope))
            return True

        return await self._write("try_register_idempotency_key", register)

    async def trigger_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] = NO_TAGS,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        scope = None if idempotency_key is None else keys.key_scope(flow_id, trigger_key, idempotency_key)

        async def trigger(tx: Transaction) -> TriggerResult:
            registered = None if scope is None else await find_key(tx, scope)
            run = await change_run(tx, registered or run_id, keys_of_requests(dispatch), control=True)
            if run.run is not None:
                if registered is None:
                    raise RunAlreadyExistsError(run_id)
                return TriggerResult(run=await run.record(), created=False)
            now = await tx.now()
            if scope is not None and registered is None:
                register_key(tx, run_id, scope, now)
            run.run = RunDocument(
                flow_id=flow_id,
                flow_name=flow_name,
                trigger_key=trigger_key,
                started_at=now,
                trigger_data=tx.text(trigger_data),
                job_id=job_id,
                source_run_id=source_run_id,
            )
            run.tags = order_tags(tags)
            _configure(tx, run, flow_id, trigger_key, idempotency_key, timeout_at, now)
            settle_requests(tx, run, dispatch, now)
            return TriggerResult(run=run.run.record(run.run_id, trigger_data, run.tags), created=True)

        return await self._write("trigger_run", trigger)


def _configure(
    tx: Transaction,
    run: RunState,
    flow_id: UUID,
    trigger_key: str,
    idempotency_key: str | None,
    timeout_at: datetime | None,
    now: datetime,
) -> None:
    if run.control is None:
        run.control = ControlDocument(flow_id, trigger_key, now, idempotency_key, timeout_at)
        if run.run is None:
            tx.put(keys.orphan(now, run.run_id))
        return
    run.control.flow_id = flow_id
    run.control.trigger_key = trigger_key
    run.control.idempotency_key = idempotency_key
    run.control.timeout_at = timeout_at


async def _control_record(tx: Transaction, run_id: UUID, control: ControlDocument) -> FlowRunControlRecord:
    is_by_user = control.cancelled_at is not None
    reason = control.cancel_reason if is_by_user else control.timeout_reason
    text = await tx.read_texts(run_id, [reason])
    return FlowRunControlRecord(
        run_id=run_id,
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        cancel_requested=control.is_stopped,
        cancel_reason=text(reason),
        cancel_requested_at=control.cancelled_at if is_by_user else control.timed_out_at,
        timed_out_at=control.timed_out_at,
        created_at=control.created_at,
    )
