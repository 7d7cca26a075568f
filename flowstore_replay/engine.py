"""The reference engine: how to run workflows on a store so that a crash anywhere loses nothing.

It keeps nothing in memory that it could not do without. It reads what the store says and does the one
thing that is missing, so it needs no start-up recovery: finding a half-done run and going on with it is
all it ever does. Any number of engines may work on the same runs; where two want the same thing, the
store lets one of them win and the other looks again. What an engine remembers of a run from one step to
the next (looks.py) spares it reading that again, and may be wrong: the store's answers decide.

What a SIGKILL leaves behind, and what picks it up:

    killed after                      what is left                          found by
    trigger_run                       a run without steps                   advance
    try_record_dispatch               a due dispatch, no claim              recover (DISPATCH_DUE)
    try_claim_step                    a claim that expires                  recover (LEASE_EXPIRED)
    record_step_start                 the same, and an open attempt         recover; its start closes it
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
from time import monotonic
from uuid import UUID

from flowstore_core import (
    ConflictError,
    FlowStepRecord,
    FlowStore,
    RunStatus,
    StalledStep,
    StallReason,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
)
from flowstore_replay.heartbeats import Heartbeats
from flowstore_replay.looks import LONGEST_PAUSE, SHORTEST_PAUSE, Hand, Look, View, Watch
from flowstore_replay.patience import cancel, insist
from flowstore_replay.wfformat import Task, Workflow

FAILED = "failed: "
"""How the error_message of an attempt begins whose work failed; a worker's death is no failure."""

TAKEN_OVER = "step.taken_over"
"""The event that says a step went on after its worker's lease had run out."""

