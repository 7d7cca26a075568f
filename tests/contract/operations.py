"""Every operation with the kinds of its arguments: what is legal for a kind, and what is not."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from flowstore_core import RunStatus, StepStatus

# A kind that ends in a question mark takes None too.
OPERATIONS: dict[str, dict[str, str]] = {
    "start_run": {
        "flow_id": "id",
        "flow_name": "key",
        "run_id": "id",
        "trigger_key": "key",
        "trigger_data": "text?",
        "job_id": "job?",
        "source_run_id": "id?",
    },
    "complete_run": {"run_id": "id", "status": "completion", "expected": "expected?"},
    "get_runs": {"flow_id": "id?", "skip": "skip", "take": "take"},
    "get_runs_page": {
        "flow_id": "id?",
        "status": "run status?",
        "skip": "skip",
        "take": "take",
        "search": "search?",
    },
    "get_run_detail": {"run_id": "id"},
    "get_run_status": {"run_id": "id"},
    "get_active_runs": {"take": "take?"},
    "get_derived_runs": {"source_run_id": "id", "take": "take?"},
    "record_step_start": {
        "run_id": "id",
        "step_key": "key",
        "step_type": "key",
        "input_json": "text?",
        "job_id": "job?",
        "owner": "key?",
    },
    "record_step_complete": {
        "run_id": "id",
        "step_key": "key",
        "status": "outcome",
        "output_json": "text?",
        "error_message": "text?",
        "attempt": "attempt?",
    },
    "record_skipped_step": {
        "run_id": "id",
        "step_key": "key",
        "step_type": "key",
        "reason": "text?",
        "owner": "key?",
    },
    "retry_step": {"run_id": "id", "step_key": "key", "attempt": "attempt?", "reset": "keys"},
    "get_step_statuses": {"run_id": "id"},
    "reschedule_step": {
        "run_id": "id",
        "step_key": "key",
        "attempt": "attempt",
        "output_json": "text?",
        "due_at": "datetime?",
    },
    "get_stalled_steps": {"as_of": "datetime?", "take": "take"},
    "try_record_dispatch": {"run_id": "id", "step_key": "key", "due_at": "datetime?"},
    "annotate_dispatch": {"run_id": "id", "step_key": "key", "job_id": "job"},
    "release_dispatch": {"run_id": "id", "step_key": "key"},
    "get_dispatched_step_keys": {"run_id": "id"},
    "get_dispatches": {"run_id": "id"},
    "try_claim_step": {"run_id": "id", "step_key": "key", "owner": "key?", "lease": "lease?"},
    "release_step_claim": {"run_id": "id", "step_key": "key", "owner": "key?"},
    "renew_step_claim": {"run_id": "id", "step_key": "key", "owner": "key", "lease": "lease"},
    "get_claimed_step_keys": {"run_id": "id"},
    "get_step_claims": {"run_id": "id"},
    "configure_run": {
        "run_id": "id",
        "flow_id": "id",
        "trigger_key": "key",
        "idempotency_key": "key?",
        "timeout_at": "datetime?",
    },
    "get_run_control": {"run_id": "id"},
    "request_cancel": {"run_id": "id", "reason": "text?"},
    "mark_timed_out": {"run_id": "id", "reason": "text?", "as_of": "datetime?"},
    "find_run_id_by_idempotency_key": {"flow_id": "id", "trigger_key": "key", "idempotency_key": "key"},
    "try_register_idempotency_key": {
        "flow_id": "id",
        "trigger_key": "key",
        "idempotency_key": "key",
        "run_id": "id",
    },
    "trigger_run": {
        "flow_id": "id",
        "flow_name": "key",
        "run_id": "id",
        "trigger_key": "key",
        "trigger_data": "text?",
        "job_id": "job?",
        "source_run_id": "id?",
        "idempotency_key": "key?",
        "timeout_at": "datetime?",
    },
    "get_runs_to_stop": {"as_of": "datetime?", "take": "take"},
    "extend_deadline": {"run_id": "id", "timeout_at": "datetime"},
    "register_waiter": {"run_id": "id", "step_key": "key", "signal_name": "key", "expires_at": "datetime?"},
    "deliver_signal": {"run_id": "id", "signal_name": "key", "payload_json": "text", "delivery_id": "key?"},
    "get_waiter": {"run_id": "id", "step_key": "key"},
    "remove_waiter": {"run_id": "id", "step_key": "key"},
    "expire_waiter": {"run_id": "id", "step_key": "key"},
    "get_waiters": {"run_id": "id"},
    "save_output": {"run_id": "id", "key": "key", "value_json": "text"},
    "get_output": {"run_id": "id", "key": "key"},
    "get_outputs": {"run_id": "id"},
    "append_event": {"run_id": "id", "event_type": "key", "step_key": "key?", "message": "text?"},
    "get_run_events": {"run_id": "id", "after": "after", "take": "take"},
    "cleanup": {"cutoff": "datetime"},
    "get_statistics": {"as_of": "datetime?"},
    "get_run_timeseries": {
        "granularity": "granularity",
        "since": "datetime",
        "until": "datetime",
        "flow_id": "id?",
    },
}

_MOMENT = datetime(2026, 3, 14, 12, tzinfo=UTC)

LEGAL: dict[str, Any] = {
    "id": UUID("00000000-0000-4000-8000-00000000f10e"),
    "key": "charge",
    "job": "job 1",
    "text": "{}",
    "datetime": _MOMENT,
    "attempt": 1,
    "skip": 0,
    "take": 10,
    "after": 0,
    "lease": timedelta(minutes=1),
    "completion": RunStatus.SUCCEEDED,
    "run status": RunStatus.RUNNING,
    "outcome": StepStatus.SUCCEEDED,
    "expected": {"charge": StepStatus.SUCCEEDED},
    "keys": ["ship"],
    "granularity": "hour",
    "search": "orders",
}


class _NoOffset(tzinfo):
    """A tzinfo that does not know its offset: a datetime with it is naive all the same."""

    def utcoffset(self, moment: datetime | None) -> None:
        return None

    def dst(self, moment: datetime | None) -> None:
        return None

    def tzname(self, moment: datetime | None) -> str:
        return "?"


class _Other(StrEnum):
    PAUSED = "Paused"


_TYPES: list[Any] = [1, 1.5, True, b"bytes", [], {}, object(), Decimal(1)]
_NUL_AND_SURROGATES = ["a\0b", "\0", "\ud800", "a\udfff", "\udc80\ud800"]
_TEXTS = [*_TYPES, UUID(int=1), *_NUL_AND_SURROGATES]
_INTS = [-1, -(2**63), 2**63, 2**64, True, False, 1.0, "1", b"1", Decimal(1), float("nan")]
_STATUSES = [1, True, b"Succeeded", "succeeded", "SUCCEEDED", "Succeeded ", "", "Paused", _Other.PAUSED, []]

HOSTILE: dict[str, list[Any]] = {
    "id": [str(UUID(int=1)), UUID(int=1).hex, UUID(int=1).bytes, 1, True, b"", "", object()],
    "key": ["", "x" * 257, "\U0001f600" * 257, *_TEXTS],
    "job": ["", "x" * 1025, *_TEXTS],
    "text": [*_TEXTS, "x" * (16 * 1024 * 1024 + 1), "é" * (8 * 1024 * 1024 + 1)],
    "datetime": [
        datetime(2026, 3, 14),  # noqa: DTZ001 - naive is what it is about
        datetime(2026, 3, 14, tzinfo=_NoOffset()),
        datetime(1, 1, 1, 23, 59, 59, 999_999, UTC),
        datetime.min.replace(tzinfo=UTC),
        datetime(9999, 12, 30, 0, 0, 0, 1, UTC),
        datetime.max.replace(tzinfo=UTC),
        date(2026, 3, 14),
        1_700_000_000,
        1.5,
        "2026-03-14T00:00:00Z",
        timedelta(0),
        True,
    ],
    "attempt": [0, *_INTS],
    "skip": _INTS,
    "take": [1001, *_INTS],
    "after": _INTS,
    "lease": [
        timedelta(0),
        timedelta(microseconds=-1),
        timedelta(days=366, microseconds=1),
        timedelta.max,
        30,
        1.5,
        True,
        "30",
    ],
    "completion": [
        *_STATUSES,
        RunStatus.RUNNING,
        "Running",
        StepStatus.RUNNING,
        "Skipped",
        "Pending",
        "TimedOut",
    ],
    "run status": [*_STATUSES, "Pending", "Skipped"],
    "outcome": [*_STATUSES, StepStatus.RUNNING, "Running", RunStatus.CANCELLED, "Cancelled"],
    "expected": [
        [],
        "charge",
        1,
        {"": "Succeeded"},
        {"x" * 257: "Succeeded"},
        {1: "Succeeded"},
        {"a\0": "Succeeded"},
        {"charge": "succeeded"},
        {"charge": None},
        {"charge": RunStatus.CANCELLED},
        {"charge": 1},
    ],
    "keys": ["charge", b"charge", 1, object(), [""], ["x" * 257], [1], [None], ["a", "\ud800"], {"a\0"}],
    "granularity": [1, True, "", "Hour", "minute", "week", b"hour"],
    "search": ["x" * 257, *_TEXTS],
}


def legal_arguments(operation: str) -> dict[str, Any]:
    """Arguments, all of them given, that no check refuses."""
    arguments = {name: LEGAL[kind.removesuffix("?")] for name, kind in OPERATIONS[operation].items()}
    if operation == "get_run_timeseries":
        arguments["until"] = _MOMENT + timedelta(hours=3)
    return arguments


def hostile_arguments(operation: str) -> list[tuple[str, dict[str, Any]]]:
    """The name of the one bad argument, with all arguments, for everything that must be refused."""
    return [
        (name, {**legal_arguments(operation), name: value})
        for name, kind in OPERATIONS[operation].items()
        for value in HOSTILE[kind.removesuffix("?")] + ([] if kind.endswith("?") else [None])
    ]
