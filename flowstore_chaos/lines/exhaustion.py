"""A server and pools that are driven to their limits: no error of the driver reaches a caller (CON-2).

Each kind of trouble is made for real, by sessions of our own beside the store's, and counted as the server
counts it: by what it logs of the store's sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from uuid import UUID

# Locks held in the wrong order, sessions terminated, connections used up: only the server's own sessions
# can do that to a store.
import asyncpg

from flowstore_chaos.books import Books
from flowstore_chaos.line import Line
from flowstore_chaos.proxy import Fault, Proxy, proxy_before_port
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import FlowStore, StoreUnavailableError, open_store

STORES = 3
GROUPS = 4
SCHEMA = "chaos"
SCENARIOS = {
    # Nothing crashes here, so nothing needs to reach a disk.
    "fsync": "off",
    "max_connections": "40",
    "deadlock_timeout": "40ms",
    "log_line_prefix": "%a|",
    "log_min_error_statement": "panic",
}
RESUMES_SECONDS = 20.0
PHASE_SECONDS = 90.0
POLL_SECONDS = 0.05


_SESSION = {
    "application_name": "trouble",
    "search_path": SCHEMA,
    # What is set for the stores' sessions is not for this one.
    "lock_timeout": "0",
}


class LetsThrough:
    """A store that lets surface what it ran into, as it came."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(**arguments: Any) -> Any:
            try:
                return await method(**arguments)
            except StoreUnavailableError as error:
                raise ConnectionError(str(error)) from error

        return call


class _Counting:
    """A store whose refusals for want of a connection are counted."""

    def __init__(self, store: FlowStore, scene: _Scene) -> None:
        self._store = store
        self._scene = scene

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(**arguments: Any) -> Any:
            try:
                return await method(**arguments)
            except StoreUnavailableError as error:
                self._scene.no_connection += "send fewer calls at once" in str(error)
                raise

        return call


@dataclass(slots=True, kw_only=True)
class _Scene:
    """What a kind of trouble is made with."""

    server: Server
    proxy: Proxy
    rng: Random
    books: Books
    forced: int = 0
    """What the trouble-maker has counted itself."""
    no_connection: int = 0
    own_failures: int = 0
    """Lines in the server's log that are the trouble-maker's."""

    @asynccontextmanager
    async def session(self, **settings: str) -> AsyncIterator[Any]:
        session = await asyncpg.connect(
            host="127.0.0.1",
            port=self.server.port,
            user="postgres",
            database="postgres",
            server_settings={**_SESSION, **settings},
        )
        try:
            yield session
        finally:
            session.terminate()

    def runs(self) -> list[UUID]:
        """Those that clients are at."""
        newest = self.books.entries[-2 * GROUPS :]
        return [one.run_id for one in newest if one.run_id is not None and not one.completed]


Force = Callable[[_Scene], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """One kind of trouble: how it is made, how it shows, and under which options of the stores."""

    name: str
    force: Force
    logged: str | None = None
    """What the server logs each time."""
    count: Callable[[_Scene], int] = lambda scene: 0
    """How often it has happened, where the log does not tell."""
    options: Mapping[str, object] = field(default_factory=dict)
    database: Mapping[str, str] = field(default_factory=dict)
    """Settings of the database meanwhile."""
    through_proxy: bool = False


async def _hold_runs(scene: _Scene, seconds: float) -> None:
    async with scene.session() as session:
        while True:
            async with session.transaction():
                await session.execute("SELECT FROM runs WHERE run_id = ANY($1) FOR UPDATE", scene.runs())
                await asyncio.sleep(seconds)
            await asyncio.sleep(0.02)


async def _hold_table(scene: _Scene) -> None:
    async with scene.session() as session:
        while True:
            async with session.transaction():
                await session.execute("LOCK TABLE steps, waiters IN ACCESS EXCLUSIVE MODE")
                await asyncio.sleep(0.3)
            await asyncio.sleep(0.05)


_WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore' AND wait_event_type = 'Lock'
"""


async def _lock_in_opposite_order(scene: _Scene) -> None:
    """The store locks a run and then its steps. Ours notices no deadlock, so the store's session must."""
    async with scene.session(deadlock_timeout="30s") as session, scene.session() as looking:
        while True:
            if not (runs := scene.runs()):
                await asyncio.sleep(0.01)
                continue
            run_id = scene.rng.choice(runs)
            async with session.transaction():
                await session.execute("SELECT FROM steps WHERE run_id = $1 FOR UPDATE", run_id)
                for _ in range(20):
                    if await looking.fetchval(_WAITING):
                        break
                await session.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)


