"""A PostgreSQL server that dies under its clients and comes back: they carry on, and nothing is gone."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import psutil

from flowstore_chaos.line import Line
from flowstore_chaos.server import Server, wait_dead
from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import open_store

CLIENTS = 4
KINDS = ("SIGKILL", "immediate", "SIGKILL of one process")
"""Of all its processes; the stop that does without a checkpoint; of a client's process alone, upon which
PostgreSQL crashes and restarts by itself."""
WORK_SECONDS = (0.05, 0.4)
AWAY_SECONDS = (0.0, 0.3)
CRASHED = "terminating any other active server processes"
NOTICE_SECONDS = 2.0
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
    await asyncio.sleep(rng.uniform(*WORK_SECONDS))
    kind = KINDS[tally.landed % len(KINDS)] if tally.landed < len(KINDS) else rng.choice(KINDS)
    working = tally.operations > before
    if kind == "SIGKILL":
        await server.kill()
    elif kind == "immediate":
        await server.stop("immediate")
    elif not await _kill_one(trial, server):
        return
    if kind != "SIGKILL of one process":
        await asyncio.sleep(rng.uniform(*AWAY_SECONDS))
        await server.start()
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


async def _kill_one(trial: Trial, server: Server) -> bool:
    """Kill the process that serves one of the clients, and wait until the others are gone as well."""
    children = psutil.Process(server.pid).children()
    serving = [child for child in children if "127.0.0.1" in " ".join(child.cmdline())]
    if not serving:
        return False
    before = server.log.count(CRASHED)
    trial.rng.choice(serving).kill()
    until = time.monotonic() + NOTICE_SECONDS
    while server.log.count(CRASHED) == before:
        if time.monotonic() > until:
            # It was one that only told a client to come back later; nothing happened to the others.
            return False
        await asyncio.sleep(0.01)
    await wait_dead(children)
    return True


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
