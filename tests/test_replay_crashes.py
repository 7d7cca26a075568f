"""The reference engine under crashes: killed between any two of its store calls, it leaves nothing lost.

The engine is killed in-process: a store that, from its n-th call on, raises what nobody catches. What
the store then holds is what a SIGKILL at that moment would have left. Another engine takes over, on a
virtual clock, so that leases run out without anybody waiting for them.
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
from uuid import UUID

import pytest

from flowstore_core import (
    ClaimLostError,
    ConflictError,
    FlowStore,
    OutcomeUnknownError,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_replay import Engine, Task, WorkFailed, Workflow, verify
from flowstore_replay.engine import StepContext
from flowstore_replay.verify import Summary
from flowstore_replay.work import output_of
from tests.virtual_clock import VirtualClock

LEASE = timedelta(seconds=30)


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
    """The process is gone. No Exception: nothing may catch it."""


class Interposed:
    """A store with something to say before and after each call; everything else goes through."""

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


class Mortal(Interposed):
    """Dies before its n-th call, which is after the one before, and stays dead."""

    def __init__(self, store: FlowStore, dies_at: int) -> None:
        super().__init__(store)
        self.dies_at = dies_at

    async def before(self, name: str) -> None:
        if self.calls >= self.dies_at:
            raise Killed


@dataclass
class Scene:
    """A run, and all that happens to it besides the engines."""

    store: FlowStore
    clock: VirtualClock
    run_id: UUID
    workflow: Workflow = field(default_factory=diamond)
    approval_steps: Collection[str] = ()
    fails: Callable[[StepContext], bool] = lambda context: False
    max_attempts: int = 3
    cancel_at: int | None = None
    turns: int = 0
    engines: int = 0

    def engine(self, store: Any = None, lease: timedelta = LEASE) -> Engine:
        self.engines += 1
        return Engine(
            store or self.store,
            self.workflow,
            self.work,
            name=f"engine-{self.engines}",
            lease=lease,
            max_attempts=self.max_attempts,
            approval_steps=self.approval_steps,
        )

    async def work(self, context: StepContext) -> str:
        await asyncio.sleep(context.task.seconds)
        if self.fails(context):
            raise WorkFailed("on purpose")
        return output_of(context.task, context.inputs)

    async def drive(self, engine: Engine) -> None:
        """What Engine.run does, but time passes only when there is nothing left to do."""
        idle = 0
        while await self.store.get_run_status(self.run_id) is RunStatus.RUNNING:
            self.turns += 1
            if self.turns == self.cancel_at:
                await self.store.request_cancel(self.run_id, "changed my mind")
            try:
                moved = await engine.tick([self.run_id])
            except (ConflictError, StoreUnavailableError):
                moved = False
            idle = 0 if moved else idle + 1
            if idle > 1:
                assert idle < 200, "the run is stuck"
                for waiter in await self.store.get_waiters(self.run_id):
                    if waiter.delivered_at is None:
                        await self.store.deliver_signal(self.run_id, waiter.signal_name, '"go"')
                self.clock.advance(seconds=31)
            await asyncio.sleep(0)

    async def verdict(self) -> Summary:
        return await verify(self.store, self.workflow, [self.run_id], approval_steps=self.approval_steps)


SCENES: dict[str, dict[str, Any]] = {
    "plain": {},
    "every first attempt fails": {"fails": lambda context: context.attempt == 1},
    "waits for a signal": {"approval_steps": ["first", "gate"]},
    "fails for good": {"fails": lambda context: context.task.key == "left", "max_attempts": 2},
    "cancelled": {"cancel_at": 4, "fails": lambda context: context.attempt == 1, "approval_steps": ["first"]},
    "past its deadline": {},
}
ENDS = {
    "fails for good": RunStatus.FAILED,
    "cancelled": RunStatus.CANCELLED,
    "past its deadline": RunStatus.CANCELLED,
}


async def play(name: str, crashes: Collection[int]) -> Scene:
    """A scene in which one engine after another dies at its n-th call, and a last one does not."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), **SCENES[name])
        deadline = clock() + timedelta(seconds=1) if name == "past its deadline" else None
        await store.trigger_run(
            scene.workflow.flow_id, "diamond", scene.run_id, "test", idempotency_key="k", timeout_at=deadline
        )
        if deadline is not None:
            assert await scene.engine().tick([scene.run_id])
            clock.advance(seconds=2)
        for dies_at in crashes:
            engine = scene.engine(Mortal(store, dies_at))
            # It may be done before it can die.
            with contextlib.suppress(Killed):
                await scene.drive(engine)
            clock.advance(seconds=31)
        await scene.drive(scene.engine())
        await judge(name, scene)
    return scene


