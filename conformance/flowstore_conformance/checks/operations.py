"""The kind of each argument of every operation, with legal and illegal values of each kind."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, tzinfo
from decimal import Decimal
from enum import StrEnum
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import full_archive
from flowstore_conformance.checks.impossible_archives import impossible_archives
from flowstore_core import Capability, EndedStep, RunPosition, RunStatus, StepRequest, StepStatus, StoreLimits
from flowstore_core.operations import KEYWORD_CAPABILITIES

_DETAIL = {"run_id": "id"}
_STEP = {"run_id": "id", "step_key": "key"}
_SCOPE = {"flow_id": "id", "trigger_key": "key", "idempotency_key": "key"}
_START = {
    "flow_id": "id",
    "flow_name": "key",
    "run_id": "id",
    "trigger_key": "key",
    "trigger_data": "text?",
    "job_id": "job?",
    "source_run_id": "id?",
    "tags": "tags?",
}
_PAGE = {"skip": "skip", "take": "take"}

# A kind that ends in a question mark takes None too.
ARGUMENT_KINDS: dict[str, dict[str, str]] = {
    "start_run": _START,
    "complete_run": {**_DETAIL, "status": "completion", "expected": "expected?"},
    "get_runs": {"flow_id": "id?", "after": "position?", **_PAGE, "tags": "tags?"},
    "get_runs_page": {
        "flow_id": "id?",
        "status": "run status?",
        "after": "position?",
        **_PAGE,
        "search": "search?",
        "tags": "tags?",
    },
    "get_run": _DETAIL,
    "get_run_detail": _DETAIL,
    "get_run_status": _DETAIL,
    "set_tags": {**_DETAIL, "tags": "tag changes"},
    "get_active_runs": {"take": "take?"},
    "get_derived_runs": {"source_run_id": "id", "take": "take?"},
    "record_step_start": {
        **_STEP,
        "step_type": "key",
        "input_json": "text?",
        "job_id": "job?",
        "owner": "key?",
    },
    "record_step_complete": {
        **_STEP,
        "status": "outcome",
        "output_json": "text?",
        "error_message": "text?",
        "attempt": "attempt?",
        "owner": "key?",
    },
    "record_skipped_step": {**_STEP, "step_type": "key", "reason": "text?", "owner": "key?"},
    "retry_step": {**_STEP, "attempt": "attempt?", "reset": "keys", "dispatch": "requests"},
    "get_step": _STEP,
    "get_step_statuses": _DETAIL,
    "reschedule_step": {
        **_STEP,
        "attempt": "attempt",
        "output_json": "text?",
        "error_message": "text?",
        "due_at": "datetime?",
        "owner": "key?",
    },
    "get_stalled_steps": {"as_of": "datetime?", "take": "take"},
    "try_record_dispatch": {
        **_STEP,
        "due_at": "datetime?",
        "queue": "key?",
        "priority": "priority",
        # queue needs a step_type.
        "step_type": "key",
        "input_json": "text?",
    },
    "annotate_dispatch": {**_STEP, "job_id": "job"},
    "release_dispatch": _STEP,
    "get_dispatched_step_keys": _DETAIL,
    "get_dispatches": _DETAIL,
    "try_claim_step": {**_STEP, "owner": "key?", "lease": "lease?"},
    "try_start_step": {
        **_STEP,
        "step_type": "key",
        "owner": "key",
        "lease": "lease",
        "input_json": "text?",
        "job_id": "job?",
    },
    "release_step_claim": {**_STEP, "owner": "key?"},
    "renew_step_claim": {**_STEP, "owner": "key", "lease": "lease"},
    "renew_step_claims": {"claims": "claims", "lease": "lease"},
    "get_claimed_step_keys": _DETAIL,
    "get_step_claims": _DETAIL,
    "claim_next_steps": {"queues": "queues", "lease": "lease", "limit": "limit", "worker": "job?"},
    "advance_run": {
        **_STEP,
        "status": "final outcome",
        "attempt": "attempt",
        "owner": "key?",
        "output_json": "text?",
        "error_message": "text?",
        "dispatch": "requests",
        "complete_as": "completion?",
        "failed_as": "completion?",
    },
    "advance_runs": {"steps": "ended steps"},
    "redispatch_step": {**_STEP, "queue": "key?", "priority": "priority?", "due_at": "datetime?"},
    "get_queues": {},
    "wait_for_steps": {"queues": "queues", "timeout": "timeout"},
    "wait_for_run": {**_DETAIL, "timeout": "timeout"},
    "configure_run": {
        **_DETAIL,
        "flow_id": "id",
        "trigger_key": "key",
        "idempotency_key": "key?",
        "timeout_at": "datetime?",
    },
    "get_run_control": _DETAIL,
    "get_run_controls": {"run_ids": "ids"},
    "request_cancel": {**_DETAIL, "reason": "text?"},
    "mark_timed_out": {**_DETAIL, "reason": "text?", "as_of": "datetime?"},
    "find_run_id_by_idempotency_key": _SCOPE,
    "try_register_idempotency_key": {**_SCOPE, "run_id": "id"},
    "trigger_run": {
        **_START,
        "idempotency_key": "key?",
        "timeout_at": "datetime?",
        "dispatch": "first requests",
    },
    "get_runs_to_stop": {"as_of": "datetime?", "take": "take"},
    "extend_deadline": {**_DETAIL, "timeout_at": "datetime"},
    "register_waiter": {**_STEP, "signal_name": "key", "expires_at": "datetime?"},
    "deliver_signal": {
        **_DETAIL,
        "signal_name": "key",
        "payload_json": "text",
        "delivery_id": "key?",
        "buffer": "bool",
    },
    "get_waiter": _STEP,
    "remove_waiter": _STEP,
    "expire_waiter": _STEP,
    "get_waiters": _DETAIL,
    "get_buffered_signals": _DETAIL,
    "save_output": {**_DETAIL, "key": "key", "value_json": "text"},
    "save_outputs": {**_DETAIL, "outputs": "outputs"},
    "get_output": {**_DETAIL, "key": "key"},
    "get_outputs": {**_DETAIL, "prefix": "prefix", "after": "key?", "take": "take?"},
    "delete_outputs": {**_DETAIL, "prefix": "prefix"},
    "append_event": {**_DETAIL, "event_type": "key", "step_key": "key?", "message": "text?"},
    "get_run_events": {**_DETAIL, "after": "after", "take": "take"},
    "export_run": _DETAIL,
    "import_run": {"archive": "archive"},
    "cleanup": {"cutoff": "datetime"},
    "delete_run": _DETAIL,
    "get_statistics": {"as_of": "datetime?"},
    "get_run_timeseries": {
        "granularity": "granularity",
        "since": "datetime",
        "until": "datetime",
        "flow_id": "id?",
    },
}

RUN = UUID("00000000-0000-4000-8000-00000000f10e")
"""The run that legal arguments name."""

_MOMENT = datetime(2026, 3, 14, 12, tzinfo=UTC)
_REQUEST = StepRequest(step_key="ship", step_type="http")
_ENDED = EndedStep(run_id=RUN, step_key="charge", status=StepStatus.SUCCEEDED, attempt=1, dispatch=[_REQUEST])

LEGAL: dict[str, Any] = {
    "id": RUN,
    "key": "charge",
    "job": "job 1",
    "text": "{}",
    "prefix": "char",
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
    "ids": [RUN],
    "claims": [(RUN, "charge", "me")],
    "outputs": {"charge": "{}"},
    "granularity": "hour",
    "search": "orders",
    "position": RunPosition(started_at=_MOMENT, run_id=RUN),
    "priority": 1,
    "bool": True,
    "queues": ["default"],
    "limit": 1,
    "timeout": timedelta(milliseconds=1),
    "final outcome": StepStatus.SUCCEEDED,
    "requests": [_REQUEST],
    "ended steps": [_ENDED],
    "first requests": [_REQUEST],
    "archive": full_archive(RUN),
    "tags": {"env": "test"},
    "tag changes": {"env": "test", "team": None},
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


def _request(**given: Any) -> StepRequest:
    return replace(_REQUEST, **given)


_TYPES: list[Any] = [1, 1.5, True, b"bytes", [], {}, object(), Decimal(1)]
_NO_TEXT: list[Any] = [*_TYPES, UUID(int=1), "a\0b", "\0", "\ud800", "a\udfff", "\udc80\ud800"]
_NO_INT: list[Any] = [-1, -(2**63), 2**63, 2**64, True, False, 1.0, "1", b"1", Decimal(1), float("nan")]
_NO_STATUS: list[Any] = [1, True, b"Succeeded", "succeeded", "SUCCEEDED", "Succeeded ", "", _Other.PAUSED, []]
_NO_REQUESTS: list[Any] = [
    "ship",
    1,
    object(),
    {"ship": _REQUEST},
    [None],
    ["ship"],
    [{"step_key": "ship", "step_type": "http"}],
    [_REQUEST, _REQUEST],
    *(
        [_request(**{name: value})]
        for name in ("step_key", "step_type", "queue")
        for value in ("", "x" * 257, "a\0", "\ud800", 1, None)
    ),
    *([_request(input_json=value)] for value in (1, b"{}", "a\0", "\ud800", "x" * (16 * 1024 * 1024 + 1))),
    *([_request(priority=value)] for value in (-1, 10, True, 1.0, "1", None)),
    *([_request(due_at=value)] for value in (datetime(2026, 3, 14), 1, "2026-03-14")),  # noqa: DTZ001
    *([_request(accept=value)] for value in ((), None, "Succeeded", ["succeeded"], ["Running"], ["Pending"])),
    *([_request(accept=value)] for value in ([RunStatus.CANCELLED], [1])),
    [_request(step_key=f"step {number}") for number in range(1001)],
]
_NO_AFTER: list[Any] = [
    *([_request(after=value)] for value in ("charge", 1, None, [1], [""], ["x" * 257], ["a\0"])),
    # A request waits neither for its own step nor twice for another one.
    *([_request(after=value)] for value in (["ship"], ["a", "a"])),
    [_request(after=[f"step {number}" for number in range(10_001)])],
    [_request(step_key=f"step {n}", after=[f"after {m}" for m in range(101)]) for n in range(100)],
]

_NO_TAGS: list[Any] = [
    [],
    "env",
    1,
    True,
    object(),
    [("env", "test")],
    {"env"},
    *({key: "test"} for key in ("", "x" * 257, 1, None, b"env", "a\0", "\ud800")),
    *({"env": value} for value in ("", "x" * 257, "\U0001f600" * 257, 1, True, b"test", "a\0", "a\udfff")),
    {f"key {number}": "test" for number in range(33)},
]

HOSTILE: dict[str, list[Any]] = {
    "id": [str(UUID(int=1)), UUID(int=1).hex, UUID(int=1).bytes, 1, True, b"", "", object()],
    "key": ["", "x" * 257, "\U0001f600" * 257, *_NO_TEXT],
    "job": ["", "x" * 1025, *_NO_TEXT],
    "prefix": ["x" * 257, "\U0001f600" * 257, *_NO_TEXT],
    "text": [*_NO_TEXT, "x" * (16 * 1024 * 1024 + 1)],
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
    "attempt": [0, *_NO_INT],
    "skip": _NO_INT,
    "take": [1001, *_NO_INT],
    "after": _NO_INT,
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
    "completion": [*_NO_STATUS, "Running", StepStatus.RUNNING, "Skipped", "Pending", "TimedOut"],
    "run status": [*_NO_STATUS, "Pending", "Skipped"],
    "outcome": [*_NO_STATUS, "Running", RunStatus.RUNNING, RunStatus.CANCELLED, "Cancelled"],
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
    ],
    "keys": ["charge", b"charge", 1, object(), [""], ["x" * 257], [1], [None], ["a", "\ud800"], {"a\0"}],
    "ids": ["charge", b"charge", 1, object(), [str(RUN)], [RUN.bytes], [None], [RUN] * 1001],
    "claims": [
        "charge",
        1,
        object(),
        {(RUN, "charge", "me")},
        [RUN],
        ["abc"],
        [(RUN, "charge")],
        [[RUN, "charge", "me"]],
        [(RUN, "charge", None)],
        [(RUN, "", "me")],
        [(str(RUN), "charge", "me")],
        [(RUN, "charge", "a\0")],
        [(RUN, "x" * 257, "me")],
        [(RUN, "charge", "me")] * 1001,
    ],
    "outputs": [
        [],
        "charge",
        [("charge", "1")],
        {"": "1"},
        {"x" * 257: "1"},
        {1: "1"},
        {"a\0": "1"},
        {"charge": None},
        {"charge": 1},
        {"charge": b"1"},
        {"charge": "a\0"},
        {"charge": "\ud800"},
        {"a": "x" * (8 * 1024 * 1024), "b": "\u00e9" * (4 * 1024 * 1024), "c": "x"},
        {str(number): "1" for number in range(1001)},
    ],
    "granularity": [1, True, "", "Hour", "minute", "week", b"hour"],
    "search": ["x" * 257, *_NO_TEXT],
    "position": [
        RUN,
        _MOMENT,
        (_MOMENT, RUN),
        str(LEGAL["position"]),
        {"started_at": _MOMENT, "run_id": RUN},
        RunPosition(started_at=datetime(2026, 3, 14), run_id=RUN),  # noqa: DTZ001
        RunPosition(started_at=datetime(1, 1, 1, tzinfo=UTC), run_id=RUN),
        RunPosition(started_at="2026-03-14T00:00:00Z", run_id=RUN),  # type: ignore[arg-type]
        RunPosition(started_at=_MOMENT, run_id=str(RUN)),  # type: ignore[arg-type]
        RunPosition(started_at=_MOMENT, run_id=None),  # type: ignore[arg-type]
        *_TYPES,
    ],
    "priority": [10, *_NO_INT],
    "bool": [0, 1, 1.0, "", "True", b"1", [], object(), Decimal(1)],
    "queues": [
        "default",
        [],
        1,
        [""],
        ["x" * 257],
        [1],
        [None],
        ["a\0"],
        [f"queue {number}" for number in range(101)],
    ],
    "limit": [0, 1001, *_NO_INT],
    "timeout": [
        timedelta(0),
        timedelta(microseconds=-1),
        timedelta(hours=1, microseconds=1),
        timedelta.max,
        30,
        1.5,
        True,
        "30",
        None,
    ],
    "final outcome": [*_NO_STATUS, "Pending", "Running", RunStatus.RUNNING, RunStatus.CANCELLED, "Cancelled"],
    "requests": [*_NO_REQUESTS, *_NO_AFTER],
    "archive": impossible_archives(RUN),
    "first requests": [*_NO_REQUESTS, *_NO_AFTER, [_request(after=["charge"])]],
    "tags": [*_NO_TAGS, {"env": None}],
    "tag changes": [*_NO_TAGS, dict.fromkeys(map(str, range(33)))],
}

HOSTILE["ended steps"] = [
    "charge",
    1,
    object(),
    {1: _ENDED},
    [None],
    [_REQUEST],
    [{"run_id": RUN, "step_key": "charge", "status": "Succeeded", "attempt": 1}],
    [_ENDED] * 1001,
    *(
        [_ENDED, replace(_ENDED, **{name: value})]
        for name, kind in ARGUMENT_KINDS["advance_run"].items()
        # Texts of 16 MiB are tried with advance_run.
        for value in (HOSTILE[kind.removesuffix("?")] if kind != "text?" else _NO_TEXT)
    ),
]


def legal_arguments(operation: str) -> dict[str, Any]:
    """Arguments, all of them given, that nothing refuses on their own account."""
    arguments = {name: LEGAL[kind.removesuffix("?")] for name, kind in ARGUMENT_KINDS[operation].items()}
    if operation == "get_run_timeseries":
        arguments["until"] = _MOMENT + timedelta(hours=3)
    return arguments


def offered_arguments(operation: str, capabilities: Collection[Capability]) -> dict[str, Any]:
    """The legal arguments without the keywords of capabilities that the store lacks."""
    keywords = KEYWORD_CAPABILITIES.get(operation, {})
    return {
        name: value
        for name, value in legal_arguments(operation).items()
        if keywords.get(name) is None or keywords[name] in capabilities
    }


def arguments_beyond(operation: str, limits: StoreLimits) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of one argument with all arguments, where this one is a byte or an item beyond a limit.

    A key has at most 256 characters, so it cannot be longer than the largest limit of keys.
    """
    text = "x" * (limits.text_bytes + 1)
    wide = limits.key_bytes // 4
    key = "\U0001f600" * wide + "x" * (limits.key_bytes + 1 - 4 * wide)
    long: dict[str, list[Any]] = {
        "text": [text],
        "take": [limits.page_size + 1],
        "outputs": [{"charge": text}, {"a": text[:-2], "b": "\u00e9"}],
        "requests": [[_request(input_json=text)]],
        "first requests": [[_request(input_json=text)]],
    }
    if len(key) <= 256:
        of_request = [[_request(**{name: key})] for name in ("step_key", "step_type", "queue")]
        long["key"] = long["prefix"] = [key]
        long["keys"] = long["queues"] = [["charge", key]]
        long["expected"] = [{key: StepStatus.SUCCEEDED}]
        long["claims"] = [[(RUN, key, "me")], [(RUN, "charge", key)]]
        long["outputs"].append({key: "{}"})
        long["tags"] = [{key: "test"}, {"env": key}]
        long["tag changes"] = [{key: None}, {"env": key}]
        long["requests"] += [*of_request, [_request(after=(key,))]]
        long["first requests"] += of_request
    for name, kind in ARGUMENT_KINDS[operation].items():
        for value in long.get(kind.removesuffix("?"), ()):
            yield name, {**legal_arguments(operation), name: value}


def hostile_arguments(operation: str, kinds: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of the one bad argument, of some kinds, with all arguments, for all that must be refused."""
    for name, kind in ARGUMENT_KINDS[operation].items():
        plain = kind.removesuffix("?")
        if plain in kinds:
            for value in HOSTILE[plain] + ([] if kind.endswith("?") else [None]):
                yield name, {**legal_arguments(operation), name: value}
