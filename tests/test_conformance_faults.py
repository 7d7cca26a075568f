"""The checks that inject faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from flowstore_conformance import CheckResult, Profile, Status, run_suite
from flowstore_conformance.registry import Check, Kind, all_checks
from flowstore_conformance.rendering import render_text
from flowstore_conformance.suite import run_check

from flowstore_core import ConfigurationError, StoreUnavailableError, open_store
from flowstore_core.backend import FaultInjectable, FaultInjector, OutageInjectable, SchemaVersionAdjustable
from flowstore_core.plugins import Backend, find_backend
from flowstore_core.urls import parse_url
from flowstore_memory.plugin import MemoryBackend
from tests.calls import new_run

CHECKS = [check for check in all_checks() if check.kind is Kind.FAULT]
SCHEMA_CHECK = next(check for check in CHECKS if check.clauses == ("CON-6",))


async def run_on(backend: Backend, check: Check, url: str) -> CheckResult:
    return await run_check(check, url, backend, Profile.QUICK, 7)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_postgresql_passes(check: Check, postgresql_url: str) -> None:
    result = await run_on(find_backend("postgresql")[1], check, postgresql_url)
    assert result.status is Status.PASS, result


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
