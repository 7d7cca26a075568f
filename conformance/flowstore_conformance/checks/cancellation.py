"""Calls that are cancelled at every step: whole or undone, given back, and nothing left behind (CON-4)."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance import observation
from flowstore_conformance.bench import Bench, Inconclusive, Violation
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.cutting import Course, Cut, Point, course, cut, program, sweep
from flowstore_conformance.history import Call, Raised, Returned
from flowstore_conformance.model import State
from flowstore_conformance.observation import (
    Expectation,
    answer,
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
from flowstore_core import FlowStore


async def _set_up(store: FlowStore, scene: Scene) -> None:
    for call in scene.setup:
        await ask(store, call)


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


async def _examine(bench: Bench, store: FlowStore, made: Cut) -> None:
    """Whole or not at all; then the same call again must be answered as that state demands."""
    scene, times = made.scene, bench.times
    before = _expected(bench, scene.setup)
    after = before.then(scene.call, times=times)
    if made.outcome is not None:
        assert after.outcome is not None
        bench.expect_that(
            made.outcome == after.outcome or isinstance(made.outcome, Raised),
            f"{made.title} gave {answer(made.outcome)}, where {answer(after.outcome)} is right",
        )
    if isinstance(made.outcome, Returned):
        possible = [after]
    elif scene.gives_back:
        possible = [before]
    else:
        possible = [before, after]
    half = await find_half(store, scene.asked, scene.call, before=before, possible=possible, times=times)
    bench.exercised += 1
    if half is not None:
        what = "left what it had won" if possible == [before] else "was neither whole nor undone"
        raise Violation(f"{made.title} {what}: {half}", program=program(made))


async def _cut_everywhere(bench: Bench, settings: dict[str, Setting], moments: int) -> None:
    """Cancel the call of each setting at every point, and at so many moments, each on a run of its own."""
    *_, other = await bench.workers(2)
    for setting in settings.values():

        async def make(count: int, setting: Setting = setting) -> Sequence[Scene]:
            scenes = [make_scene(bench, setting) for _ in range(count)]
            await asyncio.gather(*(_set_up(bench.store, scene) for scene in scenes))
            return scenes

        [whole] = await make(1)
        usual = await course(bench.store, whole)
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        swept = sweep(
            bench.store,
            make,
            usual,
            bench.random,
            # What was won and must be given back is won at one moment, in a server or thread perhaps.
            moments=(4 if whole.gives_back else 1) * moments,
            times=bench.times,
            most=bench.profile.of(24, 60, 200),
        )
        cuts = [made async for made in swept]
        await _settle(before)
        # Every other one is looked at by a further store: what happened, happened for all.
        await asyncio.gather(
            *(_examine(bench, other if number % 2 else bench.store, made) for number, made in enumerate(cuts))
        )


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_write_happened_or_did_not(bench: Bench) -> None:
    """Each writing call, cancelled at each step, has happened whole or not at all, and can be said again."""
    await _cut_everywhere(bench, available(bench.capabilities), bench.profile.of(2, 5, 40))


@check("CON-4", kind=Kind.CANCELLATION)
async def a_cancelled_win_is_given_back_before_the_store_closes(bench: Bench) -> None:
    """An ownerless claim or a dispatch that was won and cancelled is given back; closing waits for that."""
    rounds = bench.profile.of(3, 5, 20)
    settings = {
        name: setting
        for name, setting in available(bench.capabilities).items()
        if name in ("claim_without_owner", "dispatch")
    }
    whole = make_scene(bench, settings["dispatch"])
    await _set_up(bench.store, whole)
    usual = await course(bench.store, whole)
    for _ in range(rounds):
        closing = await bench.open()
        scenes = [make_scene(bench, setting) for setting in settings.values() for _ in range(10)]
        await asyncio.gather(*(_set_up(closing, scene) for scene in scenes))
        # All at once: some are cancelled while they wait for a connection or for the writer.
        points = [_some_point(bench, usual, len(scenes)) for _ in scenes]
        cuts = await asyncio.gather(
            *(
                cut(closing, scene, point, times=bench.times)
                for scene, point in zip(scenes, points, strict=True)
            )
        )
        await closing.aclose()
        await asyncio.gather(*(_examine(bench, bench.store, made) for made in cuts))


def _some_point(bench: Bench, usual: Course, crowd: int) -> Point:
    """A point of a call among so many at the same time, so that each takes longer than alone."""
    if bench.random.random() < 0.5:
        return Point(bench.random.randrange(usual.waits + 2))
    return Point(seconds=usual.seconds * bench.random.random() * (1 + crowd * bench.random.random()))


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

        async def make(count: int, scene: Scene = scene) -> Sequence[Scene]:
            return [scene] * count

        right = await outcome_of(bench.store, read, times=bench.times)
        usual = await course(bench.store, scene)
        moments = bench.profile.of(1, 3, 20)
        async for made in sweep(bench.store, make, usual, bench.random, moments=moments, times=bench.times):
            if made.outcome not in (None, right):
                assert made.outcome is not None
                message = f"{made.title} gave {answer(made.outcome)}, where {answer(right)} is right"
                raise Violation(message)
            bench.exercised += 1
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

    async def storm(store: FlowStore) -> Sequence[Cut]:
        """Every call several times: cancelled where it first waits, later, and before it began."""
        # The last is the only one at which a store can be cancelled that answers at once.
        points = [Point(1), Point(bench.random.randrange(2, 6)), Point(0)]
        cuts = [(make_scene(bench, setting), point) for point in points for setting in settings]
        await asyncio.gather(*(_set_up(store, scene) for scene, _ in cuts))
        return await asyncio.gather(*(cut(store, scene, point, times=bench.times) for scene, point in cuts))

    # The first time may load what is kept for ever; that is no leak.
    store = await bench.open()
    await storm(store)
    await store.aclose()
    gc.collect()
    tasks, threads, descriptors = set(asyncio.all_tasks()), _threads(), _descriptors()
    store = await bench.open()
    await _set_up(store, make_scene(bench, SETTINGS["claim_step"]))
    # A store may keep tasks of its own for as long as it is open.
    resident = set(asyncio.all_tasks())
    cuts: list[Cut] = []
    for _ in range(bench.profile.of(1, 2, 10)):
        cuts += await storm(store)
    if all(made.outcome is not None for made in cuts):
        raise Inconclusive("no call was still under way when it was cancelled")
    await _settle(resident)
    await asyncio.gather(*(_examine(bench, store, made) for made in cuts[: len(settings)]))
    opened = len(asyncio.all_tasks() - tasks)
    growing = bench.profile.of(20, 40, 200)
    for _ in range(growing):
        await cut(store, make_scene(bench, SETTINGS["start_run"]), Point(1), times=bench.times)
    await _settle(resident)
    grown = len(asyncio.all_tasks() - tasks) - opened
    bench.expect_that(grown < growing / 2, f"{growing} cancelled calls left {grown} tasks that do not end")
    await store.aclose()
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
    async def make() -> Sequence[Scene]:
        scenes = [replace(make_scene(bench, setting), call=cleanup) for _ in range(3)]
        await asyncio.gather(*(_set_up(bench.store, scene) for scene in scenes))
        return scenes

    usual = await course(bench.store, (await make())[0])
    most = bench.profile.of(5, 12, 60)
    points = [Point(number) for number in range(usual.waits + 2)]
    if len(points) > most:
        points = [points[0], points[-2], *bench.random.sample(points[1:-2], most - 2)]
    points += [
        Point(seconds=usual.seconds * bench.random.random()) for _ in range(bench.profile.of(1, 3, 20))
    ]
    for point in points:
        scenes = await make()
        before: set[asyncio.Task[object]] = set(asyncio.all_tasks())
        made = await cut(bench.store, scenes[0], point, times=bench.times)
        await _settle(before)
        for scene in scenes:
            gone, kept = _expected(bench, ()), _expected(bench, scene.setup)
            wanted = [one.look(scene.asked, times=bench.times) for one in (gone, kept)]
            seen = await look_until(bench.store, scene.asked, wanted, times=bench.times)
            bench.exercised += 1
            if seen not in wanted:
                raise Violation(
                    f"{made.title} deleted half a run: {difference(scene.asked, seen, wanted)}",
                    program=program(made),
                )
