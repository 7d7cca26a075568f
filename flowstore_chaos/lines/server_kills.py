"""A PostgreSQL server that dies under its clients and comes back: they carry on, and nothing is gone."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from flowstore_chaos.crashes import KINDS, crash
from flowstore_chaos.line import Line
from flowstore_chaos.server import Server
from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import open_store

CLIENTS = 4
WORK_CALLS = (5, 60)
"""So many are answered between two crashes, unless that takes too long."""
WORK_SECONDS = 3.0
RESUME_SECONDS = 30.0
"""From the server's return until the first answer; longer is counted as wrong."""


async def run(trial: Trial) -> None:
    # A crash then forgets commits that were acknowledged.
    settings = {"synchronous_commit": "off"} if trial.broken else {}
    async with trial.server(settings) as server, AsyncExitStack() as stack:
        url = server.url(schema="chaos")
        stores = [await stack.enter_async_context(open_store(url)) for _ in range(CLIENTS)]
        clients = Clients(stores, trial.tally, trial.rng)
        working = asyncio.create_task(clients.work(lambda: trial.done))
        try:
            while not trial.done and not working.done():
                await _crash(trial, server)
        finally:
            if not trial.done:
                working.cancel()
            await asyncio.wait({working})
        working.result()
        trial.tally.details["calls refused"] = clients.refused
        await clients.books.verify(stores[0], trial.tally)


async def _crash(trial: Trial, server: Server) -> None:
    """Let the clients work, end the server, bring it back, and see that the clients are served again."""
    rng, tally = trial.rng, trial.tally
    before = tally.operations
    until, wanted = time.monotonic() + WORK_SECONDS, before + rng.randrange(*WORK_CALLS)
    while tally.operations < wanted and time.monotonic() < until:  # noqa: ASYNC110 - a count of work has no event
        await asyncio.sleep(0.005)
    # Each in turn at first, so that small rows meet all.
    kind = KINDS[tally.landed] if tally.landed < len(KINDS) else rng.choice(KINDS)
    working = tally.operations > before
    if not await crash(server, kind, rng):
        return
    began, before = time.monotonic(), tally.operations
    while tally.operations == before:
        if time.monotonic() - began > RESUME_SECONDS:
            tally.mistrust(f"no client was served within {RESUME_SECONDS:.0f} s of the server's return")
            break
        await asyncio.sleep(0.01)
    longest = float(tally.details.get("longest until served again, s", 0))
    tally.details["longest until served again, s"] = max(longest, round(time.monotonic() - began, 2))
    if working:
        tally.add(kind)
        trial.landed()


LINE = Line(
    number=5,
    name="server-kills",
    fault="SIGKILL and immediate stop of PostgreSQL while clients work, and restart",
    unit="crashes",
    planned=50,
    least=3,
    backends=("postgresql",),
    passes_when="everything acknowledged is there, and the clients carry on with the stores they have",
    broken="synchronous_commit=off",
    minutes=8,
    run=run,
)
