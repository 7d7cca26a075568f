"""The replay: run a recorded workflow on worker processes, kill some of them, and verify the result."""

from __future__ import annotations

import asyncio
import json
import secrets
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from flowstore_core import (
    CRASH_SAFE,
    Capability,
    FlowRunDetail,
    FlowStore,
    SignalDeliveryStatus,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_core.platforms import require_posix
from flowstore_core.urls import redact
from flowstore_replay.kill_plan import POLL_INTERVAL, StepHolders, kill_threshold
from flowstore_replay.requests import Requests
from flowstore_replay.verify import KILLED, Check, Summary, Takeover, takeovers, verify
from flowstore_replay.wfcommons import Workflow
from flowstore_replay.worker_pool import Worker, WorkerPool

TRIGGER_KEY = "replay"
PAYLOAD = '{"approved": true}'
APPROVAL_DELAY = 0.5
"""Seconds between finding a waiting step and approving it, so that the step really waits."""
COMPLETED = -1
"""Replaces the number of succeeded steps of a run that is completed, in any status."""
MAX_UNEXPECTED_EXITS = 5
"""Number of workers that may exit unexpectedly before the replay is aborted."""


class ReplayError(Exception):
    """The replay cannot continue; the message says why and what to do."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        self.usage = usage
        """Whether the caller's arguments are the cause."""
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Size, speed and faults of a replay."""

    workers: int = 4
    runs: int = 1
    speed: float = 100.0
    """Divisor of recorded durations."""
    kill: int = 0
    fail_rate: float = 0.0
    lease: float = 2.0
    """Seconds after which a dead worker's step is taken over, at most."""
    max_attempts: int = 5
    approval_steps: tuple[str, ...] = ()
    hold: bool = False
    seed: int = 0
    timeout: float | None = 300.0
    key: str | None = None
    """Names the replay. Reusing a key continues its runs instead of starting new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayProgress:
    """The progress of a replay, for display."""

    seconds: float
    runs: int
    runs_done: int
    steps: int
    steps_done: int
    kills: int
    kills_done: int
    held_steps: tuple[tuple[str, str | None], ...]
    """Each worker and the key of the step that it executes."""
    waiting: tuple[str, ...]
    """Keys of steps that wait for a signal."""


class Observer(Protocol):
    """Receives the events and the progress of a replay."""

    def note(self, text: str) -> None:
        """One event, as a sentence."""
        ...

    def show(self, progress: ReplayProgress) -> None:
        """The current progress; called several times a second."""
        ...


class Replay:
    """One replay. The parent triggers, polls, kills and approves; the workers execute steps."""

    def __init__(
        self,
        workflow: Workflow,
        options: Options,
        observer: Observer,
        *,
        url: str | None = None,
        migrate: bool = True,
    ) -> None:
        """Raises ReplayError if the workflow lacks a step of ``approval_steps``, WorkflowError if a store
        cannot run it.
        """
        if unknown := sorted(set(options.approval_steps) - workflow.by_key.keys()):
            step_keys = ", ".join(list(workflow.by_key)[:10])
            raise ReplayError(f"no step {unknown[0]!r} to approve; steps are: {step_keys}", usage=True)
        self._workflow = workflow
        self._options = options
        self._observer = observer
        self._url = url
        self._migrate = migrate
        self.key = options.key or secrets.token_hex(4)
        self._queue = f"replay {self.key}"
        self._requests = Requests(workflow, self._queue)
        self.run_ids: list[UUID] = []
        self._started_at = time.monotonic()
        self._steps_done_by_run: dict[UUID, int] = {}
        self._holders = StepHolders(workflow, options.speed)
        self._kills_done = 0
        self._killed_steps: set[tuple[UUID, str]] = set()
        self._waiting: dict[tuple[UUID, str], float] = {}
        self._approved: set[tuple[UUID, str]] = set()
        self._reported: set[Takeover] = set()
        self._unexpected_exits = 0

    async def run(self) -> Summary:
        """Replay, and verify the final state in the store.

        Raises ReplayError, and FlowStoreError if the store cannot be opened. When cancelled, it ends its
        workers and leaves the runs as they are; the same key continues them.
        """
        options = self._options
        require_posix("a replay")
        async with open_store(self._url, migrate=self._migrate) as store:
            _check_capabilities(store)
            await self._trigger(store)
            pool = WorkerPool(
                {
                    "url": self._url,
                    "queue": self._queue,
                    "run_ids": [str(run_id) for run_id in self.run_ids],
                    "workflow": self._workflow.to_json(),
                    "speed": options.speed,
                    "fail_rate": options.fail_rate,
                    "seed": options.seed,
                    "lease": options.lease,
                    "max_attempts": options.max_attempts,
                    "approval_steps": options.approval_steps,
                }
            )
            try:
                for _ in range(options.workers):
                    await pool.start()
                finished_in_time = await self._supervise(store, pool)
            finally:
                await pool.shutdown()
            summary = await verify(store, self._workflow, self.run_ids, approval_steps=options.approval_steps)
        if not finished_in_time:
            check = Check(name="finished in time")
            check.fail(f"not finished after {options.timeout:g} s; continue with --key {self.key}")
            summary.checks.insert(0, check)
        if self._kills_done < options.kill:
            self._note(
                f"{self._kills_done} of {options.kill} workers were killed: the runs completed "
                "before the remaining kills were due; lower --speed or raise --runs"
            )
        return summary

    async def _trigger(self, store: FlowStore) -> None:
        for number in range(self._options.runs):
            result = await store.trigger_run(
                self._workflow.flow_id,
                self._workflow.name,
                new_run_id(),
                TRIGGER_KEY,
                trigger_data=json.dumps({"key": self.key, "number": number, "seed": self._options.seed}),
                idempotency_key=f"{self.key}/{number}",
                dispatch=self._requests.roots,
            )
            self.run_ids.append(result.run.run_id)
            if not result.created:
                if detail := await store.get_run_detail(result.run.run_id):
                    self._reported.update(takeover for step in detail.steps for takeover in takeovers(step))
                self._note(f"continuing run {result.run.run_id} ({result.run.status}) of an earlier replay")

    async def _supervise(self, store: FlowStore, pool: WorkerPool) -> bool:
        """Poll until all runs are completed. False on timeout."""
        unreachable = False
        while True:
            started_at = time.monotonic()
            if self._options.timeout is not None and started_at - self._started_at > self._options.timeout:
                return False
            try:
                is_completed = await self._poll(store, pool)
                unreachable = False
            except StoreUnavailableError as error:
                if not unreachable:
                    self._note(f"{error}; retrying")
                is_completed, unreachable = False, True
            if is_completed:
                return True
            await self._replace_exited(pool)
            # Polling many runs must leave the processor to the workers.
            await asyncio.sleep(max(POLL_INTERVAL, 4 * (time.monotonic() - started_at)))

    async def _poll(self, store: FlowStore, pool: WorkerPool) -> bool:
        active = {run.run_id for run in await store.get_active_runs()}
        details = []
        for run_id in self.run_ids:
            if self._steps_done_by_run.get(run_id) == COMPLETED:
                continue
            if detail := await store.get_run_detail(run_id):
                details.append(detail)
                self._note_takeovers(detail)
                succeeded = sum(step.status is StepStatus.SUCCEEDED for step in detail.steps)
                self._steps_done_by_run[run_id] = succeeded if run_id in active else COMPLETED
        is_completed = all(self._steps_done_by_run.get(run_id) == COMPLETED for run_id in self.run_ids)
        self._holders.update(details, {worker.name for worker in pool.workers})
        self._show(pool)
        if not is_completed:
            await self._approve(store, [detail for detail in details if detail.run_id in active])
            await self._kill(store, pool, details)
        return is_completed

    async def _kill(self, store: FlowStore, pool: WorkerPool, details: Sequence[FlowRunDetail]) -> None:
        """Kill a worker if the next kill is due and a worker is in the middle of a step."""
        if self._kills_done < self._options.kill:
            finished = sum(state == COMPLETED for state in self._steps_done_by_run.values())
            unfinished = [detail for detail in details if self._steps_done_by_run[detail.run_id] != COMPLETED]
            progress = self._holders.progress(unfinished, finished, len(self.run_ids))
            if progress >= kill_threshold(self._kills_done, self._options.kill):
                victim = self._holders.victim(progress, self._killed_steps)
                for worker in pool.workers:
                    if worker.name == victim:
                        await self._kill_worker(store, pool, worker)
                        return

    async def _kill_worker(self, store: FlowStore, pool: WorkerPool, victim: Worker) -> None:
        await pool.kill(victim)
        self._kills_done += 1
        # Read after the worker's death: the state that it really left behind.
        run_id = self._holders.held[victim.name].run_id
        detail = await store.get_run_detail(run_id)
        open_attempts = [
            (step.step_key, step.attempts[-1].attempt)
            for step in (detail.steps if detail else ())
            if step.attempts[-1].job_id == victim.name and step.attempts[-1].completed_at is None
        ]
        key = open_attempts[0][0] if open_attempts else None
        if key is not None:
            self._killed_steps.add((run_id, key))
        await store.append_event(run_id, KILLED, step_key=key, message=victim.name)
        held = (
            f"while it held {key!r} (attempt {open_attempts[0][1]})"
            if open_attempts
            else "just after it had finished a step"
        )
        replacement = await pool.start()
        self._note(f"killed {victim.name} {held}; started {replacement.name}")

    async def _replace_exited(self, pool: WorkerPool) -> None:
        for worker in await pool.reap_exited():
            self._unexpected_exits += 1
            if self._unexpected_exits > MAX_UNEXPECTED_EXITS:
                raise ReplayError(
                    f"workers keep exiting unexpectedly; last line of standard error: {worker.last_line}"
                )
            replacement = await pool.start()
            self._note(f"{worker.name} exited unexpectedly: {worker.last_line}; started {replacement.name}")

    async def _approve(self, store: FlowStore, details: Sequence[FlowRunDetail]) -> None:
        for run_id in [detail.run_id for detail in details] if self._options.approval_steps else ():
            for waiter in await store.get_waiters(run_id):
                waiting_step = (run_id, waiter.step_key)
                if waiter.delivered_at is not None or waiter.expired_at is not None:
                    self._waiting.pop(waiting_step, None)
                    continue
                if waiting_step not in self._waiting:
                    self._waiting[waiting_step] = time.monotonic()
                    self._note(f"step {waiter.step_key!r} of run {run_id} waits for a signal")
                    if self._options.hold:
                        self._note(f"approve it with: {self._deliver_command(run_id, waiter.signal_name)}")
                delay_elapsed = time.monotonic() - self._waiting[waiting_step] >= APPROVAL_DELAY
                if not self._options.hold and delay_elapsed and waiting_step not in self._approved:
                    # The delivery_id makes a retry idempotent.
                    result = await store.deliver_signal(
                        run_id,
                        waiter.signal_name,
                        PAYLOAD,
                        delivery_id=f"{run_id}/{waiter.created_at.isoformat()}",
                    )
                    if result.status is SignalDeliveryStatus.NOT_FOUND:
                        continue  # The run completed first. A retry may reopen it with its waiter.
                    self._approved.add(waiting_step)
                    self._note(f"approved step {waiter.step_key!r} of run {run_id}: {result.status}")

    def _deliver_command(self, run_id: UUID, signal_name: str) -> str:
        command = ["flowstore", "signal", "deliver", str(run_id), signal_name, PAYLOAD]
        if self._url is not None:
            command += ["--url", redact(self._url)]
        return shlex.join(command)

    def _note_takeovers(self, detail: FlowRunDetail) -> None:
        for step in detail.steps:
            for takeover in takeovers(step):
                if takeover not in self._reported:
                    self._reported.add(takeover)
                    self._note(
                        f"{takeover.to_worker} took over {takeover.step_key!r}: "
                        "its worker's lease had expired"
                    )

    def _note(self, text: str) -> None:
        self._observer.note(text)

    def _show(self, pool: WorkerPool) -> None:
        size = len(self._workflow.tasks)
        held_steps = tuple(
            (worker.name, held.key if (held := self._holders.held.get(worker.name)) else None)
            for worker in pool.workers
        )
        self._observer.show(
            ReplayProgress(
                seconds=time.monotonic() - self._started_at,
                runs=len(self.run_ids),
                runs_done=sum(state == COMPLETED for state in self._steps_done_by_run.values()),
                steps=size * len(self.run_ids),
                steps_done=sum(
                    size if state == COMPLETED else state for state in self._steps_done_by_run.values()
                ),
                kills=self._options.kill,
                kills_done=self._kills_done,
                held_steps=held_steps,
                waiting=tuple(key for _, key in self._waiting),
            )
        )


def _check_capabilities(store: FlowStore) -> None:
    if Capability.MULTI_PROCESS not in store.capabilities:
        raise ReplayError(
            f"a replay needs a store that several processes can open; backend {store.backend!r} lives in one "
            "process: use --url sqlite:///flowstore.db or a postgresql:// URL",
            usage=True,
        )
    needed = CRASH_SAFE | {Capability.QUEUES, Capability.WATCH, Capability.EVENTS}
    if missing := needed - store.capabilities:
        names = ", ".join(sorted(missing))
        raise ReplayError(
            f"a replay needs {names}, which backend {store.backend!r} does not offer", usage=True
        )
