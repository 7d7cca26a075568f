"""Closing a store ends the calls that have only just begun, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest

from flowstore_core import Capability, FlowStore, StoreClosedError, open_store
from tests.calls import new_run

SECONDS = 60.0
"""The time limit of a call, generous enough for a loaded machine."""
HOUR = timedelta(hours=1)
STEPS = 24
"""The store is closed after each number of steps of the event loop that is smaller than this."""


@pytest.mark.needs(Capability.QUEUES, Capability.WATCH)
@pytest.mark.parametrize(
    "call",
    [
        lambda store, run_id: store.wait_for_steps(["default"], timeout=HOUR),
        lambda store, run_id: store.wait_for_run(run_id, timeout=HOUR),
    ],
    ids=["wait_for_steps", "wait_for_run"],
)
async def test_calls_that_begin_to_wait_end_when_the_store_is_closed(
    call: Callable[[FlowStore, Any], Awaitable[object]], namespace: str
) -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: reported.append(context))
    threads = threading.active_count()
    for step in range(STEPS):
        async with open_store(namespace) as store:
            run_id = await new_run(store)
            calls = [asyncio.ensure_future(call(store, run_id)) for _ in range(4)]
            for _ in range(step):
                await asyncio.sleep(0)
        done, pending = await asyncio.wait(calls, timeout=SECONDS)
        for one in pending:
            one.cancel()
        assert not pending, f"closed after {step} steps of the event loop"
        assert {type(one.exception()) for one in done} == {StoreClosedError}
    assert len(asyncio.all_tasks()) == 1
    assert threading.active_count() <= threads
    del calls, done, pending
    gc.collect()
    await asyncio.sleep(0)
    assert not reported, reported
