"""The reference engine: how to run workflows on a store so that a crash anywhere loses nothing.

It keeps nothing in memory that it could not do without. Every turn it reads what the store says and
does the one thing that is missing, so it needs no start-up recovery: finding a half-done run and going
on with it is all it ever does. Any number of engines may work on the same runs; where two want the same
thing, the store lets one of them win and the other looks again.

What a SIGKILL leaves behind, and what picks it up:

    killed after                      what is left                          found by
    trigger_run                       a run without steps                   advance
    try_record_dispatch               a due dispatch, no claim              recover (DISPATCH_DUE)
    try_claim_step                    a claim that expires                  recover (LEASE_EXPIRED)
    record_step_start, save_output    the same, and an open attempt         recover; its start closes it
    register_waiter                   the same; not listed while it waits   recover, once the signal came
    reschedule_step                   a due dispatch                        recover, once the signal came
    record_step_complete              children that nobody dispatched       advance
      ... of a failed attempt         a Failed step with attempts left      advance
    retry_step                        a Pending step without dispatch       advance
      ... of the last step            a Running run, all steps succeeded    advance
    part of _end                      the reason to end it still stands     turn, advance

Time is the store's: leases and deadlines are compared there, and the engine only ever measures how long
it has waited itself.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import timedelta
from uuid import UUID

from flowstore_core import (
    ConflictError,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    StallReason,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_replay.wfformat import Task, Workflow

SHORTEST_PAUSE = 0.02
LONGEST_PAUSE = 0.3
"""Seconds between two looks at the store while there is nothing to do."""

FAILED = "failed: "
"""How the error_message of an attempt begins whose work failed; a worker's death is no failure."""

TAKEN_OVER = "step.taken_over"
"""The event that says a step went on after its worker's lease had run out."""

_log = logging.getLogger("flowstore_replay")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a piece of work is told."""

    run_id: UUID
    task: Task
    attempt: int
    inputs: Mapping[str, str]
    """The outputs of the task's parents, by key."""


class WorkFailed(Exception):  # noqa: N818 - an outcome of the work, not a defect of the program
    """Raised by the work: this attempt failed; the engine tries again while attempts are left."""


Work = Callable[[Job], Awaitable[str]]
"""Does one attempt and returns the step's output as JSON text, or raises WorkFailed.

It may run more than once for one step, twice at the same time even (a worker that was taken for dead),
so it should be safe to repeat. Only one attempt's outcome is ever recorded as the step's.
"""


