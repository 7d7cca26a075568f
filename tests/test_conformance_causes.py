"""Failures grouped by their probable cause, levels, and reports of partial runs."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from flowstore_conformance import CheckResult, Failure, Level, Report, Status
from flowstore_conformance.causes import CauseKind, find_causes
from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.registry import Kind
from flowstore_conformance.rendering import (
    render_badge,
    render_json,
    render_junit,
    render_markdown,
    render_page,
    render_text,
)

from tests.conformance_reports import example_check, example_report

LACKS = SignatureFinding(method="ping", noun="store", problem="is missing", remedy="define it", missing=True)


def failed(name: str, failure: Failure, kind: Kind = Kind.EXAMPLE, clause: str = "CLM-1") -> CheckResult:
    check = dataclasses.replace(example_check(clause, name), kind=kind)
    return CheckResult(check=check, status=Status.FAIL, assertions=1, seconds=0.1, seed=1, failure=failure)


def wrong(clause: str = "CLM-1") -> Failure:
    return Failure(clause=clause, message=f"{clause}: expected True, got False")


def raised(error: str = "KeyError", place: str | None = "mine/claims.py:7 in _row") -> Failure:
    return Failure(
        clause="CON-2",
        message=f"the backend raised {error}",
        error=error,
        place=place,
        operation="try_claim_step",
    )


def hung(operation: str = "ping", message: str = "ping() did not return within 30 s") -> Failure:
    return Failure(clause="CON-2", message=message, operation=operation, hung=True)


def not_run(name: str, finding: SignatureFinding = LACKS) -> CheckResult:
    return CheckResult(
        check=example_check("RUN-1", name),
        status=Status.NOT_RUN,
        assertions=0,
        seconds=0.0,
        seed=1,
        reason=finding.title,
        finding=finding,
    )


def names(report: list[CheckResult]) -> list[tuple[CauseKind, list[str]]]:
    return [(one.kind, [each.check.name for each in one.results]) for one in find_causes(report)]


def test_failures_are_grouped_by_clause_line_operation_and_method() -> None:
    results = [
        failed("a", wrong()),
        failed("b", raised()),
        failed("c", hung()),
        not_run("d"),
        failed("e", wrong(), Kind.RACE),
        failed("f", raised()),
        failed("g", hung()),
        not_run("h"),
    ]
    assert names(results) == [
        (CauseKind.SIGNATURE, ["d", "h"]),
        (CauseKind.EXCEPTION, ["b", "f"]),
        (CauseKind.HANG, ["c", "g"]),
        (CauseKind.VIOLATION, ["a", "e"]),
    ]


def test_different_lines_errors_operations_and_clauses_are_different_causes() -> None:
    results = [
        failed("a", raised()),
        failed("b", raised(place="mine/claims.py:8 in _row")),
        failed("c", raised(error="OSError")),
        failed("d", hung()),
        failed("e", hung("get_runs")),
        failed("f", wrong("CLM-1")),
        failed("g", wrong("CLM-2")),
    ]
    assert [len(one.results) for one in find_causes(results)] == [1] * 7


def test_causes_are_ordered_by_failures_and_start_with_the_simplest_check() -> None:
    results = [
        failed("one", wrong("CLM-2")),
        failed("a_race", wrong("CLM-1"), Kind.RACE),
        failed("a_model", wrong("CLM-1"), Kind.MODEL),
        failed("an_example", wrong("CLM-1"), Kind.EXAMPLE),
    ]
    assert names(results) == [
        (CauseKind.VIOLATION, ["an_example", "a_model", "a_race"]),
        (CauseKind.VIOLATION, ["one"]),
    ]


def test_a_cause_starts_with_the_hang_that_had_the_longest_limit() -> None:
    results = [failed("race", hung(), Kind.RACE), failed("example", hung(), Kind.EXAMPLE)]
    (cause,) = find_causes(results)
    assert cause.lead is results[0]


def test_an_unexpected_contract_error_belongs_to_the_clause_of_the_check() -> None:
    error = dataclasses.replace(wrong(), error="NotFoundError", operation="get_runs")
    assert names([failed("a", error), failed("b", wrong())]) == [(CauseKind.VIOLATION, ["a", "b"])]


def many() -> Report:
    results = [failed(f"check_{number:02}", wrong()) for number in range(30)]
    results += [not_run("needs_ping"), failed("raises", raised())]
    return dataclasses.replace(example_report(), results=tuple(results), findings=(LACKS,))


def test_the_text_shows_each_cause_once_with_its_checks() -> None:
    shown = render_text(many())
    assert len(re.findall("^CAUSE ", shown, re.M)) == 3
    assert "CAUSE 1 of 3: store.ping is missing" in shown
    assert "CAUSE 3 of 3, 30 checks: CLM-1 is broken" in shown
    assert len(re.findall(r"^FAIL CLM-1:", shown, re.M)) == 1
    for number in range(30):
        assert f"check_{number:02}" in shown
    # A clause has one line or two.
    assert len(shown.splitlines()) < 2 * len(CLAUSES) + 40


def test_every_format_shows_the_causes_and_all_failures() -> None:
    report = many()
    told = json.loads(render_json(report))
    assert [one["kind"] for one in told["causes"]] == ["signature", "exception", "violation"]
    assert told["causes"][0]["finding"]["remedy"] == "define it"
    assert len(told["causes"][2]["checks"]) == 30
    page = render_page(report)
    assert page.count('class="failure card fail" open') == 2
    assert page.count("check_29") >= 2
    markdown = render_markdown(report)
    assert markdown.count("### ") == 3
    assert "`check_29`" in markdown
    junit = render_junit(report)
    assert junit.count("<failure") == 32
    assert 'classname="flowstore_conformance.signatures" name="store.ping"' in junit


def test_a_report_with_a_method_that_core_cannot_call_does_not_conform() -> None:
    report = dataclasses.replace(
        example_report(), results=(*example_report().results, not_run("needs_ping")), findings=(LACKS,)
    )
    assert (report.conforms, report.level, report.verdict) == (False, None, "VIOLATES")
    assert report.headline.startswith("core cannot call ping")


# Levels


@pytest.mark.parametrize("status", [Status.FAIL, Status.INCONCLUSIVE, Status.NOT_RUN])
def test_levels_above_an_incomplete_level_are_shown_as_lacking(status: Status) -> None:
    page = render_page(example_report({"RUN-1": status}))
    assert re.findall(r'<li class="(\w+)">', page) == ["lacking"] * 3
    assert "a lower level lacks clauses" in page


def test_levels_below_an_incomplete_level_are_shown_as_complete() -> None:
    page = render_page(example_report({"EVT-1": Status.FAIL}))
    assert re.findall(r'<li class="(\w+)">', page) == ["complete", "complete", "lacking"]
    assert '"granted"' not in page


def test_the_lowest_level_is_called_base() -> None:
    report = example_report({"CLM-6": Status.UNSUPPORTED})
    assert report.level is Level.BASE
    for render in (render_text, render_json, render_markdown, render_page, render_badge, render_junit):
        shown = render(report)
        assert re.search(r"\bbase\b", shown)
        assert not re.search(r"level core|\bcore \d|\"core\"|>core<", shown)


# Partial runs


def test_a_partial_run_shows_selected_checks_and_counts_the_others() -> None:
    report = example_report(selected=("CLM-1", "SIG-3"))
    for shown in (render_text(report), render_markdown(report), render_page(report)):
        assert f"{len(CLAUSES) - 2} other clauses were not selected" in shown
        assert "NOT RUN" not in shown
    assert len(re.findall(r"^[A-Z]{3}(?:-\d)? +PASS", render_text(report), re.M)) == 2
    assert len(json.loads(render_json(report))["clauses"]) == len(CLAUSES)


def test_a_partial_run_shows_unselected_clauses_that_are_broken() -> None:
    result = failed("claims", raised())
    report = dataclasses.replace(example_report(), results=(result,), selected=("CLM-1",))
    assert [one.clause.id for one in report.shown_clauses] == ["CLM-1", "CON-2"]


# Incomplete runs


def test_an_incomplete_run_is_marked_in_every_format() -> None:
    report = dataclasses.replace(example_report(), incomplete="interrupted after 9 of 53 checks")
    assert (report.conforms, report.level, report.verdict) == (False, None, "INCOMPLETE")
    for render in (render_text, render_json, render_junit, render_markdown, render_page):
        assert "interrupted after 9 of 53 checks" in render(report)
    assert json.loads(render_badge(report))["message"] == "incomplete"
    broken = dataclasses.replace(example_report({"CLM-1": Status.FAIL}), incomplete="interrupted after 9")
    assert broken.verdict == "VIOLATES"
    assert broken.headline == "interrupted after 9; 1 clause is broken: CLM-1"
    assert json.loads(render_badge(broken))["message"] == "violates, incomplete"


def test_namespaces_that_were_not_dropped_are_named() -> None:
    report = dataclasses.replace(example_report(), left_behind=("mine://scratch-1",))
    for render in (render_text, render_json, render_markdown, render_page):
        assert "mine://scratch-1" in render(report)
