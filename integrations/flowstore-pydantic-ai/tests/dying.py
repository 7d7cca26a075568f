"""A process that runs an agent and kills itself with SIGKILL before one of its calls of the store."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from agents import Log, ask_in_file, order_agent, refund_agent
from flowstore_pydantic_ai import DurableRunner

from flowstore import FlowStore, open_store

LEASE = timedelta(seconds=8)
"""The wait after a kill; a process that gets no processor time for as long loses its claims."""
IMPORTED_IN = os.getpid()
UNCOUNTED = ("get_", "wait_", "renew_")
"""Calls that read, and renewals, whose number depends on how fast the machine is."""


class DyingStore:
    """A store whose process is killed before its ``last``-th writing call; renewals are not counted."""

    def __init__(self, store: FlowStore, last: int) -> None:
        self._store = store
        self._last = last
        self._count = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not inspect.iscoroutinefunction(value) or name.startswith(UNCOUNTED):
            return value

        async def call(*args: Any, **options: Any) -> Any:
            self._count += 1
            if self._count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
            return await value(*args, **options)

        return call


def run(url: str, path: str, kind: str, last: int) -> None:
    """Run an agent until the call; the process ends by itself if there are fewer calls."""
    assert os.getpid() != IMPORTED_IN, "the fork server did not import this module"
    asyncio.run(_run(url, Log(Path(path)), kind, last))


async def _run(url: str, log: Log, kind: str, last: int) -> None:
    async with open_store(url) as opened:
        runner = DurableRunner(cast(FlowStore, DyingStore(opened, last)), lease=LEASE)
        agent = order_agent(log) if kind == "order" else refund_agent(log, ask_in_file(log))
        await runner.run(agent, "go", run_id=f"{kind} {last}")
