"""Crashes and restarts of a PostgreSQL server."""

from __future__ import annotations

import asyncio
import random
import time

import psutil

from flowstore_chaos.server import Server, wait_exited

KINDS = ("SIGKILL", "immediate", "SIGKILL of one process")
"""SIGKILL of all processes; a stop without a checkpoint; SIGKILL of one backend process, after which
PostgreSQL crashes and restarts by itself."""
DOWN_SECONDS = (0.0, 0.3)
CRASHED = "terminating any other active server processes"
CRASH_TIMEOUT = 2.0


async def crash(server: Server, kind: str, rng: random.Random) -> bool:
    """Crash and restart the server. False if the crash did not happen."""
    if kind == "SIGKILL of one process":
        return await _kill_backend(server, rng)
    if kind == "SIGKILL":
        await server.kill()
    else:
        await server.stop(kind)
    await asyncio.sleep(rng.uniform(*DOWN_SECONDS))
    await server.start()
    return True


async def _kill_backend(server: Server, rng: random.Random) -> bool:
    """Kill one backend process, and wait until the others have exited too."""
    children = psutil.Process(server.pid).children()
    serving = [child for child in children if "127.0.0.1" in _title(child)]
    if not serving:
        return False
    before = server.log.count(CRASHED)
    try:
        rng.choice(serving).kill()
    except psutil.NoSuchProcess:
        # Its client has just disconnected.
        return False
    until = time.monotonic() + CRASH_TIMEOUT
    while server.log.count(CRASHED) == before:
        if time.monotonic() > until:
            # The process only rejected a client during recovery; the others were not affected.
            return False
        await asyncio.sleep(0.01)
    await wait_exited(children)
    return True


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
