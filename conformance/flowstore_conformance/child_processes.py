"""The processes that checks start, so that none outlives the run, however it ends."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from weakref import WeakKeyDictionary

_children: WeakKeyDictionary[asyncio.subprocess.Process, asyncio.AbstractEventLoop] = WeakKeyDictionary()


async def start_module(module: str, *arguments: str, limit: int = 1 << 26) -> asyncio.subprocess.Process:
    """Start ``python -m module`` with pipes to its stdin and from its stdout."""
    # It must find a backend wherever this process does, in a folder that was put on sys.path too.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module, *arguments),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        limit=limit,
    )
    _children[process] = asyncio.get_running_loop()
    return process


def kill_children(loop: asyncio.AbstractEventLoop) -> None:
    """Kill the processes that were started from a loop, which need not run any more."""
    for process, started_in in list(_children.items()):
        if started_in is loop and process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
