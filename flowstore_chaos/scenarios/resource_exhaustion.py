"""Servers and pools at their limits: no driver error reaches a caller (CON-2).

The scenario's own sessions cause each kind of fault on the server. Faults are counted in the server's log of
the store's sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any
from uuid import UUID

# Only sessions on the server can lock in the wrong order, terminate sessions or use up connections.
import asyncpg

from flowstore_chaos.clients import ClientGroup
from flowstore_chaos.context import RunContext
from flowstore_chaos.ledger import Ledger
from flowstore_chaos.proxy import Fault, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server
from flowstore_core import FlowStore, StoreUnavailableError, open_store

STORES = 3
GROUPS = 4
SCHEMA = "chaos"
SETTINGS = {
    # No server crashes in this scenario, so fsync is off.
    "fsync": "off",
    "max_connections": "40",
    "deadlock_timeout": "40ms",
    "log_line_prefix": "%a|",
    "log_min_error_statement": "panic",
}
RESUME_TIMEOUT = 20.0
PHASE_SECONDS = 90.0
POLL_SECONDS = 0.05


_SESSION = {
    "application_name": "injector",
    "search_path": SCHEMA,
    # Exempt from the database settings of the stores' sessions.
    "lock_timeout": "0",
}


class LeakDriverErrorsMutant:
    """A store that raises ConnectionError in place of the contract's error."""

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
    """A store that counts errors caused by an exhausted pool."""

    def __init__(self, store: FlowStore, env: _Environment) -> None:
        self._store = store
        self._env = env

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        async def call(**arguments: Any) -> Any:
            try:
                return await method(**arguments)
            except StoreUnavailableError as error:
                self._env.no_connection += "send fewer calls at once" in str(error)
                raise

        return call


@dataclass(slots=True, kw_only=True)
class _Environment:
    """The server, the proxy and the counters used to inject a fault."""

    server: Server
    proxy: Proxy
    rng: Random
    ledger: Ledger
    injected: int = 0
    """Faults counted by the injector itself."""
    no_connection: int = 0
    own_failures: int = 0
    """Lines in the server's log caused by the injector."""

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
        """The runs that clients work on."""
        newest = self.ledger.entries[-2 * GROUPS :]
        return [one.run_id for one in newest if one.run_id is not None and not one.completed]


Injector = Callable[[_Environment], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _FaultKind:
    """One kind of fault: how to inject and count it, and the stores' options."""

    name: str
    inject: Injector
    logged: str | None = None
    """Text logged by the server for each fault."""
    count: Callable[[_Environment], int] = lambda env: 0
    """Counts faults that the server does not log."""
    options: Mapping[str, object] = field(default_factory=dict)
    database: Mapping[str, str] = field(default_factory=dict)
    """Database settings during the fault."""
    through_proxy: bool = False


async def _hold_runs(env: _Environment, seconds: float) -> None:
    async with env.session() as session:
        while True:
            async with session.transaction():
                await session.execute("SELECT FROM runs WHERE run_id = ANY($1) FOR UPDATE", env.runs())
                await asyncio.sleep(seconds)
            await asyncio.sleep(0.02)


async def _hold_table(env: _Environment) -> None:
    async with env.session() as session:
        while True:
            async with session.transaction():
                await session.execute("LOCK TABLE steps, waiters IN ACCESS EXCLUSIVE MODE")
                await asyncio.sleep(0.3)
            await asyncio.sleep(0.05)


_WAITING = """
SELECT count(*) FROM pg_stat_activity WHERE application_name = 'flowstore' AND wait_event_type = 'Lock'
"""


async def _lock_in_opposite_order(env: _Environment) -> None:
    """Lock steps, then their run; the store locks in the opposite order.

    The long deadlock_timeout makes the store's session detect the deadlock.
    """
    async with env.session(deadlock_timeout="30s") as session, env.session() as monitor:
        while True:
            if not (runs := env.runs()):
                await asyncio.sleep(0.01)
                continue
            run_id = env.rng.choice(runs)
            async with session.transaction():
                await session.execute("SELECT FROM steps WHERE run_id = $1 FOR UPDATE", run_id)
                for _ in range(20):
                    if await monitor.fetchval(_WAITING):
                        break
                await session.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)


async def _do_nothing(env: _Environment) -> None:
    """Inject nothing: concurrent clients cause the fault."""
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


async def _terminate(env: _Environment, statement: str) -> None:
    async with env.session() as session:
        while True:
            env.injected += await session.fetchval(statement)
            await asyncio.sleep(env.rng.uniform(0, 0.05))


async def _cancel(env: _Environment) -> None:
    async with env.session() as session:
        while True:
            await session.execute(_CANCEL_STATEMENTS)
            await asyncio.sleep(env.rng.uniform(0, 0.05))


async def _use_up_connections(env: _Environment) -> None:
    async with env.session() as first, AsyncExitStack() as stack:
        while True:
            await first.fetchval(_END)
            with suppress(asyncpg.TooManyConnectionsError):
                while True:
                    await stack.enter_async_context(env.session())
            env.own_failures += 1
            await asyncio.sleep(0.2)
            # Let some sessions connect before they are terminated again.
            await stack.aclose()
            await asyncio.sleep(0.05)


async def _black_hole(env: _Environment) -> None:
    while True:
        env.proxy.arm(env.rng.randint(1, 10), Fault.BLACK_HOLE, times=2)
        await asyncio.sleep(0.5)
        env.injected += env.proxy.injected.total()
        env.proxy.heal()


