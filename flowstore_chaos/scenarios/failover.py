"""Failover to the synchronous standby of a killed primary: no acknowledged write is lost.

Before the kill, the primary's WAL sender is suspended: any write acknowledged after that would be lost. A
primary with a synchronous standby acknowledges nothing while it waits for the standby, and the new primary
waits for a new standby before it acknowledges a write.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import psutil

from flowstore_chaos.context import RunContext
from flowstore_chaos.outage import run_clients_through
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server, new_server

SETTINGS = {"synchronous_standby_names": "*", "hot_standby": "on"}
INITDB = ("--wal-segsize=1",)
"""Small segments make the copy of a standby faster."""
MUTANT_SETTINGS = {"synchronous_commit": "local"}
SILENT_SECONDS = (0.2, 0.5)
"""Seconds without replication before the primary is killed."""
STATEMENT_SECONDS = 2.0
"""Shorter than the creation of a standby may take, so that waiting calls time out."""
FOLLOW_SECONDS = 30.0
SYNC_STATE = "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"


class Pair:
    """A primary and its standby, on two fixed ports."""

    def __init__(self, context: RunContext, primary: Server) -> None:
        self._context = context
        self._number = 0
        self.primary = primary
        self.standby: Server | None = None
        self._port: int | None = None

    async def follow(self) -> None:
        """Create a standby and wait until it is synchronous."""
        self._number += 1
        folder: Path = self._context.folder / f"standby-{self._number}"
        self.standby = await self.primary.new_standby(folder, "standby", port=self._port)
        await self.standby.start()
        until = time.monotonic() + FOLLOW_SECONDS
        while not self._context.is_mutant and await self.primary.psql(SYNC_STATE) != "1":
            if time.monotonic() > until:
                raise RuntimeError(f"the standby does not stream: {self.standby.log[-1000:]}")
            await asyncio.sleep(0.02)

    async def fail_over(self) -> None:
        """Suspend replication, kill the primary and promote the standby."""
        assert self.standby is not None
        rng = self._context.rng
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


async def run(context: RunContext) -> None:
    async with AsyncExitStack() as stack:
        settings = {**SETTINGS, **MUTANT_SETTINGS} if context.is_mutant else SETTINGS
        first = await stack.enter_async_context(new_server(context.folder / "primary", settings, INITDB))
        pair = Pair(context, first)
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

        await run_clients_through(context, url, outage)


SCENARIO = FaultScenario(
    number=12,
    name="failover",
    fault="the primary is killed and its synchronous standby promoted, with both in the URL",
    unit="fail-overs",
    planned=5,
    min_faults=1,
    backends=("postgresql",),
    pass_criterion="no acknowledged write is lost, and clients continue with their open stores",
    mutant="synchronous_commit=local, which does not wait for the standby",
    minutes=4,
    run=run,
)
