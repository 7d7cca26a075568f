"""The report as JSON, as specified by report.schema.json in this folder."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from flowstore_conformance.causes import Cause
from flowstore_conformance.history import UNKNOWN, Operation, Raised
from flowstore_conformance.linearizability import Answer
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.phrasing import outcome_words
from flowstore_conformance.report import Report, anchor
from flowstore_conformance.results import CheckResult, ClauseResult, Failure

SCHEMA_VERSION = 2
"""Increases if a field is removed or changes its meaning; new fields do not change the version."""


def render_json(report: Report) -> str:
    """The report as one JSON document."""
    return json.dumps(document(report), indent=2) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema of the document."""
    text = files("flowstore_conformance.rendering").joinpath("report.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def document(report: Report) -> dict[str, Any]:
    """The report as lists, mappings and strings."""
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": report.verdict,
        "headline": report.headline,
        "conforms": report.conforms,
        "incomplete": report.incomplete,
        "level": report.level,
        "backend": report.backend,
        "url": report.url,
        "capabilities": list(report.capabilities),
        "limits": asdict(report.limits),
        "max_skew_seconds": None if report.max_skew is None else report.max_skew.total_seconds(),
        "versions": dict(report.versions),
        "profile": report.profile,
        "seed": report.seed,
        "variants": list(report.variants),
        "selected": list(report.selected),
        "started_at": report.started_at.isoformat(),
        "seconds": round(report.seconds, 3),
        "counts": {status.value: number for status, number in report.counts.items()},
        "problems": list(report.problems),
        "waivers": [
            {
                "clause": one.waiver.clause,
                "reason": one.waiver.reason,
                "link": one.waiver.link,
                "expires": one.waiver.expires.isoformat(),
                "state": one.state.value,
            }
            for one in report.waivers
        ],
        "left_behind": list(report.left_behind),
        "causes": [_cause(one) for one in report.causes],
        "clauses": [_clause(one) for one in report.clauses],
        "checks": [_check(report, one) for one in report.results],
    }


def _cause(one: Cause) -> dict[str, Any]:
    return {
        "kind": one.kind.word,
        "title": one.title,
        "finding": None if one.finding is None else _finding(one.finding),
        "checks": [result.check.name for result in one.results],
    }


def _finding(one: SignatureFinding) -> dict[str, Any]:
    return {
        "method": one.method,
        "noun": one.noun,
        "problem": one.problem,
        "remedy": one.remedy,
        "place": one.place,
        "capability": one.capability,
    }


def _clause(one: ClauseResult) -> dict[str, Any]:
    return {
        "id": one.clause.id,
        "sentence": one.clause.sentence,
        "contract": anchor(one.clause.id),
        "level": one.clause.level.value,
        "needs": one.clause.needs,
        "status": one.status.value,
        "exercised": one.assertions,
        "reason": one.reason,
        "gap": one.gap,
        "checks": [each.check.name for each in one.results],
    }


def _check(report: Report, result: CheckResult) -> dict[str, Any]:
    return {
        "name": result.check.name,
        "clauses": list(result.check.clauses),
        "kind": result.check.kind.value,
        "sentence": result.check.sentence,
        "status": result.status.value,
        "exercised": result.assertions,
        "seconds": round(result.seconds, 3),
        "reason": result.reason,
        "variant": result.variant,
        "notes": list(result.notes),
        "command": report.command(result),
        "failure": None if result.failure is None else _failure(result.failure),
    }


def _failure(failure: Failure) -> dict[str, Any]:
    return {
        "clause": failure.clause,
        "message": failure.message,
        "reproductions": failure.reproductions,
        "repetitions": failure.repetitions,
        "program": failure.program,
        "program_file": failure.program_file,
        "right_answer": failure.right_answer,
        "traceback": failure.traceback,
        "hung": failure.hung,
        "operation": failure.operation,
        "place": failure.place,
        "error": failure.error,
        "history": None if failure.history is None else _history(failure),
    }


def _history(failure: Failure) -> dict[str, Any]:
    assert failure.history is not None
    operations, verdict = failure.history.operations, failure.verdict
    numbers = {id(one): number for number, one in enumerate(operations)}

    def number(one: Operation) -> int:
        # The search keeps the identity of operations; a deserialized verdict holds equal operations.
        return numbers[id(one)] if id(one) in numbers else operations.index(one)

    misfits = [] if verdict is None or verdict.answer is not Answer.VIOLATION else verdict.unplaced
    return {
        "operations": [_operation(one) for one in operations],
        "answer": None if verdict is None else verdict.answer.value,
        "order": [] if verdict is None else [number(one) for one in verdict.prefix],
        "unplaced": [
            {"operation": number(one), "expected": outcome_words(expected)}
            for one, expected in zip(misfits, verdict.expected if verdict else (), strict=False)
        ],
    }


def _operation(one: Operation) -> dict[str, Any]:
    kind = (
        "unknown" if one.outcome is UNKNOWN else "raised" if isinstance(one.outcome, Raised) else "returned"
    )
    return {
        "client": one.client,
        "call": one.call.source(),
        "invoked": one.invoked,
        "returned": one.returned if math.isfinite(one.returned) else None,
        "outcome": kind,
        "answer": outcome_words(one.outcome),
    }
