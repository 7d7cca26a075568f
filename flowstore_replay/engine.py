"""The reference engine: run workflows on a store so that no crash loses anything.

The store is the work queue. Four calls do the work:

    claim_next_steps    hands out ready steps, each under a lease, with an open attempt
    advance_runs        records results; each dispatches the next steps or completes the run, atomically
    reschedule_step     makes a step ready again: after a failure, or once its signal is delivered
    wait_for_steps      wakes an idle worker

There is no recovery and no scheduler. At every moment an open run has a step that is queued or claimed under
a lease, and the store hands out both: the queued step at once, the claimed one when its lease has expired. So
a SIGKILL at any moment costs at most one attempt of each step that the worker held. Any number of engines may
work on one queue.

All time is the store's: the store compares leases and deadlines. The engine measures only its own pauses.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import (
    ClaimedStep,
    ClaimLostError,
    ConflictError,
    EndedStep,
    FlowStepRecord,
    FlowStore,
    FlowStoreError,
    RunNotFoundError,
    RunStatus,
    StepNotFoundError,
    StepStatus,
)
from flowstore_replay.lease_keeper import LeaseKeeper
from flowstore_replay.requests import Requests
from flowstore_replay.retry import retrying
from flowstore_replay.wfcommons import Task, Workflow

FAILED = "failed: "
"""Prefix of an attempt's error_message if the work failed. A worker's death is not a failure."""

MAX_STEPS = 1_000
"""Limit of one call of claim_next_steps and of advance_runs (INP-4)."""

IDLE_WAIT = timedelta(seconds=1)
"""Time after which an idle engine asks for steps although nothing has woken it."""

EMPTY_CLAIM_PAUSE = 0.02
"""Seconds that an engine pauses if it was woken and other engines had claimed the steps already."""

STOP_INTERVAL = 1.0
"""Seconds between two looks for runs that were cancelled or are past their deadline."""

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
should be idempotent. The store records the result of one attempt as the step's. Attempts that follow one
another may share a task, and so see the context variables that an earlier one has set.
"""


