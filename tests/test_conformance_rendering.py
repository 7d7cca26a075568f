"""The formats of a report: required content, and escaping of texts from the backend."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from datetime import date
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from flowstore_conformance import CLAUSES, Failure, Report, Status, Waiver
from flowstore_conformance.history import History, Returned
from flowstore_conformance.linearizability import Answer
from flowstore_conformance.rendering import (
    render_badge,
    render_json,
    render_junit,
    render_markdown,
    render_page,
    render_text,
)
from flowstore_conformance.rendering.json_document import schema
from flowstore_conformance.rendering.timeline import lay_out, svg_timeline, text_timeline
from flowstore_conformance.report import apply_waivers

from tests.conformance_reports import (
    example_report,
    operation,
    race_failure,
    simple_failure,
    two_winners,
    verdict_of,
)

NASTY = "</script><b>\x00\x1b[31m & ``` | \ud800 ]]> \"'"


def waivers(*clauses: str, expires: date = date(2999, 1, 1)) -> list[Waiver]:
    return [
        Waiver(clause=clause, reason="known", link="https://example.org/7", expires=expires)
        for clause in clauses
    ]


def full_report() -> Report:
    outcomes = {
        "CLM-1": Status.FAIL,
        "SIG-3": Status.FAIL,
        "QRY-2": Status.FAIL,
        "CON-1": Status.INCONCLUSIVE,
        "EVT-1": Status.UNSUPPORTED,
    }
    report = example_report(outcomes, failing=lambda c: (race_failure if c == "CLM-1" else simple_failure)(c))
    return apply_waivers(report, waivers("QRY-2", "RUN-1"), today=date(2026, 3, 14))


REPORTS: dict[str, Callable[[], Report]] = {
    "passing": example_report,
    "failing": full_report,
    "partial": lambda: example_report(selected=("CLM-1",)),
    "nasty": lambda: example_report(
        {"CLM-1": Status.FAIL},
        failing=lambda clause: Failure(
            clause=clause, message=NASTY, program=NASTY, right_answer=NASTY, traceback=NASTY
        ),
    ),
}


@pytest.fixture(params=sorted(REPORTS))
def report(request: pytest.FixtureRequest) -> Report:
    return REPORTS[request.param]()


# All formats


@pytest.mark.parametrize("render", [render_text, render_json, render_markdown, render_page])
def test_every_format_shows_verdict_clauses_statuses_and_waivers(render: Callable[[Report], str]) -> None:
    # Markdown escapes special characters.
    shown = render(full_report()).replace("\\", "")
    for wanted in (
        *CLAUSES,
        "https://example.org/7",
        "not needed",
        "docs/contract.md#clm-1",
        "--clause CLM-1 --seed 1234",
        "two of three concurrent try_claim_step were told True",
        "second False",
        "KeyError",
    ):
        assert wanted in shown, wanted
    assert re.search("violates", shown, re.I)
    assert re.search("inconclusive", shown, re.I)


def test_the_text_explains_why_a_level_is_not_granted() -> None:
    shown = render_text(example_report({"EVT-1": Status.UNSUPPORTED}))
    assert "level full is not granted: EVT-1 UNSUPPORTED" in shown
    assert shown.endswith("CONFORMS: level crash-safe\n")


def test_the_text_has_optional_colours_and_an_ascii_form() -> None:
    report = full_report()
    assert "\x1b" not in render_text(report)
    assert "\x1b[1;31m" in render_text(report, colour=True)
    assert render_text(report, unicode=False).isascii()


# JSON


def conforms_to(value: Any, shape: dict[str, Any], root: dict[str, Any], place: str = "$") -> None:
    """Validate with the keywords of JSON Schema that the schema uses; raise on any other keyword."""
    known = {"$ref", "$schema", "$defs", "title", "description", "type", "enum", "const", "items", "anyOf"}
    assert not shape.keys() - known - {"properties", "required", "additionalProperties"}
    if "$ref" in shape:
        conforms_to(value, root["$defs"][shape["$ref"].rpartition("/")[2]], root, place)
        return
    if "anyOf" in shape:
        # anyOf is used only for nullable values.
        if value is not None:
            conforms_to(value, shape["anyOf"][1], root, place)
        return
    kinds = {
        "object": dict,
        "array": list,
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
        "null": type(None),
    }
    names = [shape["type"]] if isinstance(shape.get("type"), str) else shape.get("type", [])
    if names:
        assert any(isinstance(value, kinds[name]) for name in names), place
        assert "boolean" in names or not isinstance(value, bool), place
    assert "enum" not in shape or value in shape["enum"], place
    assert "const" not in shape or value == shape["const"], place
    for name in shape.get("required", ()):
        assert name in value, f"{place}.{name}"
    if "properties" in shape:
        assert value.keys() == shape["properties"].keys(), place
        for name, each in shape["properties"].items():
            conforms_to(value[name], each, root, f"{place}.{name}")
    elif isinstance(shape.get("additionalProperties"), dict):
        for name, each in value.items():
            conforms_to(each, shape["additionalProperties"], root, f"{place}.{name}")
    if "items" in shape:
        for number, each in enumerate(value):
            conforms_to(each, shape["items"], root, f"{place}[{number}]")


def test_the_json_is_valid_under_its_schema(report: Report) -> None:
    conforms_to(json.loads(render_json(report)), schema(), schema())


def test_the_json_contains_the_history_and_its_order() -> None:
    told = json.loads(render_json(full_report()))
    assert (told["schema_version"], told["conforms"], told["level"]) == (2, False, None)
    (race,) = [one["failure"] for one in told["checks"] if one["failure"] and one["failure"]["history"]]
    history = race["history"]
    assert history["answer"] == "violation"
    assert history["operations"][history["unplaced"][0]["operation"]]["answer"] == "True"
    assert history["unplaced"][0]["expected"] == "False"
    assert [one["returned"] for one in history["operations"]].count(None) == 1
    assert (race["reproductions"], race["repetitions"]) == (3, 5)


# JUnit


def test_junit_has_a_case_for_each_check_and_each_problem(report: Report) -> None:
    root = ET.fromstring(render_junit(report))
    cases = root.findall("testsuite/testcase")
    assert len(cases) == len(report.results) + len(report.problems)
    assert {case.get("classname", "").rpartition(".")[2] for case in cases} >= {
        one.check.clauses[0] for one in report.results
    }
    failed = [one for one in report.results if one.status is Status.FAIL]
    assert root.get("failures") == str(len(failed) + len(report.problems))
    assert len(root.findall(".//failure")) == len(failed) + len(report.problems)
    for status, tag in ((Status.INCONCLUSIVE, "error"), (Status.UNSUPPORTED, "skipped")):
        expected = [one for one in report.results if one.status is status]
        assert len(root.findall(f".//{tag}")) >= len(expected)


# Markdown


def test_the_markdown_has_a_row_for_each_clause(report: Report) -> None:
    shown = render_markdown(report)
    for clause in (one.clause.id for one in report.shown_clauses):
        assert len(re.findall(rf"^\| {clause} \| \S+ [A-Z ]+ \| [\d,]* \| .* \|$", shown, re.M)) == 1


def test_a_fence_in_a_program_does_not_end_the_code_block() -> None:
    failing = example_report(
        {"CLM-1": Status.FAIL}, failing=lambda c: Failure(clause=c, message="x", program="'''\n````\n'''")
    )
    assert "`````python\n" in render_markdown(failing)


def test_the_markdown_fits_a_summary() -> None:
    big = example_report(
        dict.fromkeys(CLAUSES, Status.FAIL),
        failing=lambda c: Failure(clause=c, message="x", program="y" * 100_000),
    )
    shown = render_markdown(big)
    assert len(shown.encode()) < 1_000_000
    assert "more causes are in the other report formats" in shown


# HTML


class Page(HTMLParser):
    """Records open tags and the URLs that a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.classes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "data", "action") or (name == "href" and tag != "a"):
                self.loads.append(value or "")
            if name == "class":
                self.classes.append(value or "")