LONGEST_STRETCH = 0.005
"""Seconds after which a hand lets others have their turn, even where no call of it had to wait."""

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
    """One worker. It runs ``at_once`` steps at a time; for more, start more of them, in any process."""

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
        at_once: int = 1,
    ) -> None:
        """``name`` is recorded as the job_id of attempts; ``approve`` names steps that wait for a signal.

        A step fails its run after ``max_attempts`` failed attempts. Attempts that ended because their
        worker died do not count. Steps that run at once share the store's round trips, so that many cost
        little more than one.
        """
        self._store = store
        self._workflow = workflow
        self._work = work
        self._name = name
        self._lease = lease
        self._max_attempts = max_attempts
        self._approve = frozenset(approve)
        self._at_once = at_once
        self._inputs = {
            task.key: json.dumps({"seconds": task.seconds, "parents": task.parents})
            for task in workflow.tasks
        }
        """What is recorded as the input of each step."""
        self._heartbeats: Heartbeats[str] = Heartbeats(lease.total_seconds() / 3)
        self._executing: set[tuple[UUID, str]] = set()

    async def run(self, run_ids: Collection[UUID]) -> None:
        """Work on these runs until each of them is completed, by whomever."""
        wanted = frozenset(run_ids)

        async def list_active() -> Collection[UUID]:
            return [run.run_id for run in await self._store.get_active_runs() if run.run_id in wanted]

        hands = [Hand() for _ in range(self._at_once)]
        watch = Watch(hands, list_active, lambda look: self._look_around(look, wanted))
        tasks = [asyncio.create_task(self._work_on(watch, hand)) for hand in hands]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                await cancel(task)

    async def _work_on(self, watch: Watch, hand: Hand) -> None:
        """Step after step until nothing is left to do."""
        pause, rested = SHORTEST_PAUSE, monotonic()
        while True:
            try:
                look = await watch.look()
                if look is None:
                    return
                moved = await self._move(look, hand)
            except ConflictError as error:
                # Somebody was faster, or decided otherwise. What we had is dropped; the state says the rest.
                _log.debug("%s", error)
                moved = False
                hand.let_go()
            except StoreUnavailableError as error:
                # It may have happened or not: the next look tells.
                _log.warning("%s", error)
                moved, pause = False, LONGEST_PAUSE
                hand.let_go()
            if not moved:
                pause = min(2 * pause, LONGEST_PAUSE)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                rested = monotonic()
                continue
            pause = SHORTEST_PAUSE
            if monotonic() > rested + LONGEST_STRETCH:
                await asyncio.sleep(0)
                rested = monotonic()

    async def turn(self, active: Collection[UUID]) -> bool:
        """Look at the store and do at most one step of work; whether anything moved."""
        look = Look()
        look.list_runs(active)
        await self._look_around(look, active)
        return await self._move(look, Hand())

    async def _look_around(self, look: Look, run_ids: Collection[UUID]) -> None:
        """Note which of these runs have to be stopped, and which of their steps nothing else moves."""
        look.stop(await self._stop_reasons(run_ids))
        look.stalled.clear()
        for stalled in await self._store.get_stalled_steps(take=1000):
            run_id, key = stalled.run_id, stalled.step_key
            # What this engine has dispatched a moment ago it is about to claim.
            if run_id in run_ids and key in self._workflow.by_key and (run_id, key) not in self._executing:
                look.stalled.append(stalled)

    async def _move(self, look: Look, hand: Hand) -> bool:
        """Do at most one step of what is to be done; whether anything moved."""
        ended = False
        while look.reasons:
            run_id, why = look.reasons.popitem()
            ended |= await self._end(run_id, RunStatus.CANCELLED, why)
        while look.stalled:
            stalled = look.stalled.popleft()
            if stalled.run_id not in look.stopping and await self.recover(stalled):
                return True
        followed = None if hand.view.is_over else hand.run_id
        if followed is not None and followed not in look.stopping and await self.advance(followed, hand.view):
            return True
        while look.runs:
            run_id = look.runs.popleft()
            if run_id not in look.stopping and await self.advance(run_id, hand.follow(run_id, look)):
                return True
        hand.let_go()
        return ended

    async def recover(self, stalled: StalledStep) -> bool:
        """Go on with a step that nothing else moves: abandoned, or dispatched and never claimed.

        Between another worker's dispatch and its claim this may be the faster one. That is no harm: the
        claim decides, and either of them does the work.
        """
        run_id, key = stalled.run_id, stalled.step_key
        if stalled.reason is StallReason.NOT_DISPATCHED:
            await self._store.try_record_dispatch(run_id, key)
        return await self.execute(run_id, key, View(), taken_over=stalled.reason is StallReason.LEASE_EXPIRED)

    async def advance(self, run_id: UUID, view: View) -> bool:
        """Do the next thing that a run needs: complete it, retry a step, or dispatch and execute one."""
        plan = view.known()
        if plan is None:
            plan = view.see(self._workflow, await self._store.get_step_statuses(run_id))
        if not plan.unfinished:
            view.is_over = await self._store.complete_run(run_id, RunStatus.SUCCEEDED, expected=plan.statuses)
            return view.is_over or view.forget()

        if plan.failed:
            return await self._mend(run_id, view)

        if not plan.ready and not plan.moving:
            if not view.is_fresh:
                return view.forget()
            view.is_over = await self._end(
                run_id, RunStatus.FAILED, "a step that others wait for was skipped"
            )
            return view.is_over
        if view.is_fresh and len(plan.ready) > 1:
            view.dispatched |= await self._store.get_dispatched_step_keys(run_id)
        ready = [task for task in plan.ready if task.key not in view.dispatched]
        if len(ready) > 1:
            random.shuffle(ready)
            if view.leave is not None:
                view.leave()
        for task in ready:
            view.dispatched.add(task.key)
            self._executing.add((run_id, task.key))
            try:
                if await self._store.try_record_dispatch(run_id, task.key):
                    # An engine with a queue would send its message here; this one is its own consumer.
                    return await self.execute(run_id, task.key, view)
            finally:
                self._executing.discard((run_id, task.key))
        return view.forget()

    async def _mend(self, run_id: UUID, view: View) -> bool:
        """Retry the steps that failed, or end the run if one did for good."""
        detail = await self._store.get_run_detail(run_id)
        failed = [step for step in detail.steps if step.status is StepStatus.FAILED] if detail else []
        if lost := [step for step in failed if not self._has_attempts_left(step)]:
            why = f"step {lost[0].step_key!r} failed for good"
            view.is_over = await self._end(run_id, RunStatus.FAILED, why)
            return view.is_over
        for step in failed:
            # Naming the attempt makes this safe against another worker that has retried already.
            await self._store.retry_step(run_id, step.step_key, attempt=step.attempts[-1].attempt)
        return view.forget() or bool(failed)

    async def execute(self, run_id: UUID, key: str, view: View, *, taken_over: bool = False) -> bool:
        """Claim a dispatched step and do its work under a lease that is renewed; False if it is another's."""
        task = self._workflow.by_key[key]
        owner = new_claim_token()
        if not await self._store.try_claim_step(run_id, key, owner=owner, lease=self._lease):
            return view.forget()
        attempt = await self._store.record_step_start(
            run_id, key, task.name, input_json=self._inputs[key], job_id=self._name, owner=owner
        )
        if taken_over:
            await self._store.append_event(run_id, TAKEN_OVER, step_key=key, message=self._name)

        async def beat() -> str | None:
            """Why the work has to stop: nothing but an empty text where another worker decides now."""
            try:
                if not await self._store.renew_step_claim(run_id, key, owner, self._lease):
                    return ""
                return (await self._stop_reasons([run_id])).get(run_id)
            except StoreUnavailableError:
                return None  # The next beat asks again, and learns whether the claim survived.

        work = self._perform(run_id, task, attempt, view)
        reason = await self._heartbeats.during(work, beat)
        if reason is not None:
            view.forget()
        if reason:
            await self._store.record_step_complete(
                run_id, key, StepStatus.SKIPPED, error_message=reason, attempt=attempt
            )
        return True

    async def _perform(self, run_id: UUID, task: Task, attempt: int, view: View) -> None:
        """Do the work of one attempt and record what came of it."""
        store, key = self._store, task.key
        try:
            if key in self._approve:
                output = await self._await_signal(run_id, key)
            else:
                if not view.outputs.keys() >= set(task.parents):
                    view.outputs.update(await self._read_outputs(run_id))
                inputs = {parent: view.outputs[parent] for parent in task.parents}
                output = await self._work(Job(run_id=run_id, task=task, attempt=attempt, inputs=inputs))
        except WorkFailed as error:
            message = f"{FAILED}{error}"
            await insist(
                lambda: store.record_step_complete(
                    run_id, key, StepStatus.FAILED, error_message=message, attempt=attempt
                )
            )
            view.forget()
            return
        if output is None:
            # One call that ends the attempt, gives up the claim and dispatches anew: there is no moment at
            # which the step would be lost, and while its waiter is open nobody is told to move it.
            await insist(lambda: store.reschedule_step(run_id, key, attempt=attempt))
            view.forget()
            return
        # With its output, in one call: whoever sees the step succeeded finds it.
        await insist(
            lambda: store.record_step_complete(
                run_id, key, StepStatus.SUCCEEDED, output_json=output, attempt=attempt
            )
        )
        view.note_success(key, output)

    async def _read_outputs(self, run_id: UUID) -> Mapping[str, str]:
        """The outputs of the steps that have succeeded, by key."""
        detail = await self._store.get_run_detail(run_id)
        steps = detail.steps if detail is not None else ()
        return {
            step.step_key: step.output_json
            for step in steps
            if step.status is StepStatus.SUCCEEDED and step.output_json is not None
        }

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
