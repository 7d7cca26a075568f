"""Canary values, and a detector of canaries in errors, logs, warnings and reprs."""

from __future__ import annotations

import asyncio
import inspect
import logging
import pickle
import traceback
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

from flowstore_conformance.archives import full_archive

from flowstore_core import (
    EndedStep,
    FlowStore,
    FlowStoreError,
    RunArchive,
    RunStatus,
    StepRequest,
    StepStatus,
)
from flowstore_core.operations import OPERATIONS as CONTRACT

PASSWORD = "caNary/p@ss?w#rd:1"
"""Unencoded; most of its special characters must be percent-encoded in a URL."""
ENCODED = "caNary%2Fp%40ss%3Fw%23rd%3A1"
PASSWORD_PARTS = ("caNary", "ss?w", "ss%3Fw", "rd:1", "rd%3A1")
"""Fragments of the password, encoded and unencoded."""

CANARY, NAME_CANARY = "wAxbill", "nAmebill"
"""In application data, and in names chosen by the application."""
TEXTS = {
    **dict.fromkeys(
        ("trigger_data", "input_json", "output_json", "error_message", "reason", "payload_json"), CANARY
    ),
    **dict.fromkeys(("idempotency_key", "value_json", "message", "search"), CANARY),
    **dict.fromkeys(("flow_name", "trigger_key", "job_id", "step_type", "owner", "signal_name"), NAME_CANARY),
    **dict.fromkeys(("delivery_id", "event_type", "key", "prefix"), NAME_CANARY),
}
"""Every text argument of the contract except the step key, which errors show."""
OPERATIONS = ("ping", *CONTRACT)


