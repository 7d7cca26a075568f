"""The checks that inject faults."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest
from flowstore_conformance import CheckResult, Profile, Status, run_suite
from flowstore_conformance.registry import Check, Kind, all_checks
from flowstore_conformance.rendering import render_text
from flowstore_conformance.suite import run_check

from flowstore_core import ConfigurationError, open_store
from flowstore_core.backend import FaultInjectable, FaultInjector, SchemaVersionAdjustable
from flowstore_core.plugins import Backend, find_backend
from flowstore_core.urls import parse_url
from flowstore_memory.plugin import MemoryBackend
from flowstore_memory.store import SharedStore
from tests.calls import new_run

CHECKS = [check for check in all_checks() if check.kind is Kind.FAULT]
SCHEMA_CHECK = next(check for check in CHECKS if check.clauses == ("CON-6",))


async def run_on(backend: Backend, check: Check, url: str) -> CheckResult:
    return await run_check(check, url, backend, Profile.QUICK, 7)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
async def test_postgresql_passes(check: Check, postgresql_url: str) -> None:
    backend = find_backend("postgresql")[1]
    if not check.needs <= backend.capabilities:
        pytest.skip(f"it does not declare {', '.join(sorted(check.needs - backend.capabilities))}")
    result = await run_on(backend, check, postgresql_url)
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


class RepeatsClaims(MemoryBackend):
    """Repeats claim_next_steps after a lost reply as if the first request had not happened."""

    def __init__(self) -> None:
        self.url = ""
        self.skip: int | None = None

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        self.url = url
        yield self

    def lose_reply(self, *, skip: int = 0) -> None:
        self.skip = skip

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
