"""Random operations on a small universe of runs, keys and owners, so that they meet often."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import RunStatus, StepStatus
from tests.virtual_clock import VirtualClock

RUNS = [UUID(int=n) for n in (1, 2, 3)]
FLOWS = [UUID(int=n) for n in (11, 12)]
KEYS = ["a", "b", "B", "é"]
OWNERS = ["me", "you", None]
SIGNALS = ["go", "stop"]
OUTCOMES = [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED, StepStatus.PENDING]
ENDINGS = [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED]

Call = tuple[str, dict[str, Any]]


def _moment(rng: random.Random, clock: VirtualClock) -> Any:
    return rng.choice([None, clock() + timedelta(seconds=rng.randint(-20, 20))])


def _start(rng: random.Random) -> dict[str, Any]:
    return {
        "flow_id": rng.choice(FLOWS),
        "flow_name": rng.choice(["orders", "Invoices"]),
        "run_id": rng.choice(RUNS),
        "trigger_key": rng.choice(["manual", "timer"]),
        "trigger_data": rng.choice([None, "data"]),
        "job_id": rng.choice([None, "job"]),
        "source_run_id": rng.choice([None, *RUNS]),
    }


def _step(rng: random.Random) -> dict[str, Any]:
    return {"run_id": rng.choice(RUNS), "step_key": rng.choice(KEYS)}


def _attempt(rng: random.Random) -> Any:
    return rng.choice([None, None, 1, 2, 3, 4])


def _lease(rng: random.Random, owner: str | None) -> Any:
    return rng.choice([None, timedelta(seconds=rng.randint(1, 15))]) if owner else None


def _claim(rng: random.Random) -> dict[str, Any]:
    owner = rng.choice(OWNERS)
    return {**_step(rng), "owner": owner, "lease": _lease(rng, owner)}


def _outcome(rng: random.Random) -> dict[str, Any]:
    return {
        "status": rng.choice(OUTCOMES),
        "output_json": rng.choice([None, "out", "Out"]),
        "error_message": rng.choice([None, "", "error"]),
    }


# How often an operation comes, and its arguments.
MAKERS: dict[str, tuple[int, Callable[[random.Random, VirtualClock], dict[str, Any]]]] = {
    "start_run": (2, lambda r, c: _start(r)),
    "trigger_run": (
        2,
        lambda r, c: {
            **_start(r),
            "idempotency_key": r.choice([None, "k1", "k2"]),
            "timeout_at": _moment(r, c),
        },
    ),
    "try_register_idempotency_key": (
        1,
        lambda r, c: {
            "flow_id": r.choice(FLOWS),
            "trigger_key": "manual",
            "idempotency_key": r.choice(["k1", "k2"]),
            "run_id": r.choice(RUNS),
        },
    ),
    "configure_run": (
        1,
        lambda r, c: {
            "run_id": r.choice(RUNS),
            "flow_id": r.choice(FLOWS),
            "trigger_key": "manual",
            "idempotency_key": r.choice([None, "k1"]),
            "timeout_at": _moment(r, c),
        },
    ),
    "try_record_dispatch": (6, lambda r, c: {**_step(r), "due_at": _moment(r, c)}),
    "annotate_dispatch": (3, lambda r, c: {**_step(r), "job_id": r.choice(["j1", "j2"])}),
    "release_dispatch": (2, lambda r, c: _step(r)),
    "try_claim_step": (10, lambda r, c: _claim(r)),
    "release_step_claim": (3, lambda r, c: {**_step(r), "owner": r.choice(OWNERS)}),
    "renew_step_claim": (
        3,
        lambda r, c: {
            **_step(r),
            "owner": r.choice(OWNERS[:2]),
            "lease": timedelta(seconds=r.randint(1, 20)),
        },
    ),
    "record_step_start": (
        14,
        lambda r, c: {
            **_step(r),
            "step_type": r.choice(["http", "grpc"]),
            "input_json": r.choice([None, "in"]),
            "job_id": r.choice([None, "job"]),
            "owner": r.choice([*OWNERS, None]),
        },
    ),
    "record_step_complete": (14, lambda r, c: {**_step(r), **_outcome(r), "attempt": _attempt(r)}),
    "record_skipped_step": (
        5,
        lambda r, c: {
            **_step(r),
            "step_type": "http",
            "reason": r.choice([None, "reason"]),
            "owner": r.choice(OWNERS),
        },
    ),
    "retry_step": (
        8,
        lambda r, c: {**_step(r), "attempt": _attempt(r), "reset": r.sample(KEYS, r.randint(0, 3))},
    ),
    "reschedule_step": (
        6,
        lambda r, c: {
            **_step(r),
            "attempt": r.randint(1, 3),
            "output_json": r.choice([None, "again"]),
            "due_at": _moment(r, c),
        },
    ),
    "complete_run": (
        3,
        lambda r, c: {
            "run_id": r.choice(RUNS),
            "status": r.choice(ENDINGS),
            "expected": r.choice([None, {}, {"a": r.choice(OUTCOMES)}, {"a": OUTCOMES[0], "b": OUTCOMES[1]}]),
        },
    ),
    "request_cancel": (1, lambda r, c: {"run_id": r.choice(RUNS), "reason": r.choice([None, "user"])}),
    "mark_timed_out": (
        2,
        lambda r, c: {"run_id": r.choice(RUNS), "reason": r.choice([None, "late"]), "as_of": _moment(r, c)},
    ),
    "extend_deadline": (
        1,
        lambda r, c: {"run_id": r.choice(RUNS), "timeout_at": c() + timedelta(seconds=r.randint(-9, 9))},
    ),
    "register_waiter": (
        5,
        lambda r, c: {**_step(r), "signal_name": r.choice(SIGNALS), "expires_at": _moment(r, c)},
    ),
    "deliver_signal": (
        5,
        lambda r, c: {
            "run_id": r.choice(RUNS),
            "signal_name": r.choice(SIGNALS),
            "payload_json": r.choice(["1", "2"]),
            "delivery_id": r.choice([None, "d1", "d2"]),
        },
    ),
    "expire_waiter": (3, lambda r, c: _step(r)),
    "remove_waiter": (2, lambda r, c: _step(r)),
    "save_output": (
        1,
        lambda r, c: {"run_id": r.choice(RUNS), "key": r.choice(KEYS), "value_json": r.choice("12")},
    ),
    "append_event": (
        1,
        lambda r, c: {"run_id": r.choice(RUNS), "event_type": "event", "step_key": r.choice([None, "a"])},
    ),
    "cleanup": (1, lambda r, c: {"cutoff": c() - timedelta(seconds=r.randint(-5, 60))}),
    "get_runs_page": (
        2,
        lambda r, c: {
            "flow_id": r.choice([None, *FLOWS]),
            "status": r.choice([None, *RunStatus]),
            "search": r.choice(["O", "out", "é", "reason", "000-", "supersed"]),
        },
    ),
    "get_stalled_steps": (1, lambda r, c: {"as_of": _moment(r, c), "take": r.randint(0, 5)}),
    "get_runs_to_stop": (1, lambda r, c: {"as_of": _moment(r, c), "take": r.randint(0, 3)}),
    "get_run_timeseries": (
        1,
        lambda r, c: {
            "granularity": r.choice(["hour", "day"]),
            "since": c() - timedelta(hours=r.randint(0, 3)),
            "until": c() + timedelta(hours=r.randint(0, 3)),
            "flow_id": r.choice([None, *FLOWS]),
        },
    ),
    "find_run_id_by_idempotency_key": (
        1,
        lambda r, c: {"flow_id": r.choice(FLOWS), "trigger_key": "manual", "idempotency_key": "k1"},
    ),
}


def random_call(rng: random.Random, clock: VirtualClock) -> Call:
    """An operation with legal arguments."""
    operation = rng.choices(list(MAKERS), [weight for weight, _ in MAKERS.values()])[0]
    return operation, MAKERS[operation][1](rng, clock)


def first_calls(rng: random.Random) -> list[Call]:
    """The starts of all runs but one, so that a history does not begin with unknown runs alone."""
    return [("start_run", {**_start(rng), "run_id": run_id}) for run_id in RUNS[:-1]]
