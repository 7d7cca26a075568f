"""Mutants of migrations and of the checks of schema versions in SQLite."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import (
    Capability,
    RunStatus,
    RunTimeseriesGranularity,
    SchemaVersionError,
    open_store,
)
from flowstore_core.plugins import find_backend
from flowstore_core.timeseries import EARLIEST, day_start
from flowstore_sqlite.codecs import to_us
from flowstore_sqlite.url import database_path
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import error_of, raw_connection
from tests.virtual_clock import VirtualClock

MIGRATIONS = "flowstore_sqlite/schema_migrations.py"
SUMMARIES = "flowstore_sqlite/migrations/0002_summaries.sql"
SEARCH = "flowstore_sqlite/search.py"
OPEN = "flowstore_sqlite/open.py"
NOON = datetime.fromisoformat("2026-03-14T12:00:00+00:00")
OTHER_FLOW = UUID(int=7)

INSERT_RUN = """
INSERT INTO runs (run_id, flow_id, flow_name, trigger_key, status, started_at, completed_at)
VALUES (?, ?, 'orders', 'manual', ?, ?, ?)
"""


def _create_older_file(url: str, version: int, runs: list[tuple[UUID, RunStatus]]) -> None:
    """Create a file of an older schema version, with runs that started at NOON."""
    backend: Any = find_backend("sqlite")[1]
    with closing(sqlite3.connect(database_path(url), isolation_level=None)) as db:
        for number, _, script in backend.migrations(None):
            if number <= version:
                db.executescript(script)
        for flow_id, status in runs:
            end = to_us(NOON + timedelta(minutes=1)) if status.is_terminal else None
            db.execute(INSERT_RUN, (uuid4().bytes, flow_id.bytes, status, to_us(NOON), end))


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            MIGRATIONS,
            "    if not migrate:\n        raise",
            "    if not migrate and version == 0:\n        raise",
        )
    ],
)
async def older_schema_opens_without_migrating(url: str) -> None:
    """migrate=False opens and migrates a file of an older schema version."""
    _create_older_file(url, 1, [])
    try:
        async with open_store(url, migrate=False):
            raise AssertionError("a file of an older schema version was opened")
    except SchemaVersionError:
        pass


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6",),
    changes=[(MIGRATIONS, "if works_from > needed:", "if works_from > version:")],
)
async def newer_schema_opens(url: str) -> None:
    """A file whose schema is too new for the code is opened."""
    async with open_store(url):
        pass
    with raw_connection(url) as newer:
        newer.execute("INSERT INTO flowstore_schema VALUES (99, 'future', 99, 0)")
    try:
        async with open_store(url):
            raise AssertionError("a file with a newer schema was opened")
    except SchemaVersionError:
        pass


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6", "QRY-4"),
    changes=[
        (
            SUMMARIES,
            "ON CONFLICT (day) DO UPDATE SET succeeded = excluded.succeeded, failed = excluded.failed;",
            "ON CONFLICT (day) DO NOTHING;",
        )
    ],
)
async def migration_loses_the_ends_of_a_day(url: str) -> None:
    """A migration counts no completed runs on the days on which runs have started."""
    _create_older_file(url, 1, [(FLOW, RunStatus.FAILED)])
    async with open_store(url) as store:
        assert (await store.get_statistics(as_of=NOON)).failed_today == 1


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6", "QRY-1"),
    changes=[(SUMMARIES, "FROM runs GROUP BY flow_id, status;", "FROM runs GROUP BY status;")],
)
async def migration_counts_all_runs_for_one_flow(url: str) -> None:
    """A migration counts the runs of all flows with the same status for one of these flows."""
    _create_older_file(url, 1, [(FLOW, RunStatus.RUNNING), (OTHER_FLOW, RunStatus.RUNNING)])
    async with open_store(url) as store:
        for flow_id in (FLOW, OTHER_FLOW):
            assert (await store.get_runs_page(flow_id)).total_count == 1


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6", "QRY-5"),
    changes=[
        (
            SUMMARIES,
            "/ 86400000000, COUNT(*)\nFROM runs GROUP BY 1;",
            "/ 86400000000, COUNT(*)\nFROM runs WHERE completed_at IS NOT NULL GROUP BY 1;",
        )
    ],
)
async def migration_loses_days_of_running_runs(url: str) -> None:
    """After a migration, timeseries leave out the days on which no run has ended."""
    _create_older_file(url, 1, [(FLOW, RunStatus.RUNNING)])
    async with open_store(url) as store:
        day = day_start(NOON)
        found = await store.get_run_timeseries(RunTimeseriesGranularity.DAY, day, day + timedelta(days=1))
        assert [bucket.total for bucket in found] == [1]


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6", "QRY-2"),
    changes=[
        (
            SEARCH,
            "INSERT INTO unsearched SELECT run_id FROM runs WHERE status <> 'Running' ON",
            "INSERT INTO unsearched SELECT run_id FROM runs WHERE status IN ('Succeeded', 'Failed') ON",
        )
    ],
)
async def migration_loses_cancelled_runs_for_searches(url: str) -> None:
    """After a migration, searches do not find the runs that were cancelled before."""
    _create_older_file(url, 2, [(FLOW, RunStatus.CANCELLED)])
    async with open_store(url) as store:
        await store.cleanup(EARLIEST)
        assert (await store.get_runs_page(search="orders")).total_count == 1


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            MIGRATIONS,
            "            if migration.version <= version:\n                continue\n",
            "            if migration.version < version:\n                continue\n",
        )
    ],
)
async def last_migration_is_applied_again(url: str) -> None:
    """Opening a file of an older schema version applies its last migration a second time."""
    _create_older_file(url, 2, [])

    async def open_and_close() -> None:
        async with open_store(url):
            pass

    assert await error_of(open_and_close()) is None


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CON-5",),
    changes=[
        (OPEN, 'SqliteStore if options.synchronous == "FULL" else NonDurableSqliteStore', "SqliteStore")
    ],
)
async def store_without_syncs_claims_to_be_durable(url: str) -> None:
    """A store with synchronous=NORMAL has the capability DURABLE."""
    async with open_store(url, synchronous="NORMAL") as store:
        assert Capability.DURABLE not in store.capabilities


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            "flowstore_sqlite/migrations/0006_runs_to_stop.sql",
            "-- works_from: 1\n",
            "-- works_from: 7\n",
        )
    ],
)
async def migrated_file_is_too_new_for_its_own_code(url: str) -> None:
    """The newest migration asks for newer code than its own, so the migrated file cannot be opened again."""
    async with open_store(url, clock=VirtualClock()) as store:
        await new_run(store)

    async def open_and_close() -> None:
        async with open_store(url):
            pass

    assert await error_of(open_and_close()) is None
