"""QRY-1 to QRY-3 and QRY-6: order, pages, search, details, active and derived runs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    FLOW,
    HOUR,
    SECOND,
    SIMILAR_KEYS,
    TICK,
    advance,
    expect_present,
    fields_of,
    get_run,
    new_id,
    require_clock,
    run_numbers,
    run_step,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import Capability, FlowRunRecord, RunStatus, StepStatus

BIG = UUID("ffffffff-ffff-4fff-bfff-ffffffffffff").int


async def _start_runs(context: CheckContext) -> list[int]:
    """Start runs at several times and return the numbers of their ids in the order of QRY-1."""
    begun = []
    # The third group starts before the second: a clock may step back.
    batches = ((TICK, [3, 1, 2]), (SECOND, [9]), (-TICK, [BIG, 7, 2**64, 8]), (HOUR, [4, 6, 5]))
    for passed, ids in batches:
        at = advance(context, passed)
        for number in ids:
            await start(context, run_id=UUID(int=number))
            begun.append((at, number))
    return [number for _, number in sorted(begun, reverse=True)]


@check("QRY-1", needs=[Capability.VIRTUAL_CLOCK], rotation="orders of pages")
async def runs_are_ordered_by_start_then_id_descending(context: CheckContext) -> None:
    """The order is exact to the microsecond and does not depend on the order of the start_run calls."""
    store = context.store
    wanted = await _start_runs(context)
    context.expect(
        run_numbers(await store.get_runs()), wanted, "get_runs by started_at and run_id, descending"
    )
    found = run_numbers(await store.get_active_runs())
    context.expect(found, wanted, "get_active_runs by started_at and run_id, descending")
    for take in (1, 3, 4, 11, 12):
        paged: list[int] = []
        while page := await store.get_runs(skip=len(paged), take=take):
            paged += run_numbers(page)
            if len(paged) > len(wanted):
                break
        context.expect(paged, wanted, f"the runs on pages of {take}")
    for skip, take in ((0, 0), (11, 5), (10, context.page_size), (2**63 - 1, context.page_size)):
        found = run_numbers(await store.get_runs(skip=skip, take=take))
        context.expect(found, wanted[skip : skip + take], f"get_runs(skip={skip}, take={take})")


@check("QRY-1", needs=[Capability.VIRTUAL_CLOCK], rotation="orders of pages")
async def runs_at_the_limits_of_time_are_ordered(context: CheckContext) -> None:
    """From year 9999 down to year 1, across 2038, 1970 and 1582."""
    store, clock = context.store, require_clock(context)
    days = ((9999, 12, 30), (2038, 1, 19), (1970, 1, 1), (1969, 12, 31), (1582, 10, 10), (1, 1, 2))
    moments = [datetime(*day, tzinfo=UTC) for day in days]
    for moment in reversed(moments):
        clock.now = moment
        await store.complete_run(await start(context), RunStatus.SUCCEEDED)
    runs = await store.get_runs()
    context.expect([run.started_at for run in runs], moments, "the order of runs at the limits of time")


@check("QRY-1")
async def a_page_defaults_to_fifty_runs_and_filters_by_flow(context: CheckContext) -> None:
    """get_runs returns at most 50 runs by default, and with flow_id only runs of that flow."""
    store, other = context.store, new_id(context)
    mixed = [new_id(context) for _ in range(55)]
    flows = {run_id: other if number < 3 else FLOW for number, run_id in enumerate(mixed)}
    await asyncio.gather(*(start(context, run_id=one, flow_id=flow) for one, flow in flows.items()))
    context.expect(len(await store.get_runs()), 50, "the number of runs without take")
    found = {run.run_id for run in await store.get_runs(take=context.page_size)}
    context.expect(found, set(mixed), "get_runs with the largest take")
    context.expect(len(await store.get_runs(FLOW)), 50, "the number of a flow's runs without take")
    own_runs = await store.get_runs(other)
    context.expect({run.run_id for run in own_runs}, set(mixed[:3]), "get_runs of one flow")
    paged = [run for skip in range(4) for run in await store.get_runs(other, skip=skip, take=1)]
    context.expect(paged, own_runs, "pages of one flow's runs")


@check("QRY-1", isolated=False)
async def step_keys_order_by_code_point(context: CheckContext) -> None:
    """Statuses, claims and dispatches are ordered by step_key in code point order, in no language's."""
    store, run_id = context.store, await start(context)
    keys = ("b", "a", "B", "\u00e9", "e", "Z", "_", "a b", "\U0001f600", "\uffff", "10", "9", "a-b", "ab")
    for key in keys:
        await store.try_claim_step(run_id, key)
        await store.try_record_dispatch(run_id, key)
        await store.record_step_start(run_id, key, "http")
    wanted = sorted(keys)
    context.expect(list(await store.get_step_statuses(run_id)), wanted, "the keys of get_step_statuses")
    found = [claim.step_key for claim in await store.get_step_claims(run_id)]
    context.expect(found, wanted, "the keys of get_step_claims")
    found = [dispatch.step_key for dispatch in await store.get_dispatches(run_id)]
    context.expect(found, wanted, "the keys of get_dispatches")


