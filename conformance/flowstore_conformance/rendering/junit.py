"""The report as JUnit XML: a test case for each check, its class named after the clause."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.rendering.text import failure_text, finding_lines
from flowstore_conformance.report import Report
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status

SUITE = "flowstore_conformance"

# Characters that XML 1.0 excludes, escaped or not.
_ILLEGAL = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_junit(report: Report) -> str:
    """The report as one JUnit document. Inconclusive checks count as errors, waived ones as skipped."""
    suites = ET.Element("testsuites", name=SUITE)
    suite = ET.SubElement(suites, "testsuite", name=f"{SUITE} {report.backend}")
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("url", report.url),
        ("profile", report.profile),
        ("seed", str(report.seed)),
        ("verdict", report.verdict),
        ("level", report.level or "none"),
        ("incomplete", report.incomplete or "no"),
        *report.versions.items(),
    ):
        ET.SubElement(properties, "property", name=name, value=_legal(value))
    for result in report.results:
        _case(report, suite, result)
    if report.incomplete is not None:
        case = ET.SubElement(suite, "testcase", classname=SUITE, name="the run is complete", time="0")
        ET.SubElement(case, "error", message=report.incomplete, type="incomplete")
    for cause in report.causes:
        if cause.finding is not None:
            _finding(suite, cause.finding)
    for one in report.waivers:
        if one.problem is not None:
            case = ET.SubElement(
                suite, "testcase", classname=f"{SUITE}.waivers", name=one.waiver.clause, time="0"
            )
            ET.SubElement(case, "failure", message=one.problem, type="waiver")
    for element in (suites, suite):
        element.set("tests", str(len(suite.findall("testcase"))))
        for counted, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            element.set(counted, str(len(suite.findall(f"testcase/{tag}"))))
        element.set("time", f"{report.seconds:.3f}")
    suite.set("timestamp", report.started_at.isoformat(timespec="seconds"))
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _finding(suite: ET.Element, finding: SignatureFinding) -> None:
    case = ET.SubElement(
        suite, "testcase", classname=f"{SUITE}.signatures", name=f"{finding.noun}.{finding.method}", time="0"
    )
    found = ET.SubElement(case, "failure", message=_legal(finding.title), type="signature")
    found.text = _legal("\n".join(finding_lines(finding)))


def _case(report: Report, suite: ET.Element, result: CheckResult) -> None:
    case = ET.SubElement(
        suite,
        "testcase",
        classname=f"{SUITE}.{result.check.clauses[0]}",
        name=result.check.name,
        time=f"{result.seconds:.3f}",
    )
    if result.notes:
        ET.SubElement(case, "system-out").text = _legal("\n".join(result.notes))
    reason = _legal(result.reason or "")
    if result.status is Status.FAIL and result.failure is not None:
        message = _legal(f"{result.failure.clause}: {result.failure.message}")
        found = ET.SubElement(case, "failure", message=message, type=result.failure.clause)
        found.text = _legal(failure_text(report, result))
    elif result.status is Status.INCONCLUSIVE:
        ET.SubElement(case, "error", message=reason, type="inconclusive")
    elif result.status is not Status.PASS:
        ET.SubElement(case, "skipped", message=f"{result.status.value}: {reason}")


def _legal(text: str) -> str:
    return _ILLEGAL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