async def _do_nothing(scene: _Scene) -> None:
    """The clients are trouble enough for each other."""
    await asyncio.Event().wait()


_END = """
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE application_name = 'flowstore'
"""
_END_AT_WORK = f"{_END} AND state IN ('active', 'idle in transaction')"
_END_IDLE = f"{_END} AND state = 'idle'"
_CANCEL_STATEMENTS = """
SELECT pg_cancel_backend(pid) FROM pg_stat_activity
WHERE application_name = 'flowstore' AND state = 'active'
"""


async def _terminate(scene: _Scene, statement: str) -> None:
    async with scene.session() as session:
        while True:
            scene.forced += await session.fetchval(statement)
            await asyncio.sleep(scene.rng.uniform(0, 0.05))


async def _cancel(scene: _Scene) -> None:
    async with scene.session() as session:
        while True:
            await session.execute(_CANCEL_STATEMENTS)
            await asyncio.sleep(scene.rng.uniform(0, 0.05))


async def _use_up_connections(scene: _Scene) -> None:
    async with scene.session() as first, AsyncExitStack() as stack:
        while True:
            await first.fetchval(_END)
            with suppress(asyncpg.TooManyConnectionsError):
                while True:
                    await stack.enter_async_context(scene.session())
            scene.own_failures += 1
            await asyncio.sleep(0.2)
            # Some find their way in again, until they are thrown out.
            await stack.aclose()
            await asyncio.sleep(0.05)


async def _black_hole(scene: _Scene) -> None:
    while True:
        scene.proxy.arm(scene.rng.randint(1, 10), Fault.BLACK_HOLE, exact_times=2)
        await asyncio.sleep(0.5)
        scene.forced += scene.proxy.landed.total()
        scene.proxy.heal()


UNPINNED = {"pgbouncer": True}
"""Behind a pooler a store cannot set its sessions up, so the defaults of the database apply."""

KINDS = (
    _Kind(
        name="pools exhausted",
        force=lambda scene: _hold_runs(scene, 0.8),
        count=lambda scene: scene.no_connection,
        options={"pool_size": 1, "acquire_timeout": 0.3},
    ),
    _Kind(
        name="statement time-outs",
        force=_hold_table,
        logged="canceling statement due to statement timeout",
        options={"statement_timeout": 0.15},
    ),
    _Kind(
        name="lock time-outs",
        force=lambda scene: _hold_runs(scene, 0.15),
        logged="canceling statement due to lock timeout",
        database={"lock_timeout": "30ms"},
        options=UNPINNED,
    ),
    _Kind(name="deadlocks", force=_lock_in_opposite_order, logged="deadlock detected"),
    _Kind(
        name="serialization failures",
        force=_do_nothing,
        logged="could not serialize access",
        database={"default_transaction_isolation": "serializable"},
        options=UNPINNED,
    ),
    _Kind(
        name="sessions ended at work",
        force=lambda scene: _terminate(scene, _END_AT_WORK),
        count=lambda scene: scene.forced,
    ),
    _Kind(
        name="idle sessions ended",
        force=lambda scene: _terminate(scene, _END_IDLE),
        count=lambda scene: scene.forced,
    ),
    _Kind(name="statements cancelled", force=_cancel, logged="canceling statement due to user request"),
    _Kind(name="too many connections", force=_use_up_connections, logged="sorry, too many clients already"),
    _Kind(
        name="connections of a small pool gone silent",
        force=_black_hole,
        count=lambda scene: scene.forced,
        options={"pool_size": 2, "statement_timeout": 0.3, "acquire_timeout": 1},
        through_proxy=True,
    ),
)


