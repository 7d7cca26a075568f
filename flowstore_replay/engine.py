"""The reference engine: run workflows on a store so that no crash loses anything.

The engine keeps no state that it cannot read from the store again. It reads the state of a run and does the
next missing thing, so start-up recovery does not exist: continuing a half-done run is the only mode. Any
number of engines may work on the same runs; when two of them want the same step, the store lets one win and
the other polls again. What an engine caches about a run (scheduling.py) saves reads and may be stale: the
results of its writes decide.

What a SIGKILL leaves behind, and which method picks it up:

    killed after                      state left behind                     picked up by
    trigger_run                       a run without steps                   advance
    try_record_dispatch               a due dispatch, no claim              recover (DISPATCH_DUE)
    try_claim_step                    a claim that expires                  recover (LEASE_EXPIRED)
    record_step_start                 the same, and an open attempt         recover; its start closes it
    register_waiter                   the same; not listed while it waits   recover, once the signal came
    reschedule_step                   a due dispatch                        recover, once the signal came
    record_step_complete              children without a dispatch           advance
      ... of a failed attempt         a Failed step with attempts left      advance
    retry_step                        a Pending step without dispatch       advance
      ... of the last step            a Running run, all steps succeeded    advance
    part of finish_run                the reason to finish it persists      tick, advance

All time is the store's: the store compares leases and deadlines. The engine measures only its own pauses.
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
from flowstore_replay.lease_keeper import LeaseKeeper
from flowstore_replay.retry import cancel_and_wait, retry_until_available
from flowstore_replay.scheduling import (
    MAX_POLL_INTERVAL,
    MIN_POLL_INTERVAL,
    Plan,
    RunView,
    Slot,
    WorkPoller,
    WorkSnapshot,
)
from flowstore_replay.wfcommons import Task, Workflow

FAILED = "failed: "
"""Prefix of an attempt's error_message if the work failed. A worker's death is not a failure."""

TAKEN_OVER = "step.taken_over"
"""Event type: a worker took over a step whose lease had expired."""

MAX_RUN_WITHOUT_YIELD = 0.005
"""Seconds after which a slot yields to the event loop, even if none of its calls had to wait."""

CLAIM_LOST = ""
"""Stop reason of work whose claim another worker holds now; that worker records the result."""

_log = logging.getLogger("flowstore_replay")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContext:
    """The arguments of one attempt's work."""

    run_id: UUID
    task: Task
    attempt: int
    inputs: Mapping[str, str]
    """The outputs of the task's parents, by key."""


class WorkFailed(Exception):  # noqa: N818 - a result of the work, not a defect of the program
    """Raised by the work: this attempt failed. The engine retries the step while attempts are left."""


Work = Callable[[StepContext], Awaitable[str]]
"""Does one attempt and returns the step's output as JSON text, or raises WorkFailed.

It may run more than once for one step, even concurrently (if a worker was wrongly taken for dead), so it
should be idempotent. The store records the result of one attempt as the step's.
"""