class LeakDetector:
    """Records outputs and finds secrets in them."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str]] = []
        self.errors: list[BaseException] = []

    def record(self, source: str, text: str) -> None:
        self.records.append((source, text))

    def record_error(self, error: BaseException, source: str) -> None:
        """Record the traceback, attributes and pickle of an error and of its chained exceptions."""
        self.errors.append(error)
        self.record(f"traceback of {source}", "".join(traceback.format_exception(error)))
        visited: set[int] = set()
        pending: list[BaseException | None] = [error]
        while pending:
            one = pending.pop()
            if one is None or id(one) in visited:
                continue
            visited.add(id(one))
            self.record(f"{source}: {type(one).__name__}", f"{one} {one!r} {one.args!r} {vars(one)!r}")
            pending += [one.__cause__, one.__context__]
            if isinstance(one, BaseExceptionGroup):
                pending += one.exceptions
        if isinstance(error, FlowStoreError):
            self.record(f"pickle of {source}", pickle.dumps(error).decode("latin-1"))

    def find(self, *secrets: str) -> list[str]:
        """Return the records that contain any of the secrets."""
        return [
            f"{source}: {text}" for source, text in self.records if any(secret in text for secret in secrets)
        ]

    def assert_no_leaks(self) -> None:
        """Fail on a password or row data in any record, and on a name outside the repr of a result."""
        assert self.records, "nothing was recorded, so nothing was checked"
        names = [text for text in self.find(NAME_CANARY) if not text.startswith("result of ")]
        leaks = [text[:1000] for text in (*self.find(CANARY, *PASSWORD_PARTS), *names)]
        assert not leaks, "\n".join(leaks[:5])


class _Handler(logging.Handler):
    def __init__(self, detector: LeakDetector) -> None:
        super().__init__(logging.DEBUG)
        self._detector = detector

    def emit(self, record: logging.LogRecord) -> None:
        text = logging.Formatter("%(message)s").format(record)
        # Structured handlers write the arguments and the extra fields too.
        self._detector.record(f"log of {record.name}", f"{text} {record.args!r} {vars(record)!r}")
        if record.exc_info and record.exc_info[1]:
            self._detector.record_error(record.exc_info[1], f"log of {record.name}")


@contextmanager
def detect_leaks() -> Iterator[LeakDetector]:
    """Record warnings and the messages of every logger at level DEBUG."""
    detector = LeakDetector()
    handler, root = _Handler(detector), logging.getLogger()
    names = ["", *logging.root.manager.loggerDict, "aiosqlite", "asyncpg", "asyncio"]
    levels = {name: logging.getLogger(name).level for name in names}
    for name in levels:
        logging.getLogger(name).setLevel(logging.DEBUG)
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield detector
        for warning in warned:
            detector.record("warning", f"{warning.message} {warning!r}")
    finally:
        root.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@asynccontextmanager
async def detect_leaks_in_loop() -> AsyncIterator[LeakDetector]:
    """Record warnings, log messages and the errors reported by the event loop."""
    loop = asyncio.get_running_loop()
    with detect_leaks() as detector:

        def handle(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            detector.record("event loop", repr(context))
            if error := context.get("exception"):
                detector.record_error(error, "event loop")

        loop.set_exception_handler(handle)
        try:
            yield detector
        finally:
            loop.set_exception_handler(None)


def archive(run_id: UUID) -> RunArchive:
    """An archive of a run with canaries in its application data."""
    full = full_archive(run_id)
    assert full.control is not None
    return replace(
        full,
        run=replace(full.run, trigger_data=CANARY, flow_name=NAME_CANARY),
        control=replace(full.control, cancel_reason=CANARY, timed_out_reason=CANARY, idempotency_key=CANARY),
        idempotency_keys=tuple(
            replace(one, idempotency_key=f"{CANARY} of {run_id} {number}")
            for number, one in enumerate(full.idempotency_keys)
        ),
        waiters=tuple(replace(one, payload_json=one.payload_json and CANARY) for one in full.waiters),
        outputs=((NAME_CANARY, CANARY),),
        events=tuple(replace(one, message=CANARY) for one in full.events),
    )


def values(run_id: UUID) -> dict[str, Any]:
    """Return a value for every parameter of the contract; texts contain canaries."""
    time = datetime(2026, 3, 14, tzinfo=UTC)
    return {
        **{name: f"{marker} in {name}" for name, marker in TEXTS.items()},
        "run_id": run_id,
        "archive": archive(UUID(int=run_id.int ^ 1)),
        "flow_id": UUID(int=7),
        "source_run_id": run_id,
        "step_key": "step",
        "status": None,
        "expected": None,
        "lease": timedelta(seconds=60),
        "due_at": None,
        "timeout_at": time,
        "expires_at": time,
        "as_of": None,
        "cutoff": time,
        "since": time,
        "until": time + timedelta(hours=3),
        "granularity": "hour",
        "reset": (),
        "attempt": 1,
        "buffer": True,
        "run_ids": [run_id],
        "claims": [(run_id, "step", f"{NAME_CANARY} in claims")],
        "steps": [
            EndedStep(
                run_id=run_id,
                step_key="step",
                status=StepStatus.SUCCEEDED,
                attempt=1,
                owner=f"{NAME_CANARY} in steps",
                output_json=f"{TEXTS['output_json']} in steps",
            )
        ],
        "outputs": {f"{NAME_CANARY} in outputs": f"{CANARY} in outputs"},
        "tags": {"customer": f"{CANARY} in tags"},
        "after": None,
        "skip": 0,
        "take": 10,
        "queue": "queue",
        "queues": ["queue"],
        "priority": 1,
        "limit": 10,
        "timeout": timedelta(milliseconds=1),
        "worker": "worker",
        "complete_as": RunStatus.SUCCEEDED,
        "failed_as": RunStatus.FAILED,
        "dispatch": [
            StepRequest(
                step_key="next",
                step_type="task",
                queue="queue",
                input_json=f"{TEXTS['input_json']} in dispatch",
            )
        ],
    }


async def exercise(
    store: FlowStore, detector: LeakDetector, run_id: UUID | None = None, *, rounds: int = 2, **overrides: Any
) -> int:
    """Call every operation ``rounds`` times and return the number of calls that raised."""
    run_id = run_id or uuid4()
    given = {**values(run_id), **overrides}
    before = len(detector.errors)
    for round_ in range(rounds):
        for name in OPERATIONS:
            operation = getattr(store, name)
            arguments = _arguments(name, operation, given)
            try:
                result = await operation(**arguments)
            except FlowStoreError as error:
                detector.record_error(error, f"{name}, round {round_}")
            else:
                if not isinstance(result, (str, frozenset, Mapping)):
                    detector.record(f"result of {name}", repr(result))
    return len(detector.errors) - before


def _arguments(name: str, operation: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {key: given[key] for key in inspect.signature(operation).parameters}
    if "after" in arguments and name == "get_run_events":
        arguments["after"] = 0
    if name == "delete_run":
        arguments["run_id"] = uuid4()  # The run is needed by the next round and the caller.
    if name == "complete_run":
        arguments["status"] = RunStatus.FAILED
    elif name in ("record_step_complete", "advance_run"):
        arguments["status"] = StepStatus.FAILED
    return arguments
