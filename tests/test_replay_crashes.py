"""Crashes of the reference engine between any two store calls.

The engine is killed in-process: from its n-th call on, the store raises an error that no code catches. This
leaves the store in the same state as a SIGKILL. A second engine takes over on a virtual clock, so that
leases expire without waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, ClassVar
from unittest.mock import ANY
from uuid import UUID

import pytest

from flowstore_core import (
    FlowStore,
    OutcomeUnknownError,
    RunStatus,
    StepRequest,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_replay import Engine, Requests, Task, WorkFailed, Workflow, verify
from flowstore_replay.engine import StepContext
from flowstore_replay.verify import Summary
from flowstore_replay.work import output_of
from tests.virtual_clock import VirtualClock

LEASE = timedelta(seconds=30)
QUEUE = "tests"


def diamond(*, seconds: float = 0.0) -> Workflow:
    """first -> left, right -> gate -> last."""
    shape = {
        "first": (),
        "left": ("first",),
        "right": ("first",),
        "gate": ("left", "right"),
        "last": ("gate",),
    }
    tasks = (Task(key=k, name="test", parents=p, seconds=seconds) for k, p in shape.items())
    return Workflow(name="diamond", tasks=tuple(tasks))


class Killed(BaseException):
    """Simulates a killed process. A BaseException, so that no handler catches it."""


class HookedStore:
    """A store wrapper with hooks before and after each call."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not inspect.iscoroutinefunction(method):
            return method

        async def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            await self.before(name)
            result = await method(*args, **kwargs)
            await self.after(name)
            return result

        return call

    async def before(self, name: str) -> None: ...

    async def after(self, name: str) -> None: ...


class KilledStore(HookedStore):
    """A store that raises Killed from its n-th call on."""

    def __init__(self, store: FlowStore, killed_at: int) -> None:
        super().__init__(store)
        self.killed_at = killed_at

    async def before(self, name: str) -> None:
        if self.calls >= self.killed_at:
            raise Killed


async def tick(engine: Engine) -> bool:
    """Stop runs, and execute at most one step. True if there was one."""
    await engine.stop_runs()
    claimed = await engine.claim(1)
    for step in claimed:
        await engine.execute(step)
    await engine.advance()
    return bool(claimed)


async def complete(engine: Engine, store: FlowStore, run_ids: Collection[UUID]) -> None:
    """Run an engine until these runs have ended."""
    ends = [store.wait_for_run(run_id, timeout=timedelta(hours=1)) for run_id in run_ids]
    ended, running = asyncio.gather(*ends), asyncio.ensure_future(engine.run())
    try:
        async with asyncio.timeout(100):
            await asyncio.wait({ended, running}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        running.cancel()
        ended.cancel()
        await asyncio.gather(ended, running, return_exceptions=True)


@dataclass
class Harness:
    """A run with its store, its clock and its engines."""

    store: FlowStore
    clock: VirtualClock
    run_id: UUID
    workflow: Workflow = field(default_factory=diamond)
    approval_steps: Collection[str] = ()
    fails: Callable[[StepContext], bool] = lambda context: False
    max_attempts: int = 3
    cancel_at: int | None = None
    ticks: int = 0
    engines: int = 0

    def engine(self, store: Any = None, lease: timedelta = LEASE) -> Engine:
        self.engines += 1
        return Engine(
            store or self.store,
            self.workflow,
            self.work,
            queue=QUEUE,
            name=f"engine-{self.engines}",
            lease=lease,
            max_attempts=self.max_attempts,
            approval_steps=self.approval_steps,
        )

    @property
    def roots(self) -> list[StepRequest]:
        return Requests(self.workflow, QUEUE).roots

    async def trigger(self, **options: Any) -> None:
        await self.store.trigger_run(
            self.workflow.flow_id, "diamond", self.run_id, "test", dispatch=self.roots, **options
        )

    async def work(self, context: StepContext) -> str:
        await asyncio.sleep(context.task.seconds)
        if self.fails(context):
            raise WorkFailed("on purpose")
        return output_of(context.task, context.inputs)

    async def drive(self, engine: Engine) -> None:
        """Run the engine as Engine.run does, but advance the clock only when the engine is idle."""
        idle = 0
        while await self.store.get_run_status(self.run_id) is RunStatus.RUNNING:
            self.ticks += 1
            if self.ticks == self.cancel_at:
                await self.store.request_cancel(self.run_id, "changed my mind")
            idle = 0 if await tick(engine) else idle + 1
            if idle > 1:
                assert idle < 200, "the run is stuck"
                for waiter in await self.store.get_waiters(self.run_id):
                    if waiter.delivered_at is None:
                        await self.store.deliver_signal(self.run_id, waiter.signal_name, '"go"')
                self.clock.advance(seconds=31)
            await asyncio.sleep(0)

    async def summary(self) -> Summary:
        return await verify(self.store, self.workflow, [self.run_id], approval_steps=self.approval_steps)


SCENARIOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "every first attempt fails": {"fails": lambda context: context.attempt == 1},
    "waits for a signal": {"approval_steps": ["first", "gate"]},
    "no attempts left": {"fails": lambda context: context.task.key == "left", "max_attempts": 2},
    "cancelled": {"cancel_at": 4, "fails": lambda context: context.attempt == 1, "approval_steps": ["first"]},
    "past its deadline": {},
}
FINAL_STATUSES = {
    "no attempts left": RunStatus.FAILED,
    "cancelled": RunStatus.CANCELLED,
    "past its deadline": RunStatus.CANCELLED,
}


