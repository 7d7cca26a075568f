"""Calls that are cancelled at every step: whole or undone, given back, and nothing left behind (CON-4)."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance import observation
from flowstore_conformance.bench import Bench, Inconclusive, Violation
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.history import Call, Outcome, Raised, Returned, comparable, error_name
from flowstore_conformance.model import State
from flowstore_conformance.observation import (
    Expectation,
    ask,
    difference,
    find_half,
    look_until,
    outcome_of,
    what_to_ask,
)
from flowstore_conformance.situations import (
    LEASE,
    LONG_AGO,
    NEEDS,
    SETTINGS,
    Scene,
    Setting,
    available,
    make_scene,
)
from flowstore_core import FlowStore, FlowStoreError, open_store


async def _set_up(store: FlowStore, scene: Scene) -> None:
    for call in scene.setup:
        await ask(store, call)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What became of a call that was cancelled."""

    scene: Scene
    yields: int
    outcome: Outcome | None
    """What it answered all the same; None if it was cancelled."""


async def _cut(store: FlowStore, scene: Scene, yields: int, *, times: bool) -> Cut:
    """Make the scene's call and cancel it after the loop has turned so often."""
    task = asyncio.ensure_future(ask(store, scene.call))
    for _ in range(yields):
        if task.done():
            break
        await asyncio.sleep(0)
    task.cancel()
    # Not awaited itself, so that a cancellation of the check is not taken for the call's.
    await asyncio.wait({task})
    outcome: Outcome | None = None
    if not task.cancelled():
        error = task.exception()
        if error is None:
            outcome = Returned(comparable(task.result(), times=times))
        elif isinstance(error, FlowStoreError):
            outcome = Raised(error_name(error))
        else:
            message = f"{scene.call.method}, cancelled after {yields} turns of the event loop, let out"
            raise Violation(f"{message} {type(error).__name__}", clause="CON-2") from error
    return Cut(scene=scene, yields=yields, outcome=outcome)


async def _turns(store: FlowStore, scene: Scene) -> int:
    """How often the loop turns while the scene's call runs to its end."""
    task = asyncio.ensure_future(ask(store, scene.call))
    turns = 0
    while not task.done():
        await asyncio.sleep(0)
        turns += 1
    await task
    return turns


