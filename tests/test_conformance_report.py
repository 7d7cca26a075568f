"""The verdicts of clauses, the level and the conformance that follow from the results of checks."""

from __future__ import annotations

import dataclasses
import json

import pytest
from flowstore_conformance import CLAUSES, CheckResult, Failure, Level, Report, Status
from flowstore_conformance.rendering.badge import render_badge
from flowstore_conformance.rendering.html import render_page
from flowstore_conformance.rendering.json_document import render_json
from flowstore_conformance.rendering.markdown import render_markdown
from flowstore_conformance.rendering.text import render_text

from flowstore_core import StoreLimits
from tests.conformance_reports import example_check, example_report


def status_of(report: Report, clause: str) -> Status:
    return next(one.status for one in report.clauses if one.clause.id == clause)


def result(clause: str, status: Status, *also: str, name: str = "one", failing: str = "") -> CheckResult:
    failure = Failure(clause=failing or clause, message="wrong") if status is Status.FAIL else None
    return CheckResult(
        check=example_check(clause, name, None, *also),
        status=status,
        assertions=3,
        seconds=0.1,
        seed=1,
        failure=failure,
    )


def report_of(*results: CheckResult, selected: tuple[str, ...] = ()) -> Report:
    return dataclasses.replace(example_report(), results=results, selected=selected)


def test_a_report_conforms_at_level_full_if_every_check_passes() -> None:
    report = example_report()
    assert (report.conforms, report.level, report.verdict) == (True, Level.FULL, "CONFORMS")
    assert report.counts[Status.PASS] == len(CLAUSES)


@pytest.mark.parametrize("status", [Status.FAIL, Status.INCONCLUSIVE, Status.NOT_RUN])
@pytest.mark.parametrize("clause", ["RUN-1", "CLM-6", "EVT-1"])
def test_a_report_conforms_only_if_every_clause_passes(status: Status, clause: str) -> None:
    report = example_report({clause: status})
    assert not report.conforms
    assert report.level is None
    assert report.verdict == ("VIOLATES" if status is Status.FAIL else "UNDECIDED")


@pytest.mark.parametrize(
    ("clause", "level"),
    [("RUN-1", None), ("CLM-6", Level.BASE), ("STP-7", Level.BASE), ("QRY-4", Level.CRASH_SAFE)],
)
@pytest.mark.parametrize("status", [Status.UNSUPPORTED, Status.WAIVED])
def test_a_level_needs_every_clause_of_it_to_pass(clause: str, level: Level | None, status: Status) -> None:
    report = example_report({clause: status})
    assert report.conforms
    assert report.level is level


def test_undeclared_durability_does_not_affect_the_level() -> None:
    report = example_report({"CON-5": Status.UNSUPPORTED})
    without = dataclasses.replace(report, capabilities=("leases",))
    assert without.level is Level.FULL
    # Declared durability must be checked.
    assert report.level is None


def test_a_clause_has_the_worst_status_of_its_checks() -> None:
    good, bad = result("RUN-1", Status.PASS), result("RUN-1", Status.INCONCLUSIVE, name="two")
    report = report_of(good, bad)
    assert status_of(report, "RUN-1") is Status.INCONCLUSIVE
    assert next(one.assertions for one in report.clauses if one.clause.id == "RUN-1") == 6


def test_a_check_that_needs_more_than_its_clause_does_not_hide_the_others() -> None:
    report = report_of(result("CLM-1", Status.PASS), result("CLM-1", Status.UNSUPPORTED, name="two"))
    assert status_of(report, "CLM-1") is Status.PASS


def test_a_failed_check_of_two_clauses_fails_one_and_leaves_the_other_undecided() -> None:
    report = report_of(result("CLM-1", Status.FAIL, "CLM-2", failing="CLM-2"))
    assert status_of(report, "CLM-2") is Status.FAIL
    assert status_of(report, "CLM-1") is Status.NOT_RUN


def test_a_failure_counts_for_its_clause_even_if_the_check_cites_others() -> None:
    report = report_of(result("RUN-1", Status.FAIL, failing="CON-2"))
    assert status_of(report, "CON-2") is Status.FAIL
    assert status_of(report, "RUN-1") is Status.NOT_RUN


def test_a_partial_run_conforms_but_grants_no_level() -> None:
    report = report_of(result("RUN-1", Status.PASS), selected=("RUN-1",))
    assert (report.conforms, report.level) == (True, None)
    assert "grants no level" in report.headline


def test_a_suite_run_without_assertions_does_not_conform() -> None:
    assert not report_of(result("CLM-6", Status.UNSUPPORTED), selected=("CLM-6",)).conforms
    assert not report_of(selected=("CLM-6",)).conforms


def test_a_clause_without_a_check_prevents_conformance() -> None:
    report = report_of(result("RUN-1", Status.PASS))
    assert not report.conforms
    assert report.headline.startswith("no check covers INP-1")


def test_the_command_reruns_the_check_on_the_same_store() -> None:
    report = dataclasses.replace(example_report({"CLM-1": Status.FAIL}), url="postgresql://me:***@host/d b")
    assert report.command(report.failures[0]) == (
        "flowstore conformance 'postgresql://me:***@host/d b' --profile quick --clause CLM-1 --seed 1234"
    )


def test_limits_below_the_largest_are_part_of_the_verdict() -> None:
    report = dataclasses.replace(example_report(), limits=StoreLimits(text_bytes=65_536, run_steps=20_000))
    words = "texts of 65,536 bytes, 20,000 steps in a run"
    assert report.headline == f"level full, within {words}"
    assert json.loads(render_badge(report))["message"] == f"full, {words}"
    assert json.loads(render_json(report))["limits"]["run_steps"] == 20_000
    for render in (render_text, render_markdown, render_page):
        assert "20,000 steps in a run" in render(report)
        assert "steps in a run" not in render(example_report())


def test_a_level_needs_the_clause_of_a_shared_clock_only_where_one_is_declared() -> None:
    report = example_report({"CLK-1": Status.UNSUPPORTED})
    assert report.level is None
    report = dataclasses.replace(report, capabilities=("durable",))
    assert (report.level, report.verdict) == (Level.FULL, "CONFORMS")
