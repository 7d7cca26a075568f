"""Child processes of checks, tracked so that none outlives the run."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

_children: WeakKeyDictionary[asyncio.subprocess.Process, asyncio.AbstractEventLoop] = WeakKeyDictionary()


async def start_module(
    module: str, *arguments: str, limit: int = 1 << 26, **options: Any
) -> asyncio.subprocess.Process:
    """Start ``python -m module`` with pipes to its stdin and from its stdout.

    ``options`` are those of subprocess.Popen.
    """
    return await _start("-m", module, *arguments, limit=limit, **options)


async def start_file(path: str, *arguments: str, limit: int = 1 << 26) -> asyncio.subprocess.Process:
    """Start ``python -P path`` with such pipes: nothing is imported before the file runs."""
    return await _start("-P", path, *arguments, limit=limit)


async def _start(*arguments: str, limit: int, **options: Any) -> asyncio.subprocess.Process:
    # The child needs the sys.path of this process to import the backend.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        limit=limit,
        # Ctrl-C interrupts only the suite, which then ends its children, and theirs with them.
        process_group=0,
        **options,
    )
    _children[process] = asyncio.get_running_loop()
    return process


def kill_children(loop: asyncio.AbstractEventLoop) -> None:
    """Kill the processes started from a loop, which may no longer be running."""
    for process, started_in in list(_children.items()):
        if started_in is loop:
            kill_child(process)


def kill_child(process: asyncio.subprocess.Process) -> None:
    """Kill a process if it still runs, and its own children."""
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
