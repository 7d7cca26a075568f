"""The documented GRANTs suffice for each role and allow nothing else."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import pytest

from flowstore_core import ConfigurationError, RunStatus, SchemaVersionError, open_store
from tests.calls import new_run
from tests.security.leaks import OPERATIONS, LeakDetector, detect_leaks_in_loop, exercise

ENGINE = Path(__file__).parents[2] / "docs" / "using-it-in-an-engine.md"
LATER = timedelta(days=1)


@dataclass(frozen=True)
class Database:
    """A database with the roles and GRANTs of the documentation."""

    host: str
    name: str
    suffix: str

    def url(self, role: str) -> str:
        return f"postgresql:///{self.name}?host={self.host}&user=flows_{role}{self.suffix}&retry_timeout=1"

    async def connect(self, role: str | None = None) -> asyncpg.Connection:
        user = f"flows_{role}{self.suffix}" if role else "postgres"
        return await asyncpg.connect(host=self.host, user=user, database=self.name)


def _blocks(suffix: str, database: str) -> tuple[str, str]:
    """Return the documented statements to run before and after the owner migrates."""
    block = re.search(r"```sql\n(-- as an administrator\n.*?)```", ENGINE.read_text(), re.S)
    assert block is not None
    text = re.sub(r"\b(flows_(?:owner|app|reader))\b", rf"\1{suffix}", block[1])
    text = text.replace("DATABASE flows ", f"DATABASE {database} ")
    before, after = re.split(r"-- after: flowstore migrate up .*\n", text)
    return before, after


@pytest.fixture(params=["default privileges", "no privileges for PUBLIC"])
async def database(request: pytest.FixtureRequest, postgresql_url: str) -> AsyncIterator[Database]:
    suffix = f"_{uuid4().hex[:12]}"
    name = f"flows{suffix}"
    host = parse_qs(urlsplit(postgresql_url).query)["host"][0]
    created = Database(host, name, suffix)
    server = await asyncpg.connect(host=host, user="postgres", database="postgres")
    roles = ", ".join(f"flows_{role}{suffix}" for role in ("owner", "app", "reader"))
    try:
        await server.execute(f"CREATE DATABASE {name}")
        before, after = _blocks(suffix, name)
        admin = await created.connect()
        await admin.execute("CREATE EXTENSION pg_trgm")
        await admin.execute(before)
        if request.param == "no privileges for PUBLIC":
            # As on a hardened server. Default privileges apply to objects created later.
            owner = f"flows_owner{suffix}"
            await admin.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
            await admin.execute(
                f"ALTER DEFAULT PRIVILEGES FOR ROLE {owner} REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"
            )
            await admin.execute(f"GRANT USAGE ON SCHEMA public TO {owner}")
        async with open_store(created.url("owner")):
            pass
        await admin.execute(after)
        await admin.close()
        yield created
    finally:
        await server.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await server.execute(f"DROP ROLE IF EXISTS {roles}")
        await server.close()


def _database_errors(detector: LeakDetector) -> list[str]:
    return [f"{error}" for error in detector.errors if "SQLSTATE" in str(error)]


@pytest.mark.parametrize("migrate", [True, False])
async def test_privileges_on_rows_suffice_at_run_time(migrate: bool, database: Database) -> None:
    """Every operation on runs in valid and invalid states, search, statistics and cleanup."""
    async with detect_leaks_in_loop() as detector:
        async with open_store(database.url("app"), migrate=migrate) as store:
            for _ in range(5):
                await exercise(store, detector)
            run_id = await new_run(store, flow_name="needle in a haystack")
            await store.complete_run(run_id, RunStatus.SUCCEEDED)
            assert (await store.get_runs_page(search="NEEDLE in")).total_count == 1
            now = datetime.now(UTC)
            series = await store.get_run_timeseries("day", now - 3 * LATER, now)  # type: ignore[arg-type]
            assert sum(bucket.total for bucket in series) >= 1
            # The triggers call these functions once in a few hundred writes.
            app = await database.connect("app")
            await app.execute("SELECT flowstore.fold_run_changes()")
            await app.execute("SELECT flowstore.gather_texts(100)")
            await app.close()
            assert await store.cleanup(now + LATER) >= 1
        assert len(detector.errors) > 5
        assert not _database_errors(detector)


async def test_the_application_role_can_only_change_rows(database: Database) -> None:
    app = await database.connect("app")
    try:
        for statement in (
            "CREATE TABLE flowstore.mine (x int)",
            "CREATE FUNCTION flowstore.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "DROP TABLE flowstore.runs",
            "ALTER TABLE flowstore.runs ADD COLUMN x int",
            "TRUNCATE flowstore.runs",
            "CREATE TRIGGER mine AFTER INSERT ON flowstore.runs EXECUTE FUNCTION flowstore.forget_text()",
            "INSERT INTO flowstore.schema_version (version, name, works_from) VALUES (99, 'x', 99)",
            "DELETE FROM flowstore.schema_version",
            "DROP SCHEMA flowstore CASCADE",
            "CREATE SCHEMA mine",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await app.execute(statement)
        assert (
            await app.fetchval(
                "SELECT count(*) FROM pg_proc p JOIN pg_namespace n ON n.oid = pronamespace "
                "WHERE nspname = 'flowstore' AND prosecdef"
            )
            == 0
        )
        assert (
            await app.fetchval(
                "SELECT count(*) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
                "WHERE nspname = 'flowstore' AND relkind = 'S'"
            )
            == 0
        )
    finally:
        await app.close()


async def test_a_role_that_cannot_migrate_does_not_change_an_older_schema(database: Database) -> None:
    owner = await database.connect("owner")
    await owner.execute("DELETE FROM flowstore.schema_version WHERE version > 1")
    for migrate, expected in ((False, SchemaVersionError), (True, ConfigurationError)):
        with pytest.raises(expected) as caught:
            async with open_store(database.url("app"), migrate=migrate):
                pytest.fail("open_store succeeded")
        assert isinstance(caught.value, SchemaVersionError) or "GRANT" in str(caught.value)
    assert await owner.fetchval("SELECT max(version) FROM flowstore.schema_version") == 1
    await owner.close()


async def test_a_reader_can_read_every_row_and_change_none(database: Database) -> None:
    async with open_store(database.url("app")) as store, detect_leaks_in_loop() as detector:
        run_id = uuid4()
        await exercise(store, detector, run_id, rounds=1)
        await new_run(store, flow_name="needle")
    reads = [name for name in OPERATIONS if name.startswith(("get_", "find_"))]
    async with open_store(database.url("reader"), migrate=False) as store, detect_leaks_in_loop() as detector:
        await store.ping()
        await exercise(store, detector, run_id, rounds=1)
        failed = {
            source.partition(",")[0] for source, _ in detector.records if source.startswith("traceback of ")
        }
        unexpected = {f"traceback of {name}" for name in reads}
        assert not failed & unexpected
        assert any("privilege" in str(error) for error in detector.errors)
        assert {str(error) for error in detector.errors if "SQLSTATE" in str(error)} == {
            "the role lacks a privilege; docs/using-it-in-an-engine.md lists the GRANTs it needs "
            "(InsufficientPrivilegeError, SQLSTATE 42501)"
        }
        assert (await store.get_runs_page(search="needle")).total_count == 1
