"""The checks that inject faults."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from flowstore_conformance import CheckResult, Profile, Status, run_suite
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.rendering import render_text
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core import ConfigurationError, StoreUnavailableError, open_store
from flowstore_core.backend import (
    FaultInjectable,
    FaultInjector,
    Migratable,
    OutageInjectable,
    SchemaRevertible,
    SchemaVersionAdjustable,
    WriteFailable,
)
from flowstore_core.open import resolve_store
from flowstore_core.plugins import Backend, find_backend
from flowstore_core.urls import parse_url
from flowstore_memory.plugin import MemoryBackend
from flowstore_memory.store import SharedStore
from flowstore_sqlite.plugin import SqliteBackend
from flowstore_sqlite.url import database_path
from tests.calls import new_run

CHECKS = [check for check in select_checks() if check.kind is Kind.FAULT]
SCHEMA_CHECK = next(check for check in CHECKS if check.name == "another_schema_version_is_refused")
MIGRATION_CHECK = next(check for check in CHECKS if check.name == "migrations_keep_all_data")


async def run_on(backend: Backend, check: Check, url: str) -> CheckResult:
    return await run_check(check, url, backend, Profile.QUICK, 7)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_a_backend_without_the_hook_is_unsupported(check: Check) -> None:
    result = await run_on(MemoryBackend(), check, "memory://")
    assert result.status is Status.UNSUPPORTED
    assert result.reason is not None
    assert "does not implement" in result.reason


async def test_a_passed_clause_names_its_unsupported_checks() -> None:
    report = await run_suite("memory://", profile="quick", clauses=["CON-3"])
    (clause,) = report.shown_clauses
    assert clause.status is Status.PASS
    assert "partly UNSUPPORTED: the backend does not implement FaultInjectable" in " ".join(
        render_text(report).split()
    )


class IgnoresVersions(MemoryBackend):
    """Opens a schema of any version."""

    @asynccontextmanager
    async def adjust_schema_version(self, url: str, difference: int) -> AsyncIterator[None]:
        yield


async def test_a_backend_that_opens_any_schema_version_is_found() -> None:
    backend = IgnoresVersions()
    assert isinstance(backend, SchemaVersionAdjustable)
    result = await run_on(backend, SCHEMA_CHECK, "memory://")
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert result.failure.clause == "CON-6"
    assert "newer schema" in result.failure.message


# Migrations


class FaultyMigration(SqliteBackend):
    """Executes a statement on each older file, as a faulty migration would."""

    def __init__(self, statement: str) -> None:
        self._statement = statement

    async def revert_schema(self, url: str, version: int) -> None:
        await super().revert_schema(url, version)
        with closing(sqlite3.connect(database_path(url))) as db, db:
            db.execute(self._statement)


TABLES_OF_RUNS = (
    "runs",
    "steps",
    "attempts",
    "controls",
    "idempotency_keys",
    "waiters",
    "deliveries",
    "outputs",
    "events",
)


@pytest.mark.parametrize(
    "statement",
    [
        *(f"DELETE FROM {table}" for table in TABLES_OF_RUNS),
        "UPDATE runs SET completed_at = completed_at / 1000 * 1000",
        "UPDATE runs SET trigger_data = NULL",
        "UPDATE steps SET claim_owner = NULL",
        "UPDATE steps SET last_attempt = 1",
        "DELETE FROM steps WHERE status IS NULL",
        "INSERT INTO runs SELECT randomblob(16), flow_id, status, started_at, completed_at, source_run_id, "
        "flow_name, trigger_key, job_id, trigger_data FROM runs LIMIT 1",
    ],
)
async def test_a_migration_that_changes_data_is_found(statement: str, tmp_path: Path) -> None:
    backend = FaultyMigration(statement)
    assert isinstance(backend, SchemaRevertible)
    result = await run_on(backend, MIGRATION_CHECK, f"sqlite:///{tmp_path}/flows.db")
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert result.failure.clause == "CON-6"
    assert "after the migration from schema version 1" in result.failure.message


async def test_a_migration_that_fails_is_found(tmp_path: Path) -> None:
    backend = FaultyMigration("CREATE TABLE run_counts (flow_id)")
    result = await run_on(backend, MIGRATION_CHECK, f"sqlite:///{tmp_path}/flows.db")
    assert result.failure is not None
    assert result.failure.clause == "CON-6"
    assert "opening schema version 1" in result.failure.message


@pytest.mark.parametrize("name", ["postgresql", "sqlite"])
async def test_a_reverted_schema_has_the_earlier_version(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    backend = find_backend(name)[1]
    assert isinstance(backend, SchemaRevertible)
    assert isinstance(backend, Migratable)
    url = f"sqlite:///{tmp_path}/flows.db" if name == "sqlite" else request.getfixturevalue("postgresql_url")
    newest = len(backend.earlier_schema_versions()) + 1
    for version in backend.earlier_schema_versions():
        async with backend.scratch(url) as fresh:
            config = resolve_store(fresh)[2]
            await backend.migrate(config)
            await backend.revert_schema(fresh, version)
            assert await backend.schema_version(config) == version
            assert await backend.migrate(config) == newest


# Queues


class RepeatsClaims(MemoryBackend):
    """Repeats claim_next_steps after a lost reply as if the first request had not happened."""

    def __init__(self) -> None:
        self.url = ""
        self.skip: int | None = None

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        self.url = url
        yield self

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self.skip = skip

    def refuse_request(self, *, skip: int = 0) -> None:
        raise NotImplementedError

    def hold_request(self, *, skip: int = 0) -> None:
        raise NotImplementedError

    async def release_request(self) -> None:
        raise NotImplementedError

    def disarm(self) -> bool:
        armed, self.skip = self.skip, None
        return armed is None


async def test_a_repeated_claim_that_claims_more_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, claim = RepeatsClaims(), SharedStore.claim_next_steps

    async def claim_twice(store: SharedStore, **given: Any) -> Any:
        if backend.skip == 0:
            backend.skip = None
            await claim(store, **given)
        return await claim(store, **given)

    monkeypatch.setattr(SharedStore, "claim_next_steps", claim_twice)
    check = next(check for check in CHECKS if check.clauses == ("QUE-3",))
    result = await run_on(backend, check, "memory://")
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert result.failure.clause == "QUE-3"
    assert "the steps that are claimed" in result.failure.message


# The injector of PostgreSQL


@asynccontextmanager
async def connection_with_faults(url: str) -> AsyncIterator[tuple[FaultInjector, asyncpg.Connection]]:
    """Yield an injector and a connection through it."""
    backend = find_backend("postgresql")[1]
    assert isinstance(backend, FaultInjectable)
    async with backend.inject_faults(url) as injector:
        options = parse_url(injector.url).options
        connection = await asyncpg.connect(
            host=options["host"],
            port=int(options["port"]),
            user=options["user"],
            database="postgres",
            ssl=False,
        )
        try:
            yield injector, connection
        finally:
            await connection.close()


async def test_a_lost_reply_breaks_the_connection_after_the_effect(
    fresh: str, admin: asyncpg.Connection
) -> None:
    await admin.execute("CREATE TABLE written (n integer)")
    schema = parse_url(fresh).options["schema"]
    async with connection_with_faults(fresh) as (injector, connection):
        injector.lose_reply(skip=1)
        await connection.execute("SELECT 1")
        with pytest.raises(asyncpg.PostgresConnectionError):
            await connection.execute(f'INSERT INTO "{schema}".written VALUES (1)')
        assert injector.disarm()
        assert await admin.fetchval("SELECT count(*) FROM written") == 1


async def test_a_held_request_is_sent_when_it_is_released(fresh: str, admin: asyncpg.Connection) -> None:
    await admin.execute("CREATE TABLE written (n integer)")
    schema = parse_url(fresh).options["schema"]
    async with connection_with_faults(fresh) as (injector, connection):
        injector.hold_request()
        with pytest.raises(asyncpg.PostgresConnectionError):
            await connection.execute(f'INSERT INTO "{schema}".written VALUES (1)')
        assert injector.disarm()
        assert await admin.fetchval("SELECT count(*) FROM written") == 0
        await injector.release_request()
        assert await admin.fetchval("SELECT count(*) FROM written") == 1


async def test_a_refused_request_ends_its_transaction(fresh: str) -> None:
    async with connection_with_faults(fresh) as (injector, connection):
        injector.refuse_request(skip=2)
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute("SELECT 1")
        with pytest.raises(asyncpg.DeadlockDetectedError):
            await connection.execute("SELECT 2")
        assert injector.disarm()
        with pytest.raises(asyncpg.InFailedSQLTransactionError):
            await connection.execute("SELECT 3")
        await transaction.rollback()
        assert await connection.fetchval("SELECT 4") == 4


async def test_a_refused_commit_leaves_no_transaction_open(fresh: str, admin: asyncpg.Connection) -> None:
    await admin.execute("CREATE TABLE written (n integer)")
    schema = parse_url(fresh).options["schema"]
    async with connection_with_faults(fresh) as (injector, connection):
        await connection.execute("BEGIN")
        await connection.execute(f'INSERT INTO "{schema}".written VALUES (1)')
        injector.refuse_request()
        with pytest.raises(asyncpg.DeadlockDetectedError):
            await connection.execute("COMMIT")
        assert injector.disarm()
        assert not connection.is_in_transaction()
        assert await admin.fetchval("SELECT count(*) FROM written") == 0


async def test_nothing_reaches_the_server_after_an_isolating_fault(fresh: str) -> None:
    async with connection_with_faults(fresh) as (injector, connection):
        injector.lose_reply(isolates=True)
        with pytest.raises(asyncpg.PostgresConnectionError):
            await connection.execute("SELECT 1")
        opening = asyncio.ensure_future(_open_and_ping(injector.url))
        await asyncio.wait({opening}, timeout=0.2)
        assert not opening.done()
        injector.disarm()
        await opening


async def _open_and_ping(url: str) -> None:
    async with open_store(url) as store:
        await store.ping()


# Outages


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
async def test_a_lock_delays_writes_until_it_ends(name: str, tmp_path: Path, fresh: str) -> None:
    backend = find_backend(name)[1]
    assert isinstance(backend, OutageInjectable)
    url = f"sqlite:///{tmp_path}/flows.db" if name == "sqlite" else fresh
    async with open_store(url) as store, backend.inject_outages(url) as injector:
        run_id = await new_run(store)
        async with injector.lock():
            claiming = asyncio.ensure_future(store.try_claim_step(run_id, "a"))
            await asyncio.wait({claiming}, timeout=0.2)
            assert not claiming.done()
        assert await claiming


@pytest.mark.parametrize("name", ["sqlite", "postgresql"])
@pytest.mark.parametrize("number", [0, 1])
async def test_an_interruption_makes_the_store_unavailable(
    name: str, number: int, tmp_path: Path, fresh: str
) -> None:
    backend = find_backend(name)[1]
    assert isinstance(backend, OutageInjectable)
    url = f"sqlite:///{tmp_path}/flows.db" if name == "sqlite" else fresh
    async with backend.inject_outages(url) as injector, open_store(injector.url) as store:
        await new_run(store)
        assert len(injector.interruptions) == 2
        async with list(injector.interruptions.values())[number]():
            with pytest.raises(StoreUnavailableError):
                await store.ping()


async def test_an_injector_without_a_fault_has_no_effect(fresh: str) -> None:
    backend = find_backend("postgresql")[1]
    assert isinstance(backend, FaultInjectable)
    async with backend.inject_faults(fresh) as injector, open_store(injector.url) as store:
        run_id = await new_run(store)
        claims = [store.try_claim_step(run_id, f"step {number}") for number in range(50)]
        assert all(await asyncio.gather(*claims))
        injector.lose_reply(skip=1000)
        assert not injector.disarm()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("postgresql://host/database?sslmode=require", "TLS"),
        ("postgresql:///database", "names the host"),
    ],
)
async def test_a_url_unsupported_by_the_injector_is_refused(url: str, reason: str) -> None:
    backend = find_backend("postgresql")[1]
    assert isinstance(backend, FaultInjectable)
    with pytest.raises(ConfigurationError, match=reason):
        async with backend.inject_faults(url):
            pass


# The injector of SQLite


async def test_statements_fail_until_the_injector_stops(memory_path: Path) -> None:
    backend, url = find_backend("sqlite")[1], f"sqlite:///{memory_path}/flows.db"
    assert isinstance(backend, WriteFailable)
    async with (
        open_store(url) as other,
        backend.inject_write_failures(url) as injector,
        open_store(injector.url) as store,
    ):
        run_id = await new_run(store)
        injector.fail(skip=0)
        with pytest.raises(StoreUnavailableError, match="disk is full"):
            await store.try_claim_step(run_id, "charge")
        assert await other.try_claim_step(run_id, "ship"), "a write of another store fails too"
        assert await store.get_claimed_step_keys(run_id) == {"ship"}
        assert injector.stop()
        assert await store.try_claim_step(run_id, "charge")
        injector.fail(skip=100)
        assert not await store.try_claim_step(run_id, "charge")
        assert not injector.stop()
