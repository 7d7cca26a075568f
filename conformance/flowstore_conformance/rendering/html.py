"""The report as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files
from itertools import groupby

from flowstore_conformance.causes import Cause
from flowstore_conformance.clauses import CLAUSES, Level
from flowstore_conformance.linearizability import Answer
from flowstore_conformance.phrasing import call_words, client_words, legible, outcome_words, span
from flowstore_conformance.rendering.timeline import Timeline, lay_out, svg_timeline
from flowstore_conformance.report import Report, anchor
from flowstore_conformance.results import CheckResult, ClauseResult
from flowstore_conformance.status import Status

FAMILIES = {
    "INP": "Input",
    "LIM": "Limits",
    "CLK": "Clocks",
    "UNK": "Unknown runs and steps",
    "RUN": "Runs",
    "STP": "Steps and attempts",
    "CLM": "Claims and the dispatch ledger",
    "QUE": "Queues",
    "WAT": "Watching",
    "CTL": "Control",
    "IDM": "Idempotency keys and the trigger",
    "SIG": "Signals",
    "MBX": "Signals that come early",
    "RET": "Retention",
    "XFR": "Transfer",
    "TAG": "Tags",
    "QRY": "Queries",
    "EVT": "Events and outputs",
    "CON": "Concurrency and faults",
}

LEVEL_NOTES = {
    Level.BASE: "required of every store",
    Level.CRASH_SAFE: "safe recovery from crashes",
    Level.FULL: "every extension",
}


def render_page(report: Report) -> str:
    """The page. Text from the backend is escaped, and no external resource is loaded."""
    title = f"{report.backend}: {report.verdict.lower()}"
    page = "".join(
        (
            "<!doctype html>\n",
            f'<html lang="en" data-verdict="{report.verdict.lower()}">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n",
            f"<title>{escape(title)} · flowstore conformance</title>\n{_icon(report)}",
            f"<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n",
            *_hero(report),
            *_facts(report),
            *_waivers(report),
            *_failures(report),
            *_clauses(report),
            "</main>\n",
            _footer(report),
            f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n",
        )
    )
    return legible(page)


def _asset(name: str) -> str:
    return files("flowstore_conformance.rendering").joinpath(name).read_text("utf-8")


def _icon(report: Report) -> str:
    colour = {"CONFORMS": "%231a7f4b", "VIOLATES": "%23c4314b"}.get(report.verdict, "%237a5af0")
    return (
        '<link rel="icon" href="data:image/svg+xml,'
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'>"
        f"<circle cx='8' cy='8' r='7' fill='{colour}'/></svg>\">\n"
    )


# The head of the page


def _hero(report: Report) -> Iterator[str]:
    name = report.level.value if report.level else "no level" if report.conforms else report.verdict.lower()
    if report.selected and report.conforms:
        name = "partial run"
    sign = {"CONFORMS": "✓", "VIOLATES": "✕"}.get(report.verdict, "?")
    yield '<header class="hero">\n<div class="hero-text">\n'
    yield '<p class="eyebrow">flowstore conformance</p>\n'
    yield f"<h1>{escape(report.backend)}</h1>\n"
    verdict = f"<strong>{report.verdict.capitalize()}</strong>"
    yield f'<p class="headline">{verdict}: {escape(report.headline)}.</p>\n'
    yield f'<p class="url mono">{escape(report.url)}</p>\n</div>\n'
    yield (
        f'<div class="seal" role="img" aria-label="{escape(name)}"><span class="sign">{sign}</span>'
        f'<span class="seal-label">{"level" if report.level else "result"}</span>'
        f'<span class="seal-name">{escape(name)}</span></div>\n'
    )
    yield "</header>\n"
    if not report.selected:
        yield from _ladder(report)


def _ladder(report: Report) -> Iterator[str]:
    yield '<ol class="ladder">\n'
    open_below = True
    for level in Level:
        required, lacking = report.required(level), report.lacking(level)
        passed = len(required) - len(lacking)
        below, open_below = open_below, open_below and not lacking
        state = "granted" if report.level and open_below else "complete" if open_below else "lacking"
        text = "granted" if state == "granted" else f"{passed} of {len(required)} pass"
        missing = ", ".join(one.clause.id for one in lacking[:8])
        if len(lacking) > 8:
            missing += f" and {len(lacking) - 8} more"
        yield f'<li class="{state}"><div class="step-head"><b>{level.value}</b><span>{text}</span></div>'
        yield f'<div class="track"><i style="width:{100 * passed / len(required):.1f}%"></i></div>'
        note = (
            f"lacks {missing}" if missing else LEVEL_NOTES[level] if below else "a lower level lacks clauses"
        )
        yield f'<p class="note">{escape(note)}</p></li>\n'
    yield "</ol>\n"


def _facts(report: Report) -> Iterator[str]:
    yield '<section class="facts card" aria-label="About this run">\n<dl>\n'
    assertions = sum(one.assertions for one in report.results)
    facts = {
        "profile": report.profile,
        "seed": str(report.seed),
        "checks": f"{len(report.results):,}",
        "assertions": f"{assertions:,}",
        "took": f"{report.seconds:.1f} s",
        "started": f"{report.started_at:%Y-%m-%d %H:%M} UTC",
        **report.versions,
    }
    if report.selected:
        facts["selected"] = ", ".join(report.selected)
    if reduced := report.limits.reduced():
        facts["limits"] = ", ".join(reduced)
    if report.variants:
        facts["variants"] = ", ".join(report.variants)
    yield from (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>\n" for name, value in facts.items()
    )
    yield "</dl>\n"
    yield from (
        f'<p class="problem">Namespace not dropped, drop it by hand: {escape(one)}</p>\n'
        for one in report.left_behind
    )
    yield '<p class="chips" aria-label="Capabilities">'
    yield from (f'<span class="chip">{escape(one)}</span>' for one in report.capabilities)
    yield "</p>\n</section>\n"


def _waivers(report: Report) -> Iterator[str]:
    if not report.waivers:
        return
    yield '<section class="waivers card">\n<h2>Waivers</h2>\n'
    yield from (f'<p class="problem">{escape(problem)}</p>\n' for problem in report.problems)
    yield '<div class="scroll"><table><thead><tr><th>clause<th>state<th>until<th>reason</tr></thead>\n'
    yield "<tbody>\n"
    for one in report.waivers:
        waiver = one.waiver
        link = escape(waiver.link)
        if waiver.link.startswith(("https://", "http://")):
            link = f'<a href="{link}" rel="noreferrer">{link}</a>'
        kind = "bad" if one.problem else "fine"
        yield (
            f'<tr><td class="mono">{waiver.clause}<td><span class="state {kind}">{one.state}</span>'
            f'<td class="mono nowrap">{waiver.expires}<td>{escape(waiver.reason)}<br>{link}</tr>\n'
        )
    yield "</tbody></table></div>\n</section>\n"


# Failures


def _failures(report: Report) -> Iterator[str]:
    causes = report.causes
    if not causes:
        return
    checks = sum(len(one.results) for one in causes)
    yield '<section class="failures">\n<h2>Probable causes '
    behind = f"behind {checks} checks that did not pass"
    yield f'<span class="count">{len(causes)}</span> <span class="note">{behind}</span></h2>\n'
    for number, cause in enumerate(causes, 1):
        yield from _cause(report, cause, number)
    yield "</section>\n"


def _cause(report: Report, cause: Cause, number: int) -> Iterator[str]:
    yield f'<section class="cause"><h3><span class="number">{number}</span>{escape(cause.title)}</h3>\n'
    if (finding := cause.finding) is not None:
        yield '<div class="failure card fail"><div class="body"><dl class="meta">'
        yield f'<div><dt>method</dt><dd class="mono">{escape(f"{finding.noun}.{finding.method}")}</dd></div>'
        if finding.place is not None:
            yield f'<div><dt>defined</dt><dd class="mono">{escape(finding.place)}</dd></div>'
        yield f"<div><dt>problem</dt><dd>{escape(finding.problem)}</dd></div></dl>\n"
        yield _code("Define it as", finding.remedy)
        yield "</div></div>\n"
    if cause.lead is not None:
        yield from _failure(report, cause.lead)
    if cause.others:
        what = "not run because of it" if cause.lead is None else "also fail because of it"
        checks = f"{len(cause.others)} check{'s' if len(cause.others) != 1 else ''}"
        yield f'<details class="others"><summary>{checks} {what}</summary>\n'
        for result in cause.others:
            yield from _failure(report, result, is_open=False) if result.failure else _not_run(result)
        yield "</details>\n"
    yield "</section>\n"


def _not_run(result: CheckResult) -> Iterator[str]:
    yield (
        f'<p class="stumbled">{_pill(result.status)} <span class="mono">{escape(result.check.id)}</span> '
        f'<span class="note">{escape(result.check.sentence)}</span></p>\n'
    )


def _failure(report: Report, result: CheckResult, *, is_open: bool = True) -> Iterator[str]:
    failure = result.failure
    assert failure is not None
    clause = CLAUSES[failure.clause]
    place = f"{clause.id.lower()}-{result.check.name}"
    shown = " open" if is_open else ""
    yield f'<details class="failure card {_kind(result.status)}"{shown} id="{place}">\n'
    yield (
        f'<summary><span class="id mono">{clause.id}</span>{_pill(result.status)}'
        f'<span class="sentence">{escape(clause.sentence)}</span></summary>\n<div class="body">\n'
    )
    yield f'<p class="message">{escape(failure.message)}</p>\n'
    if result.status is Status.WAIVED and result.reason:
        yield f'<p class="waived-because">Waived: {escape(result.reason)}</p>\n'
    yield '<dl class="meta">'
    yield f'<div><dt>contract</dt><dd class="mono">{anchor(clause.id)}</dd></div>'
    yield f'<div><dt>check</dt><dd class="mono">{escape(result.check.name)}</dd></div>'
    if result.variant is not None:
        yield f"<div><dt>variant</dt><dd>{escape(result.variant)}</dd></div>"
    if not failure.hung:
        yield f"<div><dt>failed in</dt><dd>{failure.reproductions} of {failure.repetitions} runs</dd></div>"
    yield f"<div><dt>seed</dt><dd>{result.seed}</dd></div></dl>\n"
    yield _code("Repeat", report.command(result))
    if failure.history is not None:
        timeline = lay_out(failure.history, failure.verdict)
        yield from _timeline(result, timeline)
    if failure.program is not None or failure.right_answer is not None:
        yield '<div class="pair">\n'
        if failure.program is not None:
            name = failure.program_file or "Program that reproduces it"
            yield _code(name, failure.program)
        if failure.right_answer is not None:
            yield _code("Output on memory://", failure.right_answer, kind="printed")
        yield "</div>\n"
    if failure.traceback is not None:
        yield f'<details class="trace" open><summary>{failure.trace_title.capitalize()}</summary>'
        yield f"<pre><code>{escape(failure.traceback)}</code></pre></details>\n"
    yield "</div>\n</details>\n"


def _code(title: str, code: str, *, kind: str = "source") -> str:
    button = '<button class="copy" type="button">Copy</button>' if kind == "source" else ""
    return (
        f'<figure class="code {kind}"><figcaption><span>{escape(title)}</span>{button}</figcaption>'
        f'<pre tabindex="0"><code>{escape(code.rstrip())}</code></pre></figure>\n'
    )


def _timeline(result: CheckResult, timeline: Timeline) -> Iterator[str]:
    failure = result.failure
    assert failure is not None
    verdict = failure.verdict
    caption = "The calls of each client, from left to right."
    if verdict is not None and verdict.answer is Answer.VIOLATION:
        caption = (
            "No order explains all outcomes. The numbers give the longest partial order; "
            "✕ marks a call that could come next but does not fit."
        )
    yield f'<figure class="history"><figcaption>{caption}</figcaption>\n<div class="scroll" tabindex="0">'
    yield svg_timeline(timeline, label=f"Timeline of {len(timeline.bars)} operations")
    yield '</div>\n<div class="scroll"><table class="legend"><thead><tr><th><th>client<th>call<th>outcome'
    yield "<th>model<th>start<th>duration</tr></thead><tbody>\n"
    for bar in timeline.legend:
        one = bar.operation
        kind = "misfit" if bar.misfit else "placed" if bar.place else "later"
        wanted = escape(outcome_words(bar.expected)) if bar.expected is not None else ""
        if bar.place and not bar.is_open:
            wanted = '<span class="same">the same</span>'
        took = "" if bar.is_open else span(one.returned - one.invoked)
        yield (
            f'<tr class="{kind}"><td><span class="dot">{"✕" if bar.misfit else bar.mark}</span>'
            f'<td class="nowrap">{client_words(one.client)}<td class="mono">{escape(call_words(one.call))}'
            f'<td class="mono">{escape(outcome_words(one.outcome))}<td class="mono">{wanted}'
            f'<td class="nowrap">{span(timeline.moments[bar.begin])}<td class="nowrap">{took}</tr>\n'
        )
    yield "</tbody></table></div>\n"
    if timeline.left_out:
        yield f'<p class="note">{timeline.left_out} further operations are not shown.</p>\n'
    yield "</figure>\n"


# Clauses


def _clauses(report: Report) -> Iterator[str]:
    yield '<section class="clauses">\n<h2>Clauses</h2>\n<div class="controls">\n'
    yield '<div class="distribution" aria-hidden="true">'
    for status, number in report.counts.items():
        if number:
            yield f'<i class="{_kind(status)}" style="flex:{number}" title="{number} {status}"></i>'
    yield '</div>\n<div class="filters" role="group" aria-label="Show clauses by status">'
    yield '<button type="button" class="filter" data-status="" aria-pressed="true">'
    yield f"All <b>{len(report.shown_clauses)}</b></button>"
    for status, number in report.counts.items():
        if number:
            yield (
                f'<button type="button" class="filter {_kind(status)}" data-status="{_kind(status)}" '
                f'aria-pressed="false">{_label(status)} <b>{number}</b></button>'
            )
    yield '<input type="search" id="search" placeholder="Find a clause or a check" aria-label="Find">'
    yield "</div>\n</div>\n"
    for family, members in groupby(report.shown_clauses, key=lambda one: one.clause.id.partition("-")[0]):
        yield f'<div class="family card"><h3>{FAMILIES[family]}<span class="mono">{family}</span></h3>\n'
        for one in members:
            yield from _clause(one)
        yield "</div>\n"
    if report.hidden_note:
        yield f'<p class="note">{report.hidden_note}.</p>\n'
    yield '<p class="nothing" hidden>No clause matches.</p>\n</section>\n'


def _clause(one: ClauseResult) -> Iterator[str]:
    clause = one.clause
    needs = f'<span class="needs">needs {clause.needs}</span>' if clause.needs else ""
    times = f"{one.assertions:,}&times;" if one.assertions else ""
    words = " ".join([clause.id, clause.sentence, *(each.check.name for each in one.results)]).lower()
    yield (
        f'<details class="clause" data-status="{_kind(one.status)}" data-words="{escape(words)}">'
        f'<summary><span class="id mono">{clause.id}</span>{_pill(one.status)}'
        f'<span class="sentence">{escape(clause.sentence)} {needs}</span>'
        f'<span class="times">{times}</span></summary>\n<div class="checks">'
    )
    yield f'<p class="note"><span class="mono">{anchor(clause.id)}</span>, level {clause.level}</p>'
    if one.results:
        yield '<table class="check-list"><tbody>'
        yield from map(_check, one.results)
        yield "</tbody></table>"
    else:
        yield '<p class="note">No check of this clause ran.</p>'
    yield "</div></details>\n"


def _check(result: CheckResult) -> str:
    reason = f"<br><em>{escape(result.reason)}</em>" if result.reason else ""
    notes = "".join(f'<br><span class="note">{escape(note)}</span>' for note in result.notes)
    name = escape(result.check.name)
    if result.failure is not None:
        name = f'<a href="#{result.failure.clause.lower()}-{name}">{name}</a>'
    return (
        f'<tr><td>{_pill(result.status)}<td><span class="mono">{name}</span><br>'
        f'<span class="note">{escape(result.check.sentence)}</span>{reason}{notes}'
        f'<td class="times">{result.assertions:,}&times;<td class="times">{span(result.seconds)}</tr>'
    )


def _pill(status: Status) -> str:
    return f'<span class="pill {_kind(status)}">{_label(status)}</span>'


def _kind(status: Status) -> str:
    return status.value.lower().replace(" ", "-")


def _label(status: Status) -> str:
    return status.value.capitalize()


def _footer(report: Report) -> str:
    return (
        f"<footer><p>Checked {report.started_at:%Y-%m-%d} in scratch namespaces of the backend's own; the "
        "data under the URL itself was not touched. A clause passes when every check of it ran and passed; "
        "unsupported and inconclusive never count as passed.</p></footer>\n"
    )