class Engine:
    """One worker, which executes up to ``concurrency`` steps at a time. Start any number, in any process."""

    def __init__(
        self,
        store: FlowStore,
        workflow: Workflow,
        work: Work,
        *,
        queue: str,
        name: str,
        lease: timedelta = timedelta(seconds=30),
        max_attempts: int = 5,
        approval_steps: Collection[str] = (),
        concurrency: int = 1,
    ) -> None:
        """Serve the runs that were triggered with ``Requests(workflow, queue).roots``.

        ``name`` is the job_id of attempts; ``approval_steps`` are keys of steps that wait for a signal. A
        step fails its run after ``max_attempts`` failed attempts; those whose worker died do not count.
        Concurrent steps share round trips to the store, so many of them cost little more than one.
        """
        self._store = retrying(store)
        self._workflow = workflow
        self._work = work
        self._queue = queue
        self._name = name
        self._lease = lease
        self._max_attempts = max_attempts
        self._approval_steps = frozenset(approval_steps)
        self._concurrency = concurrency
        self._requests = Requests(workflow, queue)
        self._leases: LeaseKeeper[EndedStep] = LeaseKeeper(lease.total_seconds() / 3)
        self._working = 0
        """Number of claimed steps whose work has not ended."""
        self._claimed: deque[ClaimedStep] = deque()
        """Claimed steps whose work has not begun."""
        self._idle: list[asyncio.Future[None]] = []
        """One for each worker that waits for a claimed step."""
        self._is_waking = False
        """Whether a worker has been started or woken and does not run yet."""
        self._ended: list[EndedStep] = []
        """Steps whose work has ended and whose results are not recorded."""
        self._step_ended = asyncio.Event()
        self._slot_freed = asyncio.Event()

    async def run(self) -> None:
        """Execute steps until cancelled. Raises the first unexpected error of the work."""
        # Steps that an earlier run has left are handed out again when their leases end.
        self._claimed.clear()
        self._idle.clear()
        self._working, self._is_waking = 0, False
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._keep_stopping_runs())
                tasks.create_task(self._keep_advancing_runs())
                was_woken = False
                while True:
                    if claimed := await self.claim(await self._free_slots()):
                        was_woken = False
                        self._claimed += claimed
                        self._wake_worker(tasks)
                    else:
                        await asyncio.sleep(EMPTY_CLAIM_PAUSE if was_woken else 0)
                        was_woken = await self._store.wait_for_steps([self._queue], timeout=IDLE_WAIT)
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _free_slots(self) -> int:
        """Wait until a step may be claimed, and return how many may be.

        The store records results while other steps are worked on: those of one call, and those that wait for
        the next call. So twice as many steps again may be unrecorded.
        """
        while True:
            unrecorded = self._working + len(self._ended)
            if free := min(self._concurrency - self._working, 3 * self._concurrency - unrecorded):
                return free
            self._slot_freed.clear()
            await self._slot_freed.wait()

    async def claim(self, limit: int) -> Sequence[ClaimedStep]:
        """Claim up to ``limit`` ready steps and open their attempts."""
        claimed = await self._store.claim_next_steps(
            [self._queue], lease=self._lease, limit=min(limit, MAX_STEPS), worker=self._name
        )
        self._working += len(claimed)
        return claimed

    def _wake_worker(self, tasks: asyncio.TaskGroup) -> None:
        """Wake one worker, which wakes the next one: if the work does not wait, one does all of it."""
        if self._claimed and not self._is_waking:
            self._is_waking = True
            while self._idle:
                woken = self._idle.pop()
                # Work that has ended may still cancel the task in which it ran.
                if not woken.cancelled():
                    woken.set_result(None)
                    return
            tasks.create_task(self._execute_claimed(tasks))

    async def _execute_claimed(self, tasks: asyncio.TaskGroup) -> None:
        """A worker: execute one claimed step after another. There are as many as steps that wait at once."""
        worker: Any = asyncio.current_task()
        self._is_waking = False
        # Work that returns although it was cancelled ends this worker.
        while not worker.cancelling():
            if self._claimed:
                step = self._claimed.popleft()
                self._wake_worker(tasks)
                await self.execute(step)
            else:
                woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                self._idle.append(woken)
                await woken
                self._is_waking = False

    async def execute(self, step: ClaimedStep) -> None:
        """Do the work of a claimed step under a renewed lease. ``advance`` records its result."""
        try:
            ended = await self._leases.run_with_renewal(self._attempt(step), lambda: self._renew(step))
            if ended is not None:
                self._ended.append(ended)
                self._step_ended.set()
        except (ConflictError, RunNotFoundError, StepNotFoundError) as error:
            # Another worker has the step, or the run was deleted: this result does not count.
            _log.debug("%s", error)
        finally:
            self._working -= 1
            self._slot_freed.set()

    async def _keep_advancing_runs(self) -> None:
        while True:
            await self._step_ended.wait()
            await self.advance()

    async def advance(self) -> None:
        """Record the results of the steps that have ended."""
        self._step_ended.clear()
        while ended := self._ended[:MAX_STEPS]:
            for result in await self._store.advance_runs(ended):
                if isinstance(result, FlowStoreError):
                    # As in execute.
                    _log.debug("%s", result)
            del self._ended[: len(ended)]
            self._slot_freed.set()

    async def _renew(self, step: ClaimedStep) -> EndedStep | None:
        """Renew the lease. Returns the end of the step if its run is to stop."""
        if not await self._store.renew_step_claim(step.run_id, step.step_key, step.owner, self._lease):
            raise ClaimLostError(step.run_id, step.step_key)
        return await self._stop(step)

    async def _attempt(self, step: ClaimedStep) -> EndedStep | None:
        """Do the work of one attempt. Returns None if the step was made ready again."""
        if step.cancel_requested and (stopped := await self._stop(step)):
            return stopped
        try:
            output = await self._do(step)
        except WorkFailed as error:
            return await self._fail(step, f"{FAILED}{error}")
        if output is None:
            await self._store.reschedule_step(
                step.run_id, step.step_key, attempt=step.attempt, owner=step.owner
            )
            return None
        return EndedStep(
            run_id=step.run_id,
            step_key=step.step_key,
            status=StepStatus.SUCCEEDED,
            attempt=step.attempt,
            owner=step.owner,
            output_json=output,
            dispatch=self._requests.after_success(step.step_key, output),
            complete_as=RunStatus.SUCCEEDED,
        )

    async def _do(self, step: ClaimedStep) -> str | None:
        """The output of the step, or None while it waits for its signal."""
        run_id, task = step.run_id, self._workflow.by_key[step.step_key]
        if task.key in self._approval_steps:
            # While the waiter is open, the step is not ready.
            await self._store.register_waiter(run_id, task.key, task.key)
            waiter = await self._store.get_waiter(run_id, task.key)
            return waiter.payload_json if waiter is not None and waiter.delivered_at is not None else None
        if step.input_json is None and task.parents:
            steps = await self._steps(run_id)
            inputs = {parent: steps[parent].output_json or "" for parent in task.parents}
        else:
            inputs = dict.fromkeys(task.parents, step.input_json or "")
        return await self._work(StepContext(run_id=run_id, task=task, attempt=step.attempt, inputs=inputs))

    async def _fail(self, step: ClaimedStep, message: str) -> EndedStep | None:
        """Make a failed step ready again, or end it if it has no attempts left."""
        attempts = (await self._steps(step.run_id))[step.step_key].attempts
        failures = 1 + sum((attempt.error_message or "").startswith(FAILED) for attempt in attempts[:-1])
        if failures >= self._max_attempts:
            return self._end(step, message, RunStatus.FAILED)
        await self._store.reschedule_step(
            step.run_id, step.step_key, attempt=step.attempt, owner=step.owner, error_message=message
        )
        return None

    def _end(self, step: ClaimedStep, message: str, complete_as: RunStatus) -> EndedStep:
        """Fail a step for good, skip everything behind it, and complete the run if nothing is in progress."""
        return EndedStep(
            run_id=step.run_id,
            step_key=step.step_key,
            status=StepStatus.FAILED,
            attempt=step.attempt,
            owner=step.owner,
            error_message=message,
            dispatch=self._requests.after_failure(step.step_key),
            complete_as=complete_as,
            failed_as=None,
        )

    async def _steps(self, run_id: UUID) -> Mapping[str, FlowStepRecord]:
        """The steps of a run by key. Read only for steps with several parents and for failed steps."""
        detail = await self._store.get_run_detail(run_id)
        if detail is None:
            raise RunNotFoundError(run_id)
        return {step.step_key: step for step in detail.steps}

    async def _stop(self, step: ClaimedStep) -> EndedStep | None:
        """End a step if its run was cancelled or is past its deadline."""
        control = await self._store.get_run_control(step.run_id)
        if control is None or not control.cancel_requested:
            return None
        reason = f"{FAILED}the run is stopped: {control.cancel_reason or 'cancelled'}"
        return self._end(step, reason, RunStatus.CANCELLED)

    async def _keep_stopping_runs(self) -> None:
        while True:
            await self.stop_runs()
            await asyncio.sleep(STOP_INTERVAL)

    async def stop_runs(self) -> None:
        """Set the latches of runs past their deadline, and wake the waiting steps of runs to stop.

        A step of such a run ends when it is claimed next, or at its next renewal.
        """
        listed = await self._runs_to_stop()
        controls = await self._store.get_run_controls(listed) if listed else {}
        # A deadline that was read between two lists has passed if the second one has the run, too; as_of
        # sets the latch only if it is still the deadline.
        still_listed = await self._runs_to_stop() if listed else ()
        for run_id, control in controls.items():
            if run_id not in still_listed:
                continue
            if not control.cancel_requested and control.timeout_at is not None:
                await self._store.mark_timed_out(run_id, "the deadline has passed", as_of=control.timeout_at)
            elif control.cancel_requested:
                for waiter in await self._store.get_waiters(run_id):
                    if waiter.delivered_at is None:
                        await self._store.remove_waiter(run_id, waiter.step_key)

    async def _runs_to_stop(self) -> Sequence[UUID]:
        runs = await self._store.get_runs_to_stop(take=self._store.limits.page_size)
        return [run.run_id for run in runs if run.flow_id == self._workflow.flow_id]
