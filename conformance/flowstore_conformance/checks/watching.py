"""WAT: calls that wait are woken by the commits of other stores and by time, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from uuid import UUID

from flowstore_conformance.archives import under_another_id, with_queues
from flowstore_conformance.checks.fixtures import FLOW, expect_present, thread_count
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    ClaimedStep,
    FlowStore,
    RunStatus,
    StepRequest,
    StepStatus,
    StoreClosedError,
    new_run_id,
)

LEASE = timedelta(hours=1)
NEVER = timedelta(minutes=30)
"""The time-out of a call that must be woken before."""
WOKEN_SECONDS = 20.0
"""The time limit of a wake-up; it takes milliseconds, and the machine may be busy.

Shorter than the limit of a call, after which the watchdog would report a call that hangs."""
SETTLED_SECONDS = 0.05
"""The time in which a new call begins to wait. A slower one is not tested, and nothing is reported."""
CALLS = 20
MAX_TURNS = 24
"""The turns of the event loop within which a call begins to wait, in usual backends."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A run with a step in a queue of its own, and the store that changes it."""

    store: FlowStore
    run_id: UUID
    queue: str

    def request(self, step_key: str) -> StepRequest:
        return StepRequest(step_key=step_key, step_type="test", queue=self.queue)

    async def claim(self) -> ClaimedStep:
        (claimed,) = await self.store.claim_next_steps([self.queue], lease=LEASE)
        return claimed


Change = Callable[[], Awaitable[object]]
Prepare = Callable[[Scene], Awaitable[Change]]
"""Prepares a run without a ready step, and returns the call that makes one ready."""


async def _dispatch(scene: Scene) -> Change:
    return lambda: scene.store.try_record_dispatch(scene.run_id, "a", queue=scene.queue, step_type="test")


async def _trigger(scene: Scene) -> Change:
    requests = [scene.request("a")]
    return lambda: scene.store.trigger_run(FLOW, "flow", new_run_id(), "test", dispatch=requests)


async def _advance(scene: Scene) -> Change:
    await (await _dispatch(scene))()
    claimed = await scene.claim()
    requests = [scene.request("b")]
    return lambda: scene.store.advance_run(
        scene.run_id, "a", StepStatus.SUCCEEDED, attempt=claimed.attempt, dispatch=requests
    )


async def _release(scene: Scene) -> Change:
    await (await _dispatch(scene))()
    claimed = await scene.claim()
    return lambda: scene.store.release_step_claim(scene.run_id, "a", owner=claimed.owner)


async def _reschedule(scene: Scene) -> Change:
    await (await _dispatch(scene))()
    claimed = await scene.claim()
    return lambda: scene.store.reschedule_step(scene.run_id, "a", attempt=claimed.attempt)


async def _retry(scene: Scene) -> Change:
    await (await _dispatch(scene))()
    claimed = await scene.claim()
    await scene.store.record_step_complete(scene.run_id, "a", StepStatus.FAILED, attempt=claimed.attempt)
    return lambda: scene.store.retry_step(scene.run_id, "a", dispatch=[scene.request("a")])


async def _reopen(scene: Scene) -> Change:
    await scene.store.record_step_start(scene.run_id, "failed", "test")
    await scene.store.record_step_complete(scene.run_id, "failed", StepStatus.FAILED)
    await (await _dispatch(scene))()
    await scene.store.complete_run(scene.run_id, RunStatus.FAILED)
    return lambda: scene.store.retry_step(scene.run_id, "failed")


async def _redispatch(scene: Scene) -> Change:
    other = f"{scene.queue} elsewhere"
    await scene.store.try_record_dispatch(scene.run_id, "a", queue=other, step_type="test")
    return lambda: scene.store.redispatch_step(scene.run_id, "a", queue=scene.queue)


async def _deliver(scene: Scene) -> Change:
    await scene.store.register_waiter(scene.run_id, "a", "signal")
    await (await _dispatch(scene))()
    return lambda: scene.store.deliver_signal(scene.run_id, "signal", "{}")


async def _take_buffered(scene: Scene) -> Change:
    await scene.store.deliver_signal(scene.run_id, "early", "{}", buffer=True)
    await scene.store.register_waiter(scene.run_id, "a", "signal")
    await (await _dispatch(scene))()
    return lambda: scene.store.register_waiter(scene.run_id, "a", "early")


async def _remove_waiter(scene: Scene) -> Change:
    await scene.store.register_waiter(scene.run_id, "a", "signal")
    await (await _dispatch(scene))()
    return lambda: scene.store.remove_waiter(scene.run_id, "a")


