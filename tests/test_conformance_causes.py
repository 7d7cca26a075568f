"""Failures by their probable cause, levels that stand on those below, and reports of partial runs."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from flowstore_conformance import CheckResult, Failure, Level, Report, Status
from flowstore_conformance.causes import CauseKind, find_causes
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

from tests.conformance_reports import made_check, made_report

LACKS = SignatureFinding(method="ping", noun="store", problem="is missing", remedy="define it", missing=True)


def failed(name: str, failure: Failure, kind: Kind = Kind.EXAMPLE, clause: str = "CLM-1") -> CheckResult:
    check = dataclasses.replace(made_check(clause, name), kind=kind)
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


def apply_findings(name: str, finding: SignatureFinding = LACKS) -> CheckResult:
    return CheckResult(
        check=made_check("RUN-1", name),
        status=Status.NOT_RUN,
        assertions=0,
        seconds=0.0,
        seed=1,
        reason=finding.title,
        finding=finding,
    )


def names(report: list[CheckResult]) -> list[tuple[CauseKind, list[str]]]:
    return [(one.kind, [each.check.name for each in one.results]) for one in find_causes(report)]


def test_one_clause_one_line_one_operation_and_one_method_are_one_cause_each() -> None:
    results = [
        failed("a", wrong()),
        failed("b", raised()),
        failed("c", hung()),
        apply_findings("d"),
        failed("e", wrong(), Kind.RACE),
        failed("f", raised()),
        failed("g", hung()),
        apply_findings("h"),
    ]
    assert names(results) == [
        (CauseKind.SIGNATURE, ["d", "h"]),
        (CauseKind.EXCEPTION, ["b", "f"]),
        (CauseKind.HANG, ["c", "g"]),
        (CauseKind.VIOLATION, ["a", "e"]),
    ]


def test_other_lines_other_errors_other_operations_and_other_clauses_are_other_causes() -> None:
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


def test_causes_are_ordered_by_failures_and_led_by_their_simplest_check() -> None:
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


def test_the_hang_that_was_given_most_time_leads() -> None:
    results = [failed("race", hung(), Kind.RACE), failed("example", hung(), Kind.EXAMPLE)]
    (cause,) = find_causes(results)
    assert cause.lead is results[0]


def test_a_wrong_answer_behind_an_error_of_the_contract_belongs_to_its_clause() -> None:
    error = dataclasses.replace(wrong(), error="NotFoundError", operation="get_runs")
    assert names([failed("a", error), failed("b", wrong())]) == [(CauseKind.VIOLATION, ["a", "b"])]


def many() -> Report:
    results = [failed(f"check_{number:02}", wrong()) for number in range(30)]
    results += [apply_findings("needs_ping"), failed("raises", raised())]
    return dataclasses.replace(made_report(), results=tuple(results), findings=(LACKS,))


def test_the_text_shows_a_cause_once_with_all_that_follows() -> None:
    shown = render_text(many())
    assert len(re.findall("^CAUSE ", shown, re.M)) == 3
    assert "CAUSE 1 of 3: store.ping is missing" in shown
    assert "CAUSE 3 of 3, 30 checks: CLM-1 is broken" in shown
    assert len(re.findall(r"^FAIL CLM-1:", shown, re.M)) == 1
    for number in range(30):
        assert f"check_{number:02}" in shown
    assert len(shown.splitlines()) < 140


def test_every_other_form_knows_the_causes_and_loses_no_failure() -> None:
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


def test_a_method_that_core_cannot_call_never_conforms() -> None:
    report = dataclasses.replace(
        made_report(), results=(*made_report().results, apply_findings("needs_ping")), findings=(LACKS,)
    )
    assert (report.conforms, report.level, report.verdict) == (False, None, "VIOLATES")
    assert report.headline.startswith("core cannot call ping")


# Levels


@pytest.mark.parametrize("status", [Status.FAIL, Status.INCONCLUSIVE, Status.NOT_RUN])
def test_no_level_is_green_above_one_that_lacks_a_clause(status: Status) -> None:
    page = render_page(made_report({"RUN-1": status}))
    assert re.findall(r'<li class="(\w+)">', page) == ["lacking"] * 3
    assert "a lower level lacks clauses" in page


def test_a_level_below_one_that_lacks_a_clause_is_complete_and_not_granted() -> None:
    page = render_page(made_report({"EVT-1": Status.FAIL}))
    assert re.findall(r'<li class="(\w+)">', page) == ["complete", "complete", "lacking"]
    assert '"granted"' not in page


def test_the_level_of_every_store_is_called_base() -> None:
    report = made_report({"CLM-6": Status.UNSUPPORTED})
    assert report.level is Level.BASE
    for render in (render_text, render_json, render_markdown, render_page, render_badge, render_junit):
        shown = render(report)
        assert re.search(r"\bbase\b", shown)
        assert not re.search(r"level core|\bcore \d|\"core\"|>core<", shown)


# Partial runs


def test_a_partial_run_shows_the_selected_checks_and_counts_the_rest() -> None:
    report = made_report(selected=("CLM-1", "SIG-3"))
    for shown in (render_text(report), render_markdown(report), render_page(report)):
        assert "51 other clauses were not selected" in shown
        assert "NOT RUN" not in shown
    assert len(re.findall(r"^[A-Z]{3}(?:-\d)? +PASS", render_text(report), re.M)) == 2
    assert len(json.loads(render_json(report))["clauses"]) == 53


def test_a_partial_run_shows_another_clause_that_it_found_broken() -> None:
    result = failed("claims", raised())
    report = dataclasses.replace(made_report(), results=(result,), selected=("CLM-1",))
    assert [one.clause.id for one in report.shown_clauses] == ["CLM-1", "CON-2"]


# Incomplete runs


def test_an_incomplete_run_is_marked_so_in_every_form() -> None:
    report = dataclasses.replace(made_report(), incomplete="interrupted after 9 of 53 checks")
    assert (report.conforms, report.level, report.verdict) == (False, None, "INCOMPLETE")
    for render in (render_text, render_json, render_junit, render_markdown, render_page):
        assert "interrupted after 9 of 53 checks" in render(report)
    assert json.loads(render_badge(report))["message"] == "incomplete"
    broken = dataclasses.replace(made_report({"CLM-1": Status.FAIL}), incomplete="interrupted after 9")
    assert broken.verdict == "VIOLATES"
    assert broken.headline == "interrupted after 9; 1 clause is broken: CLM-1"
    assert json.loads(render_badge(broken))["message"] == "violates, incomplete"


def test_namespaces_that_were_left_behind_are_named() -> None:
    report = dataclasses.replace(made_report(), left_behind=("mine://scratch-1",))
    for render in (render_text, render_json, render_markdown, render_page):
        assert "mine://scratch-1" in render(report)