# QRY-2


async def _search(context: CheckContext, needle: str) -> list[int]:
    """Search, compare total_count with the rows, and return the runs found."""
    page = await context.store.get_runs_page(search=needle, take=context.page_size)
    found = sorted(run_numbers(page.runs))
    context.expect(page.total_count, len(found), f"total_count of a search for {needle!r}")
    return found


@example("QRY-2")
async def search_covers_exactly_the_contract_fields(context: CheckContext) -> None:
    """Run id, names, status and job id of the run; step keys, errors and outputs of steps and attempts."""
    store = context.store
    run_id = UUID("0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d")
    named = {"flow_name": "needle1", "trigger_key": "needle2", "job_id": "needle3", "trigger_data": "hay1"}
    await start(context, run_id=run_id, **named, flow_id=UUID("abcdef01-0000-4000-8000-000000000000"))
    await store.configure_run(run_id, FLOW, "hay2", idempotency_key="hay3")
    await store.record_step_start(run_id, "needle4", "hay4", input_json="hay5", job_id="hay6")
    result: dict[str, Any] = {"error_message": "needle5", "output_json": "needle6"}
    await store.record_step_complete(run_id, "needle4", StepStatus.FAILED, **result)
    await store.record_step_start(run_id, "needle4", "hay4")
    result = {"error_message": "needle7", "output_json": "needle8"}
    await store.record_step_complete(run_id, "needle4", StepStatus.PENDING, **result)
    await store.try_record_dispatch(run_id, "hay7")
    await store.register_waiter(run_id, "hay8", "hay9")
    await start(context, run_id=UUID(int=1), flow_name="other")
    ended = await start(context, run_id=UUID(int=2), flow_name="other")
    await store.complete_run(ended, RunStatus.FAILED)
    for number in range(1, 9):
        found = await _search(context, f"needle{number}")
        context.expect(found, [run_id.int], f"a search for needle{number}, which one run contains")
    for needle in ("0a1b2c3d-4e5f", "5f-4a6b-8c", "9e0f1a2b3c4d", "0A1B2C3D", str(run_id)):
        context.expect(
            await _search(context, needle), [run_id.int], f"a search for a part of the run id ({needle})"
        )
    context.expect(await _search(context, run_id.hex), [], "a search for a run id without hyphens")
    for needle in (*(f"hay{number}" for number in range(1, 10)), "abcdef01"):
        context.expect(
            await _search(context, needle), [], f"a search for {needle}, which only unsearched fields contain"
        )
    for needle in ("needle1needle2", "needle2needle3", "needle1 needle2", "needle6needle5"):
        context.expect(await _search(context, needle), [], f"a search for {needle!r}, which spans two texts")
    context.expect(
        await _search(context, "unnin"), [1, run_id.int], "a search for a part of the status Running"
    )
    context.expect(await _search(context, "FAILED"), [2], "a search for the status Failed")
    for nothing in ("", None):
        page = await store.get_runs_page(search=nothing)
        context.expect(page.total_count, 3, f"total_count of a search for {nothing!r}")


@example("QRY-2")
async def search_covers_the_steps_of_a_detail(context: CheckContext) -> None:
    """Attempts of a reopened step are found; those of a reset step only after its next start."""
    store, run_id = context.store, await start(context, run_id=UUID(int=11))
    await run_step(context, run_id, "charge", StepStatus.FAILED, error_message="declined", output_json="402")
    await skip_steps(context, run_id, "ship")
    await store.retry_step(run_id, "charge", reset=["ship"])
    for needle, shown in (("declined", True), ("402", True), ("ship", False), ("not needed", False)):
        sentence = f"a search for {needle!r} after a retry that reset 'ship'"
        context.expect(await _search(context, needle), [11] if shown else [], sentence)
    await store.record_step_start(run_id, "ship", "http")
    for needle in ("ship", "not needed"):
        context.expect(
            await _search(context, needle), [11], f"a search for {needle!r} after the next start of 'ship'"
        )


