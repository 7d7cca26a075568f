"""Cuts of the connection that listens for hints: waiting calls find each step, and hints resume (WAT-1)."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from flowstore_chaos.context import RunContext
from flowstore_chaos.proxy import Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server
from flowstore_chaos.waits import (
    APPLICATION,
    TIMEOUT_SECONDS,
    NoFinalReadMutant,
    expect_one_step,
    find_listener,
    finish_waits,
    note_longest,
    start_waits,
    verify_found,
)
from flowstore_core import FlowStore, new_run_id, open_store

KINDS = ("ended by the server", "reset", "silent")
COMMIT_SECONDS = (0.0, 0.05)
"""The time between the cut and the commit of a step."""
LONG_SECONDS = 600.0
"""A time-out that no wait of this scenario reaches."""


async def run(context: RunContext) -> None:
    # No server crashes in this scenario, so fsync is off.
    async with context.server({"fsync": "off"}) as server, proxy_before_port(server.port) as proxy:
        through = server.url(port=proxy.port, schema="chaos", application_name=APPLICATION)
        async with open_store(server.url(schema="chaos")) as other, open_store(through) as opened:
            waiting: Any = NoFinalReadMutant(opened) if context.is_mutant else opened
            number = 0
            # Without a listener every later round would fail too.
            while not context.done and context.counts.clean:
                # Each kind in turn, so that short rows cover all.
                kind = KINDS[number % len(KINDS)]
                await _Round(context, server, proxy, other, waiting, kind, f"queue-{number}").run()
                number += 1


class _Round:
    """Waits during one cut, and waits after it."""

    def __init__(
        self,
        context: RunContext,
        server: Server,
        proxy: Proxy,
        other: FlowStore,
        waiting: Any,
        kind: str,
        queue: str,
    ) -> None:
        self._context = context
        self._counts = context.counts
        self._server = server
        self._proxy = proxy
        self._other = other
        self._waiting = waiting
        self._kind = kind
        self._queue = queue

    async def run(self) -> None:
        waits = start_waits(self._waiting, self._queue, TIMEOUT_SECONDS)
        listener = await find_listener(self._server)
        injected = await self._cut(listener)
        await asyncio.sleep(self._context.rng.uniform(*COMMIT_SECONDS))
        await self._dispatch()
        committed_at = time.monotonic()
        ended = await finish_waits(self._counts, waits, self._kind)
        verify_found(self._counts, ended, committed_at, self._kind)
        note_longest(
            self._counts,
            f"longest wait with a time-out of {TIMEOUT_SECONDS:g} s, {self._kind}, s",
            (wait.seconds for wait in ended),
        )
        await expect_one_step(self._counts, self._other, self._queue, self._kind)
        self._proxy.heal()
        if not injected:
            return
        await self._expect_hints(listener)
        self._counts.add_detail(self._kind)
        self._context.record_faults()

    async def _cut(self, listener: str) -> bool:
        if self._kind == "ended by the server":
            return await self._server.psql(f"SELECT pg_terminate_backend({listener})") == "t"
        if self._kind == "reset":
            return bool(self._proxy.cut_listeners())
        return bool(self._proxy.silence_listeners())

    async def _expect_hints(self, listener: str) -> None:
        """The next commit wakes waiting calls again, long before their time-out."""
        waits = start_waits(self._waiting, self._queue, LONG_SECONDS)
        try:
            await find_listener(self._server, listener)
        except TimeoutError:
            self._counts.count_wrong(f"no connection replaced the listener that was cut ({self._kind})")
        await self._dispatch()
        committed_at = time.monotonic()
        what = f"after a cut ({self._kind})"
        ended = await finish_waits(self._counts, waits, what)
        note_longest(
            self._counts, "longest wake-up after a cut, s", (wait.ended_at - committed_at for wait in ended)
        )
        await expect_one_step(self._counts, self._other, self._queue, what)

    async def _dispatch(self) -> None:
        run_id = new_run_id()
        await self._other.start_run(run_id, "hints", run_id, "chaos")
        await self._other.try_record_dispatch(run_id, "step", queue=self._queue, step_type="test")


SCENARIO = FaultScenario(
    number=18,
    name="listener-cuts",
    fault="the connection that listens for hints is ended by the server, reset or silent, while calls wait",
    unit="cuts",
    planned=60,
    min_faults=3,
    backends=("postgresql",),
    pass_criterion="waiting calls find the step at their time-out at the latest, and later commits wake them",
    mutant="a wait does not read the store again at its time-out",
    minutes=4,
    run=run,
)