def _points(bench: Bench, turns: int, count: int) -> list[int]:
    """When to cancel: at each of the first turns, and spread over the rest, a little by chance."""
    if turns + 2 <= count:
        return list(range(turns + 2))
    first = max(count // 4, 1)
    rest = count - first
    step = (turns - first) / rest
    return [*range(first), *(first + int(step * (number + bench.random.random())) for number in range(rest))]


async def _settle(before: set[asyncio.Task[object]]) -> None:
    """Let what cancelled calls have left under way come to its end, bounded."""
    deadline = asyncio.get_running_loop().time() + observation.PATIENCE_SECONDS
    while (left := asyncio.all_tasks() - before) and asyncio.get_running_loop().time() < deadline:
        await asyncio.wait(left, timeout=0.1)


def _expected(bench: Bench, calls: Sequence[Call]) -> Expectation:
    """The model's state after some calls."""
    state = Expectation(bench.clock or (lambda: datetime.now(UTC)), State())
    for call in calls:
        state = state.then(call, times=bench.times)
    return state


async def _examine(bench: Bench, store: FlowStore, cut: Cut) -> None:
    """Whole or not at all; then the same call again must be answered as that state demands."""
    scene, times = cut.scene, bench.times
    before = _expected(bench, scene.setup)
    after = before.then(scene.call, times=times)
    if cut.outcome is not None:
        bench.expect_that(
            cut.outcome == after.outcome or isinstance(cut.outcome, Raised),
            f"{_title(cut)} answered {cut.outcome}, where {after.outcome} is right",
        )
    if isinstance(cut.outcome, Returned):
        possible = [after]
    elif scene.gives_back:
        possible = [before]
    else:
        possible = [before, after]
    half = await find_half(store, scene.asked, scene.call, before=before, possible=possible, times=times)
    bench.exercised += 1
    if half is not None:
        what = "left what it had won" if possible == [before] else "was neither whole nor undone"
        raise Violation(f"{_title(cut)} {what}: {half}", program=_program(cut))


def _title(cut: Cut) -> str:
    return f"{cut.scene.call.method}, cancelled after {cut.yields} turns of the event loop,"


def _program(cut: Cut) -> str:
    lines = [
        "import asyncio, sys",
        "from datetime import datetime, timedelta",
        "from uuid import UUID",
        "",
        "from flowstore_core import open_store",
        "",
        "",
        "async def main() -> None:",
        "    async with open_store(sys.argv[1]) as store:",
        *(f"        await {call.source()}" for call in cut.scene.setup),
        f"        task = asyncio.create_task({cut.scene.call.source()})",
        f"        for _ in range({cut.yields}):",
        "            await asyncio.sleep(0)",
        "        task.cancel()",
        "        await asyncio.wait({task})",
        "        await asyncio.sleep(1)",
        *(f"        print(await {call.source()})" for call in cut.scene.asked),
        "",
        "",
        "asyncio.run(main())",
    ]
    return "\n".join(lines)


async def _cut_everywhere(bench: Bench, settings: dict[str, Setting], count: int) -> None:
    """Cancel the call of each setting at ``count`` moments, each on a run of its own."""
    other = await bench.open()
    for setting in settings.values():
        whole = make_scene(bench, setting)
        await _set_up(bench.store, whole)
        points = _points(bench, await _turns(bench.store, whole), count)
        scenes = [make_scene(bench, setting) for _ in points]
        await asyncio.gather(*(_set_up(bench.store, scene) for scene in scenes))
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        cuts = [
            await _cut(bench.store, scene, point, times=bench.times)
            for scene, point in zip(scenes, points, strict=True)
        ]
        await _settle(before)
        # Every other one is looked at by a further store: what happened, happened for all.
        await asyncio.gather(
            *(_examine(bench, other if number % 2 else bench.store, cut) for number, cut in enumerate(cuts))
        )


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_write_happened_or_did_not(bench: Bench) -> None:
    """Each writing call, cancelled at each step, has happened whole or not at all, and can be said again."""
    await _cut_everywhere(bench, available(bench.capabilities), bench.profile.of(5, 8, 60))


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_win_is_given_back_before_the_store_closes(bench: Bench) -> None:
    """An ownerless claim or a dispatch that was won and cancelled is given back; closing waits for that."""
    rounds = bench.profile.of(2, 4, 20)
    settings = {
        name: setting
        for name, setting in available(bench.capabilities).items()
        if name in ("claim_without_owner", "dispatch")
    }
    whole = make_scene(bench, settings["dispatch"])
    await _set_up(bench.store, whole)
    turns = await _turns(bench.store, whole)
    for _ in range(rounds):
        closing = await bench.open()
        scenes = [make_scene(bench, setting) for setting in settings.values() for _ in range(10)]
        await asyncio.gather(*(_set_up(closing, scene) for scene in scenes))
        # With so many at once the loop turns far less often while one of them is under way.
        yields = [int((turns + 2) ** bench.random.random()) - 1 for _ in scenes]
        # All at once: some are cancelled while they wait for a connection or for the writer.
        cuts = await asyncio.gather(
            *(
                _cut(closing, scene, point, times=bench.times)
                for scene, point in zip(scenes, yields, strict=True)
            )
        )
        await closing.aclose()
        await asyncio.gather(*(_examine(bench, bench.store, cut) for cut in cuts))


@check("CON-4", kind=Kind.CANCELLATION)
async def cancelled_reads_leave_the_store_usable(bench: Bench) -> None:
    """Reads, cancelled at each step, let out nothing, change nothing and leave the store usable."""
    setup, retry = SETTINGS["retry_step"](UUID(int=bench.random.getrandbits(128)), UUID(int=7))
    run_id = retry.arguments["run_id"]
    for call in setup:
        await ask(bench.store, call)
    reads = [
        *what_to_ask(run_id, bench.capabilities, step_keys=("a",), keys=[(UUID(int=7), "manual", "K")]),
        Call(method="get_runs"),
        Call(method="get_active_runs"),
        Call(method="get_derived_runs", arguments={"source_run_id": run_id}),
    ]
    window = {"granularity": "hour", "since": LONG_AGO, "until": LONG_AGO + 5 * LEASE}
    for method, arguments in (
        ("get_runs_page", {"search": "orders"}),
        ("get_statistics", {}),
        ("get_run_timeseries", window),
        ("get_stalled_steps", {}),
        ("get_runs_to_stop", {}),
    ):
        if NEEDS[method] in bench.capabilities:
            reads.append(Call(method=method, arguments=arguments))
    for read in reads:
        scene = Scene(run_id=run_id, setup=(), call=read, gives_back=False, asked=())
        right = await outcome_of(bench.store, read, times=bench.times)
        for point in _points(bench, await _turns(bench.store, scene), bench.profile.of(3, 6, 40)):
            cut = await _cut(bench.store, scene, point, times=bench.times)
            bench.expect_that(
                cut.outcome in (None, right), f"{_title(cut)} answered {cut.outcome}, not {right}"
            )
        bench.expect_that(
            await outcome_of(bench.store, read, times=bench.times) == right,
            f"{read.method} answers otherwise after calls of it were cancelled",
        )


def _threads() -> int:
    # The event loop keeps the threads of its own executor until it ends.
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())