async def judge(name: str, scene: Scene) -> None:
    if name not in ENDS:
        summary = await scene.verdict()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        return
    detail = await scene.store.get_run_detail(scene.run_id)
    assert detail is not None
    assert detail.status is ENDS[name]
    assert all(step.status.is_terminal for step in detail.steps)
    assert all(attempt.completed_at for step in detail.steps for attempt in step.attempts)
    assert not await scene.store.get_claimed_step_keys(scene.run_id)
    dispatched = await scene.store.get_dispatched_step_keys(scene.run_id)
    assert dispatched <= {step.step_key for step in detail.steps}
    if name == "cancelled":
        control = await scene.store.get_run_control(scene.run_id)
        assert control is not None
        assert control.cancel_reason == "changed my mind"


async def count_calls(name: str) -> int:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), **SCENES[name])
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        counted = Interposed(store)
        await scene.drive(scene.engine(counted))
        return counted.calls


@pytest.mark.parametrize("name", SCENES)
async def test_killed_between_any_two_store_calls_another_engine_finishes(name: str) -> None:
    calls = await count_calls(name)
    assert calls > 20
    for dies_at in range(1, calls + 2):
        try:
            await play(name, [dies_at])
        except AssertionError as error:
            raise AssertionError(f"killed before call {dies_at}: {error}") from error


@pytest.mark.parametrize("name", SCENES)
async def test_killed_again_and_again(name: str) -> None:
    chance = random.Random(name)
    for _ in range(25):
        crashes = [chance.randint(1, 40) for _ in range(chance.randint(2, 8))]
        try:
            await play(name, crashes)
        except AssertionError as error:
            raise AssertionError(f"killed before calls {crashes}: {error}") from error


async def test_takeovers_are_told_apart_from_failures() -> None:
    """Killed right after a start, the attempt counts as taken over and not as a failure of the step."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), max_attempts=1)
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")

        class DiesAtWork(Interposed):
            async def after(self, name: str) -> None:
                if name == "record_step_start":
                    raise Killed

        for _ in range(3):
            with pytest.raises(Killed):
                await scene.drive(scene.engine(DiesAtWork(store)))
            clock.advance(seconds=31)
        await scene.drive(scene.engine())
        summary = await scene.verdict()
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
async def test_engines_that_race_and_die_do_each_step_once(seed: int) -> None:
    """Four engines, interleaved at every call in an order of chance; all but one die sooner or later."""
    chance = random.Random(seed)

    class Interleaved(Mortal):
        async def before(self, name: str) -> None:
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            await super().before(name)
            if chance.random() < 0.02:
                scene.clock.advance(seconds=20)

    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(
            store=store,
            clock=clock,
            run_id=new_run_id(),
            fails=lambda context: context.attempt == 1 and context.task.key in ("left", "last"),
            max_attempts=10,
            approval_steps=["gate"],
        )
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        deaths = [chance.randint(1, 60) for _ in range(3)]
        engines = [scene.engine(Interleaved(store, dies_at)) for dies_at in [*deaths, 10**9]]
        outcomes = await asyncio.gather(*map(scene.drive, engines), return_exceptions=True)
        assert all(outcome is None or isinstance(outcome, Killed) for outcome in outcomes), outcomes
        summary = await scene.verdict()
        assert summary.ok, [check for check in summary.checks if not check.ok]


@pytest.mark.parametrize("seed", range(10))
async def test_a_store_that_comes_and_goes_loses_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(seed)
    monkeypatch.setattr("flowstore_replay.retry.RETRY_INTERVAL", 0.001)

    class Flaky(Interposed):
        async def before(self, name: str) -> None:
            if chance.random() < 0.1:
                raise StoreUnavailableError("not now")

        async def after(self, name: str) -> None:
            if chance.random() < 0.1:
                raise OutcomeUnknownError(name)

    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(
            store=store, clock=clock, run_id=new_run_id(), fails=lambda context: context.attempt == 1
        )
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        await scene.drive(scene.engine(Flaky(store)))
        summary = await scene.verdict()
        assert summary.ok, [check for check in summary.checks if not check.ok]


async def test_a_worker_taken_for_dead_drops_its_result() -> None:
    """Its lease runs out while it works; the other's attempt is the one that counts."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        workflow = diamond(seconds=0.05)
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), workflow=workflow)
        await store.trigger_run(workflow.flow_id, "diamond", scene.run_id, "test")
        slow = asyncio.create_task(scene.engine(lease=timedelta(seconds=0.2)).tick([scene.run_id]))
        await asyncio.sleep(0.02)
        clock.advance(seconds=1)
        await scene.drive(scene.engine())
        with pytest.raises(ConflictError):
            await slow
        summary = await scene.verdict()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        assert summary.attempts_by_outcome["taken_over"] == 1