async def run_scenario(name: str, crashes: Collection[int]) -> Harness:
    """Complete a run although all engines but the last are killed at their n-th call."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), **SCENARIOS[name])
        deadline = clock() + timedelta(seconds=1) if name == "past its deadline" else None
        await harness.trigger(timeout_at=deadline)
        if deadline is not None:
            assert await tick(harness.engine())
            clock.advance(seconds=2)
        for killed_at in crashes:
            engine = harness.engine(KilledStore(store, killed_at))
            # The engine may finish before its n-th call.
            with contextlib.suppress(Killed):
                await harness.drive(engine)
            clock.advance(seconds=31)
        await harness.drive(harness.engine())
        await assert_final_state(name, harness)
    return harness


async def assert_final_state(name: str, harness: Harness) -> None:
    if name not in FINAL_STATUSES:
        summary = await harness.summary()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        return
    detail = await harness.store.get_run_detail(harness.run_id)
    assert detail is not None
    assert detail.status is FINAL_STATUSES[name]
    assert all(step.status.is_terminal for step in detail.steps)
    assert all(attempt.completed_at for step in detail.steps for attempt in step.attempts)
    assert not await harness.store.get_claimed_step_keys(harness.run_id)
    dispatched = await harness.store.get_dispatched_step_keys(harness.run_id)
    assert dispatched <= {step.step_key for step in detail.steps}
    if name == "cancelled":
        control = await harness.store.get_run_control(harness.run_id)
        assert control is not None
        assert control.cancel_reason == "changed my mind"


async def count_calls(name: str) -> int:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), **SCENARIOS[name])
        await harness.trigger()
        counted = HookedStore(store)
        await harness.drive(harness.engine(counted))
        return counted.calls


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_is_completed_after_a_kill_before_any_store_call(name: str) -> None:
    calls = await count_calls(name)
    assert calls > 10
    for killed_at in range(1, calls + 2):
        try:
            await run_scenario(name, [killed_at])
        except AssertionError as error:
            raise AssertionError(f"killed before call {killed_at}: {error}") from error


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_run_is_completed_after_repeated_kills(name: str) -> None:
    rng = random.Random(name)
    for _ in range(25):
        crashes = [rng.randint(1, 40) for _ in range(rng.randint(2, 8))]
        try:
            await run_scenario(name, crashes)
        except AssertionError as error:
            raise AssertionError(f"killed before calls {crashes}: {error}") from error


async def test_takeovers_are_distinguished_from_failures() -> None:
    """An attempt whose engine was killed after its start counts as taken over, not as failed."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), max_attempts=1)
        await harness.trigger()

        class KilledDuringWork(HookedStore):
            async def after(self, name: str) -> None:
                if name == "claim_next_steps":
                    raise Killed

        for _ in range(3):
            with pytest.raises(Killed):
                await harness.drive(harness.engine(KilledDuringWork(store)))
            clock.advance(seconds=31)
        await harness.drive(harness.engine())
        summary = await harness.summary()
        assert summary.ok
        assert summary.attempts_by_outcome == {
            "succeeded": 5,
            "failed": 0,
            "taken_over": 3,
            "waiting": 0,
            "skipped": 0,
        }
        assert summary.steps_recovered == 1
        assert {takeover.step_key for takeover in summary.takeovers} == {"first"}
        assert [takeover.from_worker for takeover in summary.takeovers] == [
            "engine-1",
            "engine-2",
            "engine-3",
        ]


