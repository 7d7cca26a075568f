"""The primary dies and its synchronous standby takes over: clients find it, and nothing is gone.

Before the primary is killed, the process that sends to the standby is stopped for a moment: what is
acknowledged from then on could only be lost. Nothing is acknowledged by a server that waits for its
standby, and the new primary waits for a standby of its own before it acknowledges anything.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil

from flowstore_chaos.line import Line
from flowstore_chaos.outages import work_through
from flowstore_chaos.server import Server, new_server
from flowstore_chaos.trial import Trial

SCENARIOS = {"synchronous_standby_names": "*", "hot_standby": "on"}
INITDB = ("--wal-segsize=1",)
"""So that a standby is copied sooner."""
BROKEN = {"synchronous_commit": "local"}
SILENT_SECONDS = (0.2, 0.5)
"""How long the standby gets nothing before the primary is killed."""
STATEMENT_SECONDS = 2.0
"""Shorter than a new standby may take: a call that waits for it is broken off, and says so."""
FOLLOW_SECONDS = 30.0
SYNC_STATE = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"


class Pair:
    """A primary and a standby that follows it, on two ports that stay the same."""

    def __init__(self, trial: Trial, primary: Server) -> None:
        self._trial = trial
        self._number = 0
        self.primary = primary
        self.standby: Server | None = None
        self._port: int | None = None

    async def follow(self) -> None:
        """Make a new standby, and wait until the primary relies on it."""
        self._number += 1
        folder: Path = self._trial.folder / f"standby-{self._number}"
        self.standby = await self.primary.new_standby(folder, "standby", port=self._port)
        await self.standby.start()
        until = time.monotonic() + FOLLOW_SECONDS
        while not self._trial.broken and await self.primary.psql(SYNC_STATE) != "1":
            if time.monotonic() > until:
                raise RuntimeError(f"the standby does not stream: {self.standby.log[-1000:]}")
            await asyncio.sleep(0.02)

    async def fail_over(self) -> None:
        """Kill the primary while it sends nothing to its standby, which takes its place."""
        assert self.standby is not None
        rng = self._trial.rng
        for process in psutil.Process(self.primary.pid).children():
            with suppress(psutil.NoSuchProcess):
                if "walsender" in " ".join(process.cmdline()):
                    process.suspend()
        await asyncio.sleep(rng.uniform(*SILENT_SECONDS))
        await self.primary.kill()
        dead, self.primary, self.standby = self.primary, self.standby, None
        self._port = dead.port
        await dead.aclose()
        await self.primary.promote()

    async def aclose(self) -> None:
        for server in (self.standby, self.primary):
            if server is not None:
                await server.aclose()


async def run(trial: Trial) -> None:
    async with AsyncExitStack() as stack:
        settings = {**SCENARIOS, **BROKEN} if trial.broken else SCENARIOS
        first = await stack.enter_async_context(new_server(trial.folder / "primary", settings, INITDB))
        pair = Pair(trial, first)
        stack.push_async_callback(pair.aclose)
        await pair.follow()
        assert pair.standby is not None
        url = first.url(
            schema="chaos",
            target_session_attrs="read-write",
            statement_timeout=str(STATEMENT_SECONDS),
        ).replace(f":{first.port}/", f":{first.port},127.0.0.1:{pair.standby.port}/")

        async def outage() -> str:
            await pair.fail_over()
            await pair.follow()
            return "standbys promoted"

        await work_through(trial, url, outage)


LINE = Line(
    number=12,
    name="failover",
    fault="the primary is killed and its synchronous standby promoted, with both in the URL",
    unit="fail-overs",
    planned=5,
    least=1,
    backends=("postgresql",),
    passes_when="everything acknowledged is there, and the clients carry on with the stores they have",
    broken="synchronous_commit=local, which does not wait for the standby",
    minutes=4,
    run=run,
)