async def run(trial: Trial) -> None:
    quota = -(-trial.planned // len(KINDS))
    books = Books()
    async with trial.server(SCENARIOS) as server, proxy_before_port(server.port) as proxy:
        url = server.url(schema=SCHEMA)
        async with open_store(url, application_name="beside") as direct:
            for kind in KINDS:
                scene = _Scene(server=server, proxy=proxy, rng=trial.rng, books=books)
                await _make_trouble(trial, kind, scene, quota)
            await books.verify(direct, trial.tally)
    trial.tally.details["runs"] = len(books.entries)


async def _make_trouble(trial: Trial, kind: _Kind, scene: _Scene, quota: int) -> None:
    async with scene.session() as session:
        for name, value in kind.database.items():
            await session.execute(f"ALTER DATABASE postgres SET {name} = '{value}'")
    try:
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(_open(kind, scene)) for _ in range(STORES)]
            wrapped: list[Any] = [_Counting(store, scene) for store in stores]
            if trial.broken:
                wrapped = [LetsThrough(store) for store in wrapped]
            clients = Clients(wrapped, trial.tally, trial.rng)
            clients.books = scene.books
            landed = await _until_landed(trial, kind, scene, clients, quota)
            trial.tally.add("calls refused, and made again", clients.refused)
    finally:
        async with scene.session() as session:
            await session.execute("ALTER DATABASE postgres RESET ALL")
    trial.tally.details[kind.name] = landed


def _open(kind: _Kind, scene: _Scene) -> AbstractAsyncContextManager[FlowStore]:
    port = scene.proxy.port if kind.through_proxy else scene.server.port
    options: dict[str, Any] = {"retry_timeout": 5, **kind.options}
    return open_store(scene.server.url(port=port, schema=SCHEMA), **options)


async def _until_landed(trial: Trial, kind: _Kind, scene: _Scene, clients: Clients, quota: int) -> int:
    """Work while trouble is made, until it has landed as often as it is to; then without."""
    before = _count(kind, scene)
    landed = 0
    loop = asyncio.get_running_loop()
    discard = loop.time() + PHASE_SECONDS
    ended = False
    forcing = asyncio.ensure_future(kind.force(scene))
    working = asyncio.ensure_future(clients.work(lambda: ended, groups=GROUPS))
    try:
        while landed < quota and loop.time() < discard and not forcing.done() and not working.done():
            await asyncio.sleep(POLL_SECONDS)
            seen = _count(kind, scene) - before
            trial.landed(min(seen, quota) - min(landed, quota))
            landed = seen
    finally:
        ended = True
        if forcing.done():
            forcing.result()
        forcing.cancel()
        scene.proxy.heal()
    done, _ = await asyncio.wait({working}, timeout=RESUMES_SECONDS)
    if not done:
        working.cancel()
        trial.tally.mistrust(f"after {kind.name} service did not resume within {RESUMES_SECONDS:g} s")
    else:
        working.result()
    return landed


def _count(kind: _Kind, scene: _Scene) -> int:
    if kind.logged is None:
        return kind.count(scene)
    ours = [text for text in scene.server.log.splitlines() if kind.logged in text]
    return sum(not text.startswith(("trouble|", "beside|")) for text in ours) - scene.own_failures


LINE = Line(
    number=10,
    name="exhaustion",
    fault="pools exhausted; time-outs, deadlocks, serialization failures; sessions ended, none to be had",
    unit="errors that the server or the pool answered with",
    planned=1_000,
    least=50,
    backends=("postgresql",),
    passes_when="no error of the driver reaches a caller, answers are true, service resumes",
    broken="where retrying does not help, the store lets surface what it ran into",
    minutes=8,
    run=run,
)