class Engine:
    """One worker, which executes up to ``concurrency`` steps at a time. Start any number, in any process."""

    def __init__(
        self,
        store: FlowStore,
        workflow: Workflow,
        work: Work,
        *,
        name: str,
        lease: timedelta = timedelta(seconds=30),
        max_attempts: int = 5,
        approval_steps: Collection[str] = (),
        concurrency: int = 1,
    ) -> None:
        """``name`` is the job_id of attempts; ``approval_steps`` are keys of steps that wait for a signal.

        A step fails its run after ``max_attempts`` failed attempts. Attempts that ended because their
        worker died do not count. Concurrent steps share round trips to the store, so many of them cost
        little more than one.
        """
        self._store = store
        self._workflow = workflow
        self._work = work
        self._name = name
        self._lease = lease
        self._max_attempts = max_attempts
        self._approval_steps = frozenset(approval_steps)
        self._concurrency = concurrency
        self._inputs = {
            task.key: json.dumps({"seconds": task.seconds, "parents": task.parents})
            for task in workflow.tasks
        }
        """The recorded input of each step, as JSON text."""
        self._leases: LeaseKeeper[str] = LeaseKeeper(lease.total_seconds() / 3)
        self._dispatching: set[tuple[UUID, str]] = set()

    async def run(self, run_ids: Collection[UUID]) -> None:
        """Work on these runs until all are completed, by this engine or another."""
        wanted = frozenset(run_ids)

        async def list_active() -> Collection[UUID]:
            return [run.run_id for run in await self._store.get_active_runs() if run.run_id in wanted]

        slots = [Slot() for _ in range(self._concurrency)]
        poller = WorkPoller(slots, list_active, lambda snapshot: self._find_exceptions(snapshot, wanted))
        tasks = [asyncio.create_task(self._run_slot(poller, slot)) for slot in slots]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                await cancel_and_wait(task)

    async def _run_slot(self, poller: WorkPoller, slot: Slot) -> None:
        """Execute one step after another until all runs are completed."""
        pause, yielded_at = MIN_POLL_INTERVAL, monotonic()
        while True:
            try:
                snapshot = await poller.poll()
                if snapshot is None:
                    return
                progressed = await self.do_next(snapshot, slot)
            except ConflictError as error:
                # Another worker was faster or decided otherwise. Drop the cache and read the state again.
                _log.debug("%s", error)
                progressed = False
                slot.release()
            except StoreUnavailableError as error:
                # The write may or may not have been applied: the next poll shows which.
                _log.warning("%s", error)
                progressed, pause = False, MAX_POLL_INTERVAL
                slot.release()
            if not progressed:
                pause = min(2 * pause, MAX_POLL_INTERVAL)
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))
                yielded_at = monotonic()
                continue
            pause = MIN_POLL_INTERVAL
            if monotonic() > yielded_at + MAX_RUN_WITHOUT_YIELD:
                await asyncio.sleep(0)
                yielded_at = monotonic()

    async def tick(self, active: Collection[UUID]) -> bool:
        """Poll the store and execute at most one step. True if anything changed."""
        snapshot = WorkSnapshot()
        snapshot.list_runs(active)
        await self._find_exceptions(snapshot, active)
        return await self.do_next(snapshot, Slot())

    async def _find_exceptions(self, snapshot: WorkSnapshot, run_ids: Collection[UUID]) -> None:
        """Fill in the runs that have to be stopped, and the steps that need recovery."""
        snapshot.set_stop_reasons(await self._stop_reasons(run_ids))
        snapshot.stalled.clear()
        for stalled in await self._store.get_stalled_steps(take=1000):
            run_id, key = stalled.run_id, stalled.step_key
            # A step between its dispatch and its claim by this engine is listed, but not stalled.
            if run_id in run_ids and key in self._workflow.by_key and (run_id, key) not in self._dispatching:
                snapshot.stalled.append(stalled)

    async def do_next(self, snapshot: WorkSnapshot, slot: Slot) -> bool:
        """Stop runs, recover a step, or advance a run: at most one step. True if anything changed."""
        stopped = False
        while snapshot.stop_reasons:
            run_id, reason = snapshot.stop_reasons.popitem()
            stopped |= await self.finish_run(run_id, RunStatus.CANCELLED, reason)

        while snapshot.stalled:
            stalled = snapshot.stalled.popleft()
            if stalled.run_id not in snapshot.stopping and await self.recover(stalled):
                return True

        open_run = slot.open_run
        if open_run and open_run not in snapshot.stopping and await self.advance(open_run, slot.view):
            return True

        while snapshot.runs:
            run_id = snapshot.runs.popleft()
            if run_id not in snapshot.stopping:
                view = slot.assign(run_id, snapshot)
                if await self.advance(run_id, view):
                    return True

        slot.release()
        return stopped

    async def recover(self, stalled: StalledStep) -> bool:
        """Continue a step that no worker moves: its lease expired, or its dispatch was never claimed.

        This may overtake another worker between its dispatch and its claim. The claim decides, and one of
        the two does the work.
        """
        run_id, key = stalled.run_id, stalled.step_key
        if stalled.reason is StallReason.NOT_DISPATCHED:
            await self._store.try_record_dispatch(run_id, key)
        lease_expired = stalled.reason is StallReason.LEASE_EXPIRED
        return await self.execute(run_id, key, RunView(), taken_over=lease_expired)

    async def advance(self, run_id: UUID, view: RunView) -> bool:
        """Do the next thing that a run needs: complete it, retry steps, or dispatch and execute a step."""
        plan = view.cached_plan()
        if plan is None:
            plan = view.refresh(self._workflow, await self._store.get_step_statuses(run_id))

        if not plan.unfinished:
            view.is_completed = await self._store.complete_run(
                run_id, RunStatus.SUCCEEDED, expected=plan.statuses
            )
            return view.is_completed or view.invalidate()

        if plan.failed:
            return await self.retry_failed(run_id, view)

        if not plan.ready and not plan.in_progress:
            if not view.is_fresh:
                return view.invalidate()
            reason = "a step that others wait for was skipped"
            view.is_completed = await self.finish_run(run_id, RunStatus.FAILED, reason)
            return view.is_completed

        for task in await self._choose_tasks(run_id, plan, view):
            view.dispatched.add(task.key)
            self._dispatching.add((run_id, task.key))
            try:
                if await self._store.try_record_dispatch(run_id, task.key):
                    # An engine with a message queue would send its message now; this one consumes directly.
                    return await self.execute(run_id, task.key, view)
            finally:
                self._dispatching.discard((run_id, task.key))
        return view.invalidate()

    async def _choose_tasks(self, run_id: UUID, plan: Plan, view: RunView) -> list[Task]:
        """The ready tasks without a dispatch, shuffled so that workers rarely compete for one step."""
        if view.is_fresh and len(plan.ready) > 1:
            view.dispatched |= await self._store.get_dispatched_step_keys(run_id)
        tasks = [task for task in plan.ready if task.key not in view.dispatched]
        if len(tasks) > 1:
            random.shuffle(tasks)
            if view.on_surplus is not None:
                view.on_surplus()
        return tasks

    async def retry_failed(self, run_id: UUID, view: RunView) -> bool:
        """Retry the failed steps, or finish the run if one of them has no attempts left."""
        detail = await self._store.get_run_detail(run_id)
        failed = [step for step in detail.steps if step.status is StepStatus.FAILED] if detail else []
        if exhausted := [step for step in failed if not self._has_attempts_left(step)]:
            reason = f"step {exhausted[0].step_key!r} has no attempts left"
            view.is_completed = await self.finish_run(run_id, RunStatus.FAILED, reason)
            return view.is_completed
        for step in failed:
            # Naming the attempt makes the call a no-op if another worker has retried the step already.
            await self._store.retry_step(run_id, step.step_key, attempt=step.attempts[-1].attempt)
        return view.invalidate() or bool(failed)

    async def execute(self, run_id: UUID, key: str, view: RunView, *, taken_over: bool = False) -> bool:
        """Claim a dispatched step and do its work under a renewed lease. False if the claim is not free."""
        task = self._workflow.by_key[key]
        owner = new_claim_token()
        if not await self._store.try_claim_step(run_id, key, owner=owner, lease=self._lease):
            return view.invalidate()
        attempt = await self._store.record_step_start(
            run_id, key, task.name, input_json=self._inputs[key], job_id=self._name, owner=owner
        )
        if taken_over:
            await self._store.append_event(run_id, TAKEN_OVER, step_key=key, message=self._name)

        async def renew() -> str | None:
            """Renew the claim; return a reason to stop the work, or None."""
            try:
                if not await self._store.renew_step_claim(run_id, key, owner, self._lease):
                    return CLAIM_LOST
                return (await self._stop_reasons([run_id])).get(run_id)
            except StoreUnavailableError:
                return None  # The next renewal shows whether the claim survived.

        work = self._perform(run_id, task, attempt, view)
        stop_reason = await self._leases.run_with_renewal(work, renew)
        if stop_reason is None:
            return True
        view.invalidate()
        if stop_reason != CLAIM_LOST:
            await self._store.record_step_complete(
                run_id, key, StepStatus.SKIPPED, error_message=stop_reason, attempt=attempt
            )
        return True

    async def _perform(self, run_id: UUID, task: Task, attempt: int, view: RunView) -> None:
        """Do the work of one attempt and record its result."""
        store, key = self._store, task.key
        try:
            if key in self._approval_steps:
                output = await self._receive_signal(run_id, key)
            else:
                if not view.outputs.keys() >= set(task.parents):
                    view.outputs.update(await self._read_outputs(run_id))
                inputs = {parent: view.outputs[parent] for parent in task.parents}
                context = StepContext(run_id=run_id, task=task, attempt=attempt, inputs=inputs)
                output = await self._work(context)
        except WorkFailed as error:
            message = f"{FAILED}{error}"
            await retry_until_available(
                lambda: store.record_step_complete(
                    run_id, key, StepStatus.FAILED, error_message=message, attempt=attempt
                )
            )
            view.invalidate()
            return
        if output is None:
            # One atomic call ends the attempt, releases the claim and dispatches the step again, so no
            # crash can lose the step. While its waiter is open, the step is not listed as stalled.
            await retry_until_available(lambda: store.reschedule_step(run_id, key, attempt=attempt))
            view.invalidate()
            return
        # Output and status in one call: a reader of a succeeded step always finds its output.
        await retry_until_available(
            lambda: store.record_step_complete(
                run_id, key, StepStatus.SUCCEEDED, output_json=output, attempt=attempt
            )
        )
        view.record_success(key, output)

    async def _read_outputs(self, run_id: UUID) -> Mapping[str, str]:
        """The outputs of the succeeded steps, by key."""
        detail = await self._store.get_run_detail(run_id)
        steps = detail.steps if detail is not None else ()
        return {
            step.step_key: step.output_json
            for step in steps
            if step.status is StepStatus.SUCCEEDED and step.output_json is not None
        }

    async def _receive_signal(self, run_id: UUID, key: str) -> str | None:
        """The payload of the signal named after the step, or None if it has not been delivered."""
        await self._store.register_waiter(run_id, key, key)
        waiter = await self._store.get_waiter(run_id, key)
        return waiter.payload_json if waiter is not None and waiter.delivered_at is not None else None

    async def _stop_reasons(self, run_ids: Collection[UUID]) -> dict[UUID, str]:
        """Why to stop each of these runs that was cancelled or is past its deadline."""
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
            # The deadline may have been extended since the list was read. If the run is listed again, the
            # deadline just read has passed; as_of sets the latch only if it is still the deadline. The next
            # poll finds the latch.
            still_listed = {run.run_id for run in await self._store.get_runs_to_stop(take=1000)}
            if run_id in still_listed and control.timeout_at is not None:
                await self._store.mark_timed_out(run_id, "the deadline has passed", as_of=control.timeout_at)
        return reasons

    async def finish_run(self, run_id: UUID, status: RunStatus, reason: str) -> bool:
        """Close the open steps of a run that cannot succeed, and complete it. False if it is not completed.

        While any step is claimed this does nothing: its worker finishes, sees the reason at its next
        renewal, or loses the claim.
        """
        detail = await self._store.get_run_detail(run_id)
        if detail is None or await self._store.get_claimed_step_keys(run_id):
            return False
        for step in detail.steps:
            if step.status is StepStatus.FAILED and self._has_attempts_left(step):
                # Another worker may be about to retry this attempt, which would reopen the completed run
                # and undo a cancel. After a retry and a skip this attempt is not the latest any more.
                await self._store.retry_step(run_id, step.step_key, attempt=step.attempts[-1].attempt)
            elif step.status.is_terminal:
                continue
            await self._store.remove_waiter(run_id, step.step_key)
            await self._store.record_skipped_step(run_id, step.step_key, step.step_type, reason)
        statuses = await self._store.get_step_statuses(run_id)
        for key in await self._store.get_dispatched_step_keys(run_id) - statuses.keys():
            await self._store.release_dispatch(run_id, key)
        if not all(step_status.is_terminal for step_status in statuses.values()):
            return False
        return await self._store.complete_run(run_id, status, expected=statuses)

    def _has_attempts_left(self, step: FlowStepRecord) -> bool:
        failures = sum((attempt.error_message or "").startswith(FAILED) for attempt in step.attempts)
        return failures < self._max_attempts