def test_the_page_loads_no_external_resource(report: Report) -> None:
    text = render_page(report)
    page = Page()
    page.feed(text)
    assert all(load.startswith("data:") for load in page.loads)
    assert "@import" not in text
    assert "url(" not in text
    assert page.classes.count("clause") == len(report.shown_clauses)
    assert page.tags.count("script") == page.tags.count("style") == 1
    assert "default-src 'none'" in text


def test_the_page_escapes_texts_of_the_backend() -> None:
    text = render_page(REPORTS["nasty"]())
    assert "&lt;/script&gt;&lt;b&gt;" in text
    assert text.count("</script>") == 1


def test_every_format_can_be_encoded_as_utf8(report: Report) -> None:
    for render in (render_text, render_json, render_junit, render_markdown, render_page, render_badge):
        render(report).encode("utf-8")


# The badge


@pytest.mark.parametrize(
    ("made", "message", "color"),
    [
        (example_report(), "full", "brightgreen"),
        (example_report({"EVT-1": Status.UNSUPPORTED}), "crash-safe", "green"),
        (example_report({"CLM-6": Status.UNSUPPORTED}), "base", "yellowgreen"),
        (example_report({"RUN-1": Status.UNSUPPORTED}), "no level", "yellow"),
        (example_report({"RUN-1": Status.FAIL}), "violates", "red"),
        (example_report({"RUN-1": Status.INCONCLUSIVE}), "undecided", "lightgrey"),
        (example_report(selected=("RUN-1",)), "partial run", "yellow"),
        (example_report({"QRY-2": Status.WAIVED}), "crash-safe, 1 waived", "green"),
    ],
)
def test_the_badge_names_the_level(made: Report, message: str, color: str) -> None:
    badge = json.loads(render_badge(made))
    assert badge == {"schemaVersion": 1, "label": "flowstore contract", "message": message, "color": color}