# A text, needles that match it, and needles that must not match it.
SEARCHES: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Order-42", ("order-42", "ORDER-42", "r-4"), ("order42", "Order-43", "order-42 ")),
    ("100%", ("100%", "%", "0%"), ("1%0", "%100", "100%%")),
    ("a_b", ("_", "A_B"), ("__", "a__b")),
    ("c:\\temp\\x", ("\\", "\\temp", "C:\\TEMP\\X"), ("c:/temp", "\\\\", "\\x\\")),
    ('it\'s "x"', ("'", '"', "'S \""), ("''", '""')),
    ("\u00c4rger, Stra\u00dfe", ("\u00c4RGER", "stra\u00dfe", "rger, s"), ("\u00e4rger", "STRASSE", "arger")),
    ("\u0130stan \u0131I", ("\u0130STAN", "\u0131i"), ("istan", "i\u0307", "\u0131\u0131")),
    ("\u212a sign", ("\u212a", "\u212a SIGN"), ("k sign", "K sign")),
    ("e\u0301t", ("e\u0301", "E\u0301T", "\u0301"), ("\u00e9",)),
    ("  two  blanks ", ("  two  ", "o  b"), ("two blanks", "   ")),
    ("*?[a-z]^$.|(){}+", ("*?", "[A-Z]", "^$", ".|(){}+"), ("*[", ".*", "z*")),
    ("\U0001f600 grin", ("\U0001f600", "\U0001f600 G"), ("\U0001f601",)),
    ("tab\tline\n", ("\t", "B\tLINE\n"), ("\r", "tab line")),
)


@example("QRY-2")
async def search_is_a_substring_match_that_folds_only_ascii(context: CheckContext) -> None:
    """There are no wildcards or patterns: %, _ and \\ are ordinary characters."""
    for at, (text, _, _) in enumerate(SEARCHES):
        by_name, by_step = UUID(int=100 + at), UUID(int=200 + at)
        await start(context, run_id=by_name, flow_name=text, trigger_key="~")
        await start(context, run_id=by_step, flow_name="~", trigger_key="~")
        # Odd texts in key and error, even texts in outputs.
        given = {"error_message": f"<{text}>"} if at % 2 else {"output_json": f"<{text}>"}
        await run_step(context, by_step, text if at % 2 else "~", StepStatus.FAILED, **given)
    for at, (text, matching, others) in enumerate(SEARCHES):
        both = {100 + at, 200 + at}
        for needle in matching:
            found = set(await _search(context, needle))
            missing = f"a search for {needle!r}, which {text!r} in a flow name and a step contains"
            context.expect_that(both <= found, f"{missing}: expected {both} among {found}")
        for needle in others:
            found = set(await _search(context, needle))
            sentence = f"a search for {needle!r}, which {text!r} does not contain"
            context.expect_that(not both & found, f"{sentence}: expected neither of {both} in {found}")


