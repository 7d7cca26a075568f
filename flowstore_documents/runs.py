"""Runs: start, complete, list, page, detail (RUN, QRY)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from uuid import UUID

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunPage,
    RunPosition,
    RunStatus,
    StepStatus,
    new_claim_token,
)
from flowstore_core.backend import fold_ascii, search_matches
from flowstore_core.runs import SEARCHED_BYTES
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.attempts import all_attempts, read_attempts, step_records
from flowstore_documents.codec import decode
from flowstore_documents.documents import Intent, IntentKind, RunDocument, StepDocument
from flowstore_documents.intents import complete_run, is_as_expected
from flowstore_documents.run_state import change_run, read_run
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction

LOST_TRIES = 3
"""After this number of lost tries complete_run stores an intent, which stops other changes of the run."""
READ_BATCH = 500
"""Number of runs that are read at once."""


class Runs(Access):
    async def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
    ) -> FlowRunRecord:
        async def start(tx: Transaction) -> FlowRunRecord:
            run = await change_run(tx, run_id, control=True)
            if run.run is not None:
                raise RunAlreadyExistsError(run_id)
            run.run = RunDocument(
                flow_id=flow_id,
                flow_name=flow_name,
                trigger_key=trigger_key,
                started_at=await tx.now(),
                trigger_data=tx.text(trigger_data),
                job_id=job_id,
                source_run_id=source_run_id,
            )
            return run.run.record(run_id, trigger_data)

        return await self._write("start_run", start)

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus,
        *,
        expected: Mapping[str, StepStatus] | None = None,
    ) -> bool:
        token = new_claim_token()

        async def complete(tx: Transaction) -> bool | None:
            run = await change_run(tx, run_id, control=True)
            if run.is_terminal:
                return False
            if tx.tries >= LOST_TRIES:
                arguments = None if expected is None else tx.text(json.dumps(expected, ensure_ascii=False))
                run.stored.intent = Intent(IntentKind.COMPLETE, token, status=status, expected=arguments)
                return None
            now = await tx.now()
            if not await is_as_expected(run, expected, now):
                return False
            complete_run(run.stored, status, now)
            return True

        async def decide() -> bool:
            is_completed = await self._transactions.run("complete_run", complete)
            if is_completed is not None:
                return is_completed
            await self._transactions.roll_forward(run_id)
            return await self._transactions.run("complete_run", was_completed)

        async def was_completed(tx: Transaction) -> bool:
            run = (await read_run(tx, run_id)).run
            return run is not None and run.completed_by == token

        return await self._shielded.run(decide())

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        async def read(tx: Transaction) -> FlowRunRecord | None:
            run = await read_run(tx, run_id)
            return None if run.run is None else await run.record()

        return await self._read("get_run", read)

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        async def read(tx: Transaction) -> FlowRunDetail | None:
            run = await read_run(tx, run_id)
            if run.run is None:
                return None
            await run.load_all_steps()
            steps = await step_records(tx, run_id, run.steps, await read_attempts(tx, run_id))
            record = await run.record()
            return FlowRunDetail(
                run_id=run_id,
                flow_id=record.flow_id,
                flow_name=record.flow_name,
                status=record.status,
                trigger_key=record.trigger_key,
                trigger_data=record.trigger_data,
                job_id=record.job_id,
                started_at=record.started_at,
                completed_at=record.completed_at,
                source_run_id=record.source_run_id,
                steps=steps,
            )

        return await self._read("get_run_detail", read)

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        async def read(tx: Transaction) -> RunStatus | None:
            run = (await read_run(tx, run_id)).run
            return None if run is None else run.status

        return await self._read("get_run_status", read)

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
    ) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            return await _read_index(tx, keys.runs_of(flow_id), after, skip, take)

        return await self._read("get_runs", read)

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            found = await _read_index(tx, keys.runs_of(None, RunStatus.RUNNING), take=take)
            # Without snapshots a run may have ended after the index was read.
            return tuple(run for run in found if not run.status.is_terminal)

        return await self._read("get_active_runs", read)

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            return await _read_index(tx, keys.derived_runs(source_run_id), take=take)

        return await self._read("get_derived_runs", read)

    async def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
    ) -> RunPage:
        prefix = keys.runs_of(flow_id, status)

        async def read(tx: Transaction) -> RunPage:
            await finish_intents(tx)
            count = (await tx.read((), [keys.prefix_range(prefix, 0, count=True)])).pages[0].count
            assert count is not None
            return RunPage(runs=await _read_index(tx, prefix, after, skip, take), total_count=count)

        async def find(tx: Transaction) -> RunPage:
            await finish_intents(tx)
            entries = await tx.scan(keys.prefix_range(prefix, keys_only=True))
            needle = fold_ascii(search or "")
            runs = await read_runs(tx, [keys.parse_position(key) for key, _ in entries])
            found = [(run_id, run) for run_id, run in runs if await _matches(tx, run_id, run, needle)]
            first = _start_after(prefix, after)
            page = [
                run_id for run_id, run in found if prefix + keys.position(run.started_at, run_id) >= first
            ]
            records = await read_records(tx, page[skip : skip + take])
            return RunPage(runs=records, total_count=len(found))

        return await self._read("get_runs_page", read if search is None else find)


def _start_after(prefix: bytes, after: RunPosition | None) -> bytes:
    """The first key of an index of runs that is behind a position."""
    return prefix if after is None else prefix + keys.position(after.started_at, after.run_id) + b"\0"


async def _read_index(
    tx: Transaction,
    prefix: bytes,
    after: RunPosition | None = None,
    skip: int = 0,
    take: int | None = None,
) -> tuple[FlowRunRecord, ...]:
    """The records of a page of an index."""
    await finish_intents(tx)
    limit = None if take is None else skip + take
    wanted = Range(_start_after(prefix, after), keys.end_of(prefix), limit, keys_only=True)
    entries = (await tx.scan(wanted))[skip:] if take != 0 else []
    return await read_records(tx, [keys.parse_position(key) for key, _ in entries])


async def read_runs(tx: Transaction, run_ids: Sequence[UUID]) -> list[tuple[UUID, RunDocument]]:
    """Those of some runs that are stored, in the order of their ids."""
    found = []
    for start in range(0, len(run_ids), READ_BATCH):
        some = run_ids[start : start + READ_BATCH]
        view = await tx.read([keys.gate(run_id) for run_id in some], expect=False)
        for run_id in some:
            value = view.found.get(keys.gate(run_id))
            run = None if value is None else decode(RunDocument, value.value)
            if run is not None and not run.is_deleted:
                found.append((run_id, run))
    return found


async def read_records(tx: Transaction, run_ids: Sequence[UUID]) -> tuple[FlowRunRecord, ...]:
    runs = await read_runs(tx, run_ids)
    text = await tx.read_pieces([(run_id, run.trigger_data) for run_id, run in runs])
    return tuple(run.record(run_id, text(run.trigger_data)) for run_id, run in runs)


async def _matches(tx: Transaction, run_id: UUID, run: RunDocument, needle: str) -> bool:
    """Whether a run matches the search, in the fields of get_run_detail (QRY-2)."""
    if search_matches(needle, [str(run_id), run.flow_name, run.trigger_key, run.status, run.job_id], ()):
        return True
    prefix = keys.steps(run_id)
    steps = {
        keys.parse_last_name(key, prefix): decode(StepDocument, found.value)
        for key, found in await tx.scan(keys.prefix_range(prefix))
    }
    visible = {key: step for key, step in steps.items() if step.status is not None}
    if search_matches(needle, [*visible], ()):
        return True
    earlier = await read_attempts(tx, run_id) if visible else {}
    texts = [
        text
        for key, step in visible.items()
        for attempt in all_attempts(step, earlier.get(key, ()))
        for text in (attempt.output_json, attempt.error_message)
    ]
    pieces = -(-SEARCHED_BYTES // tx.limits.value_bytes)
    text = await tx.read_pieces([(run_id, found) for found in texts], count=pieces)
    return search_matches(needle, (), [text(found) for found in texts])
