"""Waivers: strict parsing, visibility in reports, expiry, and failure when unused."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from flowstore_conformance import Report, Status, Waiver, WaiverState, read_waivers
from flowstore_conformance.report import apply_waivers

from flowstore_core import ConfigurationError
from tests.conformance_reports import example_report

TODAY = date(2026, 3, 14)

GOOD = """
[[waiver]]
clause = "QRY-2"
reason = "the index folds accents"
link = "https://example.org/issues/7"
expires = 2026-03-14
"""


def waive(report: Report, clause: str = "QRY-2", expires: date = TODAY) -> Report:
    waiver = Waiver(clause=clause, reason="known", link="https://example.org/7", expires=expires)
    return apply_waivers(report, [waiver], today=TODAY)


def test_a_waiver_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(GOOD)
    assert read_waivers(path) == (
        Waiver(
            clause="QRY-2",
            reason="the index folds accents",
            link="https://example.org/issues/7",
            expires=TODAY,
        ),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (GOOD.replace("reason", "because"), "lacks reason"),
        (GOOD.replace('link = "https://example.org/issues/7"\n', ""), "lacks link"),
        (GOOD.replace("expires = 2026-03-14", ""), "lacks expires"),
        (GOOD + "who = 'me'", "unknown keys: who"),
        (GOOD.replace("QRY-2", "XYZ-9"), "there is no clause XYZ-9"),
        (GOOD.replace("the index folds accents", "  "), "reason must be a non-empty string"),
        (GOOD.replace("2026-03-14", "'2026-03-14'"), "expires must be a date"),
        (GOOD.replace("2026-03-14", "2026-03-14T00:00:00"), "expires must be a date"),
        (GOOD + GOOD, "waiver 2 of .* QRY-2 already has a waiver"),
        ("[waiver]\nclause = 'QRY-2'", "may contain \\[\\[waiver\\]\\] tables only"),
        ("waivers = []", "may contain \\[\\[waiver\\]\\] tables only"),
        ("waiver = [", "not valid TOML"),
    ],
)
def test_an_invalid_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "waivers.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_waivers(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_waivers(tmp_path / "none.toml")


def test_a_waived_failure_does_not_fail_the_run_and_is_no_pass() -> None:
    report = waive(example_report({"QRY-2": Status.FAIL}))
    assert report.conforms
    assert report.level == "crash-safe"
    assert report.waivers[0].state is WaiverState.USED
    assert report.counts[Status.WAIVED] == 1


def test_only_the_named_clause_is_waived() -> None:
    report = waive(example_report({"QRY-2": Status.FAIL, "CLM-1": Status.FAIL}))
    assert not report.conforms
    assert report.counts[Status.FAIL] == 1


def test_a_waiver_is_valid_until_the_end_of_its_last_day() -> None:
    failing = example_report({"QRY-2": Status.FAIL})
    assert waive(failing, expires=TODAY).conforms
    expired = waive(failing, expires=date(2026, 3, 13))
    assert not expired.conforms
    assert expired.counts[Status.FAIL] == 1
    assert "expired on 2026-03-13" in expired.problems[0]


@pytest.mark.parametrize("status", [Status.PASS, Status.UNSUPPORTED])
def test_an_unused_waiver_fails_the_run(status: Status) -> None:
    report = waive(example_report({"QRY-2": status}))
    assert not report.conforms
    assert report.waivers[0].state is WaiverState.NOT_NEEDED
    assert "not needed" in report.problems[0]


def test_a_waiver_does_not_apply_to_an_inconclusive_clause() -> None:
    report = waive(example_report({"QRY-2": Status.INCONCLUSIVE}))
    assert not report.conforms
    assert report.waivers[0].state is WaiverState.UNDECIDED
    assert not report.problems


def test_a_waiver_of_an_unselected_clause_is_ignored() -> None:
    report = waive(example_report(selected=("CLM-1",)))
    assert report.conforms
    assert report.waivers[0].state is WaiverState.NOT_SELECTED