UNPINNED = {"pgbouncer": True}
"""Behind a pooler a store cannot set up its sessions, so the defaults of the database apply."""

KINDS = (
    _FaultKind(
        name="pools exhausted",
        inject=lambda env: _hold_runs(env, 0.8),
        count=lambda env: env.no_connection,
        options={"pool_size": 1, "acquire_timeout": 0.3},
    ),
    _FaultKind(
        name="statement timeouts",
        inject=_hold_table,
        logged="canceling statement due to statement timeout",
        options={"statement_timeout": 0.15},
    ),
    _FaultKind(
        name="lock timeouts",
        inject=lambda env: _hold_runs(env, 0.15),
        logged="canceling statement due to lock timeout",
        database={"lock_timeout": "30ms"},
        options=UNPINNED,
    ),
    _FaultKind(name="deadlocks", inject=_lock_in_opposite_order, logged="deadlock detected"),
    _FaultKind(
        name="serialization failures",
        inject=_do_nothing,
        logged="could not serialize access",
        database={"default_transaction_isolation": "serializable"},
        options=UNPINNED,
    ),
    _FaultKind(
        name="active sessions ended",
        inject=lambda env: _terminate(env, _END_AT_WORK),
        count=lambda env: env.injected,
    ),
    _FaultKind(
        name="idle sessions ended",
        inject=lambda env: _terminate(env, _END_IDLE),
        count=lambda env: env.injected,
    ),
    _FaultKind(name="statements cancelled", inject=_cancel, logged="canceling statement due to user request"),
    _FaultKind(
        name="too many connections", inject=_use_up_connections, logged="sorry, too many clients already"
    ),
    _FaultKind(
        name="silent connections of a small pool",
        inject=_black_hole,
        count=lambda env: env.injected,
        options={"pool_size": 2, "statement_timeout": 0.3, "acquire_timeout": 1},
        through_proxy=True,
    ),
)


async def run(context: RunContext) -> None:
    quota = -(-context.planned // len(KINDS))
    ledger = Ledger()
    async with context.server(SETTINGS) as server, proxy_before_port(server.port) as proxy:
        url = server.url(schema=SCHEMA)
        async with open_store(url, application_name="beside") as direct:
            for kind in KINDS:
                if context.is_detected:
                    break
                env = _Environment(server=server, proxy=proxy, rng=context.rng, ledger=ledger)
                await _inject(context, kind, env, quota)
            await ledger.verify(direct, context.counts)
    context.counts.details["runs"] = len(ledger.entries)


async def _inject(context: RunContext, kind: _FaultKind, env: _Environment, quota: int) -> None:
    async with env.session() as session:
        for name, value in kind.database.items():
            await session.execute(f"ALTER DATABASE postgres SET {name} = '{value}'")
    try:
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(_open(kind, env)) for _ in range(STORES)]
            wrapped: list[Any] = [_Counting(store, env) for store in stores]
            if context.is_mutant:
                wrapped = [LeakDriverErrorsMutant(store) for store in wrapped]
            clients = ClientGroup(wrapped, context.counts, context.rng)
            clients.ledger = env.ledger
            injected = await _run_until_injected(context, kind, env, clients, quota)
            context.counts.add_detail("calls refused and retried", clients.refused)
    finally:
        async with env.session() as session:
            await session.execute("ALTER DATABASE postgres RESET ALL")
    context.counts.details[kind.name] = injected


def _open(kind: _FaultKind, env: _Environment) -> AbstractAsyncContextManager[FlowStore]:
    port = env.proxy.port if kind.through_proxy else env.server.port
    options: dict[str, Any] = {"retry_timeout": 5, **kind.options}
    return open_store(env.server.url(port=port, schema=SCHEMA), **options)


async def _run_until_injected(
    context: RunContext, kind: _FaultKind, env: _Environment, clients: ClientGroup, quota: int
) -> int:
    """Run clients until ``quota`` faults were injected, then without faults."""
    before = _count(kind, env)
    injected = 0
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PHASE_SECONDS
    ended = False
    injecting = asyncio.ensure_future(kind.inject(env))
    working = asyncio.ensure_future(clients.run(lambda: ended, groups=GROUPS))
    try:
        while injected < quota and loop.time() < deadline and not injecting.done() and not working.done():
            await asyncio.sleep(POLL_SECONDS)
            seen = _count(kind, env) - before
            context.record_faults(min(seen, quota) - min(injected, quota))
            injected = seen
    finally:
        ended = True
        if injecting.done():
            injecting.result()
        injecting.cancel()
        env.proxy.heal()
    done, _ = await asyncio.wait({working}, timeout=RESUME_TIMEOUT)
    if not done:
        working.cancel()
        context.counts.count_wrong(f"after {kind.name}, service did not resume within {RESUME_TIMEOUT:g} s")
    else:
        working.result()
    return injected


def _count(kind: _FaultKind, env: _Environment) -> int:
    if kind.logged is None:
        return kind.count(env)
    matching = [text for text in env.server.log.splitlines() if kind.logged in text]
    return sum(not text.startswith(("injector|", "beside|")) for text in matching) - env.own_failures


SCENARIO = FaultScenario(
    number=10,
    name="resource-exhaustion",
    fault="exhausted pools and connections; timeouts, deadlocks, serialization failures; ended sessions",
    unit="errors of the server or the pool",
    planned=1_000,
    min_faults=50,
    backends=("postgresql",),
    pass_criterion="no driver error reaches a caller, results are correct, service resumes",
    mutant="the store raises the underlying error when retries fail",
    minutes=8,
    run=run,
)
