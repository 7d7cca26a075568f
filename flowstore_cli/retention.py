"""``flowstore cleanup``: deleting what is over."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.durations import before, parse_duration
from flowstore_cli.printing import count, moment, print_json, say
from flowstore_cli.stores import AsJson, NoMigrate, Url, existing_store, run
from flowstore_core import FlowStore, RunStatus

PAGE = 1000


def cleanup(
    older_than: Annotated[
        str,
        typer.Option(metavar="AGE", help="Since completion: 30d, 12h, 1h30m.", show_default=False),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Count what would go; delete nothing.")] = False,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """Delete runs that have long been over.

    Those completed longer ago than AGE go, with all that belongs to them. Running runs are never
    touched. It may be interrupted at any time: only whole runs go.

    \b
      flowstore cleanup --older-than 30d --dry-run
      flowstore cleanup --older-than 30d

    JSON: cutoff, dry_run, runs (deleted, or with --dry-run to be deleted).
    """
    cutoff = before(datetime.now(UTC), parse_duration(older_than, "--older-than"), "--older-than")
    number = run(_cleanup(url, cutoff, dry_run, migrate=not no_migrate))
    if as_json:
        print_json({"cutoff": cutoff, "dry_run": dry_run, "runs": number})
        return
    verb = "would delete" if dry_run else "deleted"
    say(f"{verb} {count(number, 'run')} completed before {moment(cutoff)} UTC")


async def _cleanup(url: str | None, cutoff: datetime, dry_run: bool, *, migrate: bool) -> int:
    async with existing_store(url, migrate=migrate) as store:
        return await _count(store, cutoff) if dry_run else await store.cleanup(cutoff)


async def _count(store: FlowStore, cutoff: datetime) -> int:
    """How many runs cleanup would delete, through the reads that anybody may use."""
    found: set[UUID] = set()
    for status in RunStatus:
        skip = 0
        while status.is_terminal:
            # New runs push the pages on meanwhile; by their ids none counts twice.
            runs, _ = await store.get_runs_page(status=status, skip=skip, take=PAGE)
            found.update(run.run_id for run in runs if run.completed_at and run.completed_at < cutoff)
            skip += PAGE
            if len(runs) < PAGE:
                break
    return len(found)
