"""The report as a badge, in the endpoint format of shields.io."""

from __future__ import annotations

import json

from flowstore_conformance.clauses import Level
from flowstore_conformance.report import Report
from flowstore_conformance.status import Status

COLOURS = {Level.FULL: "brightgreen", Level.CRASH_SAFE: "green", Level.BASE: "yellowgreen"}


def render_badge(report: Report) -> str:
    """The badge as JSON: the level, or the verdict if there is none."""
    waived = report.counts[Status.WAIVED]
    if not report.conforms:
        message, colour = report.verdict.lower(), "red" if report.verdict == "VIOLATES" else "lightgrey"
    elif report.level is not None:
        message, colour = ", ".join([report.level.value, *report.limits.reduced()]), COLOURS[report.level]
    else:
        message, colour = ("partial run" if report.selected else "no level"), "yellow"
    if waived:
        message = f"{message}, {waived} waived"
    if report.incomplete and report.verdict != "INCOMPLETE":
        message = f"{message}, incomplete"
    badge = {"schemaVersion": 1, "label": "flowstore contract", "message": message, "color": colour}
    return json.dumps(badge) + "\n"
