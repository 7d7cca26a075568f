"""``flowstore doctor``: the problems of a store, their meaning and their remedies."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from flowstore_cli.durations import before, parse_duration
from flowstore_cli.failures import NO, USAGE, Failure, explain_unavailable
from flowstore_cli.printing import cell, clean, new_console, print_form, print_json, say
from flowstore_cli.stores import (
    AsJson,
    Url,
    existing_store,
    run,
    whereabouts,
    with_url,
)
from flowstore_cli.words import in_words
from flowstore_core import FlowStoreError, StoreUnavailableError
from flowstore_core.backend import Fixable
from flowstore_core.diagnostics import SEVERITIES, Diagnostic, Severity
from flowstore_core.inspection.diagnosis import diagnose_backend, diagnose_schema, worst_first
from flowstore_core.inspection.stalled_work import Examination, examine
from flowstore_core.inspection.wording import count
from flowstore_core.open import resolve_store

STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.NOTE: "bold cyan"}


@dataclass(slots=True)
class Report:
    """The result of one examination."""

    backend: str
    store: str
    findings: list[Diagnostic] = field(default_factory=list)
    running: int = 0
    examined: int = 0
    is_open: bool = False
    """Whether the store was opened, so that its runs were examined too."""

    @property
    def is_well(self) -> bool:
        return all(finding.severity is Severity.NOTE for finding in self.findings)


def doctor(
    place: Annotated[
        str | None, typer.Argument(metavar="URL", help="The store, as with --url.", show_default=False)
    ] = None,
    url: Url = None,
    fix: Annotated[bool, typer.Option("--fix", help="Apply the safe fixes, after asking.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With --fix: do not ask.")] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="Check every page and row, however long that takes.")
    ] = False,
    grace: Annotated[
        str, typer.Option(metavar="AGE", help="How long work may stall before it is reported.")
    ] = "5m",
    limit: Annotated[
        int,
        typer.Option(
            "--runs", min=1, max=100_000, help="Number of Running runs to examine, the oldest first."
        ),
    ] = 1000,
    as_json: AsJson = False,
) -> None:
    """Diagnose a store: each problem, its meaning and its remedy.

    Finds stalled work (expired leases, lost dispatches, queues with too few workers or none, runs with
    nothing in flight or past their deadline), rows that belong to no run, counters that differ from the
    runs, settings of the server or the file that can lose data, clocks that differ, and a schema of another
    version. It changes nothing, and takes a few seconds however large the store is.

    With --fix it deletes the rows that belong to no run, corrects the counters and sets the mode of SQLite
    files to 0600, then checks again. It never changes a run or the settings of a server.

    \b
      flowstore doctor
      flowstore doctor postgresql://user@host/db --grace 15m
      flowstore doctor sqlite:///flows.db --thorough
      flowstore doctor --fix --yes --json

    \b
    Exit codes of this command:
    0  no findings, or notes only
    1  there are warnings or errors
    2  the checks could not run: wrong usage, no store, or one that is unavailable
       (for which other commands exit with 3)

    JSON: store, backend, findings (a list of objects with code, severity, summary, meaning, remedy, count,
    examples, fix, blocks), fixed (the actions of --fix), running_runs, examined_runs, opened.
    """
    if place is not None and url is not None:
        raise Failure("the store is given twice; use either the argument or --url", USAGE)
    url = url if place is None else place
    length = parse_duration(grace, "--grace")
    before(datetime.now(UTC), length, "--grace")
    if yes and not fix:
        raise Failure("--yes requires --fix", USAGE)
    report = _examine(url, thorough, length, limit)
    fixed: Sequence[str] = ()
    wanted = [finding for finding in report.findings if finding.fix is not None]
    if fix and wanted and (yes or _agrees(wanted, as_json)):
        fixed = _run(_fix(url, wanted))
        report = _examine(url, thorough, length, limit)
    if as_json:
        print_json(_document(report, fixed))
    else:
        _print(report, fixed, url, fix=fix)
    if not report.is_well:
        raise typer.Exit(NO)


def _run(work: Any) -> Any:
    try:
        return run(work)
    except StoreUnavailableError as error:
        raise Failure(explain_unavailable(error), USAGE) from error
    except FlowStoreError as error:
        raise Failure(in_words(error), USAGE) from error


def _examine(url: str | None, thorough: bool, grace: timedelta, limit: int) -> Report:
    report: Report = _run(_diagnose(url, thorough, grace, limit))
    report.findings = worst_first(report.findings)
    return report


async def _diagnose(url: str | None, thorough: bool, grace: timedelta, limit: int) -> Report:
    plugin, backend, config = resolve_store(url, migrate=False)
    report = Report(backend.name, whereabouts(config))
    # Before opening the store, which would change its files.
    report.findings += await diagnose_backend(plugin, backend, config, thorough=thorough)
    if any(finding.prevents_open for finding in report.findings):
        return report
    try:
        outdated = await diagnose_schema(plugin, backend, config)
        report.findings += outdated
        if any(finding.prevents_open for finding in outdated):
            return report
        async with existing_store(url) as store:
            found: Examination = await examine(store, grace=grace, limit=limit)
    except FlowStoreError:
        if report.is_well:
            raise
        # The findings so far may explain the error.
        return report
    report.findings += found.findings
    report.running, report.examined, report.is_open = found.running, found.examined, True
    return report


async def _fix(url: str | None, findings: Sequence[Diagnostic]) -> Sequence[str]:
    _, backend, config = resolve_store(url, migrate=False)
    return await backend.fix(config, findings) if isinstance(backend, Fixable) else ()


def _agrees(wanted: Sequence[Diagnostic], as_json: bool) -> bool:
    if as_json or not sys.stdin.isatty():
        raise Failure("--fix asks for confirmation, which needs a terminal; use --yes to skip it", USAGE)
    for finding in wanted:
        sys.stderr.write(f"will {clean(finding.fix or '')}\n")
    return typer.confirm("go on?", err=True)


def _document(report: Report, fixed: Sequence[str]) -> dict[str, Any]:
    return {
        "store": report.store,
        "backend": report.backend,
        "findings": report.findings,
        "fixed": fixed,
        "running_runs": report.running,
        "examined_runs": report.examined,
        "opened": report.is_open,
    }


def _print(report: Report, fixed: Sequence[str], url: str | None, *, fix: bool) -> None:
    console = new_console()
    for line in fixed:
        say(f"fixed: {line}")
    if fixed:
        say("")
    for finding in report.findings:
        title = cell(f"{finding.severity.value.upper():<8}", STYLES[finding.severity])
        console.print(title.append_text(cell(f" {finding.summary}", "bold")), soft_wrap=True)
        facts = [("  means", cell(finding.meaning))]
        if finding.examples:
            facts.append(("  as", cell(", ".join(finding.examples))))
        print_form(console, facts)
        # On one line, so that a command can be copied.
        console.print(
            cell("  do     ", "dim").append_text(cell(_complete(finding.remedy, url))), soft_wrap=True
        )
        console.print(cell(f"  code   {finding.code}", "dim"))
        console.print()
    _print_sum(report, url, fix=fix)


def _complete(remedy: str, url: str | None) -> str:
    """A remedy; if it ends with a flowstore command, that command gets the user's URL."""
    return with_url(remedy, url) if re.search("(^|: )flowstore ", remedy) else remedy


def _print_sum(report: Report, url: str | None, *, fix: bool) -> None:
    numbers = [
        count(number, severity.value)
        for severity in reversed(SEVERITIES)
        if (number := sum(finding.severity is severity for finding in report.findings))
    ]
    say(f"{', '.join(numbers) if numbers else 'no findings'}: {report.store}")
    if not report.is_open:
        say("the store was not opened, so its runs were not examined")
    elif report.examined < report.running:
        say(f"examined the oldest {report.examined:,} of {report.running:,} Running runs (--runs)")
    if not fix and any(finding.fix for finding in report.findings):
        say(_complete("some findings can be fixed: flowstore doctor --fix", url))
