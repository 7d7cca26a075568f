"""QRY-1: pages after a position."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    FLOW,
    HOUR,
    SECOND,
    TICK,
    advance,
    new_id,
    require_clock,
    run_numbers,
    run_step,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import Capability, FlowRunRecord, RunPosition, RunStatus

BIGGEST = UUID(int=2**128 - 1)


async def _start_runs_with_ties(context: CheckContext) -> Sequence[FlowRunRecord]:
    """Start groups of runs with equal started_at, and return them as get_runs lists them."""
    advance(context, TICK)
    for passed, ids in ((TICK, (5, 2**127, 6)), (SECOND, (1,)), (-TICK, (9, 8, 2**64)), (HOUR, (4, 3))):
        advance(context, passed)
        for number in ids:
            await start(context, run_id=UUID(int=number))
    return await context.store.get_runs()


@check("QRY-1", needs=[Capability.VIRTUAL_CLOCK], rotation="orders of pages")
async def pages_start_after_a_position(context: CheckContext) -> None:
    """Strictly after it, also among runs with equal started_at; skip counts from there."""
    store = context.store
    runs = await _start_runs_with_ties(context)
    wanted = run_numbers(runs)
    for take in (1, 2, 4, len(wanted), len(wanted) + 1):
        paged: list[FlowRunRecord] = []
        while page := await store.get_runs(after=paged[-1].position if paged else None, take=take):
            paged += page
            if len(paged) > len(wanted):
                break
        context.expect(
            run_numbers(paged),
            wanted,
            f"the runs on pages of {take}, each after the last run of the previous page",
        )
    for index, run in enumerate(runs):
        for skip in (0, 1, 3):
            found = run_numbers(await store.get_runs(after=run.position, skip=skip, take=3))
            context.expect(found, wanted[index + 1 + skip :][:3], f"after run {index}, skip={skip}, take=3")
        found = run_numbers(await store.get_runs(FLOW, after=run.position, take=context.page_size))
        context.expect(found, wanted[index + 1 :], f"the flow's runs after run {index}")


@check("QRY-1", needs=[Capability.VIRTUAL_CLOCK])
async def a_position_needs_no_stored_run(context: CheckContext) -> None:
    """Positions between, before and after all runs, at the limits of time, and of a deleted run are valid."""
    store = context.store
    runs = await _start_runs_with_ties(context)
    places = [(run.started_at, run.run_id) for run in runs]
    limits = (datetime(1, 1, 2, tzinfo=UTC), datetime(9999, 12, 30, tzinfo=UTC))
    moments = [*limits, *(run.started_at + shift for run in runs for shift in (TICK, -TICK, timedelta(0)))]
    for moment in moments:
        for number in (UUID(int=0), UUID(int=7), UUID(int=2**64 + 1), BIGGEST):
            found = run_numbers(
                await store.get_runs(after=RunPosition(started_at=moment, run_id=number), take=9)
            )
            behind = [run_id.int for started_at, run_id in places if (started_at, run_id) < (moment, number)]
            context.expect(found, behind, f"the runs after {moment} and id number {number.int}")
    await store.complete_run(runs[0].run_id, RunStatus.FAILED)
    await store.cleanup(require_clock(context).now + HOUR)
    context.expect(await store.get_run_status(runs[0].run_id), None, "the status of a deleted run")
    found = run_numbers(await store.get_runs(after=runs[0].position))
    context.expect(found, run_numbers(runs)[1:], "the runs after the position of a deleted run")


@check("QRY-1", rotation="totals of pages")
async def pages_show_lasting_runs_once_during_changes(context: CheckContext) -> None:
    """Each lasting run is listed exactly once while other runs are started and deleted between pages."""
    store = context.store
    lasting, doomed = set(), []
    for number in range(12):
        run_id = await start(context, run_id=new_id(context))
        if number % 3:
            lasting.add(run_id)
        else:
            doomed.append(run_id)
    seen: list[UUID] = []
    after: RunPosition | None = None
    while page := await store.get_runs(after=after, take=2):
        after = page[-1].position
        seen += [run.run_id for run in page]
        if len(seen) > 50:
            break
        await start(context, run_id=new_id(context))
        # Preferably delete the run at whose position the next page starts.
        going = next(
            (run_id for run_id in doomed if run_id == page[-1].run_id), doomed[0] if doomed else None
        )
        if going is not None:
            doomed.remove(going)
            await store.complete_run(going, RunStatus.SUCCEEDED)
            await store.cleanup(page[-1].started_at + timedelta(days=365))
            context.expect(await store.get_run_status(going), None, "the status of a deleted run")
    shown = sorted(str(run_id) for run_id in seen if run_id in lasting)
    context.expect(shown, sorted(str(run_id) for run_id in lasting), "the lasting runs on all pages")


@check("QRY-1", "QRY-3", needs=[Capability.DASHBOARD], rotation="totals of pages")
async def total_count_does_not_depend_on_the_position(context: CheckContext) -> None:
    """With a position and filters, get_runs_page returns the remaining rows and the count of all matches."""
    store, other = context.store, new_id(context)
    for number in range(12):
        run_id = await start(context, run_id=new_id(context), flow_id=other if number % 2 else FLOW)
        await run_step(context, run_id, "a", output_json='"NEEDLE"' if number % 3 else None)
        if number < 8:
            await store.complete_run(run_id, RunStatus.FAILED if number % 4 else RunStatus.SUCCEEDED)
    for flow_id in (None, other):
        for status in (None, RunStatus.RUNNING, RunStatus.FAILED, RunStatus.SUCCEEDED):
            for search in (None, "needle", "ee", "nothing"):
                what = f"flow {'any' if flow_id is None else 'one'}, status {status}, search {search!r}"
                every = await store.get_runs_page(flow_id, status=status, search=search)
                total = len(every.runs)
                context.expect(every.total_count, total, f"total_count without position: {what}")
                for index in range(0, total, 2):
                    for skip, take in ((0, 2), (1, 50), (0, 0)):
                        page = await store.get_runs_page(
                            flow_id,
                            status=status,
                            search=search,
                            after=every.runs[index].position,
                            skip=skip,
                            take=take,
                        )
                        rest = every.runs[index + 1 + skip :][:take]
                        context.expect(page.runs, rest, f"the page after run {index}, skip={skip}: {what}")
                        context.expect(page.total_count, total, f"total_count of that page: {what}")
