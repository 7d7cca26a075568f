"""Shell completions of the word at the cursor. They open existing stores only, and change nothing.

On any error, such as an unavailable store, they offer nothing: a message would end up in the command line.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime

import typer

from flowstore_cli.failures import Failure
from flowstore_cli.printing import SHORT_ID, clean
from flowstore_cli.stores import existing_store
from flowstore_core import FlowRunRecord, FlowStoreError, RunStatus
from flowstore_core.inspection.wording import span

TIMEOUT = 2.0
"""Seconds after which completion offers nothing, because the user waits at the prompt."""
RUNS = 50
"""Maximum number of runs offered, the newest first."""
NAMED = 200
"""Number of newest runs whose flows are offered."""
LONGEST_NAME = 40
"""Maximum length of a flow's name beside a run."""
VARIABLE = "_FLOWSTORE_COMPLETE"
"""The environment variable that the shell sets when it requests completions."""

Offers = list[tuple[str, str]]


def complete_run_status(incomplete: str) -> list[str]:
    """The run statuses, in lower case if the word is in lower case."""
    statuses = [status.lower() if incomplete.islower() else status.value for status in RunStatus]
    return [status for status in statuses if status.startswith(incomplete)]


def complete_run(context: typer.Context, incomplete: str) -> Offers:
    """Short ids of the newest runs, or whole ids that begin with the word."""
    now = datetime.now(UTC)
    offers: Offers = []
    for run in _newest_runs(context, RUNS):
        age = max((now - run.started_at).total_seconds(), 0.0)
        description = f"{run.status}, {span(age)} ago, {clean(run.flow_name)[:LONGEST_NAME]}"
        for text in (run.run_id.hex[-SHORT_ID:], str(run.run_id)):
            if text.startswith(incomplete.lower()):
                offers.append((text, description))
                break
    return offers


def complete_flow(context: typer.Context, incomplete: str) -> Offers:
    """The names of the flows of the newest runs."""
    flows = {clean(run.flow_name): str(run.flow_id) for run in _newest_runs(context, NAMED)}
    offers = [(name, flow_id) for name, flow_id in flows.items() if name.startswith(incomplete)]
    if os.environ.get(VARIABLE) == "complete_bash":
        # Other shells quote completions themselves.
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