async def _import(scene: Scene) -> Change:
    other = f"{scene.queue} elsewhere"
    await scene.store.try_record_dispatch(scene.run_id, "a", queue=other, step_type="test")
    archive = expect_present(await scene.store.export_run(scene.run_id), "export_run of a stored run")
    # No call before the import has made a step of this queue ready.
    queued = with_queues(under_another_id(archive, new_run_id()), lambda queue: scene.queue)
    return lambda: scene.store.import_run(queued)


CHANGES: dict[str, Prepare] = {
    "try_record_dispatch": _dispatch,
    "trigger_run with dispatch": _trigger,
    "advance_run with dispatch": _advance,
    "release_step_claim": _release,
    "reschedule_step": _reschedule,
    "retry_step with dispatch": _retry,
    "retry_step of another step, which reopens the run": _reopen,
    "redispatch_step from another queue": _redispatch,
    "deliver_signal": _deliver,
    "remove_waiter": _remove_waiter,
}
CHANGES_WITH_MAILBOX: dict[str, Prepare] = {
    "register_waiter under the name of a buffered signal": _take_buffered,
}


async def _new_scene(store: FlowStore) -> Scene:
    run_id = new_run_id()
    await store.start_run(FLOW, "flow", run_id, "test")
    return Scene(store, run_id, f"queue {run_id}")


async def _begin_waiting(store: FlowStore, queue: str) -> asyncio.Task[bool]:
    """A call that waits for a step of a queue without ready steps; a spurious True is allowed (WAT-1)."""
    for _ in range(20):
        task = asyncio.create_task(store.wait_for_steps([queue], timeout=NEVER))
        await asyncio.sleep(SETTLED_SECONDS)
        if not task.done():
            return task
        if not await task:
            raise ContractViolation("wait_for_steps returned False before its time-out")
        if await store.claim_next_steps([queue], lease=LEASE):
            raise ContractViolation("claim_next_steps claimed a step that was not ready", clause="QUE-1")
    raise Inconclusive("wait_for_steps returned True 20 times although no step was ready")


async def _woken(context: CheckContext, task: asyncio.Task[object], cause: str) -> object:
    """The result of a waiting call that the cause must have woken."""
    done, _ = await asyncio.wait({task}, timeout=WOKEN_SECONDS * context.timeout_factor)
    context.assertions += 1
    if not done:
        task.cancel()
        await asyncio.wait({task})
        raise ContractViolation(
            f"a waiting call was not woken by {cause}: after every commit that makes a step ready or ends a "
            "run, let the waiting calls of all stores look again"
        )
    return task.result()


@check("WAT-1", kind=Kind.RACE, isolated=False)
async def commits_of_any_store_wake_waiting_calls(context: CheckContext) -> None:
    """Every operation that makes a step ready wakes a call that waits for it, also in another store."""
    stores = await context.workers(2)
    waiting, changing = stores[0], stores[-1]
    changes = dict(CHANGES)
    if Capability.MAILBOX in context.capabilities:
        changes |= CHANGES_WITH_MAILBOX
    if Capability.TRANSFER in context.capabilities:
        changes["import_run"] = _import
    for name, prepare in changes.items():
        scene = await _new_scene(changing)
        change = await prepare(scene)
        task = await _begin_waiting(waiting, scene.queue)
        await change()
        context.expect(await _woken(context, task, name), True, f"the result of wait_for_steps after {name}")
        found = await waiting.claim_next_steps([scene.queue], lease=LEASE)
        context.expect(len(found), 1, f"the number of steps that are ready after {name}")
        # A call that begins when a step is ready does not wait.
        await changing.release_step_claim(found[0].run_id, found[0].step_key)
        context.expect(
            await waiting.wait_for_steps([scene.queue, "another queue"], timeout=NEVER),
            True,
            "wait_for_steps while a step is ready",
        )


@check("WAT-1", kind=Kind.RACE, isolated=False)
async def time_wakes_waiting_calls(context: CheckContext) -> None:
    """A call that waits is woken when a lease ends or a due time comes, and ends at its time-out."""
    store = await context.open(clock=None)
    scene = await _new_scene(store)
    await (await _dispatch(scene))()
    await store.claim_next_steps([scene.queue], lease=timedelta(milliseconds=300))
    task = asyncio.create_task(store.wait_for_steps([scene.queue], timeout=NEVER))
    context.expect(await _woken(context, task, "the end of a lease"), True, "the result of wait_for_steps")

    loop, short = asyncio.get_running_loop(), timedelta(milliseconds=50)
    began = loop.time()
    result = await store.wait_for_steps([f"{scene.queue} unused"], timeout=short)
    context.expect_that(
        result or loop.time() - began >= short.total_seconds() * 0.9,
        "wait_for_steps returned False before its time-out",
    )
    context.expect(
        await store.wait_for_run(scene.run_id, timeout=short),
        None,
        "wait_for_run of a Running run at its end",
    )