async def test_a_heartbeat_keeps_a_long_step_and_notices_that_the_claim_is_lost() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        workflow = diamond(seconds=0.3)
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), workflow=workflow)
        await store.trigger_run(workflow.flow_id, "diamond", scene.run_id, "test")
        counted = Interposed(store)
        lease = timedelta(seconds=0.06)
        turn = asyncio.create_task(scene.engine(counted, lease).tick([scene.run_id]))
        for _ in range(10):
            await asyncio.sleep(0.01)
            clock.advance(milliseconds=10)
        assert await store.get_claimed_step_keys(scene.run_id) == {"first"}
        clock.advance(seconds=1)
        assert await asyncio.wait_for(turn, 0.2)
        assert await store.get_step_statuses(scene.run_id) == {"first": StepStatus.RUNNING}
        assert [(s.step_key, s.reason) for s in await store.get_stalled_steps()] == [
            ("first", "LeaseExpired")
        ]


async def test_a_cancel_interrupts_a_long_step_at_its_next_heartbeat() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        workflow = diamond(seconds=60)
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), workflow=workflow)
        await store.trigger_run(workflow.flow_id, "diamond", scene.run_id, "test")
        running = asyncio.create_task(scene.engine(lease=timedelta(seconds=0.06)).run([scene.run_id]))
        await asyncio.sleep(0.1)
        assert await store.get_step_statuses(scene.run_id) == {"first": StepStatus.RUNNING}
        await store.request_cancel(scene.run_id, "changed my mind")
        await asyncio.wait_for(running, 5)
        detail = await store.get_run_detail(scene.run_id)
        assert detail is not None
        assert detail.status is RunStatus.CANCELLED
        assert [(s.status, s.error_message) for s in detail.steps] == [
            (StepStatus.SKIPPED, "the run is stopped: changed my mind")
        ]


