"""What a shell offers for the word at the cursor. Opens an existing store only, and changes nothing.

On any trouble, such as a store that is away, nothing is offered: an error would land in the command line.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime

import typer

from flowstore_cli.failures import Failure
from flowstore_cli.printing import SHORT_ID, clean, span
from flowstore_cli.stores import existing_store
from flowstore_core import FlowRunRecord, FlowStoreError, RunStatus

TIMEOUT = 2.0
"""Seconds after which nothing is offered: somebody is waiting at the prompt."""
RUNS = 50
"""Newest runs that are offered."""
NAMED = 200
"""Newest runs whose flows are offered."""
LONGEST_NAME = 40
"""Characters of a flow's name that are shown next to a run."""
VARIABLE = "_FLOWSTORE_COMPLETE"
"""Set by the shell where it asks for completions."""

Offers = list[tuple[str, str]]


def complete_run_status(incomplete: str) -> list[str]:
    """The statuses, in lower case where the word is."""
    statuses = [status.lower() if incomplete.islower() else status.value for status in RunStatus]
    return [status for status in statuses if status.startswith(incomplete)]


def complete_run(context: typer.Context, incomplete: str) -> Offers:
    """Short ids of the newest runs, or whole ids where the word begins one."""
    now = datetime.now(UTC)
    offers: Offers = []
    for run in _newest_runs(context, RUNS):
        age = max((now - run.started_at).total_seconds(), 0.0)
        told = f"{run.status}, {span(age)} ago, {clean(run.flow_name)[:LONGEST_NAME]}"
        for text in (run.run_id.hex[-SHORT_ID:], str(run.run_id)):
            if text.startswith(incomplete.lower()):
                offers.append((text, told))
                break
    return offers


def complete_flow(context: typer.Context, incomplete: str) -> Offers:
    """The names of the flows of the newest runs."""
    flows = {clean(run.flow_name): str(run.flow_id) for run in _newest_runs(context, NAMED)}
    offers = [(name, flow_id) for name, flow_id in flows.items() if name.startswith(incomplete)]
    if os.environ.get(VARIABLE) == "complete_bash":
        # The other shells quote by themselves.
        offers = [(re.sub(r"([^\w@%+=,./-])", r"\\\1", name), flow_id) for name, flow_id in offers]
    return offers


def _newest_runs(context: typer.Context, take: int) -> Sequence[FlowRunRecord]:
    async def read() -> Sequence[FlowRunRecord]:
        async with asyncio.timeout(TIMEOUT):
            async with existing_store(context.params.get("url")) as store:
                return await store.get_runs(take=take)

    try:
        return asyncio.run(read())
    except (FlowStoreError, Failure, TimeoutError, OSError):
        return ()
