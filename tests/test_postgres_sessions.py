"""Hostile defaults of a PostgreSQL server, database or role do not change the results or costs of calls."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest

from flowstore_core import (
    ConfigurationError,
    FlowStore,
    RunStatus,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
    new_run_id,
    open_store,
)
from flowstore_postgres.session_settings import PINNED, WATCHED

HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "lock_timeout": "1",
    "gin_fuzzy_search_limit": "1",
    "exit_on_error": "on",
    "TimeZone": "Europe/Berlin",
    "DateStyle": "German",
    "IntervalStyle": "iso_8601",
    "array_nulls": "off",
    "standard_conforming_strings": "off",
    "transform_null_equals": "on",
    "enable_indexscan": "off",
    "enable_nestloop": "off",
    "plan_cache_mode": "force_custom_plan",
    "jit": "on",
    "default_table_access_method": "unknown_method",
    "search_path": "public, pg_catalog",
    "statement_timeout": "1",
    "idle_in_transaction_session_timeout": "1",
    "idle_session_timeout": "500",
    "transaction_timeout": "500",
    "synchronous_commit": "off",
    "client_encoding": "LATIN1",
    "bytea_output": "escape",
    "extra_float_digits": "-15",
    "row_security": "off",
}
EXPECTED_SETTINGS = {
    **PINNED,
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "30s",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",
    "synchronous_commit": "on",
    "client_encoding": "UTF8",
}
RECORD_SETTINGS = """
CREATE TABLE public.recorded_settings (name text, setting text);
CREATE FUNCTION public.record_settings() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO public.recorded_settings
    SELECT name, current_setting(name) FROM unnest(ARRAY[{names}]) AS s (name);
    RETURN NULL;