# The timeline


def test_the_example_history_is_a_violation() -> None:
    verdict = verdict_of(two_winners())
    assert verdict.answer is Answer.VIOLATION
    assert Returned(value=False) in verdict.expected


def test_the_diagram_numbers_the_order_and_marks_the_violation() -> None:
    history = two_winners()
    timeline = lay_out(history, verdict_of(history))
    assert timeline.rows == ("client 0", "client 1", "client 2", "client 3")
    placed = [bar.place for bar in timeline.legend if bar.place]
    assert placed == list(range(1, len(placed) + 1))
    assert [bar.expected for bar in timeline.bars if bar.misfit] == [Returned(value=False)]
    lines = text_timeline(timeline, width=100)
    # Either of the two successful claims may be marked.
    assert sum("✕ True" in line for line in lines[:2]) == 1
    assert lines[3].endswith("…")
    svg = svg_timeline(timeline, label="a race")
    assert ET.fromstring(svg).tag == "svg"
    assert svg.count("<title>") == len(history.operations)


def test_bars_overlap_exactly_where_calls_overlapped() -> None:
    timeline = lay_out(History.of([operation(c, c * 0.5, c * 0.5 + 0.6, Returned(True)) for c in range(4)]))
    lines = text_timeline(timeline, width=80)
    spans = [(line.index("├"), line.index("┤")) for line in lines]
    for (_, end), (begin, _) in pairwise(spans):
        assert begin < end
    for (_, end), (begin, _) in zip(spans, spans[2:], strict=False):
        assert end < begin


def test_a_client_with_an_unacknowledged_call_has_a_second_row() -> None:
    lost = dataclasses.replace(operation(0, 0, 1, Returned(True)), returned=float("inf"))
    history = History.of([lost, operation(0, 0.2, 2, Returned(True)), operation(1, 0.5, 1.5, Returned(True))])
    assert lay_out(history).rows == ("client 0", "client 0", "client 1")


def test_a_long_history_wraps_and_omits_the_least_relevant_calls() -> None:
    history = History.of([operation(n % 3, n, n + 0.5, Returned(True)) for n in range(90)])
    timeline = lay_out(history)
    assert len(timeline.bars) + timeline.left_out == 90
    lines = text_timeline(timeline, width=80)
    assert len(lines) > 3
    assert all(len(line) <= 80 for line in lines)


def test_an_empty_history_is_an_empty_diagram() -> None:
    timeline = lay_out(History(()))
    assert text_timeline(timeline) == []
    assert svg_timeline(timeline, label="nothing").startswith("<svg")
