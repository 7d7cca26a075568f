"""``flowstore cleanup``: delete old completed runs."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from flowstore_cli.durations import before, parse_duration
from flowstore_cli.printing import moment, print_json, say
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import FlowStore
from flowstore_core.inspection.wording import count


def cleanup(
    older_than: Annotated[
        str,
        typer.Option(
            metavar="AGE", help="Minimum age since completion: 30d, 12h, 1h30m.", show_default=False
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count the runs without deleting them.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Delete runs that were completed long ago.

    Deletes runs that were completed longer ago than AGE, with everything that belongs to them. Running
    runs are never deleted. It may be interrupted at any time: it deletes whole runs only.

    \b
      flowstore cleanup --older-than 30d --dry-run
      flowstore cleanup --older-than 30d

    JSON: cutoff, dry_run, runs (deleted, or with --dry-run to be deleted).
    """
    cutoff = before(datetime.now(UTC), parse_duration(older_than, "--older-than"), "--older-than")
    number = run(_cleanup(url, cutoff, dry_run))
    if as_json:
        print_json({"cutoff": cutoff, "dry_run": dry_run, "runs": number})
        return
    verb = "would delete" if dry_run else "deleted"
    say(f"{verb} {count(number, 'run')} completed before {moment(cutoff)} UTC")


async def _cleanup(url: str | None, cutoff: datetime, dry_run: bool) -> int:
    async with existing_store(url) as store:
        return await count_completed(store, cutoff) if dry_run else await store.cleanup(cutoff)


async def count_completed(store: FlowStore, cutoff: datetime) -> int:
    """Count the runs that cleanup would delete. Reads every run: no query orders them by completion."""
    number = 0
    position = None
    while runs := await store.get_runs(after=position, take=store.limits.page_size):
        number += sum(run.completed_at is not None and run.completed_at < cutoff for run in runs)
        position = runs[-1].position
    return number
