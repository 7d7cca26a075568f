"""Limits of arguments, which are checked before the backend is called, and of reads."""

from __future__ import annotations

import inspect
import sys
import tracemalloc
from contextlib import AsyncExitStack
from dataclasses import replace
from io import BytesIO, TextIOWrapper
from typing import Any
from uuid import uuid4

import pytest

from flowstore_cli.failures import Failure
from flowstore_cli.stores import read_stdin
from flowstore_core import Capability, EndedStep, FlowStore, InvalidArgumentError, StepRequest, StepStatus
from flowstore_core.queues import MAX_PRIORITY
from flowstore_core.validated_store import ValidatedStore
from flowstore_core.validation import (
    MAX_CLAIMS,
    MAX_JOB_ID,
    MAX_KEY,
    MAX_KEYS,
    MAX_QUEUES,
    MAX_REQUESTS,
    MAX_SEARCH,
    MAX_TAGS,
    MAX_TAKE,
    MAX_TEXT_BYTES,
)
from tests.security.leaks import CANARY, OPERATIONS, TEXTS, archive, values

KEYS = {
    *("step_key", "trigger_key", "idempotency_key", "signal_name", "step_type", "flow_name", "owner"),
    *("event_type", "key", "prefix", "delivery_id", "queue"),
}
LIMITS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(KEYS, ("x" * (MAX_KEY + 1), f"{MAX_KEY:,}")),
    "job_id": ("x" * (MAX_JOB_ID + 1), f"{MAX_JOB_ID:,}"),
    "worker": ("x" * (MAX_JOB_ID + 1), f"{MAX_JOB_ID:,}"),
    "queues": ([f"{CANARY} {n}" for n in range(MAX_QUEUES + 1)], f"{MAX_QUEUES}"),
    "limit": (MAX_CLAIMS + 1, f"{MAX_CLAIMS:,}"),
    "priority": (MAX_PRIORITY + 1, f"{MAX_PRIORITY}"),
    "dispatch": ([StepRequest(step_key=CANARY, step_type="task")] * (MAX_REQUESTS + 1), f"{MAX_REQUESTS:,}"),
    "run_ids": ([uuid4()] * (MAX_TAKE + 1), f"{MAX_TAKE:,}"),
    "claims": ([(uuid4(), CANARY, CANARY)] * (MAX_TAKE + 1), f"{MAX_TAKE:,}"),
    "steps": (
        [EndedStep(run_id=uuid4(), step_key=CANARY, status=StepStatus.FAILED, attempt=1)] * (MAX_TAKE + 1),
        f"{MAX_TAKE:,}",
    ),
    "outputs": ({f"{CANARY} {n}": CANARY for n in range(MAX_TAKE + 1)}, f"{MAX_TAKE:,}"),
    "tags": ({f"{CANARY} {n}": CANARY for n in range(MAX_TAGS + 1)}, f"{MAX_TAGS}"),
    "search": (CANARY * MAX_SEARCH, f"{MAX_SEARCH}"),
    "take": (MAX_TAKE + 1, f"{MAX_TAKE:,}"),
    "skip": (2**63, "9,223,372,036,854,775,807"),
    "attempt": (2**63, "9,223,372,036,854,775,807"),
    "reset": ([CANARY] * (MAX_KEYS + 1), f"{MAX_KEYS:,}"),
    "expected": ({n: n for n in range(MAX_KEYS + 1)}, f"{MAX_KEYS:,}"),
}
TEXT = CANARY * (MAX_TEXT_BYTES // len(CANARY) + 1)
_ARCHIVE = archive(uuid4())
LIMITS["archive"] = replace(_ARCHIVE, run=replace(_ARCHIVE.run, trigger_data=TEXT)), f"{MAX_TEXT_BYTES:,}"


class _UnreachableBackend:
    """A backend that fails the test when it is called."""

    def __getattr__(self, name: str) -> Any:
        async def fail(**_: object) -> None:
            pytest.fail(f"{name} was called")

        return fail


@pytest.fixture
async def store() -> FlowStore:
    return ValidatedStore(_UnreachableBackend(), "unreachable", frozenset(Capability), AsyncExitStack())


def _arguments(operation: str, store: FlowStore) -> dict[str, Any]:
    valid = {**values(uuid4()), "status": "Failed"}
    if operation == "get_run_events":
        valid["after"] = 0
    return {name: valid[name] for name in inspect.signature(getattr(store, operation)).parameters}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_every_argument_of_every_operation_is_limited(operation: str, store: FlowStore) -> None:
    arguments = _arguments(operation, store)
    for name in arguments:
        value, limit = LIMITS.get(name, (TEXT, f"{MAX_TEXT_BYTES:,}"))
        if name not in LIMITS and name not in TEXTS:
            # Ids, times and choices have a fixed size.
            continue
        with pytest.raises(InvalidArgumentError) as caught:
            await getattr(store, operation)(**{**arguments, name: value})
        # A value in an archive is named with its path.
        assert caught.value.argument.partition(".")[0] == name
        assert limit in str(caught.value), (name, str(caught.value))
        assert CANARY not in str(caught.value)


async def test_every_argument_has_a_known_limit(store: FlowStore) -> None:
    """A new argument of the contract fails this test until its limit is tested."""
    fixed = {
        *("run_id", "flow_id", "source_run_id", "status", "lease", "due_at", "timeout_at", "expires_at"),
        *("as_of", "cutoff", "since", "until", "granularity", "after"),
        *("timeout", "complete_as", "failed_as", "buffer"),
    }
    known = fixed | set(LIMITS) | set(TEXTS)
    for operation in OPERATIONS:
        assert set(inspect.signature(getattr(store, operation)).parameters) <= known, operation


async def test_lists_are_limited(store: FlowStore) -> None:
    """Only get_active_runs, get_derived_runs and get_outputs have no default for ``take``."""
    lists = [name for name in OPERATIONS if "take" in inspect.signature(getattr(store, name)).parameters]
    defaults = {name: inspect.signature(getattr(store, name)).parameters["take"].default for name in lists}
    assert {name for name, take in defaults.items() if take is None} == {
        "get_active_runs",
        "get_derived_runs",
        "get_outputs",
    }
    assert all(take <= MAX_TAKE for take in defaults.values() if take is not None)


async def test_a_rejected_large_text_is_not_copied(store: FlowStore) -> None:
    arguments = _arguments("start_run", store)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InvalidArgumentError):
            await store.start_run(**{**arguments, "trigger_data": TEXT})
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    finally:
        tracemalloc.stop()


def test_the_command_line_stops_reading_at_the_payload_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    piped = BytesIO(b"x" * (MAX_TEXT_BYTES + 1000))
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(piped))
    with pytest.raises(Failure, match="at most 16,777,216 bytes"):
        read_stdin()
    assert piped.tell() == MAX_TEXT_BYTES + 1
