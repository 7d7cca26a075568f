"""The listener and the notifications of a PostgreSQL store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import asyncpg
import pytest

from flowstore_chaos.proxy import proxy_before
from flowstore_core import Capability, FlowStore, NotSupportedError, new_run_id, open_store
from flowstore_postgres import watching
from flowstore_postgres.watching import channel_of

FLOW = UUID(int=7)
QUEUE = "mail"
LONG = timedelta(minutes=30)
SECONDS = 60.0
LISTENERS = "SELECT pid FROM pg_stat_activity WHERE application_name = $1 AND query LIKE 'LISTEN %'"


async def start_run(store: FlowStore) -> UUID:
    return (await store.start_run(FLOW, "flow", new_run_id(), "test")).run_id


async def eventually(condition: Callable[[], Awaitable[object]], *, pause: float = 0.02) -> None:
    async with asyncio.timeout(SECONDS):
        while True:
            if await condition():
                return
            await asyncio.sleep(pause)


async def test_waiting_calls_share_one_connection(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(f"{fresh}&application_name=one-listener") as store:
        run_id = await start_run(store)
        calls: list[asyncio.Task[object]] = [
            *(asyncio.create_task(store.wait_for_steps([f"{QUEUE}-{n}"], timeout=LONG)) for n in range(20)),
            *(asyncio.create_task(store.wait_for_run(run_id, timeout=LONG)) for _ in range(20)),
        ]
        await eventually(lambda: admin.fetch(LISTENERS, "one-listener"))
        await asyncio.sleep(0.1)
        assert len(await admin.fetch(LISTENERS, "one-listener")) == 1
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    await eventually(lambda: none_of(admin, "one-listener"))


async def none_of(admin: asyncpg.Connection, application: str) -> bool:
    return not await admin.fetch("SELECT FROM pg_stat_activity WHERE application_name = $1", application)


async def test_a_lost_listener_is_replaced(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(f"{fresh}&application_name=lost-listener") as waiting, open_store(fresh) as other:
        call = asyncio.create_task(waiting.wait_for_steps([QUEUE], timeout=LONG))
        await eventually(lambda: admin.fetch(LISTENERS, "lost-listener"))
        (first,) = await admin.fetch(LISTENERS, "lost-listener")
        await admin.execute("SELECT pg_terminate_backend($1)", first["pid"])

        async def is_replaced() -> bool:
            found = await admin.fetch(LISTENERS, "lost-listener")
            return bool(found) and found[0]["pid"] != first["pid"]

        await eventually(is_replaced)
        assert not call.done()
        await other.try_record_dispatch(await start_run(other), "a", queue=QUEUE, step_type="test")
        assert await asyncio.wait_for(call, SECONDS)


async def test_a_commit_while_the_listener_is_lost_is_found(fresh: str, admin: asyncpg.Connection) -> None:
    async with open_store(f"{fresh}&application_name=deaf-listener") as waiting, open_store(fresh) as other:
        run_id = await start_run(other)
        call = asyncio.create_task(waiting.wait_for_steps([QUEUE], timeout=LONG))
        await eventually(lambda: admin.fetch(LISTENERS, "deaf-listener"))
        (listener,) = await admin.fetch(LISTENERS, "deaf-listener")
        await admin.execute("SELECT pg_terminate_backend($1)", listener["pid"])
        await other.try_record_dispatch(run_id, "a", queue=QUEUE, step_type="test")
        assert await asyncio.wait_for(call, SECONDS)


@pytest.mark.parametrize("has_answer", [True, False], ids=["after-its-answer", "before-its-answer"])
async def test_a_silent_listener_is_replaced(
    fresh: str, admin: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, has_answer: bool
) -> None:
    monkeypatch.setattr(watching, "HEARTBEAT_SECONDS", 0.2)
    monkeypatch.setattr(watching, "LISTEN_TIMEOUT", 0.5)
    async with (
        proxy_before(fresh) as (proxy, through),
        open_store(f"{through}&application_name=silent-listener") as waiting,
        open_store(fresh) as other,
    ):
        run_id = await start_run(other)
        call = asyncio.create_task(waiting.wait_for_steps([QUEUE], timeout=LONG))
        if has_answer:
            await eventually(lambda: admin.fetch(LISTENERS, "silent-listener"))
            await asyncio.sleep(0.1)
        await eventually(lambda: asyncio.sleep(0, proxy.silence_listeners()), pause=0)
        await other.try_record_dispatch(run_id, "a", queue=QUEUE, step_type="test")
        assert await asyncio.wait_for(call, SECONDS)


async def test_many_commits_share_a_notification(fresh: str, admin: asyncpg.Connection) -> None:
    (schema,) = parse_qs(urlsplit(fresh).query)["schema"]
    payloads: list[str] = []
    await admin.add_listener(channel_of(schema), lambda *notification: payloads.append(notification[3]))
    async with open_store(fresh) as store:
        run_id = await start_run(store)
        calls = (
            store.try_record_dispatch(run_id, f"step {n}", queue=f"queue {n}", step_type="test")
            for n in range(1000)
        )
        assert all(await asyncio.gather(*calls))
    await eventually(lambda: asyncio.sleep(0, bool(payloads)))
    assert len(payloads) < 100


async def test_a_store_behind_pgbouncer_cannot_wait(fresh: str) -> None:
    async with open_store(f"{fresh}&pgbouncer=true") as store:
        assert Capability.WATCH not in store.capabilities
        with pytest.raises(NotSupportedError):
            await store.wait_for_steps([QUEUE], timeout=LONG)


async def test_a_store_behind_pgbouncer_wakes_others(fresh: str) -> None:
    async with open_store(fresh) as waiting, open_store(f"{fresh}&pgbouncer=true") as other:
        run_id = await start_run(other)
        call = asyncio.create_task(waiting.wait_for_steps([QUEUE], timeout=LONG))
        await asyncio.sleep(0.1)
        await other.try_record_dispatch(run_id, "a", queue=QUEUE, step_type="test")
        assert await asyncio.wait_for(call, SECONDS)
