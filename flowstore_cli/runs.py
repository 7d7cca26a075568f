"""``flowstore runs``: list, show, tag, retry, cancel and delete runs."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.console import Console
from rich.text import Text

from flowstore_cli.dashboard import missing_extra
from flowstore_cli.failures import UNWRITTEN, USAGE, Failure
from flowstore_cli.printing import (
    Listing,
    between,
    cell,
    clean,
    excerpt,
    moment,
    new_console,
    new_table,
    on_terminal,
    plain,
    print_form,
    print_json,
    print_table,
    remark,
    say,
    short_ids,
    since,
    status,
    unfolded,
)
from flowstore_cli.references import Flow, Run, RunId, Runs, Status, Tags, find_flow, find_run, parse_tags
from flowstore_cli.stores import AsJson, Url, existing_store, new_group, run
from flowstore_cli.words import in_words, suggestion
from flowstore_core import (
    Capability,
    FlowEventRecord,
    FlowRunDetail,
    FlowRunRecord,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunNotCompletedError,
    RunNotFoundError,
    RunPage,
    RunPosition,
    RunStatus,
    StepNotFoundError,
    StepStatus,
)
from flowstore_core.inspection.events import last_events
from flowstore_core.inspection.retries import queue_request
from flowstore_core.inspection.wording import count, span
from flowstore_core.open import resolve_store
from flowstore_core.urls import redact

EVENTS = 1000
"""Maximum number of events in --json and --full."""
EVENTS_SHOWN = 10

app = new_group("List, show, follow, retry, cancel, delete, export and import runs, and wait for them.")
app = new_group("List, show, follow, tag, retry, cancel and delete runs, and wait for them.")

StepKey = Annotated[str, typer.Argument(metavar="STEP", help="The step's key.", show_default=False)]


@app.command("list")
def list_runs(
    flow: Flow = None,
    wanted: Status = None,
    tags: Tags = None,
    search: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Text in ids, names, step keys, errors or outputs."),
    ] = None,
    take: Annotated[
        int, typer.Option("--take", "-n", metavar="N", min=0, max=1000, help="Maximum number of runs.")
    ] = 20,
    skip: Annotated[int, typer.Option(metavar="N", min=0, help="Number of runs to skip.")] = 0,
    after: Annotated[
        str | None,
        typer.Option(metavar="POSITION", help="Continue after the page that printed this position."),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List runs, the newest first.

    On a terminal the list shows the last 8 digits of each id, which other commands accept. In a pipe,
    rows are complete: whole ids, flow ids, and times in UTC.

    \b
      flowstore runs list
      flowstore runs list --status failed --search timeout
      flowstore runs list --tag customer=acme --tag env=live
      flowstore runs list --flow orders --json | jq -r '.runs[].run_id'
      flowstore runs list --after POSITION

    JSON: total_count, runs (a list of objects with run_id, flow_id, flow_name, status, trigger_key,
    trigger_data, job_id, started_at, completed_at, source_run_id, tags), after (the --after of the
    next page, null if this page is empty).
    """
    position = None if after is None else RunPosition.parse(after)
    page = run(_page(url, flow, wanted, position, skip, take, search, parse_tags(tags or ())))
    onward = str(page.runs[-1].position) if page.runs else None
    if as_json:
        print_json({"total_count": page.total_count, "runs": page.runs, "after": onward})
        return
    if page.runs:
        _print_runs(page.runs)
    if not page.total_count:
        remark("no runs")
    elif not page.runs:
        start = f"from number {skip + 1:,} on" if skip else "there"
        remark(f"no runs {start}; there are {page.total_count:,}" if take else f"{page.total_count:,} runs")
    elif page.total_count > len(page.runs):
        first, last = skip + 1, skip + len(page.runs)
        shown = f"{first:,} to {last:,}" if after is None else f"{len(page.runs):,}"
        remark(f"{shown} of {page.total_count:,}")
        if len(page.runs) == take:
            remark(f"next: --after {onward}")


