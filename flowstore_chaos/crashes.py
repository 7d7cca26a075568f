"""Ways for a PostgreSQL server to go down under its clients, and to come back."""

from __future__ import annotations

import asyncio
import random
import time

import psutil

from flowstore_chaos.server import Server, wait_dead

KINDS = ("SIGKILL", "immediate", "SIGKILL of one process")
"""Of all its processes; the stop that does without a checkpoint; of a client's process alone, upon which
PostgreSQL crashes and restarts by itself."""
AWAY_SECONDS = (0.0, 0.3)
CRASHED = "terminating any other active server processes"
NOTICE_SECONDS = 2.0


async def crash(server: Server, kind: str, rng: random.Random) -> bool:
    """Let it crash and come back; whether it really did."""
    if kind == "SIGKILL of one process":
        return await _kill_one(server, rng)
    if kind == "SIGKILL":
        await server.kill()
    else:
        await server.stop(kind)
    await asyncio.sleep(rng.uniform(*AWAY_SECONDS))
    await server.start()
    return True


async def _kill_one(server: Server, rng: random.Random) -> bool:
    """Kill the process that serves one of the clients, and wait until the others are gone as well."""
    children = psutil.Process(server.pid).children()
    serving = [child for child in children if "127.0.0.1" in _title(child)]
    if not serving:
        return False
    before = server.log.count(CRASHED)
    try:
        rng.choice(serving).kill()
    except psutil.NoSuchProcess:
        # Its client has left it at this moment.
        return False
    until = time.monotonic() + NOTICE_SECONDS
    while server.log.count(CRASHED) == before:
        if time.monotonic() > until:
            # It was one that only told a client to come back later; nothing happened to the others.
            return False
        await asyncio.sleep(0.01)
    await wait_dead(children)
    return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
