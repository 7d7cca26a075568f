"""``flowstore runs events``: print the events of a run, and those that follow."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from datetime import UTC, timedelta
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.failures import NO, Failure
from flowstore_cli.printing import clean, plain, say
from flowstore_cli.references import Run, RunId, find_run
from flowstore_cli.run_wait import status_after
from flowstore_cli.stores import Url, existing_store, run
from flowstore_core import Capability, FlowEventRecord, FlowStore, RunNotFoundError

POLL = timedelta(seconds=1)
"""The time between two looks for new events; the end of the run is seen at once in a store with WATCH."""


def events(
    reference: Run,
    after: Annotated[int, typer.Option(metavar="SEQUENCE", min=0, help="Only events after this one.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with new events until the run has ended.")
    ] = False,
    url: Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each event.")] = False,
) -> None:
    """Print the events of a run, one line each, in their order.

    \b
      flowstore runs events 1d8a3f5b
      flowstore runs events 1d8a3f5b --follow
      flowstore runs events 1d8a3f5b --after 120 --json | jq -r .message

    JSON: one object on each line with sequence, run_id, timestamp, event_type, step_key, message.
    """
    run(_print_events(url, reference, after, follow=follow, as_json=as_json))


async def _print_events(
    url: str | None, reference: RunId, after: int, *, follow: bool, as_json: bool
) -> None:
    async with existing_store(url) as store:
        if Capability.EVENTS not in store.capabilities:
            raise Failure(f"the backend {store.backend} stores no events (no capability EVENTS)", NO)
        run_id = await find_run(store, reference)
        if await store.get_run_status(run_id) is None:
            raise RunNotFoundError(run_id)
        after = await _print_page(store, run_id, after, as_json=as_json)
        has_ended = not follow
        while not has_ended:
            # The status first: every event from before the end of the run is then printed.
            has_ended = (await status_after(store, run_id, POLL)).is_terminal
            after = await _print_page(store, run_id, after, as_json=as_json)


async def _print_page(store: FlowStore, run_id: UUID, after: int, *, as_json: bool) -> int:
    """Print every event after this sequence; return the sequence of the last one."""
    while page := await store.get_run_events(run_id, after=after, take=store.limits.page_size):
        _print_lines(page, as_json=as_json)
        after = page[-1].sequence
    return after


def _print_lines(page: Iterable[FlowEventRecord], *, as_json: bool) -> None:
    for event in page:
        if as_json:
            say(json.dumps(plain(event)))
        else:
            at = f"{event.timestamp.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
            message = clean(event.message or "").replace("\n", " ")
            step = clean(event.step_key or "-")
            say(f"{event.sequence:>6}  {at}  {clean(event.event_type):<16}  {step:<16}  {message}".rstrip())
    sys.stdout.flush()
