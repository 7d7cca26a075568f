"""``flowstore queues``: the steps that wait for a worker, by queue."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from flowstore_cli.printing import cell, new_console, new_table, print_json, print_table, remark, since
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import QueueStatistics

COUNTS = ("ready", "scheduled", "waiting", "running")


def queues(url: Url = None, as_json: AsJson = False) -> None:
    """Count the queued steps of Running runs, by queue.

    A step is ready (a worker may take it), scheduled (due later), waiting (for a signal) or running.

    \b
      flowstore queues
      flowstore queues --json | jq '.[] | select(.ready > 100) | .queue'

    JSON: a list of objects with queue, ready, scheduled, waiting, running, oldest_ready_at (null if
    no step is ready).
    """
    found = run(_queues(url))
    if as_json:
        print_json(found)
    elif found:
        _print(found)
    else:
        remark("no Running run has a queued step")


async def _queues(url: str | None) -> Sequence[QueueStatistics]:
    async with existing_store(url) as store:
        return await store.get_queues()


def _print(found: Sequence[QueueStatistics]) -> None:
    now = datetime.now(UTC)
    numbers = tuple(name.upper() for name in COUNTS)
    table = new_table("QUEUE", *numbers, "OLDEST READY", right=numbers, spare=("OLDEST READY",))
    for queue in found:
        oldest = queue.oldest_ready_at
        table.add_row(
            cell(queue.queue),
            *(cell(f"{getattr(queue, name):,}") for name in COUNTS),
            cell(None if oldest is None else since(oldest, now)),
        )
    print_table(new_console(), table)
