"""``flowstore runs tree``: a run with the runs it was derived from and those derived from it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import typer
from rich.text import Text

from flowstore_cli.printing import between, cell, new_console, print_json, remark, short_ids, since, status
from flowstore_cli.references import Run, RunId, find_run
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import FlowRunRecord, FlowStore, RunNotFoundError
from flowstore_core.inspection.wording import count
from flowstore_core.validation import MAX_TAKE


@dataclass(frozen=True, slots=True)
class Lineage:
    """The runs of a tree by their id, and the ids of the runs derived from each, the oldest first."""

    root: UUID
    runs: Mapping[UUID, FlowRunRecord]
    derived: Mapping[UUID, Sequence[UUID]]
    is_complete: bool
    """False if reading stopped at the wanted number of runs, so there may be more."""


def tree(
    reference: Run,
    take: Annotated[
        int, typer.Option("--take", "-n", metavar="N", min=1, max=MAX_TAKE, help="Maximum number of runs.")
    ] = 200,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show where a run comes from, and which runs were derived from it.

    The tree begins with the earliest run that is still stored. Child runs and re-runs are derived runs:
    their source_run_id names the run that they come from.

    \b
      flowstore runs tree 1d8a3f5b
      flowstore runs tree 1d8a3f5b --json | jq -r '.runs[].run_id'

    JSON: root (the id of the earliest run), runs (a list of objects as in runs list, sources before the
    runs derived from them), complete (false if it stopped at --take runs, so there may be more).
    """
    asked, lineage = run(_read(url, reference, take))
    if as_json:
        runs = list(lineage.runs.values())
        print_json({"root": lineage.root, "runs": runs, "complete": lineage.is_complete})
    else:
        _print(lineage, asked)


async def _read(url: str | None, reference: RunId, take: int) -> tuple[UUID, Lineage]:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        return run_id, await read_lineage(store, run_id, take)


async def read_lineage(store: FlowStore, run_id: UUID, take: int) -> Lineage:
    """The tree that holds a run, level by level, at most ``take`` runs. Raises RunNotFoundError."""
    root = await _earliest(store, run_id)
    runs = {root.run_id: root}
    derived: dict[UUID, Sequence[UUID]] = {}
    level = [root.run_id]
    while level and len(runs) < take:
        found = await asyncio.gather(*(store.get_derived_runs(one, take=take) for one in level))
        following: list[UUID] = []
        for source, answers in zip(level, found, strict=True):
            # A run that is in the tree already closes a circle of source_run_ids.
            new = [one for one in reversed(answers) if one.run_id not in runs]
            new = new[: take - len(runs)]
            runs |= {one.run_id: one for one in new}
            derived[source] = [one.run_id for one in new]
            following += derived[source]
        level = following
    return Lineage(root.run_id, runs, derived, is_complete=len(runs) < take)


async def _earliest(store: FlowStore, run_id: UUID) -> FlowRunRecord:
    """The first stored run of the chain of source_run_ids that leads to a run."""
    found = await store.get_run(run_id)
    if found is None:
        raise RunNotFoundError(run_id)
    seen = {run_id}
    while found.source_run_id is not None and found.source_run_id not in seen:
        seen.add(found.source_run_id)
        source = await store.get_run(found.source_run_id)
        if source is None:
            break
        found = source
    return found


def _print(lineage: Lineage, asked: UUID) -> None:
    console = new_console()
    now = datetime.now(UTC)
    ids = short_ids(list(lineage.runs))
    waiting = [(lineage.root, "", "")]
    while waiting:
        run_id, branch, indent = waiting.pop()
        one = lineage.runs[run_id]
        facts = (
            cell(ids[run_id], "bold" if run_id == asked else ""),
            status(one.status),
            cell(since(one.started_at, now)),
            cell(between(one.started_at, one.completed_at)),
            cell(one.flow_name),
            cell("<- this run" if run_id == asked and len(lineage.runs) > 1 else "", "dim"),
        )
        line = Text.assemble(branch, Text("  ").join(facts))
        line.rstrip()
        console.print(line, soft_wrap=True)
        derived = lineage.derived.get(run_id, ())
        for place, child in reversed(list(enumerate(derived, 1))):
            is_last = place == len(derived)
            waiting.append(
                (
                    child,
                    f"{indent}{'└─ ' if is_last else '├─ '}",
                    f"{indent}{'   ' if is_last else '│  '}",
                )
            )
    if not lineage.is_complete:
        remark(f"stopped at {count(len(lineage.runs), 'run')}; show more with --take")