def _print_runs(runs: Sequence[FlowRunRecord]) -> None:
    now = datetime.now(UTC)
    ids = short_ids([one.run_id for one in runs])
    flows = {(one.flow_id, one.flow_name) for one in runs}
    with_flow_id = not on_terminal() or len(flows) > len({name for _, name in flows})
    columns = ("RUN", "STATUS", "STARTED", "TOOK", "FLOW", *(["FLOW ID"] if with_flow_id else []))
    spare = [name for name in ("TOOK", "STARTED", "FLOW ID") if name in columns]
    table = new_table(*columns, right=("TOOK",), short=("FLOW",), spare=spare)
    for one in runs:
        table.add_row(
            cell(ids[one.run_id]),
            status(one.status),
            cell(since(one.started_at, now)),
            cell(between(one.started_at, one.completed_at)),
            cell(one.flow_name),
            *([cell(one.flow_id)] if with_flow_id else []),
        )
    print_table(new_console(), table)


async def _page(
    url: str | None,
    flow: str | None,
    wanted: RunStatus | None,
    after: RunPosition | None,
    skip: int,
    take: int,
    search: str | None,
    tags: Mapping[str, str],
) -> RunPage:
    async with existing_store(url) as store:
        flow_id = None if flow is None else await find_flow(store, flow)
        return await store.get_runs_page(
            flow_id, status=wanted, after=after, skip=skip, take=take, search=search, tags=tags
        )


