"""Clients that keep working during crashes and failovers of their server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from flowstore_chaos.clients import ClientGroup
from flowstore_chaos.context import RunContext
from flowstore_core import open_store

CLIENTS = 4
WORK_CALLS = (5, 60)
"""Number of calls between two outages, within WORK_SECONDS."""
WORK_SECONDS = 3.0
RESUME_SECONDS = 30.0
"""Maximum time from the end of an outage to the first result; longer counts as wrong."""


async def run_clients_through(
    context: RunContext, url: str, outage: Callable[[], Awaitable[str | None]]
) -> None:
    """Cause the planned number of outages, and compare the clients' ledger with the store.

    ``outage`` returns when a server is available again: the name of the detail to count, or None if there was
    no outage. An outage counts as injected if clients were working before it.
    """
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url)) for _ in range(CLIENTS)]
        clients = ClientGroup(stores, context.counts, context.rng)
        working = asyncio.create_task(clients.run(lambda: context.done))
        try:
            while not context.done and not working.done():
                were_working = await clients.wait_for_progress(
                    context.rng.randrange(*WORK_CALLS), WORK_SECONDS
                )
                kind = await outage()
                if kind is None:
                    continue
                await _expect_service_resumed(context, clients)
                if were_working:
                    context.counts.add_detail(kind)
                    context.record_faults()
        finally:
            if not context.done:
                working.cancel()
            await asyncio.wait({working})
        working.result()
        context.counts.details["calls refused"] = clients.refused
        await clients.ledger.verify(stores[0], context.counts)


async def _expect_service_resumed(context: RunContext, clients: ClientGroup) -> None:
    counts, started_at = context.counts, time.monotonic()
    if not await clients.wait_for_progress(1, RESUME_SECONDS):
        counts.count_wrong(f"no call succeeded within {RESUME_SECONDS:.0f} s after the outage")
    longest = float(counts.details.get("longest time to recovery, s", 0))
    counts.details["longest time to recovery, s"] = max(longest, round(time.monotonic() - started_at, 2))
