"""Runs: start, complete, list, page, detail (RUN, QRY)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from flowstore_core.tags import NO_TAGS, decode_tags, order_tags
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.attempts import all_attempts, read_attempts, step_records, steps_and_attempts
from flowstore_documents.codec import decode
from flowstore_documents.documents import Intent, IntentKind, RunDocument, StepDocument, TagsDocument
from flowstore_documents.intents import complete_run, is_as_expected, ranges_of_expected
from flowstore_documents.run_state import change_run, read_run
from flowstore_documents.space import Page, Range, Versioned
from flowstore_documents.texts import Text
from flowstore_documents.transactions import Transaction

LOST_TRIES = 3
"""After this number of lost tries complete_run stores an intent, which stops other changes of the run."""
READ_BATCH = 500
"""Number of runs that are read at once."""
SEARCH_BATCH = 40
"""Number of runs whose steps are searched at once."""


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
        tags: Mapping[str, str] = NO_TAGS,
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
            run.tags = order_tags(tags)
            return run.run.record(run_id, trigger_data, run.tags)

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
            run = await change_run(tx, run_id, control=True, ahead=ranges_of_expected(run_id, expected))
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
            return await self._transactions.settle("complete_run", run_id, was_completed)

        async def was_completed(tx: Transaction) -> bool:
            run = (await read_run(tx, run_id)).run
            return run is not None and run.completed_by == token

        return await self._shielded.run(decide())

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        async def read(tx: Transaction) -> FlowRunRecord | None:
            run = await read_run(tx, run_id, tags=True)
            return None if run.run is None else await run.record()

        return await self._read("get_run", read)

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        async def read(tx: Transaction) -> FlowRunDetail | None:
            run = await read_run(tx, run_id, tags=True, ahead=steps_and_attempts(run_id))
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
                tags=record.tags,
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
        tags: Mapping[str, str] = NO_TAGS,
    ) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            return (await _read_index(tx, keys.runs_of(flow_id), after, skip, take))[0]

        async def find(tx: Transaction) -> Sequence[FlowRunRecord]:
            first = min(skip + take, READ_BATCH)
            prefix = await _smallest_index(tx, tags, flow_id, after=after, limit=first)
            found: list[StoredRun] = []
            start, window = _start_after(prefix, after), 0
            while take and len(found) < skip + take:
                window = min(max(2 * window, skip + take - len(found)), READ_BATCH)
                entries = await tx.scan(Range(start, keys.end_of(prefix), window, keys_only=True))
                found += await _read_filtered(tx, entries, tags, flow_id)
                if len(entries) < window:
                    break
                start = entries[-1][0] + b"\0"
            return await _records(tx, found[skip : skip + take])

        return await self._read("get_runs", find if tags else read)

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            found, _ = await _read_index(tx, keys.runs_of(None, RunStatus.RUNNING), take=take)
            # Without snapshots a run may have ended after the index was read.
            return tuple(run for run in found if not run.status.is_terminal)

        return await self._read("get_active_runs", read)

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        async def read(tx: Transaction) -> Sequence[FlowRunRecord]:
            return (await _read_index(tx, keys.derived_runs(source_run_id), take=take))[0]

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
        tags: Mapping[str, str] = NO_TAGS,
    ) -> RunPage:
        prefix = keys.runs_of(flow_id, status)
        is_one_tag = len(tags) == 1 and flow_id is None and status is None
        if is_one_tag:
            (prefix,) = (keys.runs_with_tag(key, value) for key, value in tags.items())

        async def read(tx: Transaction) -> RunPage:
            all_runs = keys.prefix_range(prefix, 0, count=True)
            runs, (counted,) = await _read_index(tx, prefix, after, skip, take, [all_runs])
            return RunPage(runs=runs, total_count=counted.count or 0)

        async def find(tx: Transaction) -> RunPage:
            index = await _smallest_index(tx, tags, flow_id, status)
            entries = await tx.scan(keys.prefix_range(index, keys_only=True))
            found = await _read_filtered(tx, entries, tags, flow_id, status)
            if search is not None:
                found = await _search(tx, found, fold_ascii(search))
            first = _start_after(b"", after)
            page = [one for one in found if keys.position(one.run.started_at, one.run_id) >= first]
            return RunPage(runs=await _records(tx, page[skip : skip + take]), total_count=len(found))

        is_indexed = search is None and (is_one_tag or not tags)
        return await self._read("get_runs_page", read if is_indexed else find)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run of a list."""

    run_id: UUID
    run: RunDocument
    tags: Text | None
    """The result of encode_tags; None also if the tags were not read."""


