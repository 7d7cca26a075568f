"""CON-3 on PostgreSQL: a lost message changes no result and repeats no effect.

Each writing operation is called once without faults, and once for each of its messages with that message's
request or reply lost. The results and the whole state must be equal. Virtual time makes them comparable.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any, TypeVar
from uuid import UUID

import asyncpg
import pytest

from flowstore_chaos.proxy import DISCONNECTS, HANGS, Fault, MessageMatch, Proxy, proxy_before
from flowstore_core import FlowStore, RunNotFoundError, StoreUnavailableError, open_store
from flowstore_core.backend import FaultKind, FaultProxy
from flowstore_core.plugins import find_backend
from tests.virtual_clock import VirtualClock
from tests.writing_calls import CALLS, FLOW, LEASE, Call, prepare_run, read_state, without_run_id

T = TypeVar("T")


@pytest.mark.parametrize(
    ("name", "faults"),
    [pytest.param(name, DISCONNECTS, id=f"{name}-disconnects") for name in CALLS]
    # Each hang waits for a timeout, so only a batched write, a single statement and a transaction are tested.
    + [
        pytest.param(name, HANGS, id=f"{name}-hangs")
        for name in ("try_claim_step", "append_event", "deliver_signal")
    ],
)
async def test_con_3_a_lost_message_does_not_change_the_result(
    name: str, faults: Sequence[Fault], postgresql_url: str
) -> None:
    call = CALLS[name]
    clock = VirtualClock()
    _, backend = find_backend("postgresql")
    async with (
        backend.scratch(postgresql_url) as fresh,
        proxy_before(fresh) as (proxy, through),
        open_store(fresh, clock=clock) as direct,
        # One connection, so that the order of a call's messages is fixed.
        open_store(
            through, clock=clock, pool_size=1, statement_timeout=0.5 if faults == HANGS else 30
        ) as store,
    ):
        messages = await _count_messages(proxy, store, direct, call)
        unfaulted = UUID(int=10_000)
        await prepare_run(direct, unfaulted)
        result = without_run_id(await call(store, unfaulted), unfaulted)
        state = without_run_id(await read_state(direct, unfaulted), unfaulted)
        injections = [
            (fault, message_number) for fault in faults for message_number in range(1, messages + 1)
        ]
        for number, (fault, message_number) in enumerate(injections):
            case = f"{fault.name} at message {message_number} of {messages}"
            run = UUID(int=20_000 + 1_000 * number)
            await prepare_run(direct, run)
            await store.ping()
            proxy.arm(message_number, fault)
            with_fault = without_run_id(await call(store, run), run)
            proxy.disarm()
            assert proxy.has_injected, f"{case} was not sent"
            await proxy.settle()
            proxy.heal()
            assert with_fault == result, case
            assert without_run_id(await read_state(direct, run), run) == state, case


async def _count_messages(proxy: Proxy, store: FlowStore, direct: FlowStore, call: Call) -> int:
    """The number of messages of a call whose statements are prepared."""
    counts = []
    for run in (UUID(int=5_000), UUID(int=6_000), UUID(int=7_000)):
        await prepare_run(direct, run)
        proxy.arm(0, Fault.REPLY_LOST)
        await call(store, run)
        counts.append(proxy.messages)
    # The first call also prepares the statements, and a connection that was idle for long is also tested.
    return min(counts)


@asynccontextmanager
async def store_behind_proxy(url: str) -> AsyncIterator[tuple[FlowStore, Proxy, FlowStore]]:
    """In a new schema: a store with a direct connection, and a proxy with a store behind it."""
    _, backend = find_backend("postgresql")
    async with (
        backend.scratch(url) as fresh,
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1) as store,
    ):
        yield direct, proxy, store


async def _with_lost_reply(proxy: Proxy, store: FlowStore, call: Awaitable[Any]) -> asyncio.Future[Any]:
    """Start a call and lose its reply; connections fail until the proxy is disarmed."""
    await store.ping()
    proxy.arm(1, Fault.REPLY_LOST, match=MessageMatch.COMMIT)
    task = asyncio.ensure_future(call)
    while not proxy.has_injected:  # noqa: ASYNC110 - before the store retries
        await asyncio.sleep(0)
    proxy.arm(1, Fault.RESET, match=MessageMatch.CONNECT, times=1_000)
    return task


CONCURRENT_EVENTS: dict[str, Call] = {
    "the run is completed": lambda s, r: s.complete_run(r, "Cancelled"),
    "the claim is released": lambda s, r: s.release_step_claim(r, "fresh"),
    "the owner claims again": lambda s, r: s.try_claim_step(r, "fresh", owner="me", lease=LEASE),
    "the owner claims again and the run is completed": lambda s, r: _claim_and_complete_run(s, r),
}


async def _claim_and_complete_run(store: FlowStore, run: UUID) -> None:
    assert await store.try_claim_step(run, "fresh", owner="me", lease=LEASE)
    await store.complete_run(run, "Cancelled")


@pytest.mark.parametrize("event", CONCURRENT_EVENTS)
async def test_con_3_a_claim_with_a_lost_reply_is_true_despite_later_events(
    event: str, postgresql_url: str
) -> None:
    async with store_behind_proxy(postgresql_url) as (direct, proxy, store):
        run = UUID(int=10_000)
        await direct.start_run(FLOW, "orders", run, "manual")
        call = store.try_claim_step(run, "fresh", owner="me", lease=LEASE)
        claiming = await _with_lost_reply(proxy, store, call)
        await CONCURRENT_EVENTS[event](direct, run)
        proxy.disarm()
        assert await claiming is True
        owners = [claim.owner for claim in await direct.get_step_claims(run)]
        assert owners == ([] if event == "the claim is released" else ["me"])


async def test_con_3_a_dispatch_with_a_lost_reply_is_true_although_it_was_released(
    postgresql_url: str,
) -> None:
    async with store_behind_proxy(postgresql_url) as (direct, proxy, store):
        run = UUID(int=10_000)
        await direct.start_run(FLOW, "orders", run, "manual")
        dispatching = await _with_lost_reply(proxy, store, store.try_record_dispatch(run, "fresh"))
        await direct.release_dispatch(run, "fresh")
        proxy.disarm()
        assert await dispatching is True
        # The dispatch was recorded once and then released.
        assert await direct.get_dispatches(run) == ()


async def _gather(calls: Sequence[Awaitable[object]]) -> Sequence[object]:
    return await asyncio.gather(*calls, return_exceptions=True)


async def test_con_3_a_batch_of_outputs_with_a_lost_reply_is_not_saved_again(postgresql_url: str) -> None:
    """Another caller replaces the outputs before the store finds out what became of them."""
    async with store_behind_proxy(postgresql_url) as (direct, proxy, store):
        run, missing = UUID(int=10_000), UUID(int=20_000)
        await direct.start_run(FLOW, "orders", run, "manual")
        keys = [f"key {number}" for number in range(4)]
        calls = [store.save_output(one, key, "1") for one in (run, missing) for key in keys]
        calls += [store.save_outputs(one, {"several": "1"}) for one in (run, missing)]
        saving = await _with_lost_reply(proxy, store, _gather(calls))
        replaced = dict.fromkeys(keys, "2")
        await direct.save_outputs(run, replaced)
        proxy.disarm()
        errors = [type(one) for one in await saving]
        assert errors == [type(None)] * 4 + [RunNotFoundError] * 4 + [type(None), RunNotFoundError]
        assert await direct.get_outputs(run) == {**replaced, "several": "1"}


async def test_con_3_a_batch_of_claims_with_a_lost_reply_is_not_made_again(postgresql_url: str) -> None:
    """Others release the claims, claim the steps and release them, before the store finds out."""
    async with store_behind_proxy(postgresql_url) as (direct, proxy, store):
        run = UUID(int=10_000)
        await direct.start_run(FLOW, "orders", run, "manual")
        await direct.try_claim_step(run, "taken", owner="another")
        keys = ["a", "b", "taken", "c"]
        calls = [store.try_claim_step(run, key, owner="me", lease=LEASE) for key in keys]
        claiming = await _with_lost_reply(proxy, store, _gather(calls))
        for key in ("a", "b", "c"):
            await direct.release_step_claim(run, key)
            assert await direct.try_claim_step(run, key, owner="another")
            await direct.release_step_claim(run, key)
        proxy.disarm()
        assert await claiming == [True, True, False, True]
        assert await direct.get_claimed_step_keys(run) == {"taken"}


@pytest.mark.parametrize("message_number", [1, 2, 3])
async def test_con_2_a_server_that_stops_replying_while_connecting_times_out(
    message_number: int, postgresql_url: str
) -> None:
    _, backend = find_backend("postgresql")
    options = {"pool_size": 1, "acquire_timeout": 0.3, "statement_timeout": 0.3, "retry_timeout": 0.3}
    async with (
        backend.scratch(postgresql_url) as fresh,
        open_store(fresh),
        proxy_before(fresh) as (proxy, through),
        AsyncExitStack() as stack,
        asyncio.timeout(60),
    ):

        async def until_connected(call: Callable[[], Awaitable[T]]) -> T:
            # Connecting can take longer than these timeouts.
            while True:
                with suppress(StoreUnavailableError):
                    return await call()

        store = await until_connected(lambda: stack.enter_async_context(open_store(through, **options)))
        # The first replies answer the startup message and the handshake. A connection that takes longer than
        # acquire_timeout is replaced, and the fault may be injected into one that no call uses.
        raised = False
        while not (raised and proxy.has_injected):
            proxy.arm(message_number, Fault.BLACK_HOLE)
            proxy.drop_idle()
            try:
                await store.ping()
                raised = False
            except StoreUnavailableError:
                raised = True
        await until_connected(store.ping)


async def test_con_3_a_cleanup_with_a_lost_reply_counts_each_run_once(postgresql_url: str) -> None:
    clock = VirtualClock()
    _, backend = find_backend("postgresql")
    async with (
        backend.scratch(postgresql_url) as fresh,
        proxy_before(fresh) as (proxy, through),
        open_store(through, clock=clock, pool_size=1) as store,
    ):
        for message_number in range(1, 16):
            for number in range(3):
                run = UUID(int=100 * message_number + number)
                await store.start_run(FLOW, "orders", run, "manual")
                await store.complete_run(run, "Succeeded")
            proxy.arm(message_number, Fault.REPLY_LOST)
            assert await store.cleanup(clock() + LEASE) == 3
            assert proxy.has_injected
            proxy.disarm()
            assert await store.get_runs() == ()


async def test_con_2_a_transaction_whose_note_is_refused_is_repeated(
    fresh: str, admin: asyncpg.Connection
) -> None:
    await admin.execute(
        """
        CREATE SEQUENCE refused;
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
        BEGIN
            -- The count survives the rollback.
            IF nextval('refused') <= 2 THEN
                RAISE EXCEPTION USING ERRCODE = 'deadlock_detected';
            END IF;
            RETURN NEW;
        END $$;
        """
    )
    async with open_store(fresh, pool_size=1) as store:
        run = UUID(int=10_000)
        await store.start_run(FLOW, "orders", run, "manual")
        await admin.execute("CREATE TRIGGER refuse BEFORE INSERT ON commits EXECUTE FUNCTION refuse()")
        await store.record_skipped_step(run, "a", "http")
        await admin.execute("DROP TRIGGER refuse ON commits")
        assert await admin.fetchval("SELECT last_value FROM refused") == 3
        detail = await store.get_run_detail(run)
        assert detail is not None
        assert [len(step.attempts) for step in detail.steps] == [1]


async def test_con_2_a_transaction_with_a_delayed_request_does_not_block_its_retry(
    fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has not yet noticed that its client disconnected, and keeps the transaction's locks."""
    take_fault = FaultProxy.take_fault
    # By default the injector holds only requests outside transactions.
    monkeypatch.setattr(FaultProxy, "take_fault", lambda proxy, *_: take_fault(proxy, *FaultKind))
    async with (
        find_backend("postgresql")[1].inject_faults(fresh) as injector,  # type: ignore[attr-defined]
        open_store(injector.url) as store,
    ):
        run = UUID(int=10_000)
        await store.start_run(FLOW, "orders", run, "manual")
        held = 0
        for skip in range(12):
            injector.hold_request(skip=skip)
            await store.record_skipped_step(run, f"step {skip}", "http")
            if not injector.disarm():
                break
            held += 1
        assert held >= 3
