"""Twelve processes that open a store which is not there yet, one of them killed midway (CON-6)."""

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

from flowstore_chaos.line import Line
from flowstore_chaos.processes import Crew, EndedError, is_broken, serve_requests, tell
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStoreError, new_claim_token, new_run_id, open_store
from flowstore_core.open import resolve_store
from flowstore_core.urls import parse_url

MIGRATORS = 12
HUNG_SECONDS = 60.0
MOST_ROUNDS = 20
"""For one kill that lands at most so many rounds on average; a kill after the schema is there is none."""

# Whether any other process can see a schema yet, and what it looks like once it is there.
POSTGRES_IS_THERE = "SELECT to_regclass(format('%I.flowstore_schema', $1::text)) IS NOT NULL"
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


class Looking:
    """How the parent looks at the database from outside, while others migrate it.

    It asks the database itself: whether a kill came before the schema was there must be known at once.
    """

    def __init__(self, backend: str, place: str, connection: Any) -> None:
        self._backend = backend
        self._place = place
        self._connection = connection

    def url(self, number: int) -> str:
        """A store that is not there yet."""
        if self._backend == "sqlite":
            return f"sqlite:///{self._place}/new-{number}.db"
        return f"{self._place}&schema=new_{number}"

    async def is_there(self, url: str) -> bool:
        if self._backend == "sqlite":
            return bool(await asyncio.to_thread(_read, url, "SELECT 1 FROM sqlite_schema LIMIT 1"))
        return bool(await self._connection.fetchval(POSTGRES_IS_THERE, _schema(url)))

    async def shape(self, url: str) -> list[tuple[Any, ...]]:
        """All tables, columns and indexes, comparable."""
        if self._backend == "sqlite":
            return await asyncio.to_thread(_read, url, SQLITE_SHAPE)
        return [tuple(row) for row in await self._connection.fetch(POSTGRES_SHAPE, _schema(url))]

    async def forget(self, url: str) -> None:
        if self._backend == "postgresql":
            await self._connection.execute(f'DROP SCHEMA IF EXISTS "{_schema(url)}" CASCADE')


def _schema(url: str) -> str:
    return parse_url(url).options["schema"]


def _path(url: str) -> str:
    return parse_url(url).path


def _read(url: str, statement: str) -> list[tuple[Any, ...]]:
    if not Path(_path(url)).exists():
        return []
    # Not read-only: whoever comes upon the log of a process that was killed has to recover from it.
    with closing(sqlite3.connect(f"file:{_path(url)}?mode=rw", uri=True, timeout=5)) as database:
        return database.execute(statement).fetchall()


@asynccontextmanager
async def _looking(trial: Trial) -> AsyncIterator[Looking]:
    if trial.backend == "sqlite":
        yield Looking("sqlite", str(trial.folder), None)
        return
    import asyncpg

    # The server does not crash here.
    async with trial.server({"fsync": "off"}) as server:
        connection = await asyncpg.connect(host="127.0.0.1", port=server.port, user="postgres")
        try:
            yield Looking("postgresql", server.url(), connection)
        finally:
            await connection.close()


async def run(trial: Trial) -> None:
    async with _looking(trial) as looking:
        alone = looking.url(0)
        async with open_store(alone):
            shape = await looking.shape(alone)
        async with Crew(__name__, MIGRATORS, url="none", broken=trial.broken) as crew:
            # What a process imports with the first store is not to count.
            await crew.ask({"url": alone, "run_id": str(new_run_id())})
            await asyncio.gather(*(crew.answer(member) for member in crew.members))
            seconds = 0.05
            for number in range(1, trial.planned * MOST_ROUNDS):
                if trial.done or (trial.broken and trial.tally.wrong > MIGRATORS):
                    return
                midway = await _round(trial, looking, crew, looking.url(number), seconds, shape)
                # Late enough to hit a migration, and not after it: as long as they take on this machine.
                seconds *= 1.25 if midway else 0.8


