"""SIGKILL of a process between the commit of a step and its notification: waits find the step (WAT-1)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
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
from flowstore_chaos.worker_pool import WorkerPool, send_to_parent, serve_pool
from flowstore_core import FlowStore, new_run_id, open_store


async def run(context: RunContext) -> None:
    # No server crashes in this scenario, so fsync is off.
    async with context.server({"fsync": "off"}) as server:
        url = server.url(schema="chaos")
        listening = server.url(schema="chaos", application_name=APPLICATION)
        async with (
            open_store(url) as other,
            open_store(listening) as opened,
            WorkerPool(__name__, 1, url=url) as pool,
        ):
            waiting: Any = NoFinalReadMutant(opened) if context.is_mutant else opened
            number = 0
            while not context.done:
                await _round(context, server, other, waiting, pool, f"queue-{number}")
                number += 1


async def _round(
    context: RunContext, server: Server, other: FlowStore, waiting: Any, pool: WorkerPool, queue: str
) -> None:
    """One dispatch by a process that is killed after the commit, while calls wait for it."""
    counts = context.counts
    run_id = new_run_id()
    await other.start_run(run_id, "hints", run_id, "chaos")
    waits = start_waits(waiting, queue, TIMEOUT_SECONDS)
    await find_listener(server)
    (worker,) = pool.workers
    pool.send(worker, {"run_id": str(run_id), "queue": queue})
    committed = await pool.receive(worker)
    committed_at = time.monotonic()
    killed = await worker.wait() == -signal.SIGKILL
    ended = await finish_waits(counts, waits, "after the kill")
    verify_found(counts, ended, committed_at, "after the kill")
    note_longest(
        counts,
        f"longest wait with a time-out of {TIMEOUT_SECONDS:g} s, s",
        (wait.seconds for wait in ended),
    )
    await expect_one_step(counts, other, queue, "after the kill")
    # A call that returned much earlier than its time-out was woken by a notification. After a slow commit the
    # time-out came first.
    unnotified = all(wait.seconds > 0.9 * TIMEOUT_SECONDS and committed_at < wait.deadline for wait in ended)
    if killed and committed == "committed" and unnotified:
        context.record_faults()
    await pool.replace(worker)


async def _dispatch(store: Any, request: dict[str, Any]) -> None:
    """Commit a dispatch, and die before the event loop runs the task that notifies."""
    await store.try_record_dispatch(UUID(request["run_id"]), "step", queue=request["queue"], step_type="test")
    send_to_parent("committed")
    os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.Event().wait()


SCENARIO = FaultScenario(
    number=19,
    name="notifier-kills",
    fault="SIGKILL of a process between the commit of a step and its notification, while calls wait",
    unit="kills",
    planned=30,
    min_faults=3,
    backends=("postgresql",),
    pass_criterion="every waiting call finds the step at its time-out",
    mutant="a wait does not read the store again at its time-out",
    minutes=30,
    run=run,
)

if __name__ == "__main__":
    serve_pool(_dispatch)
