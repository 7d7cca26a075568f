"""The documents of a run, and the rules on one of them.

None is part of a reference cycle, so the garbage collector need not visit them: ``gc=False``.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from uuid import UUID

from msgspec import Struct

from flowstore_core import FlowRunRecord, RunStatus, SignalDeliveryStatus, StallReason, StepStatus
from flowstore_core.status import TERMINAL_RUN_STATUSES, TERMINAL_STEP_STATUSES
from flowstore_core.tags import RunTags
from flowstore_documents.texts import LongText


class IntentKind(StrEnum):
    """What a run's intent says must happen before anything else; see intents.py."""

    APPLY = "apply"
    """Apply the staged writes of a change that was too large for one commit."""
    REGISTER = "register"
    """Register the idempotency keys of an import one by one, then apply its staged writes."""
    GIVE_UP = "give up"
    """Undo what REGISTER did: a key is registered to another run. The run counts as not stored."""
    COMPLETE = "complete"
    """Decide a complete_run that lost against other changes."""
    DELETE = "delete"
    """Delete the run. It counts as not stored already."""


class Intent(Struct, frozen=True, omit_defaults=True, gc=False):
    """An operation that any process finishes when it meets it."""

    kind: IntentKind
    token: str
    """The token of the staged writes, or of the call."""
    count: int = 0
    """Number of pieces of the staged writes."""
    status: RunStatus | None = None
    expected: str | LongText | None = None
    """The arguments of complete_run; ``expected`` is JSON."""
    call: str = ""
    """The token of the import_run call, which finds a piece of it if its import was given up."""


class RunDocument(Struct, omit_defaults=True, gc=False):
    """The gate of a run: each write to the run expects its version."""

    flow_id: UUID
    flow_name: str
    trigger_key: str
    started_at: datetime
    status: RunStatus = RunStatus.RUNNING
    trigger_data: str | LongText | None = None
    job_id: str | None = None
    source_run_id: UUID | None = None
    completed_at: datetime | None = None
    completed_by: str | None = None
    """The token of the call whose intent completed the run."""
    intent: Intent | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_RUN_STATUSES

    @property
    def is_deleted(self) -> bool:
        """Whether the run counts as not stored, although some of its keys are left."""
        return self.intent is not None and self.intent.kind is IntentKind.DELETE

    def record(self, run_id: UUID, trigger_data: str | None, tags: RunTags) -> FlowRunRecord:
        return FlowRunRecord(
            run_id=run_id,
            flow_id=self.flow_id,
            flow_name=self.flow_name,
            status=self.status,
            trigger_key=self.trigger_key,
            trigger_data=trigger_data,
            job_id=self.job_id,
            started_at=self.started_at,
            completed_at=self.completed_at,
            source_run_id=self.source_run_id,
            tags=tags,
        )


class TagsDocument(Struct, omit_defaults=True, gc=False):
    """The tags of a run that has some."""

    tags: str | LongText
    """The result of encode_tags."""


class ControlDocument(Struct, omit_defaults=True, gc=False):
    """A control record. It may exist before its run (CTL-1)."""

    flow_id: UUID
    trigger_key: str
    created_at: datetime
    idempotency_key: str | None = None
    timeout_at: datetime | None = None
    cancelled_at: datetime | None = None
    cancel_reason: str | LongText | None = None
    timed_out_at: datetime | None = None
    timeout_reason: str | LongText | None = None

    @property
    def is_stopped(self) -> bool:
        """Whether either latch is set (CTL-2)."""
        return self.cancelled_at is not None or self.timed_out_at is not None

    def clear_stops(self, now: datetime) -> None:
        """Clear both latches and an elapsed deadline (STP-6)."""
        self.cancelled_at = self.cancel_reason = None
        self.timed_out_at = self.timeout_reason = None
        if self.timeout_at is not None and self.timeout_at <= now:
            self.timeout_at = None


class KeyDocument(Struct, omit_defaults=True, gc=False):
    """An idempotency key."""

    run_id: UUID
    created_at: datetime


class Claim(Struct, frozen=True, omit_defaults=True, gc=False):
    """The claim of a step."""

    token: str
    """Unique to the call that made the claim."""
    claimed_at: datetime
    owner: str | None = None
    expires_at: datetime | None = None


class Dispatch(Struct, frozen=True, omit_defaults=True, gc=False):
    """The record of a step in the dispatch ledger."""

    token: str
    """Unique to the call that made the record."""
    dispatched_at: datetime
    due_at: datetime | None = None
    job_id: str | None = None
    queue: str | None = None
    priority: int = 0
    step_type: str | None = None
    input_json: str | LongText | None = None

    @property
    def due(self) -> datetime:
        return self.due_at or self.dispatched_at


class Waiter(Struct, frozen=True, omit_defaults=True, gc=False):
    """The signal waiter of a step."""

    signal_name: str
    created_at: datetime
    expires_at: datetime | None = None
    delivered_at: datetime | None = None
    payload_json: str | LongText | None = None
    expired_at: datetime | None = None

    def is_open(self, at: datetime) -> bool:
        """Whether a signal may still arrive: undelivered, not closed and not past expires_at (STP-8)."""
        if self.delivered_at is not None or self.expired_at is not None:
            return False
        return self.expires_at is None or at < self.expires_at


class AttemptDocument(Struct, omit_defaults=True, gc=False):
    """An attempt before the newest one; of a reopened or reset step, the newest too."""

    step_type: str
    status: StepStatus
    started_at: datetime
    input_json: str | LongText | None = None
    output_json: str | LongText | None = None
    error_message: str | LongText | None = None
    job_id: str | None = None
    completed_at: datetime | None = None


