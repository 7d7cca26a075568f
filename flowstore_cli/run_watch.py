"""``flowstore runs watch``: show the steps of a run until it has ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import typer
from rich.console import Group
from rich.live import Live

from flowstore_cli.failures import NO
from flowstore_cli.printing import cell, clean, new_console, on_terminal, print_table, say
from flowstore_cli.references import Run, RunId, find_run
from flowstore_cli.run_wait import status_after
from flowstore_cli.runs import steps_table
from flowstore_cli.stores import Url, existing_store, run
from flowstore_core import FlowRunDetail, FlowStepRecord, RunNotFoundError, RunStatus
from flowstore_core.inspection.wording import count

POLL = timedelta(seconds=1)
"""The time between two looks at the steps; the end of the run is seen at once in a store with WATCH."""
OTHER_LINES = 4
"""Lines of a terminal that the table of steps leaves free."""

Show = Callable[[FlowRunDetail], None]


def watch(reference: Run, url: Url = None) -> None:
    """Show the steps of a run as they change, until the run has ended.

    The exit code is 0 if the run Succeeded, else 1. On a terminal a table shows the steps; in a pipe, each
    change that was seen is a line: the time in UTC, the step, its status, its attempt. To wait for a run
    in a script use: flowstore runs wait

    \b
      flowstore runs watch 1d8a3f5b
    """
    if run(_watch(url, reference)) is not RunStatus.SUCCEEDED:
        raise typer.Exit(NO)


async def _watch(url: str | None, reference: RunId) -> RunStatus:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)

        async def follow(show: Show) -> FlowRunDetail:
            while True:
                detail = await store.get_run_detail(run_id)
                if detail is None:
                    raise RunNotFoundError(run_id)
                show(detail)
                if detail.status.is_terminal:
                    return detail
                await status_after(store, run_id, POLL)

        if on_terminal():
            console = new_console()
            with Live(console=console, refresh_per_second=8, transient=True) as live:
                most = max(console.height - OTHER_LINES, 1)
                detail = await follow(lambda one: live.update(_screen(one, most)))
            print_table(console, steps_table(detail))
        else:
            detail = await follow(_Changes().show)
        say(f"{detail.run_id} {detail.status}")
        return detail.status


def _screen(detail: FlowRunDetail, most: int) -> Group:
    """The number of ended steps, and the steps; where they are too many, the ended ones go first."""
    ended = sum(step.status.is_terminal for step in detail.steps)
    title = f"{detail.flow_name}: {ended:,} of {count(len(detail.steps), 'step')} ended"
    steps = sorted(detail.steps, key=lambda step: step.status.is_terminal)[:most]
    shown = {step.step_key for step in steps}
    return Group(cell(title), steps_table(detail, [step for step in detail.steps if step.step_key in shown]))


class _Changes:
    """Prints a line for each step that is not as it was."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, int]] = {}

    def show(self, detail: FlowRunDetail) -> None:
        for step in detail.steps:
            state = (str(step.status), step.attempt_count)
            if self._seen.get(step.step_key) != state:
                self._seen[step.step_key] = state
                at = _changed_at(step).astimezone(UTC)
                say(f"{at:%Y-%m-%dT%H:%M:%SZ}  {clean(step.step_key)}  {state[0]}  attempt {state[1]}")
        sys.stdout.flush()


def _changed_at(step: FlowStepRecord) -> datetime:
    return step.completed_at or step.started_at