@pytest.mark.parametrize("seed", range(20))
async def test_concurrent_engines_that_are_killed_execute_each_step_once(seed: int) -> None:
    """Four engines are interleaved randomly at every call; three are killed."""
    rng = random.Random(seed)

    class Interleaved(KilledStore):
        async def before(self, name: str) -> None:
            for _ in range(rng.randint(0, 3)):
                await asyncio.sleep(0)
            await super().before(name)
            if rng.random() < 0.02:
                harness.clock.advance(seconds=20)

    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(
            store=store,
            clock=clock,
            run_id=new_run_id(),
            fails=lambda context: context.attempt == 1 and context.task.key in ("left", "last"),
            max_attempts=10,
            approval_steps=["gate"],
        )
        await harness.trigger()
        kills = [rng.randint(1, 60) for _ in range(3)]
        engines = [harness.engine(Interleaved(store, killed_at)) for killed_at in [*kills, 10**9]]
        outcomes = await asyncio.gather(*map(harness.drive, engines), return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, Killed) for outcome in outcomes), outcomes
        summary = await harness.summary()
        assert summary.ok, [check for check in summary.checks if not check.ok]


@pytest.mark.parametrize("seed", range(10))
async def test_a_run_succeeds_on_an_intermittent_store(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr("flowstore_replay.retry.RETRY_INTERVAL", 0.001)

    class Flaky(HookedStore):
        async def before(self, name: str) -> None:
            if rng.random() < 0.1:
                raise StoreUnavailableError("not now")

        async def after(self, name: str) -> None:
            if rng.random() < 0.1:
                raise OutcomeUnknownError(name)

    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(
            store=store, clock=clock, run_id=new_run_id(), fails=lambda context: context.attempt == 1
        )
        await harness.trigger()
        await harness.drive(harness.engine(Flaky(store)))
        summary = await harness.summary()
        assert summary.ok, [check for check in summary.checks if not check.ok]


async def test_a_worker_that_lost_its_lease_drops_its_result() -> None:
    """The lease expires during the work; the attempt of the other worker counts."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        started, completed = asyncio.Event(), asyncio.Event()

        class SlowFirstStep(Harness):
            async def work(self, context: StepContext) -> str:
                if not started.is_set():
                    started.set()
                    await completed.wait()
                return await super().work(context)

        harness = SlowFirstStep(store=store, clock=clock, run_id=new_run_id())
        await harness.trigger()
        slow = asyncio.create_task(tick(harness.engine(lease=timedelta(hours=1))))
        await started.wait()
        clock.advance(hours=2)
        await harness.drive(harness.engine())
        completed.set()
        await slow
        summary = await harness.summary()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        assert summary.attempts_by_outcome["taken_over"] == 1


async def test_the_result_of_a_deleted_run_is_dropped() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:

        class DeletedDuringWork(Harness):
            async def work(self, context: StepContext) -> str:
                await store.complete_run(context.run_id, RunStatus.CANCELLED)
                clock.advance(hours=1)
                await store.cleanup(clock())
                return await super().work(context)

        harness = DeletedDuringWork(store=store, clock=clock, run_id=new_run_id())
        await harness.trigger()
        assert await tick(harness.engine())
        assert await store.get_run_status(harness.run_id) is None


async def test_renewal_keeps_the_claim_of_a_long_step_and_detects_its_loss() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        workflow = diamond(seconds=60)
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), workflow=workflow)
        await harness.trigger()
        counted = HookedStore(store)
        lease = timedelta(seconds=0.06)
        ticking = asyncio.create_task(tick(harness.engine(counted, lease)))
        for _ in range(10):
            await asyncio.sleep(0.01)
            clock.advance(milliseconds=10)
        assert await store.get_claimed_step_keys(harness.run_id) == {"first"}
        clock.advance(seconds=1)
        assert await asyncio.wait_for(ticking, 100)
        assert await store.get_step_statuses(harness.run_id) == {"first": StepStatus.RUNNING}
        assert [(s.step_key, s.reason) for s in await store.get_stalled_steps()] == [
            ("first", "LeaseExpired")
        ]


async def test_a_cancel_interrupts_a_long_step_at_its_next_renewal() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        workflow = diamond(seconds=60)
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), workflow=workflow)
        await harness.trigger()
        engine = harness.engine(lease=timedelta(seconds=0.06))
        running = asyncio.create_task(complete(engine, store, [harness.run_id]))
        while await store.get_step_statuses(harness.run_id) != {"first": StepStatus.RUNNING}:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await store.request_cancel(harness.run_id, "changed my mind")
        await asyncio.wait_for(running, 100)
        detail = await store.get_run_detail(harness.run_id)
        assert detail is not None
        assert detail.status is RunStatus.CANCELLED
        assert [(s.status, s.error_message) for s in detail.steps] == [
            (StepStatus.FAILED, "failed: the run is stopped: changed my mind"),
            *((StepStatus.SKIPPED, ANY) for _ in range(4)),
        ]


async def test_a_retry_decided_before_a_cancel_does_not_undo_it() -> None:
    """One engine is about to retry a failed step while another takes it over and ends the cancelled run."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), fails=lambda context: True)
        await harness.trigger()

        class CancelBeforeRetry(HookedStore):
            async def before(self, name: str) -> None:
                if name == "reschedule_step":
                    await store.request_cancel(harness.run_id, "changed my mind")
                    clock.advance(seconds=31)
                    assert await tick(harness.engine())

        assert await tick(harness.engine(CancelBeforeRetry(store)))
        assert await store.get_run_status(harness.run_id) is RunStatus.CANCELLED


@pytest.mark.parametrize("hook", [("get_runs_to_stop", 1), ("get_run_controls", 1), ("get_runs_to_stop", 2)])
async def test_a_concurrently_extended_deadline_does_not_stop_the_run(hook: tuple[str, int]) -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id())
        await harness.trigger(timeout_at=clock() + timedelta(seconds=1))
        clock.advance(seconds=2)

        class ExtendDeadline(HookedStore):
            calls_seen: ClassVar[list[str]] = []

            async def after(self, name: str) -> None:
                self.calls_seen.append(name)
                if (name, self.calls_seen.count(name)) == hook:
                    await store.extend_deadline(harness.run_id, clock() + timedelta(hours=1))

        await harness.engine(ExtendDeadline(store)).stop_runs()
        control = await store.get_run_control(harness.run_id)
        assert control is not None
        assert not control.cancel_requested


