"""The document of a run, and its JSON encoding.

A document contains the whole state of a run. It is the unit of reading, writing and atomicity (CON-1). Its
values are frozen, so copying its dictionaries copies the run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from flowstore_core import (
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    RunNotFoundError,
    SignalDeliveryResult,
    StepClaim,
    StepDispatch,
    StepStatus,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step with its attempts. Status None: reset by retry_step; the step is not visible."""

    status: StepStatus | None
    attempts: tuple[FlowStepAttemptRecord, ...]
    reopened: bool
    started_owner: str | None


@dataclass(frozen=True, kw_only=True)
class Control:
    """A control record with two separate latches (CTL-2)."""

    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None
    timeout_at: datetime | None
    created_at: datetime
    cancelled_at: datetime | None = None
    cancel_reason: str | None = None
    timed_out_at: datetime | None = None
    timeout_reason: str | None = None


@dataclass(frozen=True)
class Key:
    """The scope of an idempotency key (IDM-1)."""

    flow_id: UUID
    trigger_key: str
    idempotency_key: str


@dataclass(frozen=True)
class RegisteredKey:
    """An idempotency key of the run, and the time of its registration."""

    key: Key
    created_at: datetime


@dataclass(kw_only=True)
class Document:
    """The state of a run. ``run`` is None before start_run, when only controls or keys exist."""

    run: FlowRunRecord | None = None
    control: Control | None = None
    keys: tuple[RegisteredKey, ...] = ()
    steps: dict[str, Step] = field(default_factory=dict)
    claims: dict[str, StepClaim] = field(default_factory=dict)
    dispatches: dict[str, StepDispatch] = field(default_factory=dict)
    waiters: dict[str, FlowSignalWaiter] = field(default_factory=dict)
    deliveries: dict[str, SignalDeliveryResult] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Document:
        """A copy that can be changed without effect on the original."""
        return replace(
            self,
            steps=dict(self.steps),
            claims=dict(self.claims),
            dispatches=dict(self.dispatches),
            waiters=dict(self.waiters),
            deliveries=dict(self.deliveries),
            outputs=dict(self.outputs),
        )

    def clear(self) -> None:
        """Remove all state. An empty document has no file."""
        vars(self).update(vars(Document()))

    def existing_run(self, run_id: UUID) -> FlowRunRecord:
        """The run. Raises RunNotFoundError, for operations that need an existing run (UNK)."""
        if self.run is None:
            raise RunNotFoundError(run_id)
        return self.run

    def statuses(self) -> dict[str, StepStatus]:
        """The statuses of all visible steps, ordered by key."""
        return {key: step.status for key, step in sorted(self.steps.items()) if step.status is not None}


def to_json(document: Document) -> str:
    return json.dumps(_encode(document))


def from_json(text: str) -> Document:
    document: Document = _decode(Document, json.loads(text))
    return document


def _encode(value: Any) -> Any:
    if is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, UUID) else value


def _decode(kind: Any, value: Any) -> Any:
    if value is None:
        return None
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return _decode(kind, value)
    if get_origin(kind) is tuple:
        return tuple(_decode(arguments[0], item) for item in value)
    if get_origin(kind) is dict:
        return {key: _decode(arguments[1], item) for key, item in value.items()}
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        # A field that is missing in an older document gets its default.
        return kind(**{name: _decode(hint, value[name]) for name, hint in hints.items() if name in value})
    return datetime.fromisoformat(value) if kind is datetime else kind(value)
