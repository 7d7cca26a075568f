"""The replay: runs of a recorded workflow, worker processes that die under them, and the verdict."""

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
from flowstore_replay.crew import Crew, Worker
from flowstore_replay.engine import TAKEN_OVER
from flowstore_replay.kills import POLL, Grip, kill_due
from flowstore_replay.verify import KILLED, Check, Summary, verify
from flowstore_replay.wfformat import Workflow

TRIGGER_KEY = "replay"
PAYLOAD = '{"approved": true}'
APPROVAL_DELAY = 0.5
"""Seconds between seeing a step wait and approving it, so that the wait is really one."""
FINISHED = -1
"""In place of a count of steps: the run is completed, however it ended."""
MAX_SURPRISES = 5
"""How many workers may end by themselves before the replay gives up: something is wrong with them all."""


class ReplayError(Exception):
    """The replay cannot go on; the message says why and what to do."""

    def __init__(self, message: str, *, usage: bool = False) -> None:
        self.usage = usage
        """Whether it was asked for something that cannot be."""
        super().__init__(message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to replay, how fast and with how much trouble."""

    workers: int = 4
    runs: int = 1
    speed: float = 100.0
    """Recorded seconds are divided by it."""
    kill: int = 0
    fail_rate: float = 0.0
    lease: float = 2.0
    """Seconds; a dead worker's step is taken over after at most that."""
    max_attempts: int = 5
    approve: tuple[str, ...] = ()
    hold: bool = False
    seed: int = 0
    timeout: float | None = 300.0
    key: str | None = None
    """Names the replay; the same key again goes on with its runs instead of starting new ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How things stand, for showing."""

    seconds: float
    runs: int
    runs_done: int
    steps: int
    steps_done: int
    kills: int
    kills_done: int
    at_work: tuple[tuple[str, str | None], ...]
    """Each worker with the step that it holds."""
    waiting: tuple[str, ...]
    """Steps that wait for a signal."""


class Observer(Protocol):
    """Who is told what happens."""

    def note(self, text: str) -> None:
        """One thing that happened, in a sentence."""
        ...

    def show(self, view: View) -> None:
        """How things stand; several times a second."""
        ...


class Replay:
    """One replay. The parent only triggers, watches, kills and approves: the workers do the rest."""

    def __init__(
        self,
        workflow: Workflow,
        options: Options,
        observer: Observer,
        *,
        url: str | None = None,
        migrate: bool = True,
    ) -> None:
        """Raises ReplayError for a step to approve that the workflow does not have."""
        if unknown := sorted(set(options.approve) - workflow.by_key.keys()):
            known = ", ".join(list(workflow.by_key)[:10])
            raise ReplayError(f"no step {unknown[0]!r} to approve; steps are: {known}", usage=True)
        self._workflow = workflow
        self._options = options
        self._observer = observer
        self._url = url
        self._migrate = migrate
        self.key = options.key or secrets.token_hex(4)
        self.run_ids: list[UUID] = []
        self._began = time.monotonic()
        self._done: dict[UUID, int] = {}
        self._grip = Grip(workflow, options.speed)
        self._kills_done = 0
        self._hit: set[tuple[UUID, str]] = set()
        self._waiting: dict[tuple[UUID, str], float] = {}
        self._approved: set[tuple[UUID, str]] = set()
        self._events: dict[UUID, int] = {}
        self._surprises = 0

    async def run(self) -> Summary:
        """Replay, and let the store tell what became of it.

        Raises ReplayError, and FlowStoreError where the store cannot be opened. Cancelled, it ends its
        workers and leaves the runs as they are: the same key goes on with them.
        """
        options = self._options
        require_posix("a replay")
        async with open_store(self._url, migrate=self._migrate) as store:
            _check_capabilities(store)
            await self._trigger(store)
            crew = Crew(
                {
                    "url": self._url,
                    "run_ids": [str(run_id) for run_id in self.run_ids],
                    "workflow": self._workflow.to_json(),
                    "speed": options.speed,
                    "fail_rate": options.fail_rate,
                    "seed": options.seed,
                    "lease": options.lease,
                    "max_attempts": options.max_attempts,
                    "approve": options.approve,
                }
            )
            try:
                for _ in range(options.workers):
                    await crew.start()
                in_time = await self._watch(store, crew)
            finally:
                await crew.end()
            summary = await verify(store, self._workflow, self.run_ids, approve=options.approve)
        if not in_time:
            check = Check(name="done in time")
            check.fail(f"not done after {options.timeout:g} s; go on with --key {self.key}")
            summary.checks.insert(0, check)
        if self._kills_done < options.kill:
            self._note(
                f"{self._kills_done} of {options.kill} workers were killed: the runs were over before the "
                "others; lower --speed or raise --runs"
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
            )
            self.run_ids.append(result.run.run_id)
            if not result.created:
                await self._read_events(store, result.run.run_id, tell=False)
                self._note(
                    f"going on with run {result.run.run_id} ({result.run.status}) of an earlier replay"
                )

    async def _watch(self, store: FlowStore, crew: Crew) -> bool:
        """Until all runs are completed; False if that took too long."""
        unreachable = False
        while True:
            began = time.monotonic()
            if self._options.timeout is not None and began - self._began > self._options.timeout:
                return False
            try:
                over = await self._look(store, crew)
                unreachable = False
            except StoreUnavailableError as error:
                if not unreachable:
                    self._note(f"{error}; trying again")
                over, unreachable = False, True
            if over:
                return True
            await self._replace(crew)
            # Watching many runs must not take the processor from those who do the work.
            await asyncio.sleep(max(POLL, 4 * (time.monotonic() - began)))

    async def _look(self, store: FlowStore, crew: Crew) -> bool:
        active = {run.run_id for run in await store.get_active_runs()}
        details = []
        for run_id in self.run_ids:
            if self._done.get(run_id) == FINISHED:
                continue
            await self._read_events(store, run_id)
            if detail := await store.get_run_detail(run_id):
                details.append(detail)
                succeeded = sum(step.status is StepStatus.SUCCEEDED for step in detail.steps)
                self._done[run_id] = succeeded if run_id in active else FINISHED
        over = all(self._done.get(run_id) == FINISHED for run_id in self.run_ids)
        self._grip.see(details, {worker.name for worker in crew.workers})
        self._show(crew)
        if not over:
            await self._approve(store, [detail for detail in details if detail.run_id in active])
            await self._kill(store, crew, details)
        return over

    async def _kill(self, store: FlowStore, crew: Crew, details: Sequence[FlowRunDetail]) -> None:
        """Kill the next worker, if its time has come and one is in the middle of a step."""
        if self._kills_done < self._options.kill:
            finished = sum(state == FINISHED for state in self._done.values())
            unfinished = [detail for detail in details if self._done[detail.run_id] != FINISHED]
            progress = self._grip.progress(unfinished, finished, len(self.run_ids))
            if progress >= kill_due(self._kills_done, self._options.kill):
                victim = self._grip.victim(progress, self._hit)
                for worker in crew.workers:
                    if worker.name == victim:
                        await self._kill_one(store, crew, worker)
                        return

    async def _kill_one(self, store: FlowStore, crew: Crew, victim: Worker) -> None:
        await crew.kill(victim)
        self._kills_done += 1
        # Asked of the store after its death, so that it is what the worker really left behind.
        run_id = self._grip.held[victim.name].run_id
        detail = await store.get_run_detail(run_id)
        left = [
            (step.step_key, step.attempts[-1].attempt)
            for step in (detail.steps if detail else ())
            if step.attempts[-1].job_id == victim.name and step.attempts[-1].completed_at is None
        ]
        key = left[0][0] if left else None
        if key is not None:
            self._hit.add((run_id, key))
        await store.append_event(run_id, KILLED, step_key=key, message=victim.name)
        held = (
            f"while it held {key!r} (attempt {left[0][1]})" if left else "just after it had finished a step"
        )
        replacement = await crew.start()
        self._note(f"killed {victim.name} {held}; started {replacement.name}")

    async def _replace(self, crew: Crew) -> None:
        for worker in await crew.ended():
            if worker.process.returncode == 0:
                continue  # It saw all runs completed, as we are about to.
            self._surprises += 1
            if self._surprises > MAX_SURPRISES:
                raise ReplayError(
                    f"workers keep ending by themselves; the last one said: {worker.last_words}"
                )
            replacement = await crew.start()
            self._note(f"{worker.name} ended by itself: {worker.last_words}; started {replacement.name}")
        if not crew.workers:
            await crew.start()  # Somebody has reopened a run that they saw completed.

    async def _approve(self, store: FlowStore, details: Sequence[FlowRunDetail]) -> None:
        for run_id in [detail.run_id for detail in details] if self._options.approve else ():
            for waiter in await store.get_waiters(run_id):
                place = (run_id, waiter.step_key)
                if waiter.delivered_at is not None or waiter.expired_at is not None:
                    self._waiting.pop(place, None)
                    continue
                if place not in self._waiting:
                    self._waiting[place] = time.monotonic()
                    self._note(f"step {waiter.step_key!r} of run {run_id} waits for a signal")
                    if self._options.hold:
                        self._note(f"approve it with: {self._deliver_command(run_id, waiter.signal_name)}")
                late = time.monotonic() - self._waiting[place] >= APPROVAL_DELAY
                if not self._options.hold and late and place not in self._approved:
                    # The delivery_id makes a repetition after a lost answer harmless.
                    result = await store.deliver_signal(
                        run_id,
                        waiter.signal_name,
                        PAYLOAD,
                        delivery_id=f"{run_id}/{waiter.created_at.isoformat()}",
                    )
                    if result.status is SignalDeliveryStatus.NOT_FOUND:
                        continue  # The run ended first. A retry may reopen it with this waiter in place.
                    self._approved.add(place)
                    self._note(f"approved step {waiter.step_key!r} of run {run_id}: {result.status}")

    def _deliver_command(self, run_id: UUID, signal_name: str) -> str:
        words = ["flowstore", "signal", "deliver", str(run_id), signal_name, PAYLOAD]
        if self._url is not None:
            words += ["--url", redact(self._url)]
        return shlex.join(words)

    async def _read_events(self, store: FlowStore, run_id: UUID, *, tell: bool = True) -> None:
        while events := await store.get_run_events(run_id, after=self._events.get(run_id, 0)):
            self._events[run_id] = events[-1].sequence
            for event in events if tell else ():
                if event.event_type == TAKEN_OVER:
                    self._note(
                        f"{event.message} took over {event.step_key!r}: its worker's lease had run out"
                    )

    def _note(self, text: str) -> None:
        self._observer.note(text)

    def _show(self, crew: Crew) -> None:
        size = len(self._workflow.tasks)
        at_work = tuple(
            (worker.name, held.key if (held := self._grip.held.get(worker.name)) else None)
            for worker in crew.workers
        )
        self._observer.show(
            View(
                seconds=time.monotonic() - self._began,
                runs=len(self.run_ids),
                runs_done=sum(state == FINISHED for state in self._done.values()),
                steps=size * len(self.run_ids),
                steps_done=sum(size if state == FINISHED else state for state in self._done.values()),
                kills=self._options.kill,
                kills_done=self._kills_done,
                at_work=at_work,
                waiting=tuple(key for _, key in self._waiting),
            )
        )


def _check_capabilities(store: FlowStore) -> None:
    if Capability.MULTI_PROCESS not in store.capabilities:
        raise ReplayError(
            f"a replay starts worker processes, so it needs a store that several processes can open, and "
            f"backend {store.backend!r} lives inside one; use --url sqlite:///flowstore.db or a "
            "postgresql:// URL",
            usage=True,
        )
    needed = CRASH_SAFE | {Capability.EVENTS}
    if missing := needed - store.capabilities:
        names = ", ".join(sorted(missing))
        raise ReplayError(
            f"backend {store.backend!r} does not offer {names}, which a replay needs", usage=True
        )
