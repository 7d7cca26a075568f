"""CON-2, CON-3 on PostgreSQL: a connection that breaks between two statements of a call.

The reply has arrived and the call has not continued yet when the driver notices that the connection is
closed. It then detaches the connection from the pool's proxy, which loses its attributes. This takes a few
iterations of the event loop, so the tests stop a call at each such moment until the driver has noticed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from asyncpg.pool import PoolConnectionHolder
from asyncpg.prepared_stmt import PreparedStatement

from flowstore_chaos.proxy import Fault, Proxy, proxy_before
from flowstore_core import FlowStore, open_store
from flowstore_core.plugins import find_backend
from flowstore_postgres.connection import Connection
from tests.virtual_clock import VirtualClock
from tests.writing_calls import CALLS, Call, prepare_run, read_state, without_run_id

RETRIED = (
    "record_step_start again",  # a batch
    "try_claim_step owned",  # a batch with a probe
    "start_run",  # a statement
    "claim_next_steps",  # a statement on a kept connection
    "deliver_signal with id",  # a transaction
)

CALLS_AND_READ: dict[str, Call] = {**CALLS, "get_run_detail": lambda s, r: s.get_run_detail(r)}


class ConnectionBreaker:
    """Breaks the connection that a call uses at the moment at which the call goes on."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._remaining = 0
        self._counts: Callable[[], bool] = lambda: True

    def arm(self, moment: int, *, counts: Callable[[], bool] = lambda: True) -> None:
        """Break the connection at the ``moment``-th of the moments for which ``counts`` is true, from 1."""
        self._remaining, self._counts = moment, counts

    def disarm(self) -> bool:
        """Whether the connection was broken."""
        broken, self._remaining = self._remaining == 0, 0
        return broken

    async def pause(self, connection: asyncpg.Connection) -> None:
        # Connections of the other store use a Unix socket.
        if not self._remaining or not isinstance(connection._addr, tuple) or not self._counts():
            return
        self._remaining -= 1
        if self._remaining == 0:
            self._proxy.drop_idle()
            async with asyncio.timeout(60):
                while not connection.is_closed():  # noqa: ASYNC110 - the driver has no event for it
                    await asyncio.sleep(0)


@contextmanager
def breaking(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectionBreaker]:
    """Stop every call after each reply, and after it has acquired a connection from the driver's pool."""
    breaker = ConnectionBreaker(proxy)

    def pause_after(owner: Any, name: str, connection_of: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)

        async def pausing(self: Any, *arguments: Any, **options: Any) -> Any:
            result = await original(self, *arguments, **options)
            await breaker.pause(connection_of(self))
            return result

        patch.setattr(owner, name, pausing)

    with monkeypatch.context() as patch:
        for name in ("execute", "fetch", "fetchrow", "prepare"):
            pause_after(Connection, name, lambda connection: connection)
        pause_after(PreparedStatement, "fetchrow", lambda statement: statement._connection)
        pause_after(PoolConnectionHolder, "acquire", lambda holder: holder._con)
        yield breaker


@asynccontextmanager
async def _stores(
    url: str, monkeypatch: pytest.MonkeyPatch, pool_size: int
) -> AsyncIterator[tuple[FlowStore, FlowStore, Proxy, ConnectionBreaker]]:
    """A store behind a proxy, a store on the same namespace without one, the proxy and the breaker."""
    clock = VirtualClock()
    async with (
        find_backend("postgresql")[1].scratch(url) as fresh,
        open_store(fresh, clock=clock) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, clock=clock, pool_size=pool_size) as store,
    ):
        with breaking(proxy, monkeypatch) as breaker:
            yield store, direct, proxy, breaker


async def _without_fault(name: str, store: FlowStore, direct: FlowStore) -> tuple[str, str]:
    """The result of a call, and the state after it."""
    run = UUID(int=10_000)
    await prepare_run(direct, run)
    result = without_run_id(await CALLS_AND_READ[name](store, run), run)
    return result, without_run_id(await read_state(direct, run), run)


@pytest.mark.parametrize("pool_size", [1, 4])
@pytest.mark.parametrize("name", CALLS_AND_READ)
async def test_a_connection_that_breaks_between_statements_does_not_change_the_result(
    name: str, pool_size: int, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pool of four keeps connections for batches.
    async with _stores(postgresql_url, monkeypatch, pool_size) as (store, direct, _, breaker):
        result, state = await _without_fault(name, store, direct)
        for moment in count(1):
            run = UUID(int=20_000 + 1_000 * moment)
            await prepare_run(direct, run)
            await store.ping()
            breaker.arm(moment)
            with_fault = without_run_id(await CALLS_AND_READ[name](store, run), run)
            broken = breaker.disarm()
            assert with_fault == result, f"at moment {moment}"
            assert without_run_id(await read_state(direct, run), run) == state, f"at moment {moment}"
            if not broken:
                break
        # The call sent its statement, and went on when its connection had broken.
        assert moment > 1


@pytest.mark.parametrize("fault", [Fault.REPLY_LOST, Fault.REQUEST_LOST], ids=lambda fault: fault.name)
@pytest.mark.parametrize("name", RETRIED)
async def test_a_connection_that_breaks_while_a_lost_message_is_resolved_does_not_change_the_result(
    name: str, fault: Fault, postgresql_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _stores(postgresql_url, monkeypatch, 1) as (store, direct, proxy, breaker):
        result, state = await _without_fault(name, store, direct)
        messages, runs, most = 0, count(20_000, 1_000), 0
        for message in count(1):
            for moment in count(1):
                run = UUID(int=next(runs))
                await prepare_run(direct, run)
                await store.ping()
                proxy.arm(message, fault)
                breaker.arm(moment, counts=lambda: proxy.has_injected)
                with_fault = without_run_id(await CALLS[name](store, run), run)
                broken = breaker.disarm()
                proxy.disarm()
                case = f"message {message}, moment {moment}"
                assert with_fault == result, case
                assert without_run_id(await read_state(direct, run), run) == state, case
                if not broken:
                    break
                most = max(most, moment)
            if not proxy.has_injected:
                break
            messages = message
        # Some retry made a new connection, acquired it and sent statements.
        assert messages
        assert most > 3