@check("WAT-1", kind=Kind.RACE, isolated=False)
async def the_end_of_a_run_wakes_waiting_calls(context: CheckContext) -> None:
    """wait_for_run returns the terminal status as soon as any store ends the run, and None for no run."""
    stores = await context.workers(2)
    waiting, changing = stores[0], stores[-1]
    for name in ("complete_run", "advance_run with complete_as"):
        scene = await _new_scene(changing)
        await (await _dispatch(scene))()
        claimed = await scene.claim()
        task = asyncio.create_task(waiting.wait_for_run(scene.run_id, timeout=NEVER))
        await asyncio.sleep(SETTLED_SECONDS)
        context.expect_that(not task.done(), "wait_for_run returned while the run was Running")
        if name == "complete_run":
            await changing.complete_run(scene.run_id, RunStatus.FAILED)
        else:
            await changing.advance_run(
                scene.run_id, "a", StepStatus.FAILED, attempt=claimed.attempt, complete_as=RunStatus.SUCCEEDED
            )
        sentence = f"the result of wait_for_run after {name}"
        context.expect(await _woken(context, task, name), RunStatus.FAILED, sentence)
        again = await waiting.wait_for_run(scene.run_id, timeout=NEVER)
        context.expect(again, RunStatus.FAILED, "wait_for_run of a run that has ended")
    context.expect(
        await waiting.wait_for_run(new_run_id(), timeout=NEVER), None, "wait_for_run of an unknown run"
    )


@check("WAT-2", kind=Kind.CANCELLATION, alone=True, isolated=False)
async def cancelled_waits_leave_nothing_behind(context: CheckContext) -> None:
    """Waiting calls share one thread or connection, and cancelled ones leave no task and no thread."""
    scene = await _new_scene(context.store)
    await _cancel(await _begin_waiting(context.store, scene.queue))
    tasks, threads = len(asyncio.all_tasks()), thread_count()
    calls = [await _begin_waiting(context.store, scene.queue)]
    calls += [
        asyncio.create_task(context.store.wait_for_steps([f"{scene.queue} {n}"], timeout=NEVER))
        for n in range(CALLS)
    ]
    await asyncio.sleep(SETTLED_SECONDS)
    context.expect_that(
        thread_count() <= threads + 1,
        f"{CALLS} waiting calls use {thread_count() - threads} more threads than one call",
    )
    await _cancel(*calls)
    await _expect_nothing_left(context, tasks, threads, "cancelled waiting calls")


@check("WAT-2", kind=Kind.EXAMPLE, isolated=False, alone=True)
async def closing_ends_waiting_calls(context: CheckContext) -> None:
    """aclose ends every waiting call, its thread and its tasks, also of a call that has only just begun."""
    await _close_while_calls_wait(context, lambda: asyncio.sleep(SETTLED_SECONDS))
    tasks, threads = len(asyncio.all_tasks()), thread_count()
    closings = context.profile.of(6, MAX_TURNS, MAX_TURNS)
    for turns in context.random.sample(range(MAX_TURNS), closings):
        await _close_while_calls_wait(context, partial(_take_turns, turns))
    await _expect_nothing_left(context, tasks, threads, f"{closings} closed stores with waiting calls")


async def _expect_nothing_left(context: CheckContext, tasks: int, threads: int, what: str) -> None:
    """Expect no more than these numbers of tasks and threads, once those that are ending have ended."""
    for _ in range(200):
        more_tasks, more_threads = len(asyncio.all_tasks()) - tasks, thread_count() - threads
        if more_tasks <= 0 and more_threads <= 0:
            return
        # Background work of earlier calls may be running; it ends by itself.
        await asyncio.sleep(0.05)
    context.expect_that(more_tasks <= 0, f"{what} leave {more_tasks} tasks behind")
    context.expect_that(more_threads <= 0, f"{what} leave {more_threads} threads behind")


async def _take_turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def _close_while_calls_wait(context: CheckContext, begin: Callable[[], Awaitable[None]]) -> None:
    """Close a store after calls have begun to wait; ``begin`` gives them time for that."""
    store = await context.open()
    scene = await _new_scene(store)
    calls: list[asyncio.Task[object]] = [
        asyncio.create_task(store.wait_for_steps([scene.queue], timeout=NEVER)),
        asyncio.create_task(store.wait_for_run(scene.run_id, timeout=NEVER)),
    ]
    await begin()
    await store.aclose()
    done, pending = await asyncio.wait(calls, timeout=WOKEN_SECONDS * context.timeout_factor)
    for call in pending:
        call.cancel()
    context.expect_that(not pending, "aclose must end every waiting call")
    for call in done:
        error = call.exception()
        context.expect_that(
            isinstance(error, StoreClosedError),
            f"a waiting call ends with StoreClosedError when the store is closed, not with {error!r}",
        )


async def _cancel(*calls: asyncio.Task[bool]) -> None:
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
