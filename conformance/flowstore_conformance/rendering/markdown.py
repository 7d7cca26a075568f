"""The report as Markdown, for the summary of a CI job."""

from __future__ import annotations

import re
from collections.abc import Iterator

from flowstore_conformance.causes import Cause
from flowstore_conformance.clauses import CLAUSES, Level
from flowstore_conformance.phrasing import legible
from flowstore_conformance.rendering.text import MAX_OTHERS, history_lines
from flowstore_conformance.report import Report, anchor
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status

MARKS = {
    Status.PASS: "✅",
    Status.FAIL: "❌",
    Status.WAIVED: "⚠️",
    Status.INCONCLUSIVE: "❔",
    Status.UNSUPPORTED: "⚪",
    Status.NOT_RUN: "⬜",
}

MAX_BYTES = 900_000
"""Maximum size in bytes; the summary of a GitHub step holds 1 MiB."""


def render_markdown(report: Report) -> str:
    """The report as Markdown; causes that exceed the size limit are omitted."""
    head = legible("\n".join([*_head(report), *_waivers(report), *_table(report)]))
    parts, size, left_out = [head], len(head.encode()), 0
    for cause in report.causes:
        part = legible("\n".join(["", *_cause(report, cause)]))
        size += len(part.encode())
        if size <= MAX_BYTES:
            parts.append(part)
        else:
            left_out += 1
    if left_out:
        parts.append(f"\n{left_out} more causes are in the other report formats.")
    return "\n".join(parts) + "\n"


def _head(report: Report) -> Iterator[str]:
    mark = "✅" if report.conforms else "❌" if report.verdict == "VIOLATES" else "❔"
    yield f"## {mark} {_text(report.backend)}: {report.verdict.lower()}"
    yield ""
    yield f"**{_text(report.headline)}**"
    yield ""
    levels = []
    for level in Level:
        lacking, required = len(report.lacking(level)), len(report.required(level))
        levels.append(f"{level} {required - lacking} of {required}")
    yield f"Clauses that pass, by level: {', '.join(levels)}."
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    yield (
        f"Profile `{report.profile}`, seed `{report.seed}`, {len(report.results)} checks in "
        f"{report.seconds:.1f} s, {_text(versions)}."
    )
    if reduced := report.limits.reduced():
        yield f"Limits: {_text(', '.join(reduced))}."
    if report.variants:
        yield f"Variants: {_text(', '.join(report.variants))}."
    yield from (f"\n`{one.check.name}`: {_text(note)}." for one in report.results for note in one.notes)
    yield from (f"\n> {_text(problem)}" for problem in report.problems)
    yield from (f"\n> Namespace not dropped, drop it by hand: {_text(one)}" for one in report.left_behind)


def _waivers(report: Report) -> Iterator[str]:
    if report.waivers:
        yield "\n| waived | state | until | reason |\n|---|---|---|---|"
    for one in report.waivers:
        waiver = one.waiver
        why = f"{_text(waiver.reason)} ({_link(waiver.link)})"
        yield f"| {waiver.clause} | {one.state} | {waiver.expires} | {why} |"


def _table(report: Report) -> Iterator[str]:
    yield "\n| clause | status | assertions | promise |\n|---|---|---:|---|"
    for one in report.shown_clauses:
        text = _text(one.clause.sentence)
        if one.reason and one.status is not Status.WAIVED:
            text = f"{text} <br><sub>{_text(one.reason)}</sub>"
        if one.gap:
            text = f"{text} <br><sub>Partly UNSUPPORTED: {_text(one.gap)}</sub>"
        times = f"{one.assertions:,}" if one.assertions else ""
        yield f"| {one.clause.id} | {MARKS[one.status]} {one.status.value} | {times} | {text} |"
    if report.hidden_note:
        yield f"\n{report.hidden_note}."


def _cause(report: Report, cause: Cause) -> Iterator[str]:
    yield f"### {_text(cause.title)}"
    yield ""
    if (finding := cause.finding) is not None:
        defined = f" Defined at `{finding.place}`." if finding.place else ""
        yield f"{_text(finding.noun + '.' + finding.method)} {_text(finding.problem)}.{defined} Define it as:"
        yield _fenced(finding.remedy, "python")
    if cause.lead is not None:
        yield from _failure(report, cause.lead)
    if cause.others:
        yield ""
        yield "Not run because of it:" if cause.lead is None else "Also fail because of it:"
        yield ""
    for one in cause.others[:MAX_OTHERS]:
        message = one.failure.message if one.failure is not None else one.check.sentence
        yield f"- {one.check.clauses[0]} `{one.check.name}`: {_text(message)}"
    if len(cause.others) > MAX_OTHERS:
        names = ", ".join(f"`{one.check.name}`" for one in cause.others[MAX_OTHERS:])
        yield f"- and {len(cause.others) - MAX_OTHERS} more: {names}"


def _failure(report: Report, result: CheckResult) -> Iterator[str]:
    failure = result.failure
    assert failure is not None
    yield f"{MARKS[result.status]} **{failure.clause}: {_text(CLAUSES[failure.clause].sentence)}**"
    yield ""
    yield f"{_text(failure.message)}"
    yield ""
    reproductions = (
        "" if failure.hung else f", failed in {failure.reproductions} of {failure.repetitions} runs"
    )
    variant = "" if result.variant is None else f", variant {_text(result.variant)}"
    yield f"`{anchor(failure.clause)}`, check `{result.check.name}`{variant}{reproductions}. Repeat with:"
    yield _fenced(report.command(result), "bash")
    if failure.history is not None:
        yield from _details("History", "\n".join(history_lines(result, width=110)), "text")
    if failure.program is not None:
        yield from _details("Program", failure.program, "python")
    if failure.right_answer is not None:
        yield from _details("Output on memory://", failure.right_answer, "text")
    if failure.traceback is not None:
        yield from _details(failure.trace_title.capitalize(), failure.traceback, "text")


def _details(title: str, text: str, language: str) -> Iterator[str]:
    yield f"\n<details><summary>{title}</summary>\n"
    yield _fenced(text, language)
    yield "\n</details>"


def _fenced(text: str, language: str) -> str:
    # Longer than any fence in the text, so that the text cannot close it.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _text(text: str) -> str:
    """Escape text for Markdown, including table cells."""
    escaped = re.sub(r"([\\`*_\[\]<>|~#])", r"\\\1", text)
    return " ".join(escaped.split())


def _link(link: str) -> str:
    # GitHub turns bare URLs into links; escapes would break them.
    return link if re.fullmatch(r"https?://[^\s|<>`()]+", link) else _text(link)