async def _round(
    trial: Trial, looking: Looking, crew: Crew, url: str, seconds: float, shape: list[tuple[Any, ...]]
) -> bool:
    """Everybody opens one new store; one begins a little earlier, and is killed. Whether midway."""
    victim, *others = trial.rng.sample(crew.members, len(crew.members))
    run_id = new_run_id()
    asked = {"url": url, "run_id": str(run_id)}
    crew.tell(victim, asked)
    # It says so when it begins.
    await crew.answer(victim)
    await asyncio.sleep(trial.rng.random() * seconds / 3)
    for member in others:
        crew.tell(member, asked)
    await asyncio.sleep(trial.rng.random() * seconds * 2 / 3)
    victim.send_signal(signal.SIGKILL)
    midway = not await looking.is_there(url)
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            await asyncio.gather(*(crew.answer(member) for member in others))
            said = await asyncio.gather(*(crew.answer(member) for member in others))
    except TimeoutError:
        trial.tally.mistrust(f"opening hung for {HUNG_SECONDS:.0f} s after another migrator was killed")
        raise
    midway = midway and await _died(crew, victim)
    trial.tally.add("kills after the schema was there", not midway)
    if midway:
        trial.landed()
    await _judge(trial, looking, url, run_id, said, shape)
    await looking.forget(url)
    await crew.replace(victim)
    return midway


async def _died(crew: Crew, victim: Process) -> bool:
    """Whether the killed process never got to answer."""
    try:
        await crew.answer(victim)
    except EndedError:
        return True
    return False


async def _judge(
    trial: Trial,
    looking: Looking,
    url: str,
    run_id: UUID,
    said: list[dict[str, Any]],
    shape: list[tuple[Any, ...]],
) -> None:
    for answer in said:
        trial.tally.operations += 1
        if (error := answer.get("error")) is not None:
            trial.tally.mistrust(f"opening failed where {MIGRATORS} migrate and one is killed: {error}")
    winners = [answer for answer in said if answer.get("won")]
    if len(winners) > 1:
        trial.tally.repeat(f"{len(winners)} migrators won one claim, so they work on different schemas")
    if await looking.shape(url) != shape:
        trial.tally.mistrust("the schema is not the one that a migrator alone makes")
    try:
        # It must be whole, so nothing may be left to migrate.
        async with open_store(url, migrate=False) as store:
            keys = await store.get_dispatched_step_keys(run_id)
            missing = [answer for answer in said if answer.get("key") and answer["key"] not in keys]
            for answer in missing:
                trial.tally.lose(f"what {answer['key']} wrote after it had migrated is not there")
    except FlowStoreError as error:
        trial.tally.mistrust(f"what the migrators left cannot be opened: {type(error).__name__}: {error}")


async def _migrate(asked: dict[str, Any]) -> dict[str, Any]:
    """Open the store, and see that it is the one that the others have opened."""
    run_id, key = UUID(asked["run_id"]), f"migrator {new_claim_token()}"
    tell("begun")
    try:
        if is_broken():
            await _migrate_unlocked(asked["url"])
        async with open_store(asked["url"]) as store:
            await store.trigger_run(run_id, "migrated", run_id, "manual", idempotency_key="one")
            won = await store.try_claim_step(run_id, "first", owner=key)
            await store.try_record_dispatch(run_id, key)
    except Exception as error:  # noqa: BLE001 - told to the parent, which counts it
        return {"error": f"{type(error).__name__}: {error}"}
    return {"key": key, "won": won}


async def _migrate_unlocked(url: str) -> None:
    """Run the statements of the migrations in whatever order others run them too."""
    _, found, config = resolve_store(url)
    backend: Any = found
    if config.scheme == "sqlite":
        await asyncio.to_thread(_write_unlocked, url, [script for _, _, script in backend.migrations(config)])
        return
    import asyncpg

    schema = _schema(url)
    connection = await asyncpg.connect(parse_url(url).with_options({}), ssl=False)
    try:
        if not await connection.fetchval(POSTGRES_IS_THERE, schema):
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


LINE = Line(
    number=13,
    name="migrators",
    fault=f"{MIGRATORS} processes open a new store at once, and one is killed before the schema is there",
    unit="kills",
    planned=100,
    least=3,
    backends=("sqlite", "postgresql"),
    passes_when="all others open it, and it has one schema, the same as a migrator alone makes",
    broken="migrations run without a lock",
    minutes=20,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(serve_requests(_migrate))
