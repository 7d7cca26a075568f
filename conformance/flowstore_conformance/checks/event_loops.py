"""A store belongs to the event loop that opened it, not to the thread of that loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from flowstore_conformance.checks.fixtures import FLOW, assert_same, new_id, observe, start
from flowstore_conformance.context import CheckContext
from flowstore_conformance.nested_loop import run_nested
from flowstore_conformance.registry import Kind, check
from flowstore_core import ConfigurationError, RunStatus, StepStatus

HUNG_SECONDS = 5.0


async def _error_of(call: Callable[[], Awaitable[object]]) -> Exception | None:
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            await call()
    except Exception as error:  # noqa: BLE001 - returned to the caller
        return error
    return None


@check("CON-2", kind=Kind.HOSTILE, alone=True)
async def a_nested_event_loop_is_refused(context: CheckContext) -> None:
    """Calls from an event loop nested in the store's own raise ConfigurationError and change nothing."""
    store, new = context.store, new_id(context)
    run_id = await start(context)
    attempt = await store.record_step_start(run_id, "charge", "http")
    await store.register_waiter(run_id, "wait", "go")
    before = await observe(context, run_id)
    calls: dict[str, Callable[[], Awaitable[Any]]] = {
        "start_run": lambda: store.start_run(FLOW, "orders", new, "manual"),
        "try_claim_step": lambda: store.try_claim_step(run_id, "claimed"),
        "try_record_dispatch": lambda: store.try_record_dispatch(run_id, "sent"),
        "record_step_complete": lambda: store.record_step_complete(
            run_id, "charge", StepStatus.SUCCEEDED, attempt=attempt
        ),
        "complete_run": lambda: store.complete_run(run_id, RunStatus.SUCCEEDED),
        "deliver_signal": lambda: store.deliver_signal(run_id, "go", "{}"),
        "get_runs": lambda: store.get_runs(),
        "get_step_statuses": lambda: store.get_step_statuses(run_id),
        "ping": lambda: store.ping(),
        "aclose": lambda: store.aclose(),
    }
    for name, call in calls.items():
        error = run_nested(_error_of(call))
        got = "no error" if error is None else type(error).__name__
        context.expect_that(
            type(error) is ConfigurationError,
            f"{name} in another event loop of the thread: expected ConfigurationError, got {got}",
        )
    assert_same(context, await observe(context, run_id), before, "calls in another event loop change nothing")
    context.expect(
        await store.get_run_status(new), None, "the status of a run after start_run in another event loop"
    )
    # Then concurrent calls in the store's own loop.
    keys = [f"step {number}" for number in range(20)]
    claims = await asyncio.gather(*(store.try_claim_step(run_id, key) for key in keys))
    context.expect(claims, [True] * len(keys), "claims in the store's own loop after calls in another")
