"""CON-3 on PostgreSQL: a lost message changes no result and repeats no effect.

Each writing operation is called once without faults, and once for each of its messages with that message's
request or reply lost. The results and the whole state must be equal. Virtual time makes them comparable.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from flowstore_chaos.proxy import DISCONNECTS, HANGS, Fault, MessageMatch, Proxy, proxy_before
from flowstore_core import FlowStore, StepRequest, StepStatus, StoreUnavailableError, open_store
from flowstore_core.plugins import find_backend
from flowstore_postgres.fault_injection import ServerFaultInjector
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
RUN = UUID(int=2)
OTHER = UUID(int=3)
LEASE = timedelta(minutes=5)

RANDOM_OWNER = re.compile(r"'[0-9a-f]{32}-\d+'")

Call = Callable[[FlowStore, UUID], Awaitable[Any]]


async def _prepare(store: FlowStore, run: UUID) -> None:
    """Create a run with a step in each state that the operations need."""
    await store.start_run(FLOW, "orders", run, "manual")
    await store.configure_run(run, FLOW, "manual", timeout_at=VirtualClock()() - timedelta(hours=1))
    for key in ("open", "claimed", "failed", "dispatched"):
        await store.try_record_dispatch(run, key)
        await store.try_claim_step(run, key, owner=f"{key}-owner", lease=LEASE)
    await store.release_step_claim(run, "dispatched")
    await store.record_step_start(run, "open", "http", owner="open-owner")
    await store.record_step_start(run, "failed", "http")
    await store.record_step_complete(run, "failed", StepStatus.FAILED, error_message="boom")
    await store.record_skipped_step(run, "skipped", "http", "not needed")
    await store.register_waiter(run, "waiting", "go", expires_at=VirtualClock()() - timedelta(hours=1))
    for key in ("queued", "queued too"):
        await store.try_record_dispatch(run, key, queue=f"queue {run}", step_type="http", input_json="{}")
    await store.save_output(run, "saved", "1")


async def _complete_and_delete(store: FlowStore, run: UUID) -> bool:
    return await store.complete_run(run, "Failed") and await store.delete_run(run)


def _request(step_key: str, after: tuple[str, ...] = ()) -> StepRequest:
    return StepRequest(step_key=step_key, step_type="http", queue="new", after=after)


CALLS: dict[str, Call] = {
    "start_run": lambda s, r: s.start_run(FLOW, "orders", UUID(int=r.int + 100), "manual"),
    "complete_run": lambda s, r: s.complete_run(r, "Failed"),
    "record_step_start": lambda s, r: s.record_step_start(r, "fresh", "http", input_json="{}"),
    "record_step_start again": lambda s, r: s.record_step_start(r, "failed", "http"),
    "record_step_start owned": lambda s, r: s.record_step_start(r, "claimed", "http", owner="claimed-owner"),
    "record_step_complete": lambda s, r: s.record_step_complete(r, "open", "Succeeded", output_json="1"),
    "record_step_complete pending": lambda s, r: s.record_step_complete(r, "open", "Pending", attempt=1),
    "record_skipped_step": lambda s, r: s.record_skipped_step(r, "open", "http", "why", owner="open-owner"),
    "retry_step": lambda s, r: s.retry_step(r, "failed", reset=["skipped"]),
    "reschedule_step": lambda s, r: s.reschedule_step(r, "open", attempt=1, output_json="1"),
    "try_record_dispatch": lambda s, r: s.try_record_dispatch(r, "fresh"),
    "annotate_dispatch": lambda s, r: s.annotate_dispatch(r, "dispatched", "job"),
    "release_dispatch": lambda s, r: s.release_dispatch(r, "dispatched"),
    "try_claim_step": lambda s, r: s.try_claim_step(r, "fresh"),
    "try_claim_step owned": lambda s, r: s.try_claim_step(r, "fresh", owner="me", lease=LEASE),
    "renew_step_claim": lambda s, r: s.renew_step_claim(r, "open", "open-owner", 2 * LEASE),
    "release_step_claim": lambda s, r: s.release_step_claim(r, "claimed"),
    "configure_run": lambda s, r: s.configure_run(r, FLOW, "manual", idempotency_key="k"),
    "request_cancel": lambda s, r: s.request_cancel(r, "enough"),
    "mark_timed_out": lambda s, r: s.mark_timed_out(r, as_of=VirtualClock()()),
    "extend_deadline": lambda s, r: s.extend_deadline(r, VirtualClock()() + LEASE),
    "try_register_idempotency_key": lambda s, r: s.try_register_idempotency_key(FLOW, "t", f"k{r}", r),
    "trigger_run": lambda s, r: s.trigger_run(
        FLOW, "orders", UUID(int=r.int + 200), "t", idempotency_key=f"k{r}", timeout_at=VirtualClock()()
    ),
    "trigger_run with a dispatch": lambda s, r: s.trigger_run(
        FLOW, "orders", UUID(int=r.int + 200), "t", dispatch=[_request("first")]
    ),
    "try_record_dispatch to a queue": lambda s, r: s.try_record_dispatch(
        r, "fresh", queue="new", priority=3, step_type="http"
    ),
    "claim_next_steps": lambda s, r: s.claim_next_steps([f"queue {r}"], lease=LEASE, limit=3, worker="w"),
    "advance_run": lambda s, r: s.advance_run(
        r,
        "open",
        "Succeeded",
        attempt=1,
        owner="open-owner",
        output_json="1",
        dispatch=[_request("next", after=("open",)), _request("refused", after=("failed",))],
        complete_as="Succeeded",
    ),
    "redispatch_step": lambda s, r: s.redispatch_step(r, "queued", queue="new", priority=9),
    "retry_step with a dispatch": lambda s, r: s.retry_step(r, "failed", dispatch=[_request("failed")]),
    "reschedule_step with an error": lambda s, r: s.reschedule_step(
        r, "open", attempt=1, error_message="boom"
    ),
    "register_waiter": lambda s, r: s.register_waiter(r, "other", "go"),
    "deliver_signal": lambda s, r: s.deliver_signal(r, "go", "{}"),
    "deliver_signal with id": lambda s, r: s.deliver_signal(r, "go", "{}", delivery_id="d"),
    "remove_waiter": lambda s, r: s.remove_waiter(r, "waiting"),
    "expire_waiter": lambda s, r: s.expire_waiter(r, "waiting"),
    "append_event": lambda s, r: s.append_event(r, "started", message="m"),
    "save_output": lambda s, r: s.save_output(r, "k", "1"),
    "save_outputs": lambda s, r: s.save_outputs(r, {"k": "1", "saved": "2"}),
    "renew_step_claims": lambda s, r: s.renew_step_claims([(r, "open", "open-owner")], 2 * LEASE),
    "delete_outputs": lambda s, r: s.delete_outputs(r, prefix="saved"),
    "delete_run": lambda s, r: _complete_and_delete(s, r),
}


async def _state(store: FlowStore, run: UUID) -> list[Any]:
    """Return the state of a run and of the two runs that a call may create."""
    state: list[Any] = []
    for one in (run, UUID(int=run.int + 100), UUID(int=run.int + 200)):
        state += [
            await store.get_run_detail(one),
            await store.get_run_control(one),
            await store.get_dispatches(one),
            [(c.step_key, c.owner, c.claimed_at, c.expires_at) for c in await store.get_step_claims(one)],
            await store.get_waiters(one),
            await store.get_run_events(one),
            dict(await store.get_outputs(one)),
        ]
    state.append(await store.find_run_id_by_idempotency_key(FLOW, "t", f"k{run}"))
    return state


def _with_run(value: Any, run: UUID) -> str:
    """Return the text of a state or a result with the ids of the run replaced."""
    text = repr(value)
    for offset in (0, 100, 200):
        text = text.replace(str(UUID(int=run.int + offset)), f"<run+{offset}>")
    return RANDOM_OWNER.sub("<owner>", text)


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
        await _prepare(direct, unfaulted)
        result = _with_run(await call(store, unfaulted), unfaulted)
        state = _with_run(await _state(direct, unfaulted), unfaulted)
        injections = [
            (fault, message_number) for fault in faults for message_number in range(1, messages + 1)
        ]
        for number, (fault, message_number) in enumerate(injections):
            case = f"{fault.name} at message {message_number} of {messages}"
            run = UUID(int=20_000 + 1_000 * number)
            await _prepare(direct, run)
            await store.ping()
            proxy.arm(message_number, fault)
            with_fault = _with_run(await call(store, run), run)
            proxy.disarm()
            assert proxy.has_injected, f"{case} was not sent"
            await proxy.settle()
            proxy.heal()
            assert with_fault == result, case
            assert _with_run(await _state(direct, run), run) == state, case


async def _count_messages(proxy: Proxy, store: FlowStore, direct: FlowStore, call: Call) -> int:
    """The number of messages of a call whose statements are prepared."""
    counts = []
    for run in (UUID(int=5_000), UUID(int=6_000), UUID(int=7_000)):
        await _prepare(direct, run)
        proxy.arm(0, Fault.REPLY_LOST)
        await call(store, run)
        counts.append(proxy.messages)
    # The first call also prepares the statements, and a connection that was idle for long is also tested.
    return min(counts)


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
    _, backend = find_backend("postgresql")
    async with (
        backend.scratch(postgresql_url) as fresh,
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1) as store,
    ):
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
    _, backend = find_backend("postgresql")
    async with (
        backend.scratch(postgresql_url) as fresh,
        open_store(fresh) as direct,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1) as store,
    ):
        run = UUID(int=10_000)
        await direct.start_run(FLOW, "orders", run, "manual")
        dispatching = await _with_lost_reply(proxy, store, store.try_record_dispatch(run, "fresh"))
        await direct.release_dispatch(run, "fresh")
        proxy.disarm()
        assert await dispatching is True
        # The dispatch was recorded once and then released.
        assert await direct.get_dispatches(run) == ()


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
        open_store(through, **options) as store,
    ):
        # The first replies answer the startup message and the handshake.
        proxy.arm(message_number, Fault.BLACK_HOLE)
        proxy.drop_idle()
        async with asyncio.timeout(60):
            with pytest.raises(StoreUnavailableError):
                await store.ping()
            assert proxy.has_injected
            while True:
                # Connecting can take longer than these timeouts.
                with suppress(StoreUnavailableError):
                    await store.ping()
                    break


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


async def test_con_2_a_transaction_with_a_delayed_request_does_not_block_its_retry(
    fresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has not yet noticed that its client disconnected, and keeps the transaction's locks."""
    take_fault = ServerFaultInjector.take_fault
    # By default the injector holds only requests outside transactions.
    monkeypatch.setattr(
        ServerFaultInjector, "take_fault", lambda injector, *, is_idle: take_fault(injector, is_idle=True)
    )
    async with (
        find_backend("postgresql")[1].inject_faults(fresh) as injector,  # type: ignore[attr-defined]
        open_store(injector.url) as store,
    ):
        await store.start_run(FLOW, "orders", RUN, "manual")
        held = 0
        for skip in range(12):
            injector.hold_request(skip=skip)
            await store.record_skipped_step(RUN, f"step {skip}", "http")
            if not injector.disarm():
                break
            held += 1
        assert held > 3
