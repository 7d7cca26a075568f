"""Mutants of runs and of their pages in SQLite."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from flowstore_core import RunAlreadyExistsError, RunStatus, StepStatus, open_store
from tests.calls import FLOW, new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import ended_run, error_of, new_step
from tests.virtual_clock import VirtualClock


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-1",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "ON CONFLICT (run_id) DO NOTHING",
            "ON CONFLICT (run_id) DO UPDATE SET status = 'Running', completed_at = NULL\n"
            "WHERE runs.status <> 'Running'",
        )
    ],
)
async def id_of_an_ended_run_can_be_started_again(url: str) -> None:
    """Starting a run under the id of an ended one reopens that one."""
    async with open_store(url) as store:
        run_id = await ended_run(store)
        assert await error_of(new_run(store, run_id=run_id)) is RunAlreadyExistsError
        assert await store.get_run_status(run_id) is RunStatus.SUCCEEDED


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("RUN-2",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "(expires_at IS NULL OR expires_at > ?)",
            "(expires_at IS NULL OR expires_at >= ?)",
        )
    ],
)
async def claim_that_ends_now_blocks_completion(url: str) -> None:
    """A claim whose lease ends exactly now keeps complete_run with expected from completing."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=timedelta(seconds=5))
        clock.advance(seconds=5)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={})


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-2",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "(expires_at IS NULL OR expires_at > ?)\n    OR dispatched_at IS NOT NULL\n",
            "(expires_at IS NULL OR expires_at > ?)\n",
        )
    ],
)
async def dispatched_key_does_not_block_completion(url: str) -> None:
    """complete_run with expected overlooks a key that was dispatched and has no claim."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={})


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-2",),
    changes=[("flowstore_sqlite/runs.py", "(expires_at IS NULL OR expires_at > ?)", "expires_at > ?")],
)
async def claim_without_lease_does_not_block_completion(url: str) -> None:
    """complete_run with expected takes a claim without lease for an expired one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={})


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-2",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "return statuses == expected",
            "return all(statuses.get(key) == status for key, status in expected.items())",
        )
    ],
)
async def unexpected_step_does_not_block_completion(url: str) -> None:
    """complete_run compares only the steps in expected, and overlooks a further step of the run."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, "charge")
        await store.record_step_start(run_id, "ship", "http")
        expected = {"charge": StepStatus.SUCCEEDED}
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-2",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "return statuses == expected",
            "return statuses.items() <= expected.items()",
        )
    ],
)
async def missing_step_does_not_block_completion(url: str) -> None:
    """complete_run accepts an expected step that the run does not have."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, "charge")
        expected = {"charge": StepStatus.SUCCEEDED, "ship": StepStatus.SUCCEEDED}
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "ORDER BY started_at DESC, run_id DESC",
            "ORDER BY started_at DESC, run_id",
        )
    ],
)
async def ties_ascend(url: str) -> None:
    """Runs that started at the same time are listed by ascending run_id."""
    async with open_store(url, clock=VirtualClock()) as store:
        ids = await together(new_run(store) for _ in range(3))
        found = [run.run_id for run in await store.get_runs()]
        assert found == sorted(ids, reverse=True)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-6",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            '"WHERE source_run_id = ?", NEWEST_FIRST,',
            '"WHERE source_run_id = ? ORDER BY started_at, run_id",',
        )
    ],
)
async def derived_runs_are_oldest_first(url: str) -> None:
    """get_derived_runs lists the oldest run first."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        source = await new_run(store)
        old = await new_run(store, source_run_id=source)
        clock.advance(seconds=1)
        new = await new_run(store, source_run_id=source)
        assert [run.run_id for run in await store.get_derived_runs(source)] == [new, old]


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-6",),
    changes=[("flowstore_sqlite/runs.py", "return -1 if take is None else take", "return take or -1")],
)
async def take_of_zero_is_unlimited(url: str) -> None:
    """take=0 lists every active run."""
    async with open_store(url) as store:
        await new_run(store)
        assert list(await store.get_active_runs(take=0)) == []


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-6",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "return -1 if take is None else take",
            "return 1000 if take is None else take",
        )
    ],
)
async def active_runs_are_cut_at_a_thousand(url: str) -> None:
    """get_active_runs without take lists at most 1,000 runs."""
    async with open_store(url) as store:
        await together(new_run(store) for _ in range(1001))
        assert len(await store.get_active_runs()) == 1001


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-2",),
    changes=[("flowstore_sqlite/runs.py", '"trigger_data": row[5],', '"trigger_data": row[5] or None,')],
)
async def empty_trigger_data_becomes_none(url: str) -> None:
    """An empty trigger_data is read as None."""
    async with open_store(url) as store:
        run_id = await new_run(store, trigger_data="")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.trigger_data == ""


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("STP-6",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "def read_run_status(db: sqlite3.Connection, run_id: UUID) -> RunStatus | None:\n"
            "    row = db.execute(GET_RUN_STATUS, (run_id.bytes,)).fetchone()\n"
            "    return None if row is None else RunStatus(row[0])\n",
            "_ended: dict[UUID, RunStatus] = {}\n\n\n"
            "def read_run_status(db: sqlite3.Connection, run_id: UUID) -> RunStatus | None:\n"
            "    if run_id in _ended:\n"
            "        return _ended[run_id]\n"
            "    row = db.execute(GET_RUN_STATUS, (run_id.bytes,)).fetchone()\n"
            "    status = None if row is None else RunStatus(row[0])\n"
            "    if status is not None and status.is_terminal:\n"
            "        _ended[run_id] = status\n"
            "    return status\n",
        )
    ],
)
async def terminal_status_is_cached(url: str) -> None:
    """The process remembers that a run ended, although retry_step reopens it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.complete_run(run_id, RunStatus.FAILED)
        assert await store.get_run_status(run_id) is RunStatus.FAILED
        await store.retry_step(run_id, "charge")
        assert await store.get_run_status(run_id) is RunStatus.RUNNING


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "(started_at, run_id) < (:started_at, :after_id)",
            "(started_at, run_id) <= (:started_at, :after_id)",
        )
    ],
)
async def page_repeats_the_run_at_its_position(url: str) -> None:
    """The page after a position begins with the run at that position."""
    async with open_store(url) as store:
        await new_run(store)
        (run,) = await store.get_runs()
        assert list(await store.get_runs(after=run.position)) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "(started_at, run_id) < (:started_at, :after_id)",
            "started_at < :started_at",
        )
    ],
)
async def page_skips_runs_of_the_same_time(url: str) -> None:
    """A position is only a time, so the next page skips the runs that started at that time."""
    async with open_store(url, clock=VirtualClock()) as store:
        await together(new_run(store) for _ in range(4))
        first = await store.get_runs(take=2)
        assert len(await store.get_runs(after=first[-1].position)) == 2


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[("flowstore_sqlite/pages.py", 'ids, "))", NEWEST_FIRST)', 'ids, "))")')],
)
async def page_is_ordered_by_id(url: str) -> None:
    """The right runs of a page are read in the order of their ids."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        for number in (1, 3, 2):
            await new_run(store, run_id=UUID(int=number))
            clock.advance(seconds=1)
        assert [run.run_id.int for run in await store.get_runs()] == [2, 3, 1]


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "for one in (RunStatus if",
            "for one in ((RunStatus.RUNNING, RunStatus.SUCCEEDED, RunStatus.FAILED) if",
        )
    ],
)
async def pages_omit_cancelled_runs(url: str) -> None:
    """Pages of all statuses leave out cancelled runs."""
    async with open_store(url) as store:
        await ended_run(store, RunStatus.CANCELLED)
        assert len(await store.get_runs()) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[("flowstore_sqlite/pages.py", "join_sql(counted, self._where_flow,", "join_sql(counted,")],
)
async def total_counts_every_flow(url: str) -> None:
    """total_count of a page of one flow counts the runs of all flows."""
    async with open_store(url) as store:
        await new_run(store)
        await new_run(store, flow_id=UUID(int=7))
        page = await store.get_runs_page(FLOW)
        assert (len(page.runs), page.total_count) == (1, 1)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1", "QRY-2"),
    changes=[("flowstore_sqlite/pages.py", "if each < self._position]", "if each <= self._position]")],
)
async def search_repeats_the_run_at_its_position(url: str) -> None:
    """The page of a search after a position begins with the run at that position."""
    async with open_store(url) as store:
        await new_run(store)
        (run,) = await store.get_runs()
        page = await store.get_runs_page(after=run.position, search="orders")
        assert list(page.runs) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[("flowstore_sqlite/pages.py", "total_count=len(positions)", "total_count=len(following)")],
)
async def search_counts_only_behind_the_position(url: str) -> None:
    """total_count of a search counts the matching runs behind the position only."""
    async with open_store(url) as store:
        await new_run(store)
        (run,) = await store.get_runs()
        assert (await store.get_runs_page(after=run.position, search="orders")).total_count == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1", "QRY-2"),
    changes=[
        ("flowstore_sqlite/pages.py", "self._skip : self._skip + self._take]", "self._skip : self._take]")
    ],
)
async def second_page_of_a_search_is_empty(url: str) -> None:
    """A search takes the runs from skip to take, instead of take runs."""
    async with open_store(url) as store:
        await together(new_run(store) for _ in range(4))
        assert len((await store.get_runs_page(skip=2, take=2, search="orders")).runs) == 2


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-2",),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "following[self._skip : self._skip + self._take]]",
            "following[self._skip : self._skip + self._take]][:999]",
        )
    ],
)
async def search_returns_at_most_999_runs(url: str) -> None:
    """A page of a search is cut to 999 runs, the number of parameters of old versions of SQLite."""
    async with open_store(url) as store:
        await together(new_run(store) for _ in range(1000))
        assert len((await store.get_runs_page(take=1000, search="orders")).runs) == 1000


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("QRY-2",),
    changes=[("flowstore_sqlite/pages.py", "fold_ascii(search)", "search.lower()")],
)
async def search_folds_other_letters_in_the_needle(url: str) -> None:
    """A search folds the case of all letters in the text to find, not of ASCII letters only."""
    async with open_store(url) as store:
        await new_run(store, flow_name="Étape")
        assert (await store.get_runs_page(search="ÉTAPE")).total_count == 1


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("QRY-3",),
    changes=[
        (
            "flowstore_sqlite/connection.py",
            '    db.execute("BEGIN")\n    try:\n        return work(db)',
            "    try:\n        return work(db)",
        )
    ],
)
async def each_statement_of_a_read_has_its_own_snapshot(url: str) -> None:
    """A read runs without a transaction, so its statements see different states."""
    async with open_store(url) as store:
        await together(new_run(store) for _ in range(500))
        done = asyncio.Event()

        async def start_runs() -> None:
            while not done.is_set():
                await new_run(store, flow_id=UUID(int=7))

        writing = asyncio.create_task(start_runs())
        try:
            for _ in range(60):
                page = await store.get_runs_page(take=1000)
                assert len(page.runs) == min(page.total_count, 1000)
        finally:
            done.set()
            await writing


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-2", "QRY-1"),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "where = join_sql(self._where_flow, self._where_status)",
            "where = self._where_flow",
        )
    ],
)
async def search_ignores_the_status(url: str) -> None:
    """A search within one status returns the matching runs of every status."""
    async with open_store(url) as store:
        await new_run(store)
        page = await store.get_runs_page(status=RunStatus.FAILED, search="orders")
        assert page.total_count == 0


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("RUN-4", "STP-4"),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            "            return FlowRunDetail(**_run_fields(row), steps=read_steps(db, run_id))\n",
            "            key = (run_id, row[8])\n"
            "            if key not in _details:\n"
            "                detail = FlowRunDetail(**_run_fields(row), steps=read_steps(db, run_id))\n"
            "                if row[8] is None:\n"
            "                    return detail\n"
            "                _details[key] = detail\n"
            "            return _details[key]\n",
        ),
        (
            "flowstore_sqlite/runs.py",
            "class Runs",
            "_details: dict[tuple[UUID, int], FlowRunDetail] = {}\n\n\nclass Runs",
        ),
    ],
)
async def detail_of_an_ended_run_is_cached(url: str) -> None:
    """The detail of an ended run is cached by its completed_at, so a late result is not shown."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.get_run_detail(run_id)
        await store.record_step_complete(run_id, "charge", StepStatus.FAILED)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].status is StepStatus.FAILED


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("RUN-2",),
    changes=[
        (
            "flowstore_sqlite/runs.py",
            'FROM steps WHERE run_id = ?\n"""\n\nGET_RUN_STATUS',
            'FROM steps WHERE run_id = ? LIMIT 1000\n"""\n\nGET_RUN_STATUS',
        )
    ],
)
async def completion_compares_a_thousand_steps(url: str) -> None:
    """complete_run compares the first 1,000 steps of a run with expected."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        keys = [f"step-{number}" for number in range(1001)]
        await together(store.record_skipped_step(run_id, key, "map") for key in keys)
        expected = dict.fromkeys(keys, StepStatus.SKIPPED)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected)


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("QRY-1",),
    changes=[
        (
            "flowstore_sqlite/pages.py",
            "(to_us(after.started_at), after.run_id.bytes)",
            "(to_us(after.started_at), after.run_id.bytes_le)",
        )
    ],
)
async def position_has_the_id_in_another_byte_order(url: str) -> None:
    """The run_id of a position is compared in little-endian byte order."""
    async with open_store(url, clock=VirtualClock()) as store:
        first, second = UUID(int=2 << 96), UUID(int=1 << 120)
        for run_id in (first, second):
            await new_run(store, run_id=run_id)
        (newest,) = await store.get_runs(take=1)
        assert newest.run_id == second
        assert [run.run_id for run in await store.get_runs(after=newest.position)] == [first]