class StepDocument(Struct, omit_defaults=True, gc=False):
    """A step key of a run: the step, if started, with its newest attempt, its claim, dispatch and waiter."""

    status: StepStatus | None = None
    """None: never started, or reset by retry_step; the step is not visible."""
    reopened: bool = False
    """True from retry_step until the next attempt starts."""
    first_started_at: datetime | None = None
    started_owner: str | None = None
    """The owner that started the newest attempt under its claim (STP-3)."""

    attempt: int = 0
    """The number of the newest attempt; 0 if there is none. Its fields follow."""
    step_type: str = ""
    input_json: str | LongText | None = None
    output_json: str | LongText | None = None
    error_message: str | LongText | None = None
    job_id: str | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    rescheduled_as: StepStatus | None = None
    """The status with which reschedule_step closed this attempt, so that a repeated call is a no-op."""

    claim: Claim | None = None
    dispatch: Dispatch | None = None
    waiter: Waiter | None = None

    @property
    def is_terminal(self) -> bool:
        return self.status in TERMINAL_STEP_STATUSES

    def start(
        self, step_type: str, input_json: str | LongText | None, job_id: str | None, now: datetime
    ) -> None:
        """Start the next attempt. The caller archives the previous one."""
        self.status = StepStatus.RUNNING
        self.reopened = False
        self.attempt += 1
        self.step_type = step_type
        self.input_json = input_json
        self.output_json = self.error_message = None
        self.job_id = job_id
        self.started_at = now
        self.first_started_at = self.first_started_at or now
        self.completed_at = None
        self.rescheduled_as = None

    def newest_attempt(self) -> AttemptDocument | None:
        """The newest attempt; None if there is none, or if it is among the earlier ones already."""
        if self.status is None or self.reopened or self.started_at is None:
            return None
        return AttemptDocument(
            step_type=self.step_type,
            status=self.status,
            started_at=self.started_at,
            input_json=self.input_json,
            output_json=self.output_json,
            error_message=self.error_message,
            job_id=self.job_id,
            completed_at=self.completed_at,
        )

    def close(
        self,
        status: StepStatus,
        output_json: str | LongText | None,
        error_message: str | LongText | None,
        now: datetime,
    ) -> None:
        """Close the newest attempt."""
        self.status = status
        self.output_json = output_json
        self.error_message = error_message
        self.completed_at = now

    def has_live_claim(self, now: datetime) -> bool:
        """Whether the claim is live; a lease does not expire while the step is terminal (CLM-4)."""
        if self.claim is None:
            return False
        return self.claim.expires_at is None or now < self.claim.expires_at or self.is_terminal

    def set_claim(self, claim: Claim) -> None:
        self.claim = claim
        self.started_owner = None

    def clear(self) -> None:
        """Remove claim, dispatch and undelivered waiter: the step is reopened or reset (STP-6)."""
        self.claim = self.dispatch = None
        if self.waiter is not None and self.waiter.delivered_at is None:
            self.waiter = None

    @property
    def is_open(self) -> bool:
        """Whether work may be left: not terminal, or not started but claimed or dispatched."""
        if self.status is None:
            return self.claim is not None or self.dispatch is not None
        return not self.is_terminal

    def blocks_completion(self, now: datetime) -> bool:
        """Whether the run is unfinished because of it (RUN-2, QUE-6)."""
        if self.status is None:
            return self.dispatch is not None or self.has_live_claim(now)
        return not self.is_terminal

    def stall(self) -> tuple[StallReason, datetime] | None:
        """Why and since when the step is stalled, once that time has come; None: it never is (STP-8)."""
        waiter = self.waiter
        if self.is_terminal:
            return None
        if self.claim is not None:
            if self.claim.expires_at is None:
                return None
            reason, since = StallReason.LEASE_EXPIRED, self.claim.expires_at
        elif self.dispatch is not None:
            reason, since = StallReason.DISPATCH_DUE, self.dispatch.due
        elif self.status is not None and self.started_at is not None:
            reason, since = StallReason.NOT_DISPATCHED, self.completed_at or self.started_at
        else:
            return None
        if self.dispatch is not None:
            since = max(since, self.dispatch.due)
        if waiter is not None and waiter.delivered_at is None:
            if waiter.expires_at is None:
                return None
            since = max(since, waiter.expires_at)
        return reason, since

    @property
    def ready_at(self) -> datetime | None:
        """The time from which a dispatched step is ready; None: no time makes it ready (QUE-1)."""
        found = self.stall()
        return None if found is None else found[1]


class DeliveryDocument(Struct, omit_defaults=True, gc=False):
    """The result of a delivery with a delivery_id."""

    status: SignalDeliveryStatus
    step_key: str | None = None
    delivered_at: datetime | None = None


class MailboxDocument(Struct, omit_defaults=True, gc=False):
    """The buffered signals of a run, as a whole: a change of one compares and changes it (MBX-1)."""

    count: int = 0
    """Number of buffered signals that no waiter has taken."""
    last: int = 0
    """The number of the last signal that was buffered."""


class BufferedDocument(Struct, omit_defaults=True, gc=False):
    """A buffered signal."""

    payload_json: str | LongText
    buffered_at: datetime


class OutputDocument(Struct, omit_defaults=True, gc=False):
    """An output."""

    value: str | LongText


class EventDocument(Struct, omit_defaults=True, gc=False):
    """An event."""

    timestamp: datetime
    event_type: str
    step_key: str | None = None
    message: str | LongText | None = None
