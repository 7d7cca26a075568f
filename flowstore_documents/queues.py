"""Queues: claim the next steps, advance runs, statistics (QUE)."""

from __future__ import annotations

import asyncio
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from msgspec import structs

from flowstore_core import (
    ClaimedStep,
    EndedStep,
    FlowStoreError,
    OutcomeUnknownError,
    QueueStatistics,
    RunAdvance,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_core.backend import lease_end
from flowstore_core.queues import ADVANCE_ERRORS
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.documents import Claim, StepDocument
from flowstore_documents.intents import complete_run
from flowstore_documents.ready_steps import Entry, ReadySteps
from flowstore_documents.recovery import read_steps
from flowstore_documents.requests import keys_of_requests, settle_requests
from flowstore_documents.run_state import RunState, change_run
from flowstore_documents.space import KeyValueSpace, Range
from flowstore_documents.steps import check_attempt, close_attempt
from flowstore_documents.transactions import CONFLICT_SECONDS, Transaction, Transactions

WITNESSES = 8
"""Number of marks of open steps that are read at once to find a step that keeps its run from its end."""


class Queues(Access):
    def __init__(self, space: KeyValueSpace, transactions: Transactions) -> None:
        super().__init__(space, transactions)
        self._ready = ReadySteps(transactions)

    async def claim_next_steps(
        self,
        queues: Sequence[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
    ) -> Sequence[ClaimedStep]:
        tries: list[tuple[Entry, str]] = []

        async def claim(entry: Entry) -> ClaimedStep | Exception | None:
            owner = new_claim_token()
            tries.append((entry, owner))
            try:
                return await self._claim_step(entry, queues, owner, lease, worker)
            except Exception as error:  # noqa: BLE001 - raised by claim_all
                return error

        async def claim_all() -> Sequence[ClaimedStep]:
            claimed: list[ClaimedStep] = []
            deadline = time.monotonic() + CONFLICT_SECONDS
            while len(claimed) < limit and (entries := await self._ready.take(queues, limit - len(claimed))):
                try:
                    if len(entries) == 1:  # As most calls, it needs no task.
                        results = [await claim(entries[0])]
                    else:
                        results = await asyncio.gather(*map(claim, entries))
                finally:
                    self._ready.release(entries)
                claimed += [found for found in results if isinstance(found, ClaimedStep)]
                for error in results:
                    if isinstance(error, Exception):
                        if claimed and not isinstance(error, OutcomeUnknownError):
                            return claimed
                        raise error
                if not claimed and time.monotonic() > deadline:
                    raise StoreUnavailableError("too many concurrent claims in these queues")
            return claimed

        async def give_up(_: object) -> None:
            for entry, owner in tries:
                await self._give_up(entry, owner)

        return tuple(await self._shielded.run(claim_all(), give_up))

    async def _claim_step(
        self, entry: Entry, queues: Sequence[str], owner: str, lease: timedelta, worker: str | None
    ) -> ClaimedStep | None:
        """Claim a ready step and start its next attempt; None if it is not ready any more (QUE-1)."""
        run_id, step_key = entry

        async def claim(tx: Transaction) -> ClaimedStep | None:
            if tx.tries:
                return None  # Probably another call has claimed the step: the caller reads the queue again.
            run = await change_run(tx, run_id, [step_key], control=True)
            step = run.step(step_key)
            dispatch = step.dispatch
            if not run.is_running or dispatch is None or dispatch.queue is None:
                return None
            now = await tx.now()
            if dispatch.queue not in queues or step.ready_at is None or step.ready_at > now:
                return None
            expires_at = lease_end(now, lease)
            step.set_claim(Claim(owner, now, owner, expires_at))
            run.start_step(step_key, dispatch.step_type or "", dispatch.input_json, worker, now)
            step.started_owner = owner
            text = await tx.read_texts(run_id, [dispatch.input_json])
            return ClaimedStep(
                run_id=run_id,
                flow_id=run.stored.flow_id,
                flow_name=run.stored.flow_name,
                step_key=step_key,
                step_type=step.step_type,
                input_json=text(dispatch.input_json),
                attempt=step.attempt,
                owner=owner,
                queue=dispatch.queue,
                priority=dispatch.priority,
                dispatched_at=dispatch.dispatched_at,
                due_at=dispatch.due_at,
                claimed_at=now,
                expires_at=expires_at,
                cancel_requested=run.control is not None and run.control.is_stopped,
            )

        return await self._transactions.run("claim_next_steps", claim)

    async def _give_up(self, entry: Entry, owner: str) -> None:
        """Release a claim that a cancelled call has made, and close its attempt as Pending (QUE-3)."""
        run_id, step_key = entry

        async def release(tx: Transaction) -> None:
            run = await change_run(tx, run_id, [step_key])
            step = run.step(step_key)
            if step.claim is None or step.claim.owner != owner:
                return
            step.claim = None
            if step.status is StepStatus.RUNNING and step.started_owner == owner:
                step.close(StepStatus.PENDING, None, None, await tx.now())

        await self._write("claim_next_steps", release)

    async def advance_run(self, **arguments: Any) -> RunAdvance:
        return await self._advance(EndedStep(**arguments))

    async def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        runs: dict[UUID, list[int]] = {}
        for n, step in enumerate(steps):
            runs.setdefault(step.run_id, []).append(n)
        results: dict[int, RunAdvance | FlowStoreError] = {}

        async def advance_one_by_one(numbers: Sequence[int]) -> None:
            for n in numbers:
                try:
                    results[n] = await self._advance(steps[n])
                except ADVANCE_ERRORS as error:
                    results[n] = error

        # The committer sends the advances of different runs in one commit.
        for ended in await asyncio.gather(*map(advance_one_by_one, runs.values()), return_exceptions=True):
            if ended is not None:
                raise ended
        return tuple(results[n] for n in range(len(steps)))

    async def _advance(self, ended: EndedStep) -> RunAdvance:
        run_id, step_key, complete_as = ended.run_id, ended.step_key, ended.complete_as

        async def advance(tx: Transaction) -> RunAdvance:
            wanted = [step_key, *keys_of_requests(ended.dispatch)]
            if complete_as is None:
                run = await change_run(tx, run_id, wanted)
            else:
                marks = keys.prefix_range(keys.open_marks(run_id), WITNESSES, keys_only=True)
                failed = keys.prefix_range(keys.failed_marks(run_id), keys_only=True)
                run = await change_run(tx, run_id, wanted, control=True, ahead=[marks, failed])
            check_attempt(run, step_key, ended.attempt, ended.owner)
            await close_attempt(tx, run, step_key, ended.status, ended.output_json, ended.error_message)
            if run.is_terminal:
                return RunAdvance(dispatched=(), run_completed=False)
            now = await tx.now()
            settlement = settle_requests(tx, run, ended.dispatch, now)
            if complete_as is None or not await _is_finished(tx, run, now):
                return RunAdvance(dispatched=settlement.dispatched, run_completed=False)
            has_failed = settlement.stayed_behind or await run.has_failed_step()
            outcome = ended.failed_as if has_failed and ended.failed_as is not None else complete_as
            complete_run(run.stored, outcome, now)
            return RunAdvance(dispatched=settlement.dispatched, run_completed=True)

        return await self._write("advance_run", advance)

    async def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        token = new_claim_token()

        async def redispatch(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, [step_key])
            step = run.step(step_key)
            old = step.dispatch
            if not run.is_running or step.is_terminal or old is None or old.queue is None:
                return False
            now = await tx.now()
            if step.has_live_claim(now):
                return False
            step.dispatch = structs.replace(
                old,
                token=token,
                dispatched_at=now,
                due_at=due_at or old.due_at,
                job_id=None,
                queue=old.queue if queue is None else queue,
                priority=old.priority if priority is None else priority,
            )
            return True

        return await self._write("redispatch_step", redispatch)

    async def get_queues(self) -> Sequence[QueueStatistics]:
        async def read(tx: Transaction) -> Sequence[QueueStatistics]:
            named = Range(keys.queue("") + b"\xff", keys.end_of(keys.QUEUES), keys_only=True)
            await finish_intents(tx, ahead=[named])
            entries = [keys.parse_queued_step(key)[2:] for key, _ in await tx.scan(named)]
            now = await tx.now()
            queues: defaultdict[str, list[StepDocument]] = defaultdict(list)
            for step in (await read_steps(tx, entries)).values():
                # Without snapshots a step may have left its queue after the first read.
                if step.dispatch is not None and step.dispatch.queue is not None:
                    queues[step.dispatch.queue].append(step)
            return tuple(_statistics(queue, queues[queue], now) for queue in sorted(queues))

        return await self._read("get_queues", read)


async def _is_finished(tx: Transaction, run: RunState, now: datetime) -> bool:
    """Whether every step is terminal and no other key has a live claim or a dispatch (QUE-6).

    One open step proves that the run is unfinished. Only if there is none, the commit needs that no step
    changes; so the advances of a run do not disturb each other until the last ones.
    """
    if any(step.blocks_completion(now) for step in run.steps.values()):
        return False
    after = None
    while marks := await run.open_step_keys(after=after, limit=WITNESSES):
        # In random order, so that concurrent advances do not all depend on the same step.
        for key in random.sample(marks, len(marks)):
            if key not in run.steps:
                await run.load_steps([key])
                if run.step(key).blocks_completion(now):
                    return False
        after = marks[-1]
    tx.expect(keys.steps_tick(run.run_id))
    return True


def _statistics(queue: str, steps: Sequence[StepDocument], now: datetime) -> QueueStatistics:
    running = waiting = scheduled = 0
    ready: list[datetime] = []
    for step in steps:
        if step.has_live_claim(now):
            running += 1
        elif step.waiter is not None and step.waiter.is_open(now):
            waiting += 1
        elif step.ready_at is None or step.ready_at > now:
            scheduled += 1
        else:
            ready.append(step.ready_at)
    return QueueStatistics(
        queue=queue,
        ready=len(ready),
        scheduled=scheduled,
        waiting=waiting,
        running=running,
        oldest_ready_at=min(ready, default=None),
    )