async def _smallest_index(
    tx: Transaction,
    tags: Mapping[str, str],
    flow_id: UUID | None = None,
    status: RunStatus | None = None,
    *,
    after: RunPosition | None = None,
    limit: int | None = None,
) -> bytes:
    """The index with the fewest runs, of those that have all runs with the tags, the flow and the status.

    Intents are finished first. If there is one such index, its first runs after the position are read ahead.
    """
    prefixes = [keys.runs_with_tag(key, value) for key, value in tags.items()]
    if not tags or flow_id is not None or status is not None:
        prefixes.append(keys.runs_of(flow_id, status))
    if len(prefixes) == 1:
        start = _start_after(prefixes[0], after)
        await finish_intents(tx, ahead=[Range(start, keys.end_of(prefixes[0]), limit, keys_only=True)])
        return prefixes[0]
    pages = await finish_intents(tx, [keys.prefix_range(prefix, 0, count=True) for prefix in prefixes])
    return min(zip([page.count or 0 for page in pages], prefixes, strict=True))[1]


async def _read_filtered(
    tx: Transaction,
    entries: Sequence[tuple[bytes, Versioned]],
    tags: Mapping[str, str],
    flow_id: UUID | None = None,
    status: RunStatus | None = None,
) -> list[StoredRun]:
    """The runs of index entries that have the tags, the flow and the status."""
    found = [
        one
        for one in await read_runs(tx, [keys.parse_position(key) for key, _ in entries], tags=True)
        if (flow_id is None or one.run.flow_id == flow_id) and (status is None or one.run.status is status)
    ]
    if not tags:
        return found
    text = await tx.read_pieces([(one.run_id, one.tags) for one in found])
    return [one for one in found if tags.items() <= set(decode_tags(text(one.tags)))]


def _start_after(prefix: bytes, after: RunPosition | None) -> bytes:
    """The first key of an index of runs that is behind a position."""
    return prefix if after is None else prefix + keys.position(after.started_at, after.run_id) + b"\0"


async def _read_index(
    tx: Transaction,
    prefix: bytes,
    after: RunPosition | None = None,
    skip: int = 0,
    take: int | None = None,
    ranges: Sequence[Range] = (),
) -> tuple[tuple[FlowRunRecord, ...], Sequence[Page]]:
    """The records of a page of an index, and the pages of other ranges."""
    limit = None if take is None else skip + take
    wanted = Range(_start_after(prefix, after), keys.end_of(prefix), limit, keys_only=True)
    pages = await finish_intents(tx, ranges, ahead=[wanted])
    entries = (await tx.scan(wanted))[skip:] if take != 0 else []
    return await read_records(tx, [keys.parse_position(key) for key, _ in entries]), pages


async def read_runs(tx: Transaction, run_ids: Sequence[UUID], *, tags: bool = False) -> list[StoredRun]:
    """Those of some runs that are stored, in the order of their ids."""
    found = []
    for start in range(0, len(run_ids), READ_BATCH):
        some = run_ids[start : start + READ_BATCH]
        wanted = [keys.gate(run_id) for run_id in some]
        if tags:
            wanted += [keys.tags(run_id) for run_id in some]
        documents = (await tx.read(wanted, expect=False)).found
        for run_id in some:
            value, tagged = documents.get(keys.gate(run_id)), documents.get(keys.tags(run_id))
            run = None if value is None else decode(RunDocument, value.value)
            if run is not None and not run.is_deleted:
                text = None if tagged is None else decode(TagsDocument, tagged.value).tags
                found.append(StoredRun(run_id, run, text))
    return found


async def read_records(tx: Transaction, run_ids: Sequence[UUID]) -> tuple[FlowRunRecord, ...]:
    return await _records(tx, await read_runs(tx, run_ids, tags=True))


async def _records(tx: Transaction, runs: Sequence[StoredRun]) -> tuple[FlowRunRecord, ...]:
    text = await tx.read_pieces(
        [(one.run_id, part) for one in runs for part in (one.run.trigger_data, one.tags)]
    )
    return tuple(
        one.run.record(one.run_id, text(one.run.trigger_data), decode_tags(text(one.tags))) for one in runs
    )


async def _search(tx: Transaction, runs: Sequence[StoredRun], needle: str) -> list[StoredRun]:
    """The runs that match a search."""
    found = []
    for start in range(0, len(runs), SEARCH_BATCH):
        some = runs[start : start + SEARCH_BATCH]
        await tx.read_ahead((), [wanted for one in some for wanted in steps_and_attempts(one.run_id)])
        found += [one for one in some if await _matches(tx, one.run_id, one.run, needle)]
    return found


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