class Engine:
    """One worker. It runs one step at a time; for more, start more of them, in any process."""

    def __init__(
        self,
        store: FlowStore,
        workflow: Workflow,
        work: Work,
        *,
        name: str,
        lease: timedelta = timedelta(seconds=30),
        max_attempts: int = 5,
        approve: Collection[str] = (),
    ) -> None:
        """``name`` is recorded as the job_id of attempts; ``approve`` names steps that wait for a signal.

        A step fails its run after ``max_attempts`` failed attempts. Attempts that ended because their
        worker died do not count.
        """
        self._store = store
        self._workflow = workflow
        self._work = work
        self._name = name
        self._lease = lease
        self._max_attempts = max_attempts
        self._approve = frozenset(approve)

    async def run(self, run_ids: Collection[UUID]) -> None:
        """Work on these runs until each of them is completed, by whomever."""
        wanted = frozenset(run_ids)
        pause = SHORTEST_PAUSE
        while True:
            try:
                active = [run.run_id for run in await self._store.get_active_runs() if run.run_id in wanted]
                if not active:
                    return
                moved = await self.turn(active)
            except ConflictError as error:
                # Somebody was faster, or decided otherwise. What we had is dropped; the state says the rest.
                _log.debug("%s", error)
                moved = False
            except StoreUnavailableError as error:
                # It may have happened or not: the next look tells.
                _log.warning("%s", error)
                moved, pause = False, LONGEST_PAUSE
            pause = SHORTEST_PAUSE if moved else min(2 * pause, LONGEST_PAUSE)
            await asyncio.sleep(0 if moved else pause * random.uniform(0.5, 1.0))

    async def turn(self, active: Collection[UUID]) -> bool:
        """Do at most one step of work; whether anything moved."""
        reasons = await self._stop_reasons(active)
        ended = [await self._end(run_id, RunStatus.CANCELLED, why) for run_id, why in reasons.items()]
        going = [run_id for run_id in active if run_id not in reasons]
        if await self.recover(going):
            return True
        # In any order, so that workers spread over the runs instead of racing for the first.
        for run_id in random.sample(going, len(going)):
            if await self.advance(run_id):
                return True
        return any(ended)

    async def recover(self, run_ids: Collection[UUID]) -> bool:
        """Go on with one step that nothing else moves: abandoned, or dispatched and never claimed.

        Between another worker's dispatch and its claim this may be the faster one. That is no harm: the
        claim decides, and either of them does the work.
        """
        for stalled in await self._store.get_stalled_steps(take=1000):
            run_id, key = stalled.run_id, stalled.step_key
            if run_id not in run_ids or key not in self._workflow.by_key:
                continue
            if stalled.reason is StallReason.NOT_DISPATCHED:
                await self._store.try_record_dispatch(run_id, key)
            if await self.execute(run_id, key, taken_over=stalled.reason is StallReason.LEASE_EXPIRED):
                return True
        return False

    async def advance(self, run_id: UUID) -> bool:
        """Do the next thing that a run needs: complete it, retry a step, or dispatch and execute one."""
        statuses = await self._store.get_step_statuses(run_id)
        missing = [
            task for task in self._workflow.tasks if statuses.get(task.key) is not StepStatus.SUCCEEDED
        ]
        if not missing:
            return await self._store.complete_run(run_id, RunStatus.SUCCEEDED, expected=statuses)

        if StepStatus.FAILED in statuses.values():
            detail = await self._store.get_run_detail(run_id)
            failed = [step for step in detail.steps if step.status is StepStatus.FAILED] if detail else []
            if lost := [step for step in failed if not self._has_attempts_left(step)]:
                return await self._end(run_id, RunStatus.FAILED, f"step {lost[0].step_key!r} failed for good")
            for step in failed:
                # Naming the attempt makes this safe against another worker that has retried already.
                await self._store.retry_step(run_id, step.step_key, attempt=step.attempts[-1].attempt)
            return bool(failed)

        ready = [
            task
            for task in missing
            if statuses.get(task.key) in (None, StepStatus.PENDING)
            and all(statuses.get(parent) is StepStatus.SUCCEEDED for parent in task.parents)
        ]
        if not ready and not {StepStatus.PENDING, StepStatus.RUNNING} & set(statuses.values()):
            return await self._end(run_id, RunStatus.FAILED, "a step that others wait for was skipped")
        dispatched = await self._store.get_dispatched_step_keys(run_id) if ready else frozenset()
        for task in random.sample(ready, len(ready)):
            if task.key not in dispatched and await self._store.try_record_dispatch(run_id, task.key):
                # An engine with a queue would send its message here; this one is its own consumer.
                return await self.execute(run_id, task.key)
        return False

    async def execute(self, run_id: UUID, key: str, *, taken_over: bool = False) -> bool:
        """Claim a dispatched step and do its work under a lease that is renewed; False if it is another's."""
        task = self._workflow.by_key[key]
        owner = new_claim_token()
        if not await self._store.try_claim_step(run_id, key, owner=owner, lease=self._lease):
            return False
        recorded = json.dumps({"seconds": task.seconds, "parents": task.parents})
        attempt = await self._store.record_step_start(
            run_id, key, task.name, input_json=recorded, job_id=self._name, owner=owner
        )
        if taken_over:
            await self._store.append_event(run_id, TAKEN_OVER, step_key=key, message=self._name)

        work = asyncio.create_task(self._perform(run_id, task, attempt))
        try:
            while not (await asyncio.wait({work}, timeout=self._lease.total_seconds() / 3))[0]:
                try:
                    if not await self._store.renew_step_claim(run_id, key, owner, self._lease):
                        return True  # Too late: another worker decides now.
                    reasons = await self._stop_reasons([run_id])
                except StoreUnavailableError:
                    continue  # The next beat asks again, and learns whether the claim survived.
                if run_id in reasons:
                    await _cancel(work)
                    await self._store.record_step_complete(
                        run_id, key, StepStatus.SKIPPED, error_message=reasons[run_id], attempt=attempt
                    )
                    return True
            work.result()
        finally:
            await _cancel(work)
        return True

    async def _perform(self, run_id: UUID, task: Task, attempt: int) -> None:
        """Do the work of one attempt and record what came of it."""
        store, key = self._store, task.key
        try:
            if key in self._approve:
                output = await self._await_signal(run_id, key)
            else:
                outputs = await store.get_outputs(run_id) if task.parents else {}
                inputs = {parent: outputs[parent] for parent in task.parents}
                output = await self._work(Job(run_id=run_id, task=task, attempt=attempt, inputs=inputs))
        except WorkFailed as error:
            message = f"{FAILED}{error}"
            await _insist(
                lambda: store.record_step_complete(
                    run_id, key, StepStatus.FAILED, error_message=message, attempt=attempt
                )
            )
            return
        if output is None:
            # One call that ends the attempt, gives up the claim and dispatches anew: there is no moment at
            # which the step would be lost, and while its waiter is open nobody is told to move it.
            await _insist(lambda: store.reschedule_step(run_id, key, attempt=attempt))
            return
        # The output goes first: whoever sees the step succeeded finds it.
        value = output
        await _insist(lambda: store.save_output(run_id, key, value))
        await _insist(
            lambda: store.record_step_complete(
                run_id, key, StepStatus.SUCCEEDED, output_json=value, attempt=attempt
            )
        )

    async def _await_signal(self, run_id: UUID, key: str) -> str | None:
        """The payload of the signal that is named after the step; None while it has not come."""
        await self._store.register_waiter(run_id, key, key)
        waiter = await self._store.get_waiter(run_id, key)
        return waiter.payload_json if waiter is not None and waiter.delivered_at is not None else None

    async def _stop_reasons(self, run_ids: Collection[UUID]) -> dict[UUID, str]:
        """Which of these runs were cancelled or are past their deadline, and why."""
        listed = [
            run.run_id for run in await self._store.get_runs_to_stop(take=1000) if run.run_id in run_ids
        ]
        reasons: dict[UUID, str] = {}
        for run_id in listed:
            control = await self._store.get_run_control(run_id)
            if control is None:
                continue
            if control.cancel_requested:
                reasons[run_id] = f"the run is stopped: {control.cancel_reason or 'cancelled'}"
                continue
            # The deadline may have been extended since the list was made. Listed once more, the one just
            # read has passed; as_of then lets the latch fall only if it still is the deadline. The next
            # look finds the latch.
            again = {run.run_id for run in await self._store.get_runs_to_stop(take=1000)}
            if run_id in again and control.timeout_at is not None:
                why = "the deadline has passed"
                await self._store.mark_timed_out(run_id, why, as_of=control.timeout_at)
        return reasons

    async def _end(self, run_id: UUID, status: RunStatus, reason: str) -> bool:
        """Complete a run that will not succeed, once nobody works on it any more.

        Whoever holds a claim finishes, or notices at its next heartbeat, or loses the claim: until then
        this answers False. Nothing of the run is left open.
        """
        detail = await self._store.get_run_detail(run_id)
        if detail is None or await self._store.get_claimed_step_keys(run_id):
            return False
        for step in detail.steps:
            if step.status is StepStatus.FAILED and self._has_attempts_left(step):
                # Another worker may be about to retry this attempt, which would reopen the run after its
                # end and undo a cancel. Retried and skipped here, that attempt is not the last any more.
                await self._store.retry_step(run_id, step.step_key, attempt=step.attempts[-1].attempt)
            elif step.status.is_terminal:
                continue
            await self._store.remove_waiter(run_id, step.step_key)
            await self._store.record_skipped_step(run_id, step.step_key, step.step_type, reason)
        statuses = await self._store.get_step_statuses(run_id)
        for key in await self._store.get_dispatched_step_keys(run_id) - statuses.keys():
            await self._store.release_dispatch(run_id, key)
        if not all(each.is_terminal for each in statuses.values()):
            return False
        return await self._store.complete_run(run_id, status, expected=statuses)

    def _has_attempts_left(self, step: FlowStepRecord) -> bool:
        failures = sum((attempt.error_message or "").startswith(FAILED) for attempt in step.attempts)
        return failures < self._max_attempts


async def _insist(call: Callable[[], Awaitable[None]]) -> None:
    """Repeat a call that is harmless to repeat until the store answers; losing the claim cancels it."""
    while True:
        try:
            return await call()
        except StoreUnavailableError as error:
            _log.warning("%s", error)
            await asyncio.sleep(LONGEST_PAUSE)


async def _cancel(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end; what it may still have raised concerns nobody any more."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()):
            _log.debug("dropped: %s", error)
