"""CON-3: after a lost reply, a caller repeats its call under the same token and gets the true result.

These checks repeat calls with their tokens: the same result returns, and nothing changes. The checks of
faults.py lose replies, if the backend offers that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    BUFFERED,
    assert_same,
    new_id,
    observe,
    second_store,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import Capability, FlowStore, StepStatus, new_claim_token

Call = Callable[[FlowStore], Awaitable[Any]]

LEASE = timedelta(minutes=5)


async def _expect_repeatable(
    context: CheckContext, name: str, run_id: UUID, call: Call, wanted: object
) -> None:
    """Make a call, repeat it on this and on another store, and compare results and state."""
    context.expect(await call(context.store), wanted, f"the first {name}")
    before = await observe(context, run_id)
    for store in (context.store, await second_store(context)):
        context.expect(await call(store), wanted, f"the repeated {name} with its token")
        after = await observe(context, run_id, store=store)
        assert_same(context, after, before, f"the repeated {name} with its token")


@example("CON-3")
async def repeated_step_calls_return_the_same_result(context: CheckContext) -> None:
    """A repeated claim, start or completion under one owner and attempt returns the same result."""
    run_id, owner = await start(context), new_claim_token()
    lease = LEASE if Capability.LEASES in context.capabilities else None
    await _expect_repeatable(
        context,
        "try_claim_step",
        run_id,
        lambda store: store.try_claim_step(run_id, "charge", owner=owner, lease=lease),
        True,
    )
    await _expect_repeatable(
        context,
        "record_step_start",
        run_id,
        lambda store: store.record_step_start(run_id, "charge", "http", owner=owner),
        1,
    )
    await _expect_repeatable(
        context,
        "record_step_complete",
        run_id,
        lambda store: store.record_step_complete(
            run_id, "charge", StepStatus.FAILED, error_message="declined", attempt=1
        ),
        None,
    )
    await _expect_repeatable(
        context,
        "retry_step",
        run_id,
        lambda store: store.retry_step(run_id, "charge", attempt=1),
        None,
    )
    if lease is not None:
        await _expect_repeatable(
            context,
            "try_start_step",
            run_id,
            lambda store: store.try_start_step(run_id, "ship", "http", owner=owner, lease=LEASE),
            1,
        )
    await _expect_repeatable(
        context,
        "record_skipped_step",
        run_id,
        lambda store: store.record_skipped_step(run_id, "mail", "smtp", "nobody asked", owner=owner),
        None,
    )


@example("CON-3", needs={Capability.RECOVERY})
async def a_repeated_reschedule_changes_nothing(context: CheckContext) -> None:
    """Repeating reschedule_step for the attempt that it closed changes nothing."""
    run_id = await start(context)
    await context.store.record_step_start(run_id, "poll", "http")
    await _expect_repeatable(
        context,
        "reschedule_step",
        run_id,
        lambda store: store.reschedule_step(run_id, "poll", attempt=1, output_json="1"),
        None,
    )


@example("CON-3")
async def a_repeated_delivery_returns_the_first_result(context: CheckContext) -> None:
    """The same delivery_id returns the first result, and no second waiter gets its payload."""
    run_id = await start(context)
    await context.store.register_waiter(run_id, "first", "approve")
    await context.store.register_waiter(run_id, "second", "approve")
    wanted = await context.store.deliver_signal(run_id, "approve", "{}", delivery_id="d-1")
    await _expect_repeatable(
        context,
        "deliver_signal",
        run_id,
        lambda store: store.deliver_signal(run_id, "approve", "{}", delivery_id="d-1"),
        wanted,
    )


@example("CON-3", needs={Capability.MAILBOX})
async def a_repeated_buffered_delivery_buffers_once(context: CheckContext) -> None:
    """The same delivery_id returns BUFFERED again and buffers nothing, also after the payload was taken."""
    run_id = await start(context)
    for taken in (False, True):
        if taken:
            await context.store.register_waiter(run_id, "first", "approve")
        await _expect_repeatable(
            context,
            "deliver_signal",
            run_id,
            lambda store: store.deliver_signal(run_id, "approve", "{}", delivery_id="d-1", buffer=True),
            BUFFERED,
        )


@example("CON-3")
async def a_repeated_registration_returns_true(context: CheckContext) -> None:
    """Registering a key again for the run that holds it returns True."""
    run_id, flow_id = await start(context), new_id(context)
    await _expect_repeatable(
        context,
        "try_register_idempotency_key",
        run_id,
        lambda store: store.try_register_idempotency_key(flow_id, "manual", "order-1", run_id),
        True,
    )


@example("CON-3", needs={Capability.TRIGGER})
async def a_repeated_trigger_returns_its_run(context: CheckContext) -> None:
    """Triggering again under the same key, with the first or a new run_id, returns the first run."""
    flow_id, run_id = new_id(context), new_id(context)
    first = await context.store.trigger_run(flow_id, "orders", run_id, "manual", idempotency_key="order-1")
    context.expect(first.created, True, "created of the first trigger_run")
    before = await observe(context, run_id)
    for store in (context.store, await second_store(context)):
        for requested_id in (run_id, new_id(context)):
            again = await store.trigger_run(
                flow_id, "orders", requested_id, "manual", idempotency_key="order-1"
            )
            context.expect(again.run, first.run, "the run of a repeated trigger_run")
            context.expect(again.created, False, "created of a repeated trigger_run")
    assert_same(context, await observe(context, run_id), before, "a repeated trigger_run changes nothing")