async def test_a_reopened_failed_run_completes() -> None:
    """Retry as ``flowstore runs retry --reset-skipped`` does after the cause of the failure was fixed."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), max_attempts=2)
        harness.fails = lambda context: context.task.key == "left"
        await harness.trigger()
        await harness.drive(harness.engine())
        assert await store.get_run_status(harness.run_id) is RunStatus.FAILED
        statuses = await store.get_step_statuses(harness.run_id)
        harness.fails = lambda context: False
        skipped = [key for key, status in statuses.items() if status is StepStatus.SKIPPED]
        assert skipped == ["gate", "last"]
        again = StepRequest(step_key="left", step_type="test", queue=QUEUE)
        await store.retry_step(harness.run_id, "left", attempt=2, reset=skipped, dispatch=[again])
        await harness.drive(harness.engine())
        summary = await harness.summary()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        assert summary.attempts_by_outcome["failed"] == 2


@pytest.mark.parametrize("first", ["left", "right"])
async def test_a_failure_has_the_same_effects_in_every_order(first: str) -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id(), max_attempts=1)
        harness.fails = lambda context: context.task.key == "left"
        await harness.trigger()
        engine = harness.engine()
        assert await tick(engine)
        steps = await engine.claim(2)
        for step in sorted(steps, key=lambda step: step.step_key != first):
            assert await store.get_run_status(harness.run_id) is RunStatus.RUNNING
            await engine.execute(step)
            await engine.advance()
        assert await store.get_run_status(harness.run_id) is RunStatus.FAILED
        assert await store.get_step_statuses(harness.run_id) == {
            "first": StepStatus.SUCCEEDED,
            "left": StepStatus.FAILED,
            "right": StepStatus.SUCCEEDED,
            "gate": StepStatus.SKIPPED,
            "last": StepStatus.SKIPPED,
        }


async def test_the_engine_ignores_other_runs() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        harness = Harness(store=store, clock=clock, run_id=new_run_id())
        other, roots = new_run_id(), Requests(harness.workflow, "another queue").roots
        await store.trigger_run(harness.workflow.flow_id, "diamond", other, "test", dispatch=roots)
        await harness.trigger()
        await harness.drive(harness.engine())
        assert await store.get_run_status(other) is RunStatus.RUNNING
        assert not await store.get_step_statuses(other)