END $$;
CREATE TRIGGER record_settings AFTER INSERT ON flowstore.runs
FOR EACH ROW EXECUTE FUNCTION public.record_settings()
"""


class ScratchDatabase:
    """A new database for one test, and the defaults of its settings."""

    def __init__(self, server: asyncpg.Connection, socket: str, name: str) -> None:
        self._server = server
        self._socket = socket
        self._name = name
        self.url = f"postgresql:///{name}?host={quote(socket, safe='')}&user=postgres"

    async def set_defaults(self, **settings: str) -> None:
        for name, value in settings.items():
            # search_path is a list, the others are one word.
            literal = value if name == "search_path" else f"'{value}'"
            await self._server.execute(f'ALTER DATABASE "{self._name}" SET {name} = {literal}')

    async def connect(self) -> asyncpg.Connection:
        """Connect without the defaults that would disturb the test."""
        disturbing = ("statement_timeout", "idle_session_timeout", "transaction_timeout", "lock_timeout")
        disturbing += ("default_transaction_read_only", "default_transaction_isolation")
        settings = {name: EXPECTED_SETTINGS[name] for name in disturbing}
        return await asyncpg.connect(
            host=self._socket, user="postgres", database=self._name, server_settings=settings
        )


@pytest.fixture
async def database(postgresql_url: str) -> AsyncIterator[ScratchDatabase]:
    name = f"sessions_{uuid4().hex}"
    server = await asyncpg.connect(postgresql_url)
    await server.execute(f'CREATE DATABASE "{name}"')
    socket = postgresql_url.partition("host=")[2].partition("&")[0]
    database = ScratchDatabase(server, socket, name)
    connection = await database.connect()
    await connection.execute("CREATE EXTENSION pg_trgm")
    await connection.close()
    try:
        yield database
    finally:
        await server.execute(f'DROP DATABASE "{name}" WITH (FORCE)')
        await server.close()


async def _exercise_stores(store: FlowStore, other: FlowStore) -> None:
    """Make calls of every kind, some concurrently, and check their results."""
    flow_id = new_run_id()
    triggers = [
        each.trigger_run(flow_id, "orders", new_run_id(), "http", idempotency_key="k")
        for each in (store, other) * 3
    ]
    results = await asyncio.gather(*triggers)
    assert sum(result.created for result in results) == 1
    run_id = results[0].run.run_id
    owners = [new_claim_token() for _ in range(8)]
    calls = [(store, other)[n % 2].try_claim_step(run_id, "a", owner=one) for n, one in enumerate(owners)]
    claimed = await asyncio.gather(*calls)
    assert sum(claimed) == 1
    owner = owners[claimed.index(True)]
    attempt = await store.record_step_start(
        run_id, "a", "http", owner=owner, input_json=r'{"a":"\\n","b":null}'
    )
    await asyncio.gather(*(each.append_event(run_id, "log", message="NULL") for each in (store, other) * 4))
    await store.record_step_complete(
        run_id, "a", StepStatus.FAILED, error_message=r"back\slash 'quoted' found", attempt=attempt
    )
    await store.retry_step(run_id, "a", attempt=attempt)
    await store.record_skipped_step(run_id, "a", "http", "enough")
    await store.register_waiter(run_id, "w", "go")
    await store.deliver_signal(run_id, "go", "{}", delivery_id="d")
    await store.save_output(run_id, "NULL", "null")
    assert dict(await other.get_outputs(run_id)) == {"NULL": "null"}
    assert len(await other.get_run_events(run_id)) == 8
    # Some leases end after a change to or from daylight-saving time.
    for days in range(30, 366, 30):
        assert await store.try_claim_step(run_id, f"{days}", owner=owner, lease=timedelta(days=days))
    for claim in await other.get_step_claims(run_id):
        if claim.expires_at is not None:
            assert claim.expires_at - claim.claimed_at == timedelta(days=int(claim.step_key))
    await asyncio.gather(*(store.release_step_claim(run_id, f"{days}") for days in range(30, 366, 30)))
    assert sum(
        await asyncio.gather(*(each.complete_run(run_id, RunStatus.FAILED) for each in (store, other)))
    )
    await asyncio.gather(*(store.start_run(flow_id, f"found {n}", new_run_id(), "manual") for n in range(20)))
    for run in await store.get_active_runs():
        await store.complete_run(run.run_id, RunStatus.SUCCEEDED)
    assert (await other.get_runs_page()).total_count == 21
    assert (await store.get_statistics()).completed_today == 20
    # cleanup adds the runs to the search index.
    await store.cleanup(results[0].run.started_at - timedelta(days=1))
    assert (await other.get_runs_page(search="found")).total_count == 21


@pytest.fixture
def retries(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    caplog.set_level(logging.DEBUG, "flowstore_postgres")
    return caplog.records


def _retry_messages(records: list[logging.LogRecord]) -> list[str]:
    return [one.getMessage() for one in records if hasattr(one, "flowstore.reason")]


@pytest.mark.parametrize("name", [*HOSTILE, "all at once"])
async def test_a_hostile_default_has_no_effect(
    name: str, database: ScratchDatabase, retries: list[logging.LogRecord]
) -> None:
    await database.set_defaults(**(HOSTILE if name == "all at once" else {name: HOSTILE[name]}))
    async with open_store(database.url) as store, open_store(database.url) as other:
        connection = await database.connect()
        names = ", ".join(f"'{name}'" for name in EXPECTED_SETTINGS)
        await connection.execute(RECORD_SETTINGS.replace("{names}", names))
        await _exercise_stores(store, other)
        recorded = await connection.fetch("SELECT DISTINCT name, setting FROM public.recorded_settings")
        await connection.close()
    # Connections for batches have a lock timeout of 100 ms and plan statements once.
    batch_settings = {
        ("lock_timeout", "100ms"),
        ("plan_cache_mode", "force_generic_plan"),
        ("enable_indexscan", "on"),
    }
    assert {tuple(row) for row in recorded} - batch_settings == set(
        EXPECTED_SETTINGS.items()
    ) - batch_settings
    assert _retry_messages(retries) == []


@pytest.mark.parametrize("name", ["default_transaction_isolation", "TimeZone", "DateStyle", "array_nulls"])
async def test_a_hostile_default_behind_a_pooler_changes_no_result(
    name: str, database: ScratchDatabase
) -> None:
    async with open_store(database.url):
        pass
    await database.set_defaults(**{name: HOSTILE[name]})
    url = f"{database.url}&pgbouncer=true"
    async with open_store(url) as store, open_store(url) as other:
        await _exercise_stores(store, other)


@pytest.mark.parametrize("name", WATCHED)
async def test_a_harmful_default_behind_a_pooler_is_logged(
    name: str, database: ScratchDatabase, caplog: pytest.LogCaptureFixture
) -> None:
    await database.set_defaults(**{name: HOSTILE[name]})
    async with open_store(f"{database.url}&pgbouncer=true"):
        pass
    warnings = [one.getMessage() for one in caplog.records if "ALTER ROLE" in one.getMessage()]
    assert len(warnings) == 1
    assert name in warnings[0]


async def test_a_read_only_role_behind_a_pooler_gets_a_clear_error_for_writes(
    database: ScratchDatabase,
) -> None:
    async with open_store(database.url):
        pass
    await database.set_defaults(default_transaction_read_only="on")
    async with open_store(f"{database.url}&pgbouncer=true") as store:
        assert await store.get_runs() == ()
        with pytest.raises(StoreUnavailableError, match="default_transaction_read_only"):
            await store.start_run(uuid4(), "orders", uuid4(), "manual")


@pytest.mark.parametrize(
    ("name", "value", "pgbouncer"),
    [
        ("synchronous_commit", "off", "true"),
        ("session_replication_role", "replica", "true"),
        ("session_replication_role", "replica", "false"),
    ],
)
async def test_a_default_that_breaks_the_contract_is_refused(
    name: str, value: str, pgbouncer: str, database: ScratchDatabase
) -> None:
    await database.set_defaults(**{name: value})
    with pytest.raises(ConfigurationError, match=f"{name} is {value}.*ALTER ROLE"):
        async with open_store(f"{database.url}&pgbouncer={pgbouncer}"):
            pass


async def test_a_stronger_synchronous_commit_is_kept(database: ScratchDatabase) -> None:
    await database.set_defaults(synchronous_commit="remote_apply")
    async with open_store(database.url) as store:
        connection = await database.connect()
        await connection.execute(RECORD_SETTINGS.replace("{names}", "'synchronous_commit'"))
        await store.start_run(uuid4(), "orders", uuid4(), "manual")
        assert (
            await connection.fetchval("SELECT DISTINCT setting FROM public.recorded_settings")
            == "remote_apply"
        )
        await connection.close()
