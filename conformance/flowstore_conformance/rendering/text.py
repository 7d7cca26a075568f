"""The report as text: for a terminal, a log, and the message of a failed test."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from flowstore_conformance.causes import Cause
from flowstore_conformance.clauses import CLAUSES, Level
from flowstore_conformance.linearizability import Answer
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.phrasing import legible
from flowstore_conformance.rendering.timeline import lay_out, text_legend, text_timeline
from flowstore_conformance.report import Report, anchor
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status

MAX_OTHERS = 8
"""Number of failures of one cause that get a line each; further failures are only named."""

COLOURS = {
    Status.PASS: "32",
    Status.FAIL: "1;31",
    Status.WAIVED: "33",
    Status.INCONCLUSIVE: "35",
    Status.UNSUPPORTED: "2",
    Status.NOT_RUN: "2",
}


class Paint:
    """Applies ANSI colours if they are enabled."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted

    def __call__(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._wanted and code else text

    def status(self, status: Status, text: str = "") -> str:
        return self(text or status.value, COLOURS[status])


def render_text(report: Report, *, width: int = 100, colour: bool = False, unicode: bool = True) -> str:
    """The complete report: clauses, waivers, failures by cause, and the verdict last."""
    paint = Paint(colour)
    lines = [*_table(report, width, paint), *_waivers(report)]
    for number, cause in enumerate(report.causes, 1):
        lines += ["", *_cause(report, cause, number, width=width, paint=paint, unicode=unicode)]
    lines += ["", *_verdict(report, width, paint)]
    text = "\n".join(lines) + "\n"
    return text if unicode else text.encode("ascii", "backslashreplace").decode()


def _table(report: Report, width: int, paint: Paint) -> Iterator[str]:
    yield paint(f"{'CLAUSE':7} {'STATUS':12} {'TIMES':>9}  PROMISE", "1")
    for one in report.shown_clauses:
        status = paint.status(one.status, f"{one.status.value:12}")
        times = f"{one.assertions:,}" if one.assertions else "-"
        text = one.clause.sentence
        if one.reason and one.status in (Status.INCONCLUSIVE, Status.UNSUPPORTED, Status.NOT_RUN):
            text = legible(f"{text} ({one.reason})")
        if one.gap:
            text = legible(f"{text} (partly UNSUPPORTED: {one.gap})")
        room = max(width - 32, 30)
        first, *rest = textwrap.wrap(text, room)
        yield f"{one.clause.id:7} {status} {times:>9}  {first}"
        yield from (f"{'':32}{line}" for line in rest)
    if report.hidden_note:
        yield paint(report.hidden_note, COLOURS[Status.NOT_RUN])


def _cause(
    report: Report, cause: Cause, number: int, *, width: int, paint: Paint, unicode: bool
) -> Iterator[str]:
    """One probable cause: the simplest failure, and a line for each other affected check."""
    affected = f", {len(cause.results)} checks" if len(cause.results) > 1 else ""
    title = f"CAUSE {number} of {len(report.causes)}{affected}: {legible(cause.title)}"
    yield from (paint(line, "1") for line in textwrap.wrap(title, width, subsequent_indent="  "))
    if cause.finding is not None:
        yield from finding_lines(cause.finding)
    if cause.lead is not None:
        yield from failure_lines(report, cause.lead, width=width, paint=paint, unicode=unicode)
    if cause.others:
        yield "  not run because of it:" if cause.lead is None else "  also fail because of it:"
    for other in cause.others[:MAX_OTHERS]:
        message = other.failure.message if other.failure is not None else other.check.sentence
        line = f"    {other.check.id}: {' '.join(legible(message).split())}"
        yield line if len(line) <= width else f"{line[: width - 3]}..."
    if len(cause.others) > MAX_OTHERS:
        names = ", ".join(one.check.id for one in cause.others[MAX_OTHERS:])
        more = f"    and {len(cause.others) - MAX_OTHERS} more: {names}"
        yield from textwrap.wrap(more, width, subsequent_indent="      ", break_on_hyphens=False)


def finding_lines(finding: SignatureFinding) -> Iterator[str]:
    """A method that core cannot call, and the fix."""
    yield f"  method    {finding.noun}.{finding.method}"
    yield f"  found     {legible(finding.problem)}"
    if finding.place is not None:
        yield f"  defined   {legible(finding.place)}"
    yield f"  remedy    define it as {legible(finding.remedy)}"


def _waivers(report: Report) -> Iterator[str]:
    if report.waivers:
        yield ""
        yield "WAIVERS"
    for one in report.waivers:
        waiver = one.waiver
        yield f"{waiver.clause:7} {one.state}, until {waiver.expires}: {waiver.reason} ({waiver.link})"
        if one.problem:
            yield f"{'':7} {one.problem}"


def _verdict(report: Report, width: int, paint: Paint) -> Iterator[str]:
    counts = ", ".join(f"{number} {status}" for status, number in report.counts.items() if number)
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    yield f"{report.backend} at {report.url} ({versions})"
    yield (
        f"profile {report.profile}, seed {report.seed}: {len(report.results)} checks in "
        f"{report.seconds:.1f} s; clauses: {counts}"
    )
    if reduced := report.limits.reduced():
        yield f"limits: {', '.join(reduced)}"
    if report.variants:
        yield f"variants: {', '.join(report.variants)}"
    if report.conforms and not report.selected:
        for level in Level:
            if lacking := report.lacking(level):
                named = ", ".join(f"{one.clause.id} {one.status}" for one in lacking)
                text = f"level {level} is not granted: {named}"
                yield from textwrap.wrap(text, width, subsequent_indent="  ")
    elif not report.selected:
        yield "no level: the run does not conform"
    yield from (f"namespace not dropped, drop it by hand: {one}" for one in report.left_behind)
    good, bad = COLOURS[Status.PASS], COLOURS[Status.FAIL]
    for one in report.results:
        for note in one.notes:
            text = f"{one.check.name}: {note}"
            yield from textwrap.wrap(text, width, subsequent_indent="  ", break_on_hyphens=False)
    yield from report.problems
    yield f"{paint(report.verdict, f'1;{good}' if report.conforms else bad)}: {report.headline}"


def failure_text(report: Report, result: CheckResult, *, width: int = 100) -> str:
    """One failure as plain text."""
    return "\n".join(failure_lines(report, result, width=width))


def failure_lines(
    report: Report, result: CheckResult, *, width: int = 100, paint: Paint | None = None, unicode: bool = True
) -> Iterator[str]:
    """One failure: the violation, the command that repeats it, the history and the program."""
    paint = paint or Paint(False)
    failure = result.failure
    assert failure is not None
    clause = CLAUSES[failure.clause]
    yield paint.status(result.status, f"{result.status} {clause.id}: {clause.sentence}")
    yield f"  contract  {anchor(clause.id)}"
    yield f"  check     {result.check.name}: {result.check.sentence}"
    for label, text in (("found", failure.message), ("waived", result.reason)):
        if text:
            wrapped = [line for part in legible(text).split("\n") for line in _wrap(part, width - 12)]
            yield f"  {label:9} {wrapped[0]}"
            yield from (f"{'':12}{line}".rstrip() for line in wrapped[1:])
    if result.variant is not None:
        yield f"  variant   {result.variant}"
    if not failure.hung:
        yield f"  failed in {failure.reproductions} of {failure.repetitions} runs of this check"
    yield f"  repeat    {report.command(result)}"
    if failure.history is not None:
        yield from ("", *history_lines(result, width=width - 2, unicode=unicode))
    if failure.program_file is not None:
        yield f"  program   python {failure.program_file} URL"
    elif failure.program is not None:
        yield "  program (its argument is the URL of an empty store):"
        yield from _indent(failure.program)
    if failure.right_answer is not None:
        yield "  output of the program on memory://:"
        yield from _indent(failure.right_answer)
    if failure.traceback is not None:
        yield f"  {failure.trace_title}:"
        yield from _indent(failure.traceback)


def history_lines(result: CheckResult, *, width: int = 98, unicode: bool = True) -> Iterator[str]:
    """The history of a failure as a timeline with a legend."""
    failure = result.failure
    assert failure is not None
    assert failure.history is not None
    timeline = lay_out(failure.history, failure.verdict)
    yield "  timeline of the clients, from left to right:"
    yield from _indent("\n".join(text_timeline(timeline, width=width - 4, unicode=unicode)))
    verdict = failure.verdict
    if verdict is not None and verdict.answer is Answer.VIOLATION:
        yield f"  no order explains all outcomes; the longest partial order has {len(verdict.prefix)} calls:"
    for line in text_legend(timeline, unicode=unicode):
        yield from textwrap.wrap(f"  {line}", width, subsequent_indent=" " * 17, break_on_hyphens=False)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(width, 30), break_long_words=False, break_on_hyphens=False) or [""]


def _indent(text: str) -> Iterator[str]:
    yield from (f"    {line}".rstrip() for line in legible(text).rstrip().split("\n"))
