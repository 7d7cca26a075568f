"""Load on a store, with a ledger of what was acknowledged, to compare with what is stored afterwards.

The tests of several plugins use it.

Every worker writes runs of its own, and all work on one queue. A call that raises StoreUnavailableError did
not happen and is repeated; one that raises OutcomeUnknownError may have happened, and its run is left as it
is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar
from uuid import UUID

from flowstore_core import (
    FlowStore,
    OutcomeUnknownError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
)
from flowstore_core.queues import ClaimedStep, StepRequest

T = TypeVar("T")

FLOW = UUID(int=7)
QUEUE = "work"
LEASE = timedelta(hours=1)
MAX_BACKLOG = 50
"""Maximum number of queued runs. The consumers finish them before the load stops."""
MAX_WAIT = 240.0
"""Seconds for one wait on the load. On an idle machine each takes a few."""
STEPS = ("first", "second")


@dataclass(slots=True, eq=False)
class Run:
    run_id: UUID
    done: list[str] = field(default_factory=list)
    """The acknowledged calls, in their order."""
    unknown: str | None = None
    """The call after them that may have happened."""


@dataclass(slots=True)
class Ledger:
    runs: list[Run] = field(default_factory=list)
    queued: set[UUID] = field(default_factory=set)
    """Runs with an acknowledged dispatch to the queue."""
    claims: Counter[tuple[UUID, str]] = field(default_factory=Counter)
    """How often the queue has handed out each step."""
    advanced: set[tuple[UUID, str]] = field(default_factory=set)
    unknown_claims: int = 0
    """Claims whose outcome is unknown: each may have claimed one step."""
    unknown_runs: set[UUID] = field(default_factory=set)
    """Runs of the queue with a call whose outcome is unknown."""
    acknowledged: int = 0
    unavailable: int = 0
    unknown: int = 0
    last_error: str = "none"
    last: float = field(default_factory=time.monotonic)
    longest_gap: float = 0.0
    """The longest time without an acknowledgement, in seconds."""
    slowest: float = 0.0
    """The longest call that was acknowledged."""

    @property
    def backlog(self) -> int:
        """The number of runs in the queue, without those that have an unknown call."""
        return (
            len(self.queued) - len(self.advanced) // len("ab") - self.unknown_claims - len(self.unknown_runs)
        )

    def __str__(self) -> str:
        return (
            f"{self.acknowledged} acknowledged, {self.unavailable} unavailable, {self.unknown} unknown, "
            f"{self.backlog} runs in the queue, last error: {self.last_error}"
        )

    async def call(self, make: Callable[[], Awaitable[T]]) -> T:
        """The result of a call, repeated as long as it does not happen. Raises OutcomeUnknownError."""
        while True:
            began = time.monotonic()
            try:
                result = await make()
            except OutcomeUnknownError:  # First, because it is a StoreUnavailableError.
                self.unknown += 1
                raise
            except StoreUnavailableError as error:
                self.unavailable += 1
                self.last_error = str(error)
                await asyncio.sleep(0.05)
                continue
            now = time.monotonic()
            self.acknowledged += 1
            self.longest_gap = max(self.longest_gap, now - self.last)
            self.slowest = max(self.slowest, now - began)
            self.last = now
            return result


class Load:
    """Workers on several stores of one namespace."""

    def __init__(self, stores: Sequence[FlowStore], workers: int) -> None:
        self.ledger = Ledger()
        self._stop = asyncio.Event()
        works = (self._write_runs, self._produce, self._consume)
        self._tasks = [
            asyncio.create_task(works[number % len(works)](stores[number // len(works) % len(stores)]))
            for number in range(workers)
        ]

    async def progress(self, calls: int) -> None:
        """Wait until so many further calls are acknowledged."""
        await self._more(lambda: self.ledger.acknowledged, calls)

    async def refused(self, calls: int) -> None:
        """Wait until so many further calls are refused because the store is unavailable."""
        await self._more(lambda: self.ledger.unavailable, calls)

    async def _more(self, count: Callable[[], int], calls: int) -> None:
        until = count() + calls
        async with self._bounded(f"{calls} more calls"):
            while count() < until:
                for task in self._tasks:
                    if task.done():
                        task.result()
                await asyncio.sleep(0.02)

    async def stop(self) -> Ledger:
        self._stop.set()
        async with self._bounded("the end of all calls"):
            await asyncio.gather(*self._tasks)
        return self.ledger

    @asynccontextmanager
    async def _bounded(self, what: str) -> AsyncIterator[None]:
        """Limit a wait; the TimeoutError has the counts of the ledger. Any error ends the load."""
        try:
            async with asyncio.timeout(MAX_WAIT):
                yield
        except BaseException as error:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"waited {MAX_WAIT:g} s for {what}: {self.ledger}") from None
            raise

    async def _write_runs(self, store: FlowStore) -> None:
        while not self._stop.is_set():
            run = Run(new_run_id())
            self.ledger.runs.append(run)
            calls: list[tuple[str, Callable[[], Awaitable[object]]]] = [
                ("start_run", lambda run=run: store.start_run(FLOW, "flow", run.run_id, "manual")),
            ]
            for step in STEPS:
                of = (run.run_id, step)
                calls += [
                    ("claim " + step, lambda of=of: store.try_claim_step(*of, owner="me")),
                    ("start " + step, lambda of=of: store.record_step_start(*of, "type")),
                    (
                        "complete " + step,
                        lambda of=of: store.record_step_complete(*of, StepStatus.SUCCEEDED, output_json="1"),
                    ),
                    ("event " + step, lambda of=of: store.append_event(of[0], "done", step_key=of[1])),
                ]
            calls.append(
                ("complete_run", lambda run=run: store.complete_run(run.run_id, RunStatus.SUCCEEDED))
            )
            for name, make in calls:
                try:
                    result = await self.ledger.call(make)
                except OutcomeUnknownError:
                    run.unknown = name
                    break
                # The owner of a run has no rivals: False means that a call happened that "did not".
                assert result is not False, f"{name} returned False"
                run.done.append(name)

    async def _produce(self, store: FlowStore) -> None:
        while not self._stop.is_set():
            if self.ledger.backlog >= MAX_BACKLOG:
                await asyncio.sleep(0.02)
                continue
            run_id = new_run_id()
            try:
                await self.ledger.call(lambda run_id=run_id: store.start_run(FLOW, "queue", run_id, "manual"))
                await self.ledger.call(
                    lambda run_id=run_id: store.try_record_dispatch(
                        run_id, "a", queue=QUEUE, step_type="type"
                    )
                )
            except OutcomeUnknownError:
                self.ledger.unknown_runs.add(run_id)
                continue
            self.ledger.queued.add(run_id)

    async def _consume(self, store: FlowStore) -> None:
        while True:
            try:
                claimed = await self.ledger.call(lambda: store.claim_next_steps([QUEUE], lease=LEASE))
            except OutcomeUnknownError:
                self.ledger.unknown_claims += 1
                continue
            if not claimed and self._stop.is_set():
                return
            for step in claimed:
                await self._advance(store, step)
            if not claimed:
                await asyncio.sleep(0.02)

    async def _advance(self, store: FlowStore, step: ClaimedStep) -> None:
        self.ledger.claims[step.run_id, step.step_key] += 1
        is_last = step.step_key == "b"
        follows = () if is_last else (StepRequest(step_key="b", step_type="type", queue=QUEUE),)
        try:
            await self.ledger.call(
                lambda: store.advance_run(
                    step.run_id,
                    step.step_key,
                    StepStatus.SUCCEEDED,
                    attempt=step.attempt,
                    owner=step.owner,
                    dispatch=follows,
                    complete_as=RunStatus.SUCCEEDED if is_last else None,
                )
            )
        except OutcomeUnknownError:
            self.ledger.unknown_runs.add(step.run_id)
        else:
            self.ledger.advanced.add((step.run_id, step.step_key))


@dataclass(frozen=True, slots=True)
class Verdict:
    runs: int
    lost: Sequence[str]
    """Acknowledged calls that have left no trace."""
    twice: Sequence[str]
    """Calls that have happened more often than they should have."""


async def verify(store: FlowStore, ledger: Ledger) -> Verdict:
    """Compare the ledger with what is stored, once no call is in progress."""
    lost: list[str] = []
    twice = [f"{step} was claimed {count} times" for step, count in ledger.claims.items() if count > 1]
    for run in ledger.runs:
        await _verify_run(store, run, lost, twice)
    unclaimed = 0
    for run_id in ledger.queued:
        found = await store.get_run(run_id)
        if found is None:
            lost.append(f"{run_id} start_run")
            continue
        done = [(run_id, step) in ledger.advanced for step in "ab"]
        if run_id in ledger.unknown_runs:
            continue
        if all(done):
            if found.status is not RunStatus.SUCCEEDED:
                lost.append(f"{run_id} advance_run: {found.status}")
        else:
            # Nobody knows of its claim, or nobody has claimed it.
            unclaimed += 1
    if unclaimed > ledger.unknown_claims:
        lost.append(f"{unclaimed} dispatched steps were not handed out")
    return Verdict(len(ledger.runs) + len(ledger.queued), lost, twice)


async def _verify_run(store: FlowStore, run: Run, lost: list[str], twice: list[str]) -> None:
    found = await store.get_run_detail(run.run_id)
    if found is None:
        if run.done:
            lost.append(f"{run.run_id} {run.done}")
        return
    if "complete_run" in run.done and found.status is not RunStatus.SUCCEEDED:
        lost.append(f"{run.run_id} complete_run")
    attempts = {step.step_key: len(step.attempts) for step in found.steps}
    statuses = {step.step_key: step.status for step in found.steps}
    events = Counter(event.step_key for event in await store.get_run_events(run.run_id))
    for step in STEPS:
        if f"complete {step}" in run.done and statuses.get(step) is not StepStatus.SUCCEEDED:
            lost.append(f"{run.run_id} complete {step}")
        if attempts.get(step, 1) > 1:
            twice.append(f"{run.run_id} start {step}")
        count = events[step]
        if f"event {step}" in run.done and not count:
            lost.append(f"{run.run_id} event {step}")
        if count > 1:
            twice.append(f"{run.run_id} event {step}")