LIMIT = 64 * 1024
LONG_NAMES = {"flow_name": "n" * 250 + "name 1", "job_id": "j" * 1018 + "job 12"}
LONG_TEXTS = {
    "exact": "x" * (LIMIT - 6) + "inside",
    "beyond": "x" * (LIMIT - 6) + "outsideR",
    "bytes": "\u00e9" * (LIMIT // 2 - 2) + "last" + "more",
    "cut": "y" * (LIMIT - 1) + "\u00e9" + "end",
}
"""The errors and outputs of a run, which LONG_SEARCHES match within their first 64 KiB only."""

LONG_SEARCHES = {
    "inside": True,
    "XINSIDE": True,
    "outsid": True,
    "outside": False,
    "ideR": False,
    "\u00e9last": True,
    "lastm": False,
    "yyy": True,
    "y\u00e9": False,
    "\u00e9end": False,
    "nname 1": True,
    "jjob 12": True,
    "N" * 249 + "NAME 1": True,
}
"""Whether each needle lies within the searched part of LONG_NAMES or LONG_TEXTS."""


def long_texts(text_bytes: int) -> Mapping[str, str]:
    """LONG_TEXTS, each up to the largest size of a text."""
    return {key: text.encode()[:text_bytes].decode(errors="ignore") for key, text in LONG_TEXTS.items()}


@example("QRY-2")
async def search_covers_the_first_64_kib_of_long_texts(context: CheckContext) -> None:
    """The match must lie within the first 65,536 bytes of UTF-8; keys and names are searched whole."""
    run_id = await start(context, run_id=UUID(int=12), **LONG_NAMES)
    for number, (key, text) in enumerate(long_texts(context.limits.text_bytes).items()):
        given = {"output_json": text} if number % 2 else {"error_message": text}
        await run_step(context, run_id, key, StepStatus.FAILED, **given)
    for needle, inside in LONG_SEARCHES.items():
        sentence = f"a search for {needle[-20:]!r}, which lies {'within' if inside else 'beyond'} 64 KiB"
        context.expect(await _search(context, needle), [12] if inside else [], sentence)


# QRY-3


@check("QRY-3", needs=[Capability.DASHBOARD], rotation="totals of pages")
async def a_page_counts_every_match(context: CheckContext) -> None:
    """Filters combine, and total_count counts every match, whatever skip and take are."""
    store, other = context.store, new_id(context)
    for flow_id in (FLOW, other):
        for status in RunStatus:
            for name in ("orders", "invoices"):
                run_id = await start(context, flow_id=flow_id, flow_name=name)
                if status is not RunStatus.RUNNING:
                    await store.complete_run(run_id, status)
    mixed = await store.get_runs(take=context.page_size)
    probes: tuple[UUID | None, ...] = (None, other, new_id(context))
    for flow in probes:
        for status in (None, *RunStatus):
            for search in (None, "INVOICE", "nobody"):
                wanted = [
                    run
                    for run in mixed
                    if (flow is None or run.flow_id == flow)
                    and (status is None or run.status == status)
                    and (search is None or search.lower() in run.flow_name)
                ]
                given = {"status": status, "search": search}
                sentence = f"of get_runs_page({'flow_id, ' if flow else ''}{given})"
                page = await store.get_runs_page(flow, status=status, search=search, skip=1, take=2)
                context.expect(page.runs, wanted[1:3], f"rows 2 and 3 {sentence}")
                context.expect(page.total_count, len(wanted), f"total_count {sentence}")
    for skip, take in ((0, 0), (2**63 - 1, 50), (15, 50), (0, context.page_size)):
        page = await store.get_runs_page(skip=skip, take=take)
        context.expect(page.runs, mixed[skip : skip + take], f"the rows at skip={skip}, take={take}")
        context.expect(page.total_count, len(mixed), f"total_count at skip={skip}, take={take}")
    runs, total = await store.get_runs_page()
    context.expect((runs, total), (mixed, 16), "a page unpacks as runs and total")


@check("QRY-3", needs=[Capability.VIRTUAL_CLOCK], isolated=False)
async def a_detail_orders_steps_by_start_and_attempts_by_number(context: CheckContext) -> None:
    """Steps are ordered by the start of their first attempt, then step_key; retries and resets keep the
    order."""
    store, run_id = context.store, await start(context)
    for key in ("c", "b"):
        await run_step(context, run_id, key, StepStatus.FAILED)
    advance(context, TICK)
    keys = ("z", "a", "Z", "\u00e9", "\U0001f600", "\uffff")
    for key in keys:
        await run_step(context, run_id, key, StepStatus.FAILED)
    advance(context, SECOND)
    await skip_steps(context, run_id, "last")
    for key in ("z", "c"):
        for _ in "12":
            await run_step(context, run_id, key, StepStatus.FAILED)
    await store.retry_step(run_id, "b", reset=["last"])
    advance(context, SECOND)
    await run_step(context, run_id, "newest")
    await run_step(context, run_id, "last")
    steps = (await get_run(context, run_id)).steps
    wanted = ["b", "c", *sorted(keys), "last", "newest"]
    context.expect(
        [step.step_key for step in steps], wanted, "the steps of a detail by started_at and step_key"
    )
    tries = [
        [attempt.attempt for attempt in step.attempts] for step in steps if step.step_key in ("c", "last")
    ]
    context.expect(tries, [[1, 2, 3], [1, 2]], "the attempts of two steps of a detail by number")


@example("QRY-3")
async def single_reads_return_parts_of_the_detail(context: CheckContext) -> None:
    """get_run and get_step return what get_run_detail shows, of every kind of run and step."""
    store, run_id, other = (
        context.store,
        await start(context, trigger_data="{}", job_id="job"),
        new_id(context),
    )
    for number, key in enumerate(SIMILAR_KEYS):
        await run_step(context, run_id, key, StepStatus.FAILED, output_json=f"{number}", error_message="no")
        if number % 3:
            await store.record_step_start(run_id, key, "other", input_json=f"{number}")
    await skip_steps(context, run_id, "skipped", "reset")
    await store.retry_step(run_id, SIMILAR_KEYS[0], reset=["reset"])
    await store.retry_step(run_id, SIMILAR_KEYS[1])
    await store.try_claim_step(run_id, "claimed", owner="me")
    await store.try_record_dispatch(run_id, "dispatched")
    await store.register_waiter(run_id, "waiting", "go")
    await start(context, run_id=other)
    await run_step(context, other, "only there")
    await store.complete_run(other, RunStatus.CANCELLED)
    for one in (run_id, other):
        detail = await get_run(context, one)
        found = expect_present(await store.get_run(one), "get_run of a stored run")
        context.expect(type(found), FlowRunRecord, "the type of the result of get_run")
        names = [each.name for each in fields(FlowRunRecord)]
        context.expect(fields_of(found, *names), fields_of(detail, *names), "get_run beside get_run_detail")
        for step in detail.steps:
            context.expect(
                await store.get_step(one, step.step_key), step, f"get_step of {step.step_key!r} of a detail"
            )
    for key in ("reset", "claimed", "dispatched", "waiting", "only there", "kEy"):
        context.expect(
            await store.get_step(run_id, key), None, f"get_step of {key!r}, which is not in a detail"
        )


# QRY-6


@example("QRY-6")
async def get_active_runs_lists_every_running_run(context: CheckContext) -> None:
    """take=None means all; the order is that of QRY-1, and terminal runs are not listed."""
    store = context.store
    # More than the default page size; the thorough profile exceeds 1,000.
    count = context.profile.of(55, 65, 1005)
    runs = [new_id(context) for _ in range(count)]
    for at in range(0, count, 50):
        await asyncio.gather(*(start(context, run_id=run_id) for run_id in runs[at : at + 50]))
    for run_id, status in zip(
        runs, (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED), strict=False
    ):
        await store.complete_run(run_id, status)
    active = await store.get_active_runs()
    context.expect({run.run_id for run in active}, set(runs[3:]), "get_active_runs without take")
    ordered = sorted(active, key=lambda run: (run.started_at, run.run_id.int), reverse=True)
    context.expect(active, ordered, "get_active_runs in the order of QRY-1")
    for take in (0, 3):
        context.expect(await store.get_active_runs(take=take), active[:take], f"get_active_runs(take={take})")


@example("QRY-6")
async def get_derived_runs_lists_one_generation(context: CheckContext) -> None:
    """Runs with this source_run_id, of any status, in the order of QRY-1."""
    store = context.store
    source = await start(context, run_id=UUID(int=1000))
    children = [UUID(int=number) for number in range(1, 56)]
    await asyncio.gather(*(start(context, run_id=one, source_run_id=source) for one in children))
    advance(context, timedelta(seconds=1))
    await start(context, run_id=UUID(int=60), source_run_id=source)
    await start(context, run_id=UUID(int=70), source_run_id=UUID(int=60))
    await store.complete_run(UUID(int=1), RunStatus.SUCCEEDED)
    derived = await store.get_derived_runs(source)
    wanted = sorted([60, *range(1, 56)])
    context.expect(sorted(run_numbers(derived)), wanted, "get_derived_runs without take")
    ordered = sorted(derived, key=lambda run: (run.started_at, run.run_id.int), reverse=True)
    context.expect(derived, ordered, "get_derived_runs in the order of QRY-1")
    for take in (0, 2):
        first = await store.get_derived_runs(source, take=take)
        context.expect(first, derived[:take], f"get_derived_runs(take={take})")
    context.expect(
        run_numbers(await store.get_derived_runs(UUID(int=60))),
        [70],
        "get_derived_runs of the next generation",
    )
    context.expect(
        await store.get_derived_runs(UUID(int=70)), (), "get_derived_runs of a run without derived runs"
    )
    unstored = new_id(context)
    child = await start(context, source_run_id=unstored)
    found = [run.run_id for run in await store.get_derived_runs(unstored)]
    context.expect(found, [child], "get_derived_runs of an unknown source run")