@app.command()
def show(
    reference: Run,
    full: Annotated[
        bool, typer.Option("--full", help="Show whole texts, every attempt, and the last 1,000 events.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the run's page to this file; needs the extra dashboard.",
        ),
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show a run: its tags, input, steps, outputs, errors and last events.

    On a terminal long texts are shortened to their first 200 characters. A file of --html contains all that
    the page needs, for example for a bug report; it holds the run's inputs, outputs and errors.

    \b
      flowstore runs show 1d8a3f5b
      flowstore runs show 1d8a3f5b --full | less
      flowstore runs show 1d8a3f5b --html run.html
      flowstore runs show 1d8a3f5b --json | jq .outputs

    JSON: run (with steps and their attempts), control, claims, dispatches, waiters, buffered_signals,
    outputs, events (the last 1,000); null if the backend lacks the capability.
    """
    if html is not None:
        _write_html(html, url, reference, as_json=as_json)
        return
    most = EVENTS if as_json or full else EVENTS_SHOWN
    document = run(_show(url, reference, most))
    if as_json:
        print_json(document)
    else:
        _print_run(new_console(), document, full=full)


def _write_html(file: Path, url: str | None, reference: RunId, *, as_json: bool) -> None:
    if as_json:
        raise Failure("--html and --json cannot be combined", USAGE)
    text = run(_export(url, reference))
    try:
        # Readable by its owner alone, as the store may be.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(text)
    except OSError as error:
        raise Failure(f"{file} cannot be written: {error.strerror}", UNWRITTEN) from error
    say(f"wrote {file}")


async def _export(url: str | None, reference: RunId) -> str:
    try:
        from flowstore_dashboard.export import export_run
    except ModuleNotFoundError as error:
        raise missing_extra(error) from error
    _, _, config = resolve_store(url, migrate=False)
    async with existing_store(url) as store:
        return await export_run(store, await find_run(store, reference), redact(config.url))


async def _show(url: str | None, reference: RunId, most: int) -> dict[str, Any]:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
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
            "buffered_signals": await store.get_buffered_signals(run_id)
            if Capability.MAILBOX in offered
            else None,
            "outputs": await store.get_outputs(run_id) if Capability.OUTPUTS in offered else None,
            "events": await last_events(store, run_id, most) if Capability.EVENTS in offered else None,
        }


def _print_run(console: Console, document: dict[str, Any], *, full: bool) -> None:
    one: FlowRunDetail = document["run"]
    control = document["control"]
    facts = [
        ("run", unfolded(one.run_id)),
        ("flow", cell(one.flow_name)),
        ("flow id", unfolded(one.flow_id)),
        ("status", status(one.status)),
        ("trigger", cell(one.trigger_key)),
        ("started", cell(f"{moment(one.started_at)} UTC, {_took(one)}")),
    ]
    if one.tags:
        facts.append(("tags", cell(", ".join(f"{key}={value}" for key, value in one.tags))))
    if one.trigger_data is not None:
        facts.append(("input", excerpt(one.trigger_data, full=full)))
    if one.job_id is not None:
        facts.append(("job", cell(one.job_id)))
    if one.source_run_id:
        facts.append(("derived from", unfolded(one.source_run_id)))
    if control and control.cancel_requested:
        facts.append(("cancel", cell(control.cancel_reason or "requested")))
    if control and control.timeout_at:
        facts.append(("deadline", cell(f"{moment(control.timeout_at)} UTC")))
    print_form(console, facts)
    if one.steps:
        console.print()
        print_table(console, steps_table(one))
    for step in one.steps:
        if texts := _texts(step, full=full):
            console.print()
            console.print(cell(step.step_key, "bold"), soft_wrap=True)
            print_form(console, texts)
    steps = {step.step_key: step.output_json for step in one.steps}
    outputs = [
        (f"  {clean(key)}", excerpt(value, full=full))
        for key, value in (document["outputs"] or {}).items()
        if steps.get(key) != value
    ]
    if outputs:
        console.print()
        console.print(cell("outputs", "bold"))
        print_form(console, outputs)
    for waiter in document["waiters"] or ():
        if waiter.delivered_at is None and waiter.expired_at is None:
            name = shlex.quote(waiter.signal_name)
            text = f"step {waiter.step_key!r} waits for signal {waiter.signal_name!r}; deliver it with:"
            console.print()
            console.print(cell(text, "yellow"), overflow="fold")
            console.print(cell(f"  flowstore signal deliver {one.run_id} {name} PAYLOAD"), soft_wrap=True)
    if signals := document["buffered_signals"]:
        console.print()
        console.print(cell("buffered signals", "bold"))
        print_form(
            console,
            [(f"  {clean(one.signal_name)}", excerpt(one.payload_json, full=full)) for one in signals],
        )
    if document["events"]:
        console.print()
        _print_events(console, one, document["events"])


def _took(one: FlowRunRecord) -> str:
    if one.completed_at is None:
        return "not completed"
    if one.completed_at < one.started_at:
        early = span((one.started_at - one.completed_at) / timedelta(seconds=1))
        return f"completed {early} before its start: two clocks differ"
    return f"took {between(one.started_at, one.completed_at)}"


def _texts(step: FlowStepRecord, *, full: bool) -> list[tuple[str, Text]]:
    """Print the input, output and errors of a step; of every attempt if ``full``."""
    several = len(step.attempts) > 1
    texts: list[tuple[str, str | None, str]] = []
    if not (full and several):
        texts += [("input", step.input_json, ""), ("output", step.output_json, "")]
    for attempt in step.attempts:
        which = f" {attempt.attempt}" if several else ""
        if full and several:
            texts += [(f"input{which}", attempt.input_json, ""), (f"output{which}", attempt.output_json, "")]
        texts.append((f"error{which}", attempt.error_message, "red"))
    return [
        (f"  {name}", excerpt(text, full=full, style=style))
        for name, text, style in texts
        if text is not None
    ]


def _print_events(console: Console, one: FlowRunDetail, events: Sequence[FlowEventRecord]) -> None:
    columns = ("NO", "AT (UTC)", "EVENT", "STEP", "MESSAGE")
    short = ("EVENT", "STEP", "MESSAGE")
    table = new_table(*columns, right=("NO",), short=short, spare=("AT (UTC)", "NO"))
    for event in events:
        table.add_row(
            cell(event.sequence),
            cell(_clock(event.timestamp, one.started_at)),
            cell(event.event_type),
            cell(event.step_key),
            cell(event.message),
        )
    print_table(console, table)


def steps_table(one: FlowRunDetail, steps: Sequence[FlowStepRecord] | None = None) -> Listing:
    """The steps of a run (None: all) and, where there are several, their attempts."""
    columns = ("STEP", "STATUS", "TRY", "STARTED", "TOOK", "BY")
    right = ("TRY", "TOOK")
    table = new_table(*columns, right=right, short=("STEP", "BY"), spare=("BY", "STARTED", "TRY", "TOOK"))
    for step in one.steps if steps is None else steps:
        table.add_row(cell(step.step_key), *_times(step, str(step.attempt_count), one.started_at))
        if len(step.attempts) > 1:
            for attempt in step.attempts:
                name = cell(f"  attempt {attempt.attempt}", "dim")
                table.add_row(name, *_times(attempt, "", one.started_at, "dim"))
    return table


def _times(
    one: FlowStepRecord | FlowStepAttemptRecord, attempts: str, start: datetime, style: str = ""
) -> tuple[Text, ...]:
    return (
        status(one.status),
        cell(attempts),
        cell(_clock(one.started_at, start), style),
        cell(between(one.started_at, one.completed_at), style),
        cell(one.job_id, style),
    )


def _clock(value: datetime, start: datetime) -> str:
    """A time in UTC: without the date on the day on which the run started."""
    value = value.astimezone(UTC)
    if not on_terminal():
        return f"{value:%Y-%m-%dT%H:%M:%SZ}"
    return f"{value:%H:%M:%S}" if value.date() == start.astimezone(UTC).date() else f"{value:%m-%d %H:%M:%S}"


@app.command("tag")
def tag_run(
    reference: Run,
    tags: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Tags to set.", show_default=False)
    ] = None,
    remove: Annotated[
        list[str] | None, typer.Option(metavar="KEY", help="A tag to remove; repeatable.")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Set and remove tags of a run, all at once; its other tags stay.

    The key of a tag ends at the first "=".

    \b
      flowstore runs tag RUN customer=acme env=live
      flowstore runs tag RUN env=test --remove customer

    JSON: run_id, tags (all tags of the run).
    """
    changes: dict[str, str | None] = {**parse_tags(tags or ())}
    if both := changes.keys() & set(remove or ()):
        raise Failure(f"tag {min(both)!r} cannot be both set and removed", USAGE)
    changes |= dict.fromkeys(remove or ())
    if not changes:
        raise Failure("give tags to set, as KEY=VALUE, or to remove, with --remove", USAGE)
    one = run(_tag(url, reference, changes))
    if as_json:
        print_json({"run_id": one.run_id, "tags": dict(one.tags)})
    else:
        tagged = ", ".join(f"{key}={value}" for key, value in one.tags)
        say(f"run {one.run_id} has the tags {tagged}" if tagged else f"run {one.run_id} has no tags")


async def _tag(url: str | None, reference: RunId, changes: Mapping[str, str | None]) -> FlowRunRecord:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        await store.set_tags(run_id, changes)
        if (one := await store.get_run(run_id)) is None:
            raise RunNotFoundError(run_id)
        return one


@app.command()
def retry(
    reference: Run,
    step_key: StepKey,
    attempt: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="The expected last attempt; refused if there is a newer one."),
    ] = None,
    reset: Annotated[
        list[str] | None,
        typer.Option(metavar="STEP", help="A skipped step to reset to unstarted; repeatable."),
    ] = None,
    reset_skipped: Annotated[
        bool, typer.Option("--reset-skipped", help="Reset every skipped step to unstarted.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Reopen a step, and its run, for one more attempt.

    The engine of this store then continues the run; a step that came from a queue of the store is put back
    into it. A cancel or an elapsed deadline of a completed run is cleared.

    \b
      flowstore runs retry RUN charge-card
      flowstore runs retry RUN charge-card --attempt 3 --reset-skipped

    JSON: run_id, step_key, status, attempt_count, run_status.
    """
    answer = run(_retry(url, reference, step_key, attempt, reset or [], reset_skipped))
    if as_json:
        print_json(answer)
    else:
        say(
            f"step {step_key!r} is {answer['status']}, the next attempt is {answer['attempt_count']}; "
            f"run {answer['run_id']} is {answer['run_status']}"
        )


async def _retry(
    url: str | None,
    reference: RunId,
    step_key: str,
    attempt: int | None,
    reset: list[str],
    reset_skipped: bool,
) -> dict[str, Any]:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        if reset_skipped:
            statuses = await store.get_step_statuses(run_id)
            reset = [*reset, *(key for key, value in statuses.items() if value is StepStatus.SKIPPED)]
        dispatch = await queue_request(store, run_id, step_key)
        try:
            await store.retry_step(run_id, step_key, attempt=attempt, reset=reset, dispatch=dispatch)
        except StepNotFoundError as error:
            close = suggestion(step_key, await store.get_step_statuses(run_id))
            raise Failure(f"{in_words(error)}{close}") from error
        step = await store.get_step(run_id, step_key)
        if step is None:
            raise StepNotFoundError(run_id, step_key)
        return {
            "run_id": run_id,
            "step_key": step_key,
            "status": step.status,
            "attempt_count": step.attempt_count,
            "run_status": await store.get_run_status(run_id),
        }


@app.command()
def cancel(
    reference: Run,
    reason: Annotated[str | None, typer.Option(metavar="TEXT", help="Stored with the run.")] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Request the cancellation of a run.

    The engine stops the run and completes it as Cancelled. Exit code 1 if the run is already completed.

    \b
      flowstore runs cancel RUN --reason "wrong input"

    JSON: requested (True if this call requested it), and the run's control record (cancel_reason,
    cancel_requested_at, ...) under control.
    """
    run_id, requested, control = run(_cancel(url, reference, reason))
    if as_json:
        print_json({"requested": requested, "control": plain(control)})
    elif requested:
        say(f"cancel requested for run {run_id}")
    else:
        why = f": {control.cancel_reason}" if control.cancel_reason else ""
        say(f"the cancel of run {run_id} was already requested{why}")


async def _cancel(url: str | None, reference: RunId, reason: str | None) -> tuple[UUID, bool, Any]:
    async with existing_store(url) as store:
        run_id = await find_run(store, reference)
        state = await store.get_run_status(run_id)
        if state is None:
            raise RunNotFoundError(run_id)
        if state.is_terminal:
            raise Failure(f"run {run_id} is {state} already; there is nothing to cancel")
        requested = await store.request_cancel(run_id, reason)
        return run_id, requested, await store.get_run_control(run_id)


@app.command()
def delete(
    references: Runs,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Delete completed runs, with everything that belongs to them.

    Unlike cleanup it deletes runs of any age. It asks first, and deletes nothing if one of the runs is
    missing or Running. Runs that were derived from a deleted one stay.

    \b
      flowstore runs delete RUN
      flowstore runs delete RUN RUN --yes

    JSON: deleted (the ids of the deleted runs).
    """
    deleted = run(_delete(url, references, yes=yes, as_json=as_json))
    if as_json:
        print_json({"deleted": deleted})
    else:
        say(f"deleted {count(len(deleted), 'run')}")


async def _delete(url: str | None, references: Sequence[RunId], *, yes: bool, as_json: bool) -> list[UUID]:
    if not yes and (as_json or not sys.stdin.isatty()):
        raise Failure("delete asks for confirmation, which needs a terminal; use --yes to skip it", USAGE)
    async with existing_store(url) as store:
        found: dict[UUID, FlowRunRecord] = {}
        for reference in references:
            run_id = await find_run(store, reference)
            if (one := await store.get_run(run_id)) is None:
                raise RunNotFoundError(run_id)
            if one.status is RunStatus.RUNNING:
                raise RunNotCompletedError(run_id)
            found[run_id] = one
        if not yes:
            for one in found.values():
                line = f"{one.run_id}  {one.status:<9}  {moment(one.started_at)} UTC  {one.flow_name}"
                sys.stderr.write(f"will delete {clean(line)}\n")
            if not typer.confirm("go on?", err=True):
                return []
        return [run_id for run_id in found if await store.delete_run(run_id)]