def _descriptors() -> int:
    """How many files and sockets the process has open; 0 where the system does not tell."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0


@check("CON-4", kind=Kind.CANCELLATION)
async def cancelled_calls_leave_nothing_behind(bench: Bench) -> None:
    """After a storm of cancelled calls, and closing, no task, thread or connection is left."""
    settings = list(available(bench.capabilities).values())

    async def storm(store: FlowStore, size: int) -> Sequence[Cut]:
        scenes = [make_scene(bench, settings[number % len(settings)]) for number in range(size)]
        await asyncio.gather(*(_set_up(store, scene) for scene in scenes))
        # None of the turns often: a store that answers at once can be cancelled nowhere else.
        yields = [bench.random.choice((0, bench.random.randrange(60))) for _ in scenes]
        cuts = [
            _cut(store, scene, point, times=bench.times) for scene, point in zip(scenes, yields, strict=True)
        ]
        return await asyncio.gather(*cuts)

    # The first time may load what is kept for ever; that is no leak.
    async with open_store(bench.url, clock=bench.clock) as store:
        await storm(store, len(settings))
    gc.collect()
    tasks, threads, descriptors = set(asyncio.all_tasks()), _threads(), _descriptors()
    async with open_store(bench.url, clock=bench.clock) as store:
        cuts: list[Cut] = []
        for _ in range(bench.profile.of(1, 2, 10)):
            cuts += await storm(store, len(settings))
        if all(cut.outcome is not None for cut in cuts):
            raise Inconclusive("no call was still under way when it was cancelled")
        await _settle(tasks)
        await asyncio.gather(*(_examine(bench, store, cut) for cut in cuts[: len(settings)]))
        opened = len(asyncio.all_tasks() - tasks)
        growing = bench.profile.of(20, 40, 200)
        for _ in range(growing):
            await _cut(store, make_scene(bench, SETTINGS["start_run"]), 1, times=bench.times)
        await _settle(tasks)
        grown = len(asyncio.all_tasks() - tasks) - opened
        bench.expect_that(
            grown < growing / 2, f"{growing} cancelled calls left {grown} tasks that do not end"
        )
    deadline = asyncio.get_running_loop().time() + observation.PATIENCE_SECONDS
    while True:
        gc.collect()
        left = [task for task in asyncio.all_tasks() - tasks if not task.done()]
        more = (_threads() - threads, _descriptors() - descriptors)
        if not left and max(more) <= 0:
            break
        if asyncio.get_running_loop().time() > deadline:
            break
        await asyncio.sleep(0.01)
    bench.expect_that(not left, f"{len(left)} tasks run on after the store was closed, the first: {left[:1]}")
    bench.expect_that(more[0] <= 0, f"{more[0]} more threads run after the store was closed than before")
    bench.expect_that(
        more[1] <= 0, f"{more[1]} more files or sockets are open after the store was closed than before"
    )


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_cleanup_deleted_whole_runs(bench: Bench) -> None:
    """A cleanup, cancelled at each step, leaves each run as it was or deletes it with all it had."""
    cleanup = Call(method="cleanup", arguments={"cutoff": datetime(2099, 1, 1, tzinfo=UTC)})
    setting = available(bench.capabilities)["retry_step"]
    # Of the setting only the setup is wanted: a run that failed, with something in every place.
    whole = [make_scene(bench, setting) for _ in range(4)]
    await asyncio.gather(*(_set_up(bench.store, scene) for scene in whole))
    turns = await _turns(bench.store, replace(whole[0], call=cleanup))
    for point in _points(bench, turns, bench.profile.of(3, 6, 40)):
        scenes = [replace(make_scene(bench, setting), call=cleanup) for _ in range(4)]
        await asyncio.gather(*(_set_up(bench.store, scene) for scene in scenes))
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        cut = await _cut(bench.store, scenes[0], point, times=bench.times)
        await _settle(before)
        for scene in scenes:
            gone = _expected(bench, ())
            kept = _expected(bench, scene.setup)
            wanted = [one.look(scene.asked, times=bench.times) for one in (gone, kept)]
            seen = await look_until(bench.store, scene.asked, wanted, times=bench.times)
            bench.expect_that(
                seen in wanted, f"{_title(cut)} deleted half a run: {difference(scene.asked, seen, wanted)}"
            )
