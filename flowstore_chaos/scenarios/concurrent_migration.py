"""Twelve processes open a new store concurrently, and one is killed during the migration (CON-6)."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.worker_pool import (
    WorkerExitedError,
    WorkerPool,
    is_mutant,
    send_to_parent,
    serve_requests,
)
from flowstore_core import FlowStoreError, new_claim_token, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_core.urls import parse_url

MIGRATORS = 12
HANG_TIMEOUT = 60.0
MAX_ROUNDS_PER_KILL = 20
"""Maximum average number of rounds per effective kill; a kill after the migration has no effect."""

# Whether the schema is visible to other sessions, and its structure.
POSTGRES_SCHEMA_EXISTS = "SELECT to_regclass(format('%I.flowstore_schema', $1::text)) IS NOT NULL"
POSTGRES_SHAPE = """
SELECT c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       replace(coalesce(pg_get_indexdef(i.indexrelid), ''), $1, '')
FROM pg_class c
JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = $1
LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
LEFT JOIN pg_index i ON i.indexrelid = c.oid
ORDER BY 1, 2, 3
"""
SQLITE_SHAPE = "SELECT type, name, sql FROM sqlite_schema ORDER BY type, name"


class SchemaProbe:
    """Reads the schema directly from the database while other processes migrate it.

    Without a store in between, the parent sees at once whether a kill preceded the schema.
    """

    def __init__(self, backend: str, location: str, connection: Any) -> None:
        self._backend = backend
        self._location = location
        self._connection = connection

    def url(self, number: int) -> str:
        """The URL of a store that does not exist yet."""
        if self._backend == "sqlite":
            return f"sqlite:///{self._location}/new-{number}.db"
        return f"{self._location}&schema=new_{number}"

    async def exists(self, url: str) -> bool:
        if self._backend == "sqlite":
            return bool(await asyncio.to_thread(_read, url, "SELECT 1 FROM sqlite_schema LIMIT 1"))
        return bool(await self._connection.fetchval(POSTGRES_SCHEMA_EXISTS, _schema(url)))

    async def shape(self, url: str) -> list[tuple[Any, ...]]:
        """All tables, columns and indexes, in a comparable form."""
        if self._backend == "sqlite":
            return await asyncio.to_thread(_read, url, SQLITE_SHAPE)
        return [tuple(row) for row in await self._connection.fetch(POSTGRES_SHAPE, _schema(url))]

    async def drop(self, url: str) -> None:
        if self._backend == "postgresql":
            await self._connection.execute(f'DROP SCHEMA IF EXISTS "{_schema(url)}" CASCADE')


def _schema(url: str) -> str:
    return parse_url(url).options["schema"]


def _path(url: str) -> str:
    return parse_url(url).path


def _read(url: str, statement: str) -> list[tuple[Any, ...]]:
    if not Path(_path(url)).exists():
        return []
    # Read-write: the first reader after a kill has to recover from the log.
    with closing(sqlite3.connect(f"file:{_path(url)}?mode=rw", uri=True, timeout=5)) as database:
        return database.execute(statement).fetchall()


@asynccontextmanager
async def _open_probe(context: RunContext) -> AsyncIterator[SchemaProbe]:
    if context.backend == "sqlite":
        yield SchemaProbe("sqlite", str(context.folder), None)
        return
    import asyncpg

    # No server crashes in this scenario.
    async with context.server({"fsync": "off"}) as server:
        connection = await asyncpg.connect(host="127.0.0.1", port=server.port, user="postgres")
        try:
            yield SchemaProbe("postgresql", server.url(), connection)
        finally:
            await connection.close()


async def run(context: RunContext) -> None:
    async with _open_probe(context) as probe:
        reference = probe.url(0)
        async with open_store(reference):
            shape = await probe.shape(reference)
        async with WorkerPool(__name__, MIGRATORS, url="none", mutant=context.is_mutant) as pool:
            # Warm up: imports must not count as migration time.
            await pool.request({"url": reference, "run_id": str(new_run_id())})
            await asyncio.gather(*(pool.receive(worker) for worker in pool.workers))
            seconds = 0.05
            for number in range(1, context.planned * MAX_ROUNDS_PER_KILL):
                if context.done:
                    return
                before_schema = await _round(context, probe, pool, probe.url(number), seconds, shape)
                # Adapt the delay to the duration of a migration on this machine.
                seconds *= 1.25 if before_schema else 0.8


async def _round(
    context: RunContext,
    probe: SchemaProbe,
    pool: WorkerPool,
    url: str,
    seconds: float,
    shape: list[tuple[Any, ...]],
) -> bool:
    """All open one new store; one starts earlier and is killed. True if killed before the schema existed."""
    victim, *others = context.rng.sample(pool.workers, len(pool.workers))
    run_id = new_run_id()
    request = {"url": url, "run_id": str(run_id)}
    pool.send(victim, request)
    # The first reply reports the start.
    await pool.receive(victim)
    await asyncio.sleep(context.rng.random() * seconds / 3)
    for worker in others:
        pool.send(worker, request)
    await asyncio.sleep(context.rng.random() * seconds * 2 / 3)
    victim.send_signal(signal.SIGKILL)
    before_schema = not await probe.exists(url)
    try:
        async with asyncio.timeout(HANG_TIMEOUT):
            await asyncio.gather(*(pool.receive(worker) for worker in others))
            replies = await asyncio.gather(*(pool.receive(worker) for worker in others))
    except TimeoutError:
        context.counts.count_wrong(f"opening hung for {HANG_TIMEOUT:.0f} s after another migrator was killed")
        raise
    before_schema = before_schema and await _exited_without_reply(pool, victim)
    context.counts.add_detail("kills after the schema existed", not before_schema)
    if before_schema:
        context.record_faults()
    await _verify(context, probe, url, run_id, replies, shape)
    await probe.drop(url)
    await pool.replace(victim)
    return before_schema


async def _exited_without_reply(pool: WorkerPool, victim: Process) -> bool:
    """Whether the killed process exited without a second reply."""
    try:
        await pool.receive(victim)
    except WorkerExitedError:
        return True
    return False


async def _verify(
    context: RunContext,
    probe: SchemaProbe,
    url: str,
    run_id: UUID,
    replies: list[dict[str, Any]],
    shape: list[tuple[Any, ...]],
) -> None:
    for reply in replies:
        context.counts.operations += 1
        if (error := reply.get("error")) is not None:
            context.counts.count_wrong(
                f"opening failed while {MIGRATORS} processes migrate and one is killed: {error}"
            )
    winners = [reply for reply in replies if reply.get("won")]
    if len(winners) > 1:
        context.counts.count_duplicate(
            f"{len(winners)} processes won one claim, so they use different schemas"
        )
    if await probe.shape(url) != shape:
        context.counts.count_wrong("the schema differs from the schema of an undisturbed migration")
    try:
        # No migration may be missing.
        async with open_store(url, migrate=False) as store:
            keys = await store.get_dispatched_step_keys(run_id)
            missing = [reply for reply in replies if reply.get("key") and reply["key"] not in keys]
            for reply in missing:
                context.counts.count_lost(
                    f"the dispatch that {reply['key']} wrote after its migration does not exist"
                )
    except FlowStoreError as error:
        context.counts.count_wrong(f"the migrated store cannot be opened: {type(error).__name__}: {error}")


async def _migrate(request: dict[str, Any]) -> dict[str, Any]:
    """Open the store and write to it, to check that all processes share one schema."""
    run_id, key = UUID(request["run_id"]), f"migrator {new_claim_token()}"
    send_to_parent("begun")
    try:
        if is_mutant():
            await _migrate_unlocked(request["url"])
        async with open_store(request["url"]) as store:
            await store.trigger_run(run_id, "migrated", run_id, "manual", idempotency_key="one")
            won = await store.try_claim_step(run_id, "first", owner=key)
            await store.try_record_dispatch(run_id, key)
    except Exception as error:  # noqa: BLE001 - sent to the parent, which counts it
        return {"error": f"{type(error).__name__}: {error}"}
    return {"key": key, "won": won}


async def _migrate_unlocked(url: str) -> None:
    """Run the migrations without a lock."""
    _, found, config = resolve_store(url)
    backend: Any = found
    if config.scheme == "sqlite":
        await asyncio.to_thread(_write_unlocked, url, [script for _, _, script in backend.migrations(config)])
        return
    import asyncpg

    schema = _schema(url)
    connection = await asyncpg.connect(parse_url(url).with_options({}), ssl=False)
    try:
        if not await connection.fetchval(POSTGRES_SCHEMA_EXISTS, schema):
            for _, _, script in backend.migrations(config):
                await connection.execute(script)
    finally:
        await connection.close()


def _write_unlocked(url: str, scripts: list[str]) -> None:
    if _read(url, "SELECT 1 FROM sqlite_schema LIMIT 1"):
        return
    with closing(sqlite3.connect(_path(url), isolation_level=None)) as database:
        for script in scripts:
            database.executescript(script.replace("BEGIN IMMEDIATE;", "").replace("COMMIT;", ""))


SCENARIO = FaultScenario(
    number=13,
    name="concurrent-migration",
    fault=f"{MIGRATORS} processes open a new store concurrently, and one is killed before the schema exists",
    unit="kills",
    planned=100,
    min_faults=3,
    backends=("sqlite", "postgresql"),
    pass_criterion="all others open it, and its schema equals that of an undisturbed migration",
    mutant="migrations run without a lock",
    minutes=20,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(serve_requests(_migrate))
