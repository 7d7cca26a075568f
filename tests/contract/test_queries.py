"""QRY-1 to QRY-3 and QRY-6: order, paging, search, details, active and derived runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID, uuid4

import pytest

from flowstore_core import Capability, FlowRunRecord, FlowStore, RunStatus, StepStatus
from tests.conftest import OpenAnother
from tests.contract.scenes import FLOW, new_run, run_step, together
from tests.virtual_clock import VirtualClock

dashboard = pytest.mark.needs(Capability.DASHBOARD)

# How often a reader looks beside a writer at most, so that it does not starve it on a busy machine.
LOOKS = 300


def _ids(runs: Sequence[FlowRunRecord]) -> list[int]:
    return [run.run_id.int for run in runs]


async def _runs_at_the_same_and_other_times(store: FlowStore, clock: VirtualClock) -> list[int]:
    """Start runs and return their numbers in the order of QRY-1."""
    started = []
    big = UUID("ffffffff-ffff-4fff-bfff-ffffffffffff").int
    for second, numbers in enumerate(([3, 1, 2], [9], [big, 7, 2**64, 8], [4, 6, 5])):
        for number in numbers:
            await new_run(store, run_id=UUID(int=number))
            started.append((second, number))
        clock.advance(seconds=1)
    return [number for _, number in sorted(started, reverse=True)]


async def test_qry_1_runs_are_ordered_by_start_then_id_descending(
    store: FlowStore, clock: VirtualClock
) -> None:
    wanted = await _runs_at_the_same_and_other_times(store, clock)
    assert _ids(await store.get_runs()) == wanted
    assert _ids(await store.get_active_runs()) == wanted


async def test_qry_1_the_order_is_by_microsecond(store: FlowStore, clock: VirtualClock) -> None:
    for number in (5, 1, 3):
        await new_run(store, run_id=UUID(int=number))
        clock.advance(microseconds=1)
    assert _ids(await store.get_runs()) == [3, 1, 5]


async def test_qry_1_a_clock_that_steps_back_changes_the_order_accordingly(
    store: FlowStore, clock: VirtualClock
) -> None:
    await new_run(store, run_id=UUID(int=1))
    clock.advance(hours=-1)
    await new_run(store, run_id=UUID(int=2))
    assert _ids(await store.get_runs()) == [1, 2]


@pytest.mark.parametrize("take", [1, 2, 3, 4, 11, 12])
async def test_qry_1_pages_neither_repeat_nor_skip(store: FlowStore, clock: VirtualClock, take: int) -> None:
    wanted = await _runs_at_the_same_and_other_times(store, clock)
    paged: list[int] = []
    while page := await store.get_runs(skip=len(paged), take=take):
        paged += _ids(page)
    assert paged == wanted


async def test_qry_1_skip_and_take_at_their_limits(store: FlowStore, clock: VirtualClock) -> None:
    wanted = await _runs_at_the_same_and_other_times(store, clock)
    assert await store.get_runs(take=0) == ()
    assert await store.get_runs(skip=len(wanted)) == ()
    assert await store.get_runs(skip=2**63 - 1, take=1000) == ()
    assert _ids(await store.get_runs(skip=len(wanted) - 1, take=1000)) == wanted[-1:]
    assert await store.get_active_runs(take=0) == ()
    assert _ids(await store.get_active_runs(take=2)) == wanted[:2]


async def test_qry_1_fifty_unless_asked_for_more(store: FlowStore) -> None:
    await together(new_run(store) for _ in range(55))
    assert len(await store.get_runs()) == 50
    assert len(await store.get_runs(take=1000)) == 55
    assert len(await store.get_active_runs()) == 55


async def test_qry_1_runs_of_one_flow(store: FlowStore) -> None:
    other = uuid4()
    mine = [await new_run(store, flow_id=other) for _ in range(3)]
    await new_run(store)
    found = await store.get_runs(other)
    assert sorted(run.run_id for run in found) == sorted(mine)
    assert [run.run_id for run in await store.get_runs(other, skip=1, take=1)] == [found[1].run_id]
    assert await store.get_runs(uuid4()) == ()


@dashboard
async def test_qry_3_a_page_has_its_rows_and_the_count_of_all(store: FlowStore, clock: VirtualClock) -> None:
    wanted = await _runs_at_the_same_and_other_times(store, clock)
    page = await store.get_runs_page(skip=2, take=3)
    assert (_ids(page.runs), page.total_count) == (wanted[2:5], len(wanted))
    runs, total = await store.get_runs_page(take=0)
    assert (runs, total) == ((), len(wanted))
    assert (await store.get_runs_page(skip=2**63 - 1)).total_count == len(wanted)
    assert page.runs == (await store.get_runs(skip=2, take=3))


@dashboard
async def test_qry_3_page_filters_go_together(store: FlowStore) -> None:
    other = uuid4()
    for flow_id in (FLOW, other):
        for status in RunStatus:
            for name in ("orders", "invoices"):
                run_id = await new_run(store, flow_id=flow_id, flow_name=name)
                if status is not RunStatus.RUNNING:
                    await store.complete_run(run_id, status)
    assert (await store.get_runs_page()).total_count == 16
    assert (await store.get_runs_page(other)).total_count == 8
    assert (await store.get_runs_page(status=RunStatus.FAILED)).total_count == 4
    assert (await store.get_runs_page(search="invoice")).total_count == 8
    page = await store.get_runs_page(other, status=RunStatus.RUNNING, search="ORDERS", take=1)
    assert page.total_count == 1
    (run,) = page.runs
    assert (run.flow_id, run.status, run.flow_name) == (other, RunStatus.RUNNING, "orders")
    assert (await store.get_runs_page(uuid4())).total_count == 0


@dashboard
async def test_qry_3_rows_and_count_are_of_one_snapshot(store: FlowStore, open_another: OpenAnother) -> None:
    reader = await open_another()
    done = asyncio.Event()

    async def write() -> None:
        for _ in range(60):
            await new_run(store)
            await asyncio.sleep(0)
        done.set()

    async def read() -> int:
        pages = 0
        while not done.is_set() and pages < LOOKS:
            page = await reader.get_runs_page(take=1000)
            assert len(page.runs) == page.total_count
            pages += 1
            await asyncio.sleep(0)
        return pages

    _, pages = await asyncio.gather(write(), read())
    assert (await reader.get_runs_page()).total_count == 60
    assert pages > 0


@dashboard
async def test_qry_2_search_looks_at_everything_it_should(store: FlowStore) -> None:
    run_id = UUID("0a1b2c3d-4e5f-4a6b-8c7d-9e0f1a2b3c4d")
    await new_run(
        store,
        run_id=run_id,
        flow_name="needle1",
        trigger_key="needle2",
        job_id="needle3",
        trigger_data="hay1",
    )
    await store.record_step_start(run_id, "needle4", "hay2", input_json="hay3", job_id="hay4")
    await store.record_step_complete(
        run_id, "needle4", StepStatus.FAILED, error_message="needle5", output_json="needle6"
    )
    await store.record_step_start(run_id, "needle4", "hay2")
    await store.record_step_complete(
        run_id, "needle4", StepStatus.PENDING, error_message="needle7", output_json="needle8"
    )
    await store.try_record_dispatch(run_id, "hay5")
    await store.save_output(run_id, "hay6", "hay7")
    await store.append_event(run_id, "hay8", message="hay9")
    await new_run(store, flow_name="other")

    async def found(needle: str) -> bool:
        page = await store.get_runs_page(search=needle)
        assert page.total_count == len(page.runs) <= 1
        return page.total_count == 1

    for number in range(1, 9):
        assert await found(f"needle{number}"), number
    for needle in ("0a1b2c3d-4e5f", "5f-4a6b-8c", "9e0f1a2b3c4d", "0A1B2C3D", str(run_id)):
        assert await found(needle), needle
    # Ids are searched hyphenated.
    assert not await found(run_id.hex)
    for number in range(1, 10):
        assert not await found(f"hay{number}"), number
    # Nothing is glued together.
    for needle in ("needle1needle2", "needle2needle3", "needle1 needle2", "needle6needle5"):
        assert not await found(needle), needle


@dashboard
async def test_qry_2_search_looks_at_the_status(store: FlowStore) -> None:
    running = await new_run(store)
    failed = await new_run(store)
    await store.complete_run(failed, RunStatus.FAILED)
    assert [run.run_id for run in (await store.get_runs_page(search="unnin")).runs] == [running]
    assert [run.run_id for run in (await store.get_runs_page(search="FAILED")).runs] == [failed]


@dashboard
async def test_qry_2_search_sees_what_a_detail_shows(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "charge", StepStatus.FAILED, error_message="declined")
    await store.record_skipped_step(run_id, "ship", "http", "not charged")
    await store.retry_step(run_id, "charge", reset=["ship"])

    async def total(needle: str) -> int:
        return (await store.get_runs_page(search=needle)).total_count

    # An attempt's error is shown still; a reset step is not, until it starts again.
    assert await total("declined") == 1
    assert await total("ship") == 0
    assert await total("not charged") == 0
    await store.record_step_start(run_id, "ship", "http")
    assert await total("ship") == 1
    assert await total("not charged") == 1


@dashboard
@pytest.mark.parametrize(
    ("text", "matching", "others"),
    [
        ("Order-42", ["order-42", "ORDER-42", "r-4", "Order-42"], ["order42", "Order-43", "order-42 "]),
        ("100%", ["100%", "%", "0%"], ["100_", "1%0", "%100"]),
        ("a_b", ["_", "A_B"], ["a-b", "axb", "__"]),
        ("c:\\temp\\x", ["\\", "\\temp", "C:\\TEMP\\X"], ["c:/temp", "\\\\", "\\x\\"]),
        ('it\'s "x"', ["'", '"', "'s \""], ["''", '""']),
        (
            "Ärger über Straße",
            ["Ärger", "ÄRGER", "Straße", "über", "rger ü"],
            ["ärger", "STRASSE", "ÜBER", "Über"],
        ),
        (
            "\u0130stanbul \u0131I",
            ["\u0130", "\u0131i", "\u0130STANBUL", "stanbul \u0131"],
            ["istanbul", "i\u0307", "\u0131\u0131", "ii"],
        ),
        ("\u212a and k", ["\u212a", "K", "\u212a AND K"], ["k and k", "K AND \u212a"]),
        ("e\u0301", ["e\u0301", "E\u0301", "\u0301"], ["é"]),
        ("  two  blanks ", ["  ", "two  blanks ", "o  b"], ["two blanks", "   "]),
        ("*?[a-z]^$.|(){}", ["*?", "[a-z]", "[A-Z]", "^$", ".|(){}"], ["x", "*[", ".*"]),
        ("\U0001f600 grin", ["\U0001f600", "\U0001f600 G"], ["\U0001f601"]),
        ("tab\tline\n", ["\t", "\n", "B\tLINE"], ["\r", "tab line"]),
    ],
)
async def test_qry_2_search_is_a_substring_folding_ascii_alone(
    store: FlowStore, text: str, matching: list[str], others: list[str]
) -> None:
    by_name = await new_run(store, run_id=UUID(int=1), flow_name=text)
    by_error = await new_run(store, run_id=UUID(int=2), flow_name="~")
    await run_step(store, by_error, "~", StepStatus.FAILED, error_message=f"<{text}>")
    by_output = await new_run(store, run_id=UUID(int=3), flow_name="~")
    await run_step(store, by_output, "~", StepStatus.FAILED, output_json=text)
    by_key = await new_run(store, run_id=UUID(int=4), flow_name="~")
    await run_step(store, by_key, text, StepStatus.FAILED)
    for needle in matching:
        page = await store.get_runs_page(search=needle)
        assert {by_name, by_error, by_output, by_key} == {run.run_id for run in page.runs}, needle
    for needle in others:
        page = await store.get_runs_page(search=needle)
        assert page.total_count == 0, needle


@dashboard
async def test_qry_2_an_empty_search_filters_nothing(store: FlowStore) -> None:
    await new_run(store)
    assert (await store.get_runs_page(search="")).total_count == 1
    assert (await store.get_runs_page(search=None)).total_count == 1


@dashboard
async def test_qry_2_the_first_64_kib_of_long_texts_are_searched(store: FlowStore) -> None:
    limit = 64 * 1024
    run_id = await new_run(store)
    await run_step(store, run_id, "exact", StepStatus.FAILED, error_message="x" * (limit - 6) + "inside")
    await run_step(store, run_id, "beyond", StepStatus.FAILED, error_message="x" * (limit - 6) + "outsideR")
    await run_step(
        store, run_id, "utf-8", StepStatus.FAILED, output_json="é" * (limit // 2 - 2) + "last" + "more"
    )

    async def total(needle: str) -> int:
        return (await store.get_runs_page(search=needle)).total_count

    assert await total("inside") == 1
    assert await total("XINSIDE") == 1
    assert await total("outsid") == 1
    assert await total("outside") == 0
    assert await total("ideR") == 0
    # Bytes of UTF-8 count, not characters.
    assert await total("élast") == 1
    assert await total("lastm") == 0


@dashboard
async def test_qry_2_a_character_cut_by_the_limit_does_not_match(store: FlowStore) -> None:
    run_id = await new_run(store)
    await run_step(store, run_id, "a", StepStatus.FAILED, output_json="x" * (64 * 1024 - 1) + "é" + "end")
    assert (await store.get_runs_page(search="xé")).total_count == 0
    assert (await store.get_runs_page(search="xxx")).total_count == 1


@dashboard
async def test_qry_2_keys_names_and_ids_of_full_length_are_searched_whole(store: FlowStore) -> None:
    await new_run(
        store, flow_name="n" * 250 + "name 1", trigger_key="t" * 250 + "trig 1", job_id="j" * 1018 + "job 12"
    )
    for needle in ("nname 1", "ttrig 1", "jjob 12", "N" * 249 + "NAME 1"):
        assert (await store.get_runs_page(search=needle)).total_count == 1, needle


async def test_qry_3_steps_by_start_then_key_and_attempts_by_number(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    for key in ("c", "b"):
        await run_step(store, run_id, key, StepStatus.FAILED)
    clock.advance(seconds=1)
    for key in ("z", "a", "Z", "é", "\U0001f600", "\uffff"):
        await run_step(store, run_id, key, StepStatus.FAILED)
    clock.advance(seconds=1)
    # A step starts when its first attempt does.
    for key in ("z", "c"):
        for _ in range(2):
            await run_step(store, run_id, key, StepStatus.FAILED)
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert [step.step_key for step in detail.steps] == [
        "b",
        "c",
        *("Z", "a", "z", "é", "\uffff", "\U0001f600"),
    ]
    assert [a.attempt for a in detail.steps[1].attempts] == [1, 2, 3]


async def test_qry_3_many_attempts_are_all_there(store: FlowStore) -> None:
    run_id = await new_run(store)
    for _ in range(12):
        await run_step(store, run_id, "poll", StepStatus.PENDING)
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert [a.attempt for a in detail.steps[0].attempts] == list(range(1, 13))


async def test_qry_3_a_detail_is_of_one_snapshot(store: FlowStore, open_another: OpenAnother) -> None:
    reader = await open_another()
    run_id = await new_run(store)
    done = asyncio.Event()

    async def write() -> None:
        for number in range(1, 41):
            attempt = await store.record_step_start(run_id, "poll", "http", input_json=f"in {number}")
            await store.record_step_complete(
                run_id, "poll", StepStatus.PENDING, output_json=f"out {number}", attempt=attempt
            )
            await asyncio.sleep(0)
        done.set()

    async def read() -> int:
        seen = 0
        while not done.is_set() and seen < LOOKS:
            detail = await reader.get_run_detail(run_id)
            assert detail is not None
            for step in detail.steps:
                last = step.attempts[-1]
                assert [a.attempt for a in step.attempts] == list(range(1, step.attempt_count + 1))
                assert (step.status, step.input_json, step.output_json) == (
                    last.status,
                    last.input_json,
                    last.output_json,
                )
                assert [a.completed_at is None for a in step.attempts[:-1]].count(True) == 0
                seen += 1
            await asyncio.sleep(0)
        return seen

    _, seen = await asyncio.gather(write(), read())
    assert seen > 0


async def test_qry_3_run_and_steps_are_of_one_snapshot(store: FlowStore, open_another: OpenAnother) -> None:
    reader = await open_another()
    run_id = await new_run(store)
    await run_step(store, run_id, "a", StepStatus.FAILED)
    done = asyncio.Event()

    async def write() -> None:
        for _ in range(25):
            # Failed with a failed step, or Running with a pending one: nothing else ever is.
            await store.complete_run(run_id, RunStatus.FAILED)
            await store.retry_step(run_id, "a")
            await run_step(store, run_id, "a", StepStatus.FAILED)
            await asyncio.sleep(0)
        done.set()

    async def read() -> int:
        seen = 0
        while not done.is_set() and seen < LOOKS:
            detail = await reader.get_run_detail(run_id)
            assert detail is not None
            seen += 1
            if detail.status is RunStatus.FAILED:
                assert detail.steps[0].status is StepStatus.FAILED
            else:
                assert detail.completed_at is None
            await asyncio.sleep(0)
        return seen

    _, seen = await asyncio.gather(write(), read())
    assert seen > 0


async def test_qry_6_active_runs_are_the_running_ones(store: FlowStore, clock: VirtualClock) -> None:
    wanted = await _runs_at_the_same_and_other_times(store, clock)
    for number, status in zip(
        wanted[::3],
        (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED, RunStatus.FAILED),
        strict=True,
    ):
        await store.complete_run(UUID(int=number), status)
    left = [number for index, number in enumerate(wanted) if index % 3]
    assert _ids(await store.get_active_runs()) == left
    assert _ids(await store.get_active_runs(take=3)) == left[:3]
    assert {run.status for run in await store.get_active_runs()} == {RunStatus.RUNNING}


async def test_qry_6_derived_runs_are_one_generation_in_order(store: FlowStore, clock: VirtualClock) -> None:
    source = await new_run(store, run_id=UUID(int=100))
    for number in (3, 1):
        await new_run(store, run_id=UUID(int=number), source_run_id=source)
    clock.advance(seconds=1)
    await new_run(store, run_id=UUID(int=2), source_run_id=source)
    await new_run(store, run_id=UUID(int=50), source_run_id=UUID(int=2))
    await store.complete_run(UUID(int=1), RunStatus.SUCCEEDED)
    assert _ids(await store.get_derived_runs(source)) == [2, 3, 1]
    assert _ids(await store.get_derived_runs(source, take=2)) == [2, 3]
    assert await store.get_derived_runs(source, take=0) == ()
    assert _ids(await store.get_derived_runs(UUID(int=2))) == [50]
    assert await store.get_derived_runs(UUID(int=50)) == ()


async def test_qry_6_a_source_need_not_be_stored(store: FlowStore) -> None:
    source = uuid4()
    run_id = await new_run(store, source_run_id=source)
    assert [run.run_id for run in await store.get_derived_runs(source)] == [run_id]


async def test_qry_2_times_at_the_limits_order_and_come_back(store: FlowStore, clock: VirtualClock) -> None:
    moments = [
        clock.now.replace(year=9999, month=12, day=30, hour=0, minute=0, second=0, microsecond=0),
        clock.now.replace(year=2038, month=1, day=19, microsecond=999_999),
        clock.now.replace(year=1970, month=1, day=1, hour=0, minute=0, second=0, microsecond=0),
        clock.now.replace(year=1969, month=12, day=31, microsecond=1),
        clock.now.replace(year=1582, month=10, day=10),
        clock.now.replace(year=1, month=1, day=2, hour=0, minute=0, second=0, microsecond=0),
    ]
    for moment in moments:
        clock.now = moment
        run_id = await new_run(store)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
    runs = await store.get_runs()
    assert [run.started_at for run in runs] == moments
    assert [run.completed_at for run in runs] == moments
    assert {run.started_at.utcoffset() for run in runs} == {timedelta(0)}
