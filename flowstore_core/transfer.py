"""Transfer: a run as a value that another store can import (XFR).

A backend exports a run as a ``RunArchive`` and stores the archives of others. The pure rules are here: the
claims that an export ends, and whether two archives show the same run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from flowstore_core.claims import StepClaim, StepDispatch
from flowstore_core.errors import InvalidArgumentError
from flowstore_core.events import FlowEventRecord
from flowstore_core.record_json import decode, decode_value, encode
from flowstore_core.redaction import redacted_repr
from flowstore_core.runs import FlowRunRecord
from flowstore_core.signals import BufferedSignal, FlowSignalWaiter
from flowstore_core.status import StepStatus
from flowstore_core.steps import FlowStepAttemptRecord

FORMAT = "flowstore run archive"
VERSION = 1
"""The version of the JSON document that to_json writes. from_json reads it and every earlier one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedStep:
    """A step key with its attempts, its claim and its dispatch, and with marks that no read shows."""

    run_id: UUID
    step_key: str
    status: StepStatus | None = None
    """None if the key never started, or was reset by retry_step."""
    reopened: bool = False
    """Whether retry_step reopened the step and it has not started since (STP-6)."""
    rescheduled: bool = False
    """Whether reschedule_step, repeated for the last attempt, is a no-op (STP-7)."""
    started_owner: str | None = None
    """The owner that started, or skipped, the last attempt (STP-3, STP-5)."""
    attempts: tuple[FlowStepAttemptRecord, ...] = ()
    """All attempts by number; those of a reset step too."""
    claim: StepClaim | None = None
    dispatch: StepDispatch | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedControl:
    """A control record with both latches and their reasons (CTL-2)."""

    __repr__ = redacted_repr

    run_id: UUID
    flow_id: UUID
    trigger_key: str
    idempotency_key: str | None = None
    timeout_at: datetime | None = None
    cancel_requested_at: datetime | None = None
    """When the user cancelled; None if the user did not."""
    cancel_reason: str | None = None
    timed_out_at: datetime | None = None
    timed_out_reason: str | None = None
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedKey:
    """An idempotency key that is registered to the run (IDM-2)."""

    __repr__ = redacted_repr

    flow_id: UUID
    trigger_key: str
    idempotency_key: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedDelivery:
    """A remembered delivery_id and its result (SIG-2, MBX-2)."""

    delivery_id: str
    step_key: str | None = None
    """None if the payload was buffered."""
    delivered_at: datetime | None = None
    """None if the payload was buffered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunArchive:
    """Everything that belongs to one run, from one snapshot (XFR-2).

    Equal archives describe the same state. ``repr`` shows only the id of the run.
    """

    run: FlowRunRecord
    control: ArchivedControl | None = None
    idempotency_keys: tuple[ArchivedKey, ...] = ()
    """Ordered by flow_id, trigger_key, idempotency_key."""
    steps: tuple[ArchivedStep, ...] = ()
    """Ordered by step_key."""
    waiters: tuple[FlowSignalWaiter, ...] = ()
    """Ordered by step_key."""
    deliveries: tuple[ArchivedDelivery, ...] = ()
    """Ordered by delivery_id."""
    buffered: tuple[BufferedSignal, ...] = ()
    """The payloads that no waiter has taken, the oldest first (MBX-1)."""
    outputs: tuple[tuple[str, str], ...] = ()
    """The keys and values of the outputs, ordered by key."""
    events: tuple[FlowEventRecord, ...] = ()
    """Ordered by sequence, which begins at 1 and has no gaps."""

    def __repr__(self) -> str:
        # Of an archive that import_run would refuse too: errors and logs show it.
        return f"RunArchive(run_id={getattr(self.run, 'run_id', None)})"

    @property
    def run_id(self) -> UUID:
        return self.run.run_id

    def to_json(self) -> str:
        """The archive as one line of JSON: ASCII, and the same text for equal archives (XFR-4)."""
        head = {"format": FORMAT, "version": VERSION, "run_id": str(self.run_id)}
        return json.dumps({**head, **encode(self)}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RunArchive:
        """Read the JSON of to_json, of this version or an earlier one.

        Checks the form: import_run checks that the archive is possible. Raises InvalidArgumentError for
        argument ``archive``.
        """
        document = _load(text)
        if document.pop("format", None) != FORMAT:
            raise InvalidArgumentError("archive", f'a JSON object whose "format" is {json.dumps(FORMAT)}')
        version = document.pop("version", None)
        if type(version) is not int or not 1 <= version <= VERSION:
            got = f"version {version}" if type(version) is int else None
            limit = (
                f"of version 1 to {VERSION}, which this flowstore reads" if VERSION > 1 else "of version 1"
            )
            raise InvalidArgumentError("archive.version", f"{limit}; upgrade flowstore for a later one", got)
        run_id = decode_value(UUID, document.pop("run_id", None), "archive.run_id", {})
        archive: RunArchive = decode(cls, document, "archive", {"run_id": run_id})
        return archive


def _load(text: str) -> dict[str, Any]:
    problem = None
    document: Any = None
    try:
        document = json.loads(text, object_pairs_hook=_unique)
    except (TypeError, ValueError, RecursionError) as error:
        problem = type(error).__name__
    # Raised outside the handler: the error of json contains the whole text.
    if problem is not None or not isinstance(document, dict):
        raise InvalidArgumentError("archive", "a text of one JSON object, the result of to_json", problem)
    return document


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in one object")
    return found


def step_at_export(step: ArchivedStep, at: datetime) -> ArchivedStep | None:
    """A stored step key as an export at this time shows it (XFR-2); None if nothing is left of it.

    A claim ends, unless the step is terminal. Marks that no operation can observe are left out, so that equal
    states have equal archives.
    """
    if not step.attempts and step.claim is None and step.dispatch is None:
        return None
    claim = step.claim
    if claim is not None and not _is_terminal(step) and (claim.expires_at is None or claim.expires_at > at):
        claim = replace(claim, expires_at=at)
    is_started = step.status is not None and not step.reopened
    # retry_step keeps the mark, which then counts only if the attempt failed (STP-7).
    is_retried = step.reopened and step.attempts[-1].status is StepStatus.FAILED
    return replace(
        step,
        rescheduled=step.rescheduled and (is_started or is_retried),
        started_owner=step.started_owner if is_started else None,
        claim=claim,
    )


def is_same_run(one: RunArchive, other: RunArchive) -> bool:
    """Whether two archives show the same run; the ends of claims depend on the exports (XFR-3)."""
    return one == other or _without_ends(one) == _without_ends(other)


def _without_ends(archive: RunArchive) -> RunArchive:
    return replace(archive, steps=tuple(_without_end(step) for step in archive.steps))


def _without_end(step: ArchivedStep) -> ArchivedStep:
    if step.claim is None or _is_terminal(step):
        return step
    return replace(step, claim=replace(step.claim, expires_at=None))


def _is_terminal(step: ArchivedStep) -> bool:
    return step.status is not None and step.status.is_terminal


class Transfer(Protocol):
    """Capability TRANSFER: moving runs between stores."""

    async def export_run(self, run_id: UUID) -> RunArchive | None:
        """Everything that belongs to a run, from one snapshot; None if it is not stored (XFR-2).

        Changes nothing. In the archive, claims on steps that are not terminal end now. The archive holds the
        whole run in memory.
        """
        ...

    async def import_run(self, archive: RunArchive) -> bool:
        """Store the run of an archive; True for the one call that did (XFR-3).

        False, changing nothing, if the same run is stored already. Afterwards every operation gives what it
        would have given in the exporting store (XFR-1). Atomic. Replaces a control record and keys of this
        run_id whose run never started.

        Raises InvalidArgumentError for an archive that no operations could have made (XFR-4);
        RunAlreadyExistsError if a different run has the id; ConflictError if one of the keys is registered to
        another run.
        """
        ...
