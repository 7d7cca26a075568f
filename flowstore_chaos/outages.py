"""Clients that work on while their server dies, or hands over to another, and comes back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import open_store

CLIENTS = 4
WORK_CALLS = (5, 60)
"""So many are answered between two outages, unless that takes too long."""
WORK_SECONDS = 3.0
RESUME_SECONDS = 30.0
"""From the end of an outage until the first answer; longer is counted as wrong."""


async def work_through(trial: Trial, url: str, outage: Callable[[], Awaitable[str | None]]) -> None:
    """Cause outages until as many landed as are planned, and compare the clients' books with the store.

    ``outage`` returns once a server is there again, with the name under which it is counted among the
    details; None where nothing broke. It has landed if the clients had been at work.
    """
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url)) for _ in range(CLIENTS)]
        clients = Clients(stores, trial.tally, trial.rng)
        working = asyncio.create_task(clients.work(lambda: trial.done))
        try:
            while not trial.done and not working.done():
                at_work = await clients.progress(trial.rng.randrange(*WORK_CALLS), WORK_SECONDS)
                kind = await outage()
                if kind is None:
                    continue
                await _see_them_served(trial, clients)
                if at_work:
                    trial.tally.add(kind)
                    trial.landed()
        finally:
            if not trial.done:
                working.cancel()
            await asyncio.wait({working})
        working.result()
        trial.tally.details["calls refused"] = clients.refused
        await clients.books.verify(stores[0], trial.tally)


async def _see_them_served(trial: Trial, clients: Clients) -> None:
    tally, began = trial.tally, time.monotonic()
    if not await clients.progress(1, RESUME_SECONDS):
        tally.mistrust(f"no client was served within {RESUME_SECONDS:.0f} s of the server's return")
    longest = float(tally.details.get("longest until served again, s", 0))
    tally.details["longest until served again, s"] = max(longest, round(time.monotonic() - began, 2))
