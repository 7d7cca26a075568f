"""Larger numbers of everything than a batch, a page, a parameter list or a result window holds.

Backends often split long lists at 100, 500, 999, 1,000, 1,024, 2,000, 2,048, 10,000 or 32,766 items. Every
list and count is compared with the writes, whole and page by page.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from datetime import datetime
from typing import TypeVar
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TICK,
    advance,
    new_id,
    now,
    require_clock,
    run_step,
    start,
)
from flowstore_conformance.context import CheckContext, ContractViolation, Profile
from flowstore_conformance.diffing import brief
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    FlowRunRecord,
    RunPosition,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
)

T = TypeVar("T")

CONCURRENT = 100
"""Concurrent calls while a check fills its namespace."""

ENDING_IN_STANDARD = 4_000
"""The number of runs of which the profile standard lets three of five end; the others stay Running."""


async def in_groups(call: Callable[[int], Awaitable[T]], count: int) -> list[T]:
    """Make ``count`` calls, many of them concurrently, and return the results in order."""
    results: list[T] = []
    for at in range(0, count, CONCURRENT):
        results += await asyncio.gather(*(call(number) for number in range(at, min(at + CONCURRENT, count))))
    return results


def expect_items(
    context: CheckContext, found: Iterable[Hashable], wanted: Iterable[Hashable], what: str, *, clause: str
) -> None:
    """Compare a long list with the expected one; a violation names what is missing, repeated or misplaced."""
    context.assertions += 1
    got, want = list(found), list(wanted)
    if got == want:
        return
    faults = [f"{what}: expected {len(want):,} items, got {len(got):,}"]
    lacking, excess = Counter(want) - Counter(got), Counter(got) - Counter(want)
    if lacking:
        first = next(number for number, item in enumerate(want) if item in lacking)
        number, item = lacking.total(), brief(repr(want[first]))
        faults.append(f"{number:,} are missing, the first being {item} (item {first + 1:,})")
    known = set(want)
    unexpected = [item for item in excess if item not in known]
    repeated = [item for item in excess if item in known]
    if unexpected:
        faults.append(f"{len(unexpected):,} are unexpected, such as {brief(repr(unexpected[0]))}")
    if repeated:
        faults.append(f"{len(repeated):,} are repeated, such as {brief(repr(repeated[0]))}")
    if not (lacking or excess):
        first = next(number for number, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        faults.append(
            f"the order differs from item {first + 1:,} on: expected {brief(repr(want[first]))}, "
            f"got {brief(repr(got[first]))}"
        )
    raise ContractViolation("; ".join(faults), clause=clause)


def expect_result(context: CheckContext, found: object, wanted: object, what: str, *, clause: str) -> None:
    """Compare one result of a call on many rows with the expected one."""
    context.assertions += 1
    if found != wanted:
        raise ContractViolation(f"{what}: expected {wanted}, got {found}", clause=clause)


@check("IDM-2", "IDM-4", "RET-4", kind=Kind.VOLUME, rotation="volume of a store")
async def thousands_of_keys_and_orphans_end_with_cleanup(context: CheckContext) -> None:
    """Every key finds its run; a cleanup frees all keys of a run and deletes all orphans."""
    store, run_id = context.store, await start(context)
    count = context.profile.of(60, 1_300, 10_500)
    orphans = [new_id(context) for _ in range(count)]

    async def register(number: int) -> tuple[bool, bool]:
        own = await store.try_register_idempotency_key(FLOW, "own", f"key {number}", run_id)
        orphan = await store.try_register_idempotency_key(FLOW, "orphan", f"key {number}", orphans[number])
        await store.configure_run(orphans[number], FLOW, "orphan")
        return own, orphan

    # A cleanup that stops too early leaves many, and a read of one key has no limit.
    sampled = range(0, count, context.profile.of(1, 5, 1))

    async def find(index: int) -> tuple[UUID | None, UUID | None]:
        number = sampled[index]
        own = await store.find_run_id_by_idempotency_key(FLOW, "own", f"key {number}")
        return own, await store.find_run_id_by_idempotency_key(FLOW, "orphan", f"key {number}")

    won = await in_groups(register, count)
    expect_items(context, won, [(True, True)] * count, f"registering {count:,} keys twice", clause="IDM-2")
    found = await in_groups(find, len(sampled))
    wanted = [(run_id, orphans[number]) for number in sampled]
    expect_items(context, found, wanted, f"the runs of {count:,} keys", clause="IDM-2")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    advance(context, 2 * HOUR)
    deleted = await store.cleanup(now(context) + DAY)
    what = f"the runs deleted by a cleanup of one run and {count:,} orphans"
    expect_result(context, deleted, 1, what, clause="RET-1")
    found = await in_groups(find, len(sampled))
    left = [number for number, (own, _) in zip(sampled, found, strict=True) if own is not None]
    expect_items(context, left, [], f"the keys of a deleted run that had {count:,}", clause="IDM-4")
    if context.clock is not None:
        left = [number for number, (_, orphan) in zip(sampled, found, strict=True) if orphan is not None]
        expect_items(context, left, [], f"{count:,} old keys without a run after cleanup", clause="RET-4")
        controls = await in_groups(lambda index: store.get_run_control(orphans[sampled[index]]), len(sampled))
        left = [number for number, control in zip(sampled, controls, strict=True) if control is not None]
        expect_items(context, left, [], f"{count:,} old controls without a run after cleanup", clause="RET-4")


_FLOWS = [UUID(int=FLOW.int + number) for number in range(3)]
_SOURCES = [UUID(int=FLOW.int + 100 + number) for number in range(2)]
_STATUSES = (RunStatus.SUCCEEDED, RunStatus.RUNNING, RunStatus.FAILED, RunStatus.RUNNING, RunStatus.CANCELLED)


def _newest_first(runs: Iterable[FlowRunRecord]) -> list[UUID]:
    """The ids of runs in the order of QRY-1."""
    return [run.run_id for run in sorted(runs, key=lambda run: (run.started_at, run.run_id), reverse=True)]


@check("QRY-1", "QRY-2", "QRY-3", "QRY-4", "QRY-5", "QRY-6", "RET-1", "RET-3", kind=Kind.VOLUME)
async def thousands_of_runs_are_listed_and_deleted(context: CheckContext) -> None:
    """Lists, pages, totals and statistics cover every run, and cleanup deletes every completed one."""
    store = context.store
    count = context.profile.of(60, 10_500, 40_000)
    at = now(context)

    async def begin(number: int) -> FlowRunRecord:
        flow = number % 3
        name = "needle" if number % 4 else "orders"
        source = _SOURCES[number % 2]
        return await store.start_run(_FLOWS[flow], name, new_id(context), "manual", source_run_id=source)

    runs: list[FlowRunRecord] = []
    for first in range(0, count, CONCURRENT):
        runs += await asyncio.gather(*(begin(n) for n in range(first, min(first + CONCURRENT, count))))
        advance(context, SECOND)
    statuses = {run.run_id: _STATUSES[number % 5] for number, run in enumerate(runs)}
    if context.profile is Profile.STANDARD:
        # The total of all runs is large, and the number of ended ones larger than a batch of a cleanup.
        statuses |= {run.run_id: RunStatus.RUNNING for run in runs[ENDING_IN_STANDARD:]}
    ends = [run_id for run_id, status in statuses.items() if status is not RunStatus.RUNNING]

    async def end(number: int) -> tuple[bool, bool]:
        run_id = ends[number]
        claimed = await store.try_claim_step(run_id, "charge", owner="me")
        return claimed, await store.complete_run(run_id, statuses[run_id])

    won = await in_groups(end, len(ends))
    expect_items(context, won, [(True, True)] * len(ends), f"ending {len(ends):,} runs", clause="RUN-2")
    await _expect_lists(context, runs, statuses)
    if Capability.DASHBOARD in context.capabilities:
        await _expect_totals(context, runs, statuses, at)
    deleted = await store.cleanup(now(context) + DAY)
    expect_result(
        context, deleted, len(ends), f"the result of a cleanup of {len(ends):,} runs", clause="RET-1"
    )
    left = [run for run in runs if statuses[run.run_id] is RunStatus.RUNNING]
    await _expect_lists(context, left, statuses)
    if Capability.DASHBOARD in context.capabilities:
        is_paged = context.profile is not Profile.STANDARD
        await _expect_totals(context, left, statuses, at, is_paged=is_paged)
    deleted = await store.cleanup(now(context) + DAY)
    expect_result(context, deleted, 0, "the result of a second cleanup", clause="RET-3")

    async def restart(number: int) -> tuple[object, ...]:
        await start(context, run_id=ends[number * 4])
        return tuple(await store.get_step_claims(ends[number * 4]))

    left_claims = await in_groups(restart, len(ends) // 4)
    what = f"the claims of ids that start again after a cleanup of {len(ends):,} runs with one claim each"
    expect_items(context, left_claims, [()] * len(left_claims), what, clause="RET-1")
    if count < context.page_size:
        await _expect_more_than_a_page(context)


async def _expect_more_than_a_page(context: CheckContext) -> None:
    """Start more Running runs than a page holds: a limit of 1,000 is the most common one."""
    store, source, flow_id = context.store, new_id(context), new_id(context)
    runs = await in_groups(
        lambda _: store.start_run(
            flow_id, "hay with a needle", new_id(context), "manual", source_run_id=source
        ),
        context.page_size + 1,
    )
    wanted, of = _newest_first(runs), f"of {len(runs):,} Running runs"
    active = [run.run_id for run in await store.get_active_runs() if run.flow_id == flow_id]
    expect_items(context, active, wanted, f"get_active_runs() {of}", clause="QRY-6")
    derived = [run.run_id for run in await store.get_derived_runs(source)]
    expect_items(context, derived, wanted, f"get_derived_runs() {of}", clause="QRY-6")
    found = [run.run_id for run in await store.get_runs(flow_id, take=context.page_size)]
    expect_items(
        context,
        found,
        wanted[: context.page_size],
        f"get_runs(take={context.page_size}) {of}",
        clause="QRY-1",
    )
    if Capability.DASHBOARD in context.capabilities:
        for search, clause in ((None, "QRY-1"), ("needle", "QRY-2")):
            page = await store.get_runs_page(flow_id, search=search, take=context.page_size)
            found, what = [run.run_id for run in page.runs], f"get_runs_page(search={search!r}) {of}"
            expect_items(context, found, wanted[: context.page_size], what, clause=clause)
            expect_result(context, page.total_count, len(runs), f"total_count of {what}", clause="QRY-3")


async def _expect_lists(
    context: CheckContext, runs: Sequence[FlowRunRecord], statuses: dict[UUID, RunStatus]
) -> None:
    """Compare get_runs, get_active_runs and get_derived_runs, whole and page by page."""
    store, of = context.store, f"of {len(runs):,} runs"
    every = _newest_first(runs)
    found: list[UUID] = []
    after: RunPosition | None = None
    while page := await store.get_runs(after=after, take=context.page_size):
        found += [run.run_id for run in page]
        after = page[-1].position
        if len(found) > len(every):
            break
    expect_items(
        context, found, every, f"get_runs {of}, each page after the last run before it", clause="QRY-1"
    )
    # The profile standard reads every third of these pages: the loop above has read all runs.
    interval = context.profile.of(1, 3, 1) * (context.page_size - 1)
    for skip in range(0, len(every) + context.page_size, interval):
        found = [run.run_id for run in await store.get_runs(skip=skip, take=context.page_size)]
        wanted = every[skip : skip + context.page_size]
        expect_items(
            context, found, wanted, f"get_runs(skip={skip}, take={context.page_size}) {of}", clause="QRY-1"
        )
    flow = _newest_first(run for run in runs if run.flow_id == _FLOWS[1])
    found = [
        run.run_id
        for run in await store.get_runs(_FLOWS[1], skip=max(0, len(flow) - 9), take=context.page_size)
    ]
    expect_items(context, found, flow[-9:], f"the oldest runs of one flow {of}", clause="QRY-1")
    active = _newest_first(run for run in runs if statuses[run.run_id] is RunStatus.RUNNING)
    derived = _newest_first(run for run in runs if run.source_run_id == _SOURCES[0])
    for take in (None, context.page_size):
        found = [run.run_id for run in await store.get_active_runs(take=take)]
        expect_items(context, found, active[:take], f"get_active_runs(take={take}) {of}", clause="QRY-6")
        found = [run.run_id for run in await store.get_derived_runs(_SOURCES[0], take=take)]
        expect_items(context, found, derived[:take], f"get_derived_runs(take={take}) {of}", clause="QRY-6")


async def _expect_totals(
    context: CheckContext,
    runs: Sequence[FlowRunRecord],
    statuses: dict[UUID, RunStatus],
    at: datetime,
    *,
    is_paged: bool = True,
) -> None:
    """Compare the pages and totals of get_runs_page, the statistics and a time series.

    The profile standard reads only the first and the last page of a search and of the Running runs. Unless
    ``is_paged``, it does so for every status, and makes no search.
    """
    store = context.store
    for status in (None, RunStatus.RUNNING, RunStatus.CANCELLED):
        for search in (None, "needle") if is_paged else (None,):
            wanted = _newest_first(
                run
                for run in runs
                if (status is None or statuses[run.run_id] is status)
                and (search is None or run.flow_name == search)
            )
            after: RunPosition | None = None
            found: list[UUID] = []
            what = f"get_runs_page(status={status}, search={search!r}) of {len(runs):,} runs"
            clause = "QRY-2" if search else "QRY-1"
            # A search may read every run, and most runs of the profile standard are Running.
            is_dear = search is not None or status is RunStatus.RUNNING
            reads_all = context.profile is not Profile.STANDARD or (is_paged and not is_dear)
            while True:
                page = await store.get_runs_page(
                    status=status, search=search, after=after, take=context.page_size
                )
                expect_result(
                    context, page.total_count, len(wanted), f"total_count of {what}", clause="QRY-3"
                )
                if not page.runs or len(found) > len(wanted):
                    break
                found += [run.run_id for run in page.runs]
                after = page.runs[-1].position
                if not reads_all:
                    break
            pages = wanted if reads_all else wanted[: context.page_size]
            expect_items(context, found, pages, f"the pages of {what}", clause=clause)
            skip = max(0, len(wanted) - 7)
            page = await store.get_runs_page(status=status, search=search, skip=skip, take=context.page_size)
            found = [run.run_id for run in page.runs]
            expect_items(context, found, wanted[-7:], f"the last runs of {what}, skip={skip}", clause=clause)
    statistics = await store.get_statistics()
    counted = Counter(statuses[run.run_id] for run in runs)
    expect_result(
        context,
        (statistics.total_flows, statistics.active_runs),
        (len({run.flow_id for run in runs}), counted[RunStatus.RUNNING]),
        f"total_flows and active_runs of get_statistics with {len(runs):,} runs",
        clause="QRY-4",
    )
    # A day more on both sides, in case of a server's own clock.
    buckets = await store.get_run_timeseries(RunTimeseriesGranularity.HOUR, at - DAY, at + 2 * DAY)
    sums = [
        sum(getattr(bucket, name) for bucket in buckets)
        for name in ("total", "running", "succeeded", "failed", "cancelled")
    ]
    wanted_sums = [len(runs), *(counted[status] for status in RunStatus)]
    expect_result(
        context, sums, wanted_sums, "the sums over all buckets of get_run_timeseries", clause="QRY-5"
    )


@check(
    "CTL-3",
    "STP-8",
    needs=[Capability.RECOVERY, Capability.LEASES, Capability.VIRTUAL_CLOCK],
    kind=Kind.VOLUME,
    rotation="volume of a store",
)
async def thousands_of_runs_need_attention(context: CheckContext) -> None:
    """take limits the ordered list: the first 1,000 of thousands come first, in any order of writing."""
    store, clock = context.store, require_clock(context)
    count = context.profile.of(60, 1_300, 10_500)
    at = clock.now
    runs = [new_id(context) for _ in range(count)]
    # Neither the order of writing nor that of the ids is the order of the lists.
    ranks = list(range(count))
    context.random.shuffle(ranks)
    due = {run_id: at + rank * SECOND for run_id, rank in zip(runs, ranks, strict=True)}
    kinds = {run_id: rank % 3 for run_id, rank in zip(runs, ranks, strict=True)}

    async def begin(number: int) -> None:
        run_id = runs[number]
        await start(context, run_id=run_id)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=due[run_id])
        match kinds[run_id]:
            case 0:
                await store.try_record_dispatch(run_id, "charge", due_at=due[run_id])
            case 1:
                await store.try_claim_step(run_id, "charge", owner="me", lease=due[run_id] - at + MINUTE)
            case _:
                await run_step(context, run_id, "charge", StepStatus.PENDING)

    await in_groups(begin, count)
    stalls = {run_id: (due[run_id], due[run_id] + MINUTE, at)[kinds[run_id]] for run_id in runs}
    by_deadline = sorted(runs, key=lambda run_id: due[run_id])

    async def end(rank: int) -> None:
        run_id = by_deadline[rank]
        await store.complete_run(run_id, RunStatus.CANCELLED)
        del due[run_id], stalls[run_id]

    for ended in (0, count // 3):
        # The runs that end have the earliest deadlines.
        await in_groups(end, ended)
        for as_of in (at + count * SECOND + HOUR, at + (count // 2) * SECOND, at + 5 * SECOND, at - TICK):
            for take in (context.page_size, 7):
                listed = sorted((deadline, run_id) for run_id, deadline in due.items() if deadline <= as_of)
                found = [run.run_id for run in await store.get_runs_to_stop(as_of=as_of, take=take)]
                what = f"the first {take} of {len(listed):,} runs of get_runs_to_stop as of {as_of}"
                expect_items(context, found, [run_id for _, run_id in listed[:take]], what, clause="CTL-3")
                stalled = sorted((since, run_id) for run_id, since in stalls.items() if since <= as_of)
                found_stalls = [
                    (step.since, step.run_id)
                    for step in await store.get_stalled_steps(as_of=as_of, take=take)
                ]
                what = f"the first {take} of {len(stalled):,} steps of get_stalled_steps as of {as_of}"
                expect_items(context, found_stalls, stalled[:take], what, clause="STP-8")
