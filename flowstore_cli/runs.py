"""``flowstore runs``: listing runs, looking into one, reopening and cancelling."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.text import Text

from flowstore_cli.failures import Failure
from flowstore_cli.printing import (
    between,
    cell,
    moment,
    new_console,
    new_table,
    plain,
    print_form,
    print_json,
    print_table,
    say,
    shortened,
    span,
    status,
)
from flowstore_cli.stores import AsJson, NoMigrate, RunId, Url, existing_store, new_group, run
from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowStepAttemptRecord,
    FlowStepRecord,
    FlowStore,
    RunNotFoundError,
    RunPage,
    RunPosition,
    RunStatus,
    StepNotFoundError,
    StepStatus,
)

app = new_group("List runs, look into one, reopen or cancel it.")

StepKey = Annotated[str, typer.Argument(metavar="STEP", help="The step's key.", show_default=False)]


@app.command("list")
def list_runs(
    flow: Annotated[UUID | None, typer.Option(metavar="FLOW_ID", help="Only runs of this flow.")] = None,
    wanted: Annotated[
        RunStatus | None,
        typer.Option("--status", "-s", case_sensitive=False, help="Only runs in it."),
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="In ids, names, step keys, errors, outputs."),
    ] = None,
    take: Annotated[int, typer.Option("--take", "-n", min=0, max=1000, help="How many.")] = 20,
    skip: Annotated[int, typer.Option(min=0, help="How many to leave out first.")] = 0,
    after: Annotated[
        str | None,
        typer.Option(metavar="POSITION", help="Only what lies behind; the last page says it."),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """List runs, the newest first.

    \b
      flowstore runs list
      flowstore runs list --status failed --search timeout
      flowstore runs list --json | jq -r '.runs[].run_id'
      flowstore runs list --after POSITION

    JSON: total_count, runs (a list of objects with run_id, flow_id, flow_name, status, trigger_key,
    trigger_data, job_id, started_at, completed_at, source_run_id), after (for --after of the next
    page, null when this one is empty).
    """
    position = None if after is None else RunPosition.parse(after)
    page = run(_page(url, flow, wanted, position, skip, take, search, migrate=not no_migrate))
    onward = str(page.runs[-1].position) if page.runs else None
    if as_json:
        print_json({"total_count": page.total_count, "runs": page.runs, "after": onward})
        return
    if not page.runs:
        behind = f"number {skip + 1}" if after is None else "there"
        none = f"no runs from {behind} on; there are {page.total_count:,}"
        say(none if skip or after is not None else "no runs")
        return
    now = datetime.now(UTC)
    table = new_table("RUN", "STATUS", "STARTED", "TOOK", "FLOW", right=("TOOK",), short=("FLOW",))
    for one in page.runs:
        table.add_row(
            cell(one.run_id),
            status(one.status),
            cell(f"{span(max((now - one.started_at).total_seconds(), 0.0))} ago"),
            cell(between(one.started_at, one.completed_at)),
            shortened(one.flow_name),
        )
    print_table(new_console(), table)
    if page.total_count > len(page.runs):
        first, last = skip + 1, skip + len(page.runs)
        shown = f"{first:,} to {last:,}" if after is None else f"{len(page.runs):,}"
        say(f"{shown} of {page.total_count:,}")
        if len(page.runs) == take:
            say(f"next: --after {onward}")


async def _page(
    url: str | None,
    flow_id: UUID | None,
    wanted: RunStatus | None,
    after: RunPosition | None,
    skip: int,
    take: int,
    search: str | None,
    *,
    migrate: bool,
) -> RunPage:
    async with existing_store(url, migrate=migrate) as store:
        return await store.get_runs_page(
            flow_id, status=wanted, after=after, skip=skip, take=take, search=search
        )


@app.command()
def show(
    run_id: RunId,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """Show a run, its steps and its last events.

    \b
      flowstore runs show 01970c2e-7a86-7d3b-9a55-0c1d8a3f5b20
      flowstore runs show RUN_ID --json | jq '.outputs'

    JSON: run (with steps and their attempts), control, claims, dispatches, waiters, outputs, events
    (the last 1,000); null where the backend does not offer it.
    """
    document = run(_show(url, run_id, migrate=not no_migrate))
    if as_json:
        print_json(document)
    else:
        _print_run(new_console(), document)


async def _show(url: str | None, run_id: UUID, *, migrate: bool) -> dict[str, Any]:
    async with existing_store(url, migrate=migrate) as store:
        detail = await store.get_run_detail(run_id)
        if detail is None:
            raise RunNotFoundError(run_id)
        offered = store.capabilities
        return {
            "run": detail,
            "control": await store.get_run_control(run_id),
            "claims": await store.get_step_claims(run_id),
            "dispatches": await store.get_dispatches(run_id),
            "waiters": await store.get_waiters(run_id) if Capability.WAITERS in offered else None,
            "outputs": await store.get_outputs(run_id) if Capability.OUTPUTS in offered else None,
            "events": await _last_events(store, run_id) if Capability.EVENTS in offered else None,
        }


async def _last_events(store: FlowStore, run_id: UUID) -> list[Any]:
    last: list[Any] = []
    while events := await store.get_run_events(run_id, after=last[-1].sequence if last else 0, take=1000):
        last = [*last, *events][-1000:]
    return last


def _print_run(console: Console, document: dict[str, Any]) -> None:
    one: FlowRunDetail = document["run"]
    control = document["control"]
    facts = [
        ("run", cell(one.run_id)),
        ("flow", cell(f"{one.flow_name} ({one.flow_id})")),
        ("status", status(one.status)),
        ("trigger", cell(one.trigger_key)),
        ("started", cell(f"{moment(one.started_at)} UTC, took {between(one.started_at, one.completed_at)}")),
    ]
    if one.source_run_id:
        facts.append(("derived from", cell(one.source_run_id)))
    if control and control.cancel_requested:
        facts.append(("cancel", cell(control.cancel_reason or "requested")))
    if control and control.timeout_at:
        facts.append(("deadline", cell(f"{moment(control.timeout_at)} UTC")))
    print_form(console, facts)
    if one.steps:
        console.print()
        _print_steps(console, one)
    for waiter in document["waiters"] or ():
        if waiter.delivered_at is None and waiter.expired_at is None:
            text = f"step {waiter.step_key!r} waits for signal {waiter.signal_name!r}"
            console.print(cell(text, "yellow"), overflow="fold")
    if events := (document["events"] or [])[-10:]:
        console.print()
        table = new_table("EVENT", "AT (UTC)", "STEP", "MESSAGE", short=("STEP", "MESSAGE"))
        for event in events:
            table.add_row(
                cell(event.event_type),
                cell(f"{event.timestamp.astimezone(UTC):%H:%M:%S}"),
                shortened(event.step_key),
                shortened(event.message),
            )
        print_table(console, table)


def _print_steps(console: Console, one: FlowRunDetail) -> None:
    columns = ("STEP", "STATUS", "TRY", "STARTED", "TOOK", "BY")
    table = new_table(*columns, right=("TRY", "TOOK"), short=("STEP", "BY"))
    errors: list[str] = []
    for step in one.steps:
        table.add_row(shortened(step.step_key), *_times(step, str(step.attempt_count)))
        for attempt in step.attempts:
            if len(step.attempts) > 1:
                table.add_row(cell(f"  attempt {attempt.attempt}", "dim"), *_times(attempt, "", "dim"))
            if attempt.error_message:
                errors.append(f"{step.step_key}, attempt {attempt.attempt}: {attempt.error_message}")
    print_table(console, table)
    for error in errors:
        console.print(cell(error, "red"), overflow="fold")


def _times(one: FlowStepRecord | FlowStepAttemptRecord, attempts: str, style: str = "") -> tuple[Text, ...]:
    return (
        status(one.status),
        cell(attempts),
        cell(f"{one.started_at.astimezone(UTC):%H:%M:%S}", style),
        cell(between(one.started_at, one.completed_at), style),
        shortened(one.job_id, style),
    )


@app.command()
def retry(
    run_id: RunId,
    step_key: StepKey,
    attempt: Annotated[
        int | None,
        typer.Option(min=1, help="The last attempt as you know it; refused if another came meanwhile."),
    ] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="A skipped step to make unstarted again; repeatable."),
    ] = None,
    reset_skipped: Annotated[
        bool, typer.Option("--reset-skipped", help="Make every skipped step unstarted again.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """Reopen a step, and its run, for one more attempt.

    An engine that works on this store then goes on with it. A cancel or an elapsed deadline of a run
    that was over is cleared.

    \b
      flowstore runs retry RUN_ID charge-card
      flowstore runs retry RUN_ID charge-card --attempt 3 --reset-skipped

    JSON: run_id, step_key, status, attempt_count, run_status.
    """
    answer = run(_retry(url, run_id, step_key, attempt, reset or [], reset_skipped, migrate=not no_migrate))
    if as_json:
        print_json(answer)
    else:
        say(
            f"step {step_key!r} is {answer['status']}, attempt {answer['attempt_count']} is to come; "
            f"run {run_id} is {answer['run_status']}"
        )


async def _retry(
    url: str | None,
    run_id: UUID,
    step_key: str,
    attempt: int | None,
    reset: list[str],
    reset_skipped: bool,
    *,
    migrate: bool,
) -> dict[str, Any]:
    async with existing_store(url, migrate=migrate) as store:
        if reset_skipped:
            statuses = await store.get_step_statuses(run_id)
            reset = [*reset, *(key for key, value in statuses.items() if value is StepStatus.SKIPPED)]
        await store.retry_step(run_id, step_key, attempt=attempt, reset=reset)
        detail = await store.get_run_detail(run_id)
        for step in detail.steps if detail else ():
            if detail and step.step_key == step_key:
                return {
                    "run_id": run_id,
                    "step_key": step_key,
                    "status": step.status,
                    "attempt_count": step.attempt_count,
                    "run_status": detail.status,
                }
        raise StepNotFoundError(run_id, step_key)


@app.command()
def cancel(
    run_id: RunId,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Kept with the run.")] = None,
    url: Url = None,
    as_json: AsJson = False,
    no_migrate: NoMigrate = False,
) -> None:
    """Ask for a run to be cancelled.

    The engine that works on it stops it and completes it as Cancelled. Exit code 1 if the run is over
    already.

    \b
      flowstore runs cancel RUN_ID --reason "wrong input"

    JSON: requested (whether by this call), and the run's control record (cancel_reason,
    cancel_requested_at, ...) under control.
    """
    requested, control = run(_cancel(url, run_id, reason, migrate=not no_migrate))
    if as_json:
        print_json({"requested": requested, "control": plain(control)})
    elif requested:
        say(f"cancel requested for run {run_id}")
    else:
        why = f": {control.cancel_reason}" if control.cancel_reason else ""
        say(f"the cancel of run {run_id} had been requested before{why}")


async def _cancel(url: str | None, run_id: UUID, reason: str | None, *, migrate: bool) -> tuple[bool, Any]:
    async with existing_store(url, migrate=migrate) as store:
        state = await store.get_run_status(run_id)
        if state is None:
            raise RunNotFoundError(run_id)
        if state.is_terminal:
            raise Failure(f"run {run_id} is {state} already; there is nothing to cancel")
        requested = await store.request_cancel(run_id, reason)
        return requested, await store.get_run_control(run_id)
