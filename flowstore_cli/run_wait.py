"""``flowstore runs wait``: wait until a run has ended."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.durations import parse_duration
from flowstore_cli.failures import NO, USAGE, Failure
from flowstore_cli.printing import print_json, say
from flowstore_cli.references import Run, RunId, find_run
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import Capability, FlowStore, RunNotFoundError, RunStatus
from flowstore_core.watching import MAX_TIMEOUT

POLL_SECONDS = 1.0
"""The time between two looks at a run in a store that cannot wait."""


def wait(
    reference: Run,
    timeout: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Give up after this time. Default: never.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Wait until a run has ended, and tell how.

    The exit code is 0 if the run Succeeded, and 1 if it Failed, was Cancelled or has not ended in time.

    \b
      flowstore runs wait RUN_ID
      flowstore runs wait RUN_ID --timeout 10m && deploy

    JSON: run_id, status (Running after the time-out).
    """
    limit = None if timeout is None else parse_duration(timeout, "--timeout")
    if limit is not None and not limit:
        raise Failure("--timeout must be longer than 0", USAGE)
    run_id, status = run(_wait(url, reference, limit))
    if as_json:
        print_json({"run_id": run_id, "status": status})
    elif status is RunStatus.RUNNING:
        say(f"{run_id} is still Running after {timeout}")
    else:
        say(f"{run_id} {status}")
    if status is not RunStatus.SUCCEEDED:
        raise typer.Exit(NO)


async def _wait(url: str | None, reference: RunId, limit: timedelta | None) -> tuple[UUID, RunStatus]:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        try:
            async with asyncio.timeout(None if limit is None else limit.total_seconds()):
                while True:
                    status = await status_after(store, run_id, MAX_TIMEOUT)
                    if status is not RunStatus.RUNNING:
                        return run_id, status
        except TimeoutError:
            return run_id, RunStatus.RUNNING


async def status_after(store: FlowStore, run_id: UUID, limit: timedelta) -> RunStatus:
    """The status of the run, as soon as it has ended, or after this time. Raises RunNotFoundError."""
    if Capability.WATCH in store.capabilities:
        await store.wait_for_run(run_id, timeout=limit)
    status = await store.get_run_status(run_id)
    if status is None:
        raise RunNotFoundError(run_id)
    if status is RunStatus.RUNNING and Capability.WATCH not in store.capabilities:
        await asyncio.sleep(min(POLL_SECONDS, limit.total_seconds()))
    return status