async def test_a_retry_decided_before_a_cancel_does_not_undo_it() -> None:
    """One engine has seen a failed step and is about to retry it while another ends the cancelled run."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), fails=lambda context: True)
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        assert await scene.engine().tick([scene.run_id])

        class Late(Interposed):
            async def before(self, name: str) -> None:
                if name == "retry_step":
                    await store.request_cancel(scene.run_id, "changed my mind")
                    assert await scene.engine().tick([scene.run_id])

        with pytest.raises(ConflictError):
            await scene.engine(Late(store)).tick([scene.run_id])
        assert await store.get_run_status(scene.run_id) is RunStatus.CANCELLED


@pytest.mark.parametrize("moment", [("get_runs_to_stop", 1), ("get_run_control", 1), ("get_runs_to_stop", 2)])
async def test_a_deadline_that_is_extended_meanwhile_does_not_stop_the_run(moment: tuple[str, int]) -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id())
        await store.trigger_run(
            scene.workflow.flow_id, "diamond", scene.run_id, "test", timeout_at=clock() + timedelta(seconds=1)
        )
        clock.advance(seconds=2)

        class Extending(Interposed):
            seen: ClassVar[list[str]] = []

            async def after(self, name: str) -> None:
                self.seen.append(name)
                if (name, self.seen.count(name)) == moment:
                    await store.extend_deadline(scene.run_id, clock() + timedelta(hours=1))

        await scene.engine(Extending(store)).tick([scene.run_id])
        control = await store.get_run_control(scene.run_id)
        assert control is not None
        assert not control.cancel_requested


async def test_a_step_retried_at_the_last_moment_keeps_its_run_open() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id())
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")

        class Overtaken(Interposed):
            async def before(self, name: str) -> None:
                if name == "complete_run":
                    await store.retry_step(scene.run_id, "last", attempt=1)

        engine = scene.engine(Overtaken(store))
        for _ in range(6):
            await engine.tick([scene.run_id])
        assert await store.get_run_status(scene.run_id) is RunStatus.RUNNING
        await scene.drive(scene.engine())
        assert len((await scene.verdict()).takeovers) == 0
        assert await store.get_run_status(scene.run_id) is RunStatus.SUCCEEDED


async def test_a_failed_run_that_is_reopened_goes_on_to_its_end() -> None:
    """What ``flowstore runs retry --reset-skipped`` does once the cause of the failure is gone."""
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), max_attempts=2, approval_steps=["right"])
        scene.fails = lambda context: context.task.key == "left"
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        for _ in range(50):
            with contextlib.suppress(ConflictError):
                await scene.engine().tick([scene.run_id])
        assert await store.get_run_status(scene.run_id) is RunStatus.FAILED
        statuses = await store.get_step_statuses(scene.run_id)
        scene.fails = lambda context: False
        skipped = [key for key, status in statuses.items() if status is StepStatus.SKIPPED]
        await store.retry_step(scene.run_id, "left", attempt=2, reset=skipped)
        await scene.drive(scene.engine())
        summary = await scene.verdict()
        assert summary.ok, [check for check in summary.checks if not check.ok]
        assert summary.attempts_by_outcome["failed"] == 2


async def test_a_run_whose_step_was_skipped_by_hand_does_not_hang() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id())
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        await store.record_skipped_step(scene.run_id, "left", "test", "not today")
        await scene.drive(scene.engine())
        assert await store.get_run_status(scene.run_id) is RunStatus.FAILED
        assert (await store.get_step_statuses(scene.run_id))["right"] is StepStatus.SUCCEEDED


async def test_a_failed_run_ends_only_when_nobody_works_on_it_any_more() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id(), max_attempts=1)
        scene.fails = lambda context: context.task.key == "right"
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")
        assert await scene.engine().tick([scene.run_id])
        await store.try_record_dispatch(scene.run_id, "left")
        await store.try_claim_step(scene.run_id, "left", owner="other", lease=LEASE)
        attempt = await store.record_step_start(scene.run_id, "left", "test", owner="other")
        engine = scene.engine()
        for _ in range(5):
            await engine.tick([scene.run_id])
        assert await store.get_run_status(scene.run_id) is RunStatus.RUNNING
        await store.record_step_complete(scene.run_id, "left", StepStatus.SUCCEEDED, attempt=attempt)
        assert await engine.tick([scene.run_id])
        assert await store.get_run_status(scene.run_id) is RunStatus.FAILED


async def test_a_worker_that_dawdles_between_claim_and_start_does_not_start() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id())
        await store.trigger_run(scene.workflow.flow_id, "diamond", scene.run_id, "test")

        class Dawdling(Interposed):
            async def before(self, name: str) -> None:
                if name == "record_step_start":
                    clock.advance(seconds=31)

        with pytest.raises(ClaimLostError):
            await scene.engine(Dawdling(store)).tick([scene.run_id])
        assert not await store.get_step_statuses(scene.run_id)


async def test_the_engine_leaves_the_runs_of_others_alone() -> None:
    clock = VirtualClock()
    async with open_store("memory://", clock=clock) as store:
        scene = Scene(store=store, clock=clock, run_id=new_run_id())
        other = new_run_id()
        for run_id in (scene.run_id, other):
            await store.trigger_run(scene.workflow.flow_id, "diamond", run_id, "test")
        await store.try_record_dispatch(other, "first")
        await store.try_record_dispatch(scene.run_id, "no such task")
        await store.release_dispatch(scene.run_id, "no such task")
        await scene.drive(scene.engine())
        assert await store.get_run_status(other) is RunStatus.RUNNING
        assert not await store.get_step_statuses(other)
