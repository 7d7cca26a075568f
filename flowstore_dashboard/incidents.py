"""The unusual parts of a run, as sentences: attempts taken over, retried or failed, and open waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from flowstore_core import (
    FlowEventRecord,
    FlowRunControlRecord,
    FlowRunDetail,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunStatus,
    StepClaim,
    StepStatus,
)
from flowstore_dashboard.timeline import WORDS, Kind, kind_of
from flowstore_dashboard.wording import clock, length, moment

MAX_ERROR = 300
"""Maximum number of characters of an error message in a sentence."""
MAX_ATTEMPTS = 5
"""Maximum number of sentences about one step; of more attempts the last ones are described."""


GRAVITY = (
    Kind.FAILED,
    Kind.RUNNING,
    Kind.SIGNAL,
    Kind.BETWEEN,
    Kind.TAKEN_OVER,
    Kind.SUCCEEDED,
    Kind.SKIPPED,
)
"""The kinds of incidents in the order in which a page shows them."""


@dataclass(frozen=True, slots=True)
class Incident:
    """What happened to one step, or to the run (``number`` None)."""

    kind: Kind
    title: str
    sentences: tuple[str, ...]
    number: int | None = None
    """The number of the step on the timeline."""


def find_incidents(
    run: FlowRunDetail,
    control: FlowRunControlRecord | None,
    claims: Sequence[StepClaim],
    waiters: Sequence[FlowSignalWaiter],
    events: Sequence[FlowEventRecord],
    now: datetime,
) -> list[Incident]:
    """The incidents of a run, the gravest first; none if every step succeeded at once."""
    held = {claim.step_key: claim for claim in claims}
    waiting = {waiter.step_key: waiter for waiter in waiters}
    incidents = list(_about_run(run, control))
    for number, step in enumerate(run.steps, 1):
        noted = [event for event in events if event.step_key == step.step_key]
        sentences = [
            *_about_attempts(step, held.get(step.step_key), noted, run.started_at, now),
            *_about_waiting(waiting.get(step.step_key), run, now),
        ]
        if sentences:
            incidents.append(Incident(_kind(step), step.step_key, tuple(sentences), number))
    return sorted(incidents, key=lambda incident: (incident.number is not None, _gravity(incident.kind)))


def _gravity(kind: Kind) -> int:
    return GRAVITY.index(kind) if kind in GRAVITY else len(GRAVITY)


def _kind(step: FlowStepRecord) -> Kind:
    if step.status is StepStatus.PENDING:
        return Kind.BETWEEN
    if step.status is StepStatus.SUCCEEDED and any(
        kind_of(attempt) is Kind.TAKEN_OVER for attempt in step.attempts
    ):
        return Kind.TAKEN_OVER
    return kind_of(step.attempts[-1]) if step.attempts else Kind.BETWEEN


def _about_run(run: FlowRunDetail, control: FlowRunControlRecord | None) -> Iterator[Incident]:
    if control is None:
        return
    if control.timed_out_at is not None:
        text = f"The deadline passed, and the run was marked as timed out at {moment(control.timed_out_at)}."
        yield Incident(Kind.FAILED, "Deadline", (text,))
    elif control.cancel_requested and control.cancel_requested_at is not None:
        reason = f", with the reason: {control.cancel_reason}" if control.cancel_reason else ""
        text = f"Cancellation was requested at {moment(control.cancel_requested_at)} UTC{reason}."
        if run.status is RunStatus.RUNNING:
            text += " The engine has not completed the run yet."
        yield Incident(Kind.TAKEN_OVER, "Cancellation", (text,))


def _about_attempts(
    step: FlowStepRecord,
    claim: StepClaim | None,
    events: Sequence[FlowEventRecord],
    day: datetime,
    now: datetime,
) -> Iterator[str]:
    attempts = step.attempts
    if step.status is StepStatus.SKIPPED:
        reason = f": {_short(step.error_message)}" if step.error_message else "."
        yield f"Skipped{reason}"
        return
    eventful = len(attempts) > 1 or any(one.status is StepStatus.FAILED for one in attempts)
    if eventful:
        start = max(len(attempts) - MAX_ATTEMPTS, 0)
        if start:
            yield f"{start:,} earlier attempts are listed with the step."
        for index, attempt in enumerate(attempts[start:], start):
            following = attempts[index + 1] if index + 1 < len(attempts) else None
            yield _about_attempt(attempt, following, claim, events, day, now)
    if step.status is StepStatus.RUNNING and claim is not None and claim.expires_at is not None:
        if claim.expires_at < now:
            yield (
                f"The lease of {_worker(attempts[-1])} expired {length(claim.expires_at, now)} ago, and no "
                "worker has taken the step over yet."
            )
    elif step.status is StepStatus.PENDING and eventful and attempts and attempts[-1].completed_at:
        yield (
            f"The next attempt, number {step.attempt_count}, has not started."
            if (step.attempt_count > attempts[-1].attempt)
            else "The next attempt has not started."
        )


def _about_attempt(
    attempt: FlowStepAttemptRecord,
    following: FlowStepAttemptRecord | None,
    claim: StepClaim | None,
    events: Sequence[FlowEventRecord],
    day: datetime,
    now: datetime,
) -> str:
    kind = kind_of(attempt)
    began = f"Attempt {attempt.attempt} began at {clock(attempt.started_at, day)} on {_worker(attempt)}"
    took = length(attempt.started_at, attempt.completed_at or now)
    if kind is Kind.TAKEN_OVER and (following is None or following.started_at != attempt.completed_at):
        return f"{began} and was closed without a result after {took}, when the step was retried."
    if kind is Kind.TAKEN_OVER and following is not None:
        during = [
            event
            for event in events
            if attempt.started_at <= event.timestamp <= following.started_at and event.event_type
        ]
        noted = "".join(
            f" The event log notes {event.event_type!r} at {clock(event.timestamp, day)}"
            + (f": {_short(event.message)}." if event.message else ".")
            for event in during[:2]
        )
        if claim is not None and claim.expires_at is not None:
            why = "The lease on its claim was not renewed and expired"
        else:
            why = "Its worker stopped or gave the step up"
        return (
            f"{began} and never reported a result.{noted} {why}, so {_worker(following)} took the step over "
            f"{took} after the start, as attempt {following.attempt}."
        )
    if kind is Kind.RUNNING:
        return f"{began} and has been running for {took}."
    error = f": {_short(attempt.error_message)}" if attempt.error_message else "."
    return f"{began} and {WORDS[kind]} after {took}{error}"


def _about_waiting(waiter: FlowSignalWaiter | None, run: FlowRunDetail, now: datetime) -> Iterator[str]:
    if waiter is None:
        return
    if waiter.expired_at is not None:
        yield f"The wait for signal {waiter.signal_name!r} expired at {moment(waiter.expired_at)} UTC."
    elif waiter.delivered_at is None and run.status is RunStatus.RUNNING:
        yield f"Waiting for signal {waiter.signal_name!r} for {length(waiter.created_at, now)}."


def _worker(attempt: FlowStepAttemptRecord) -> str:
    return attempt.job_id or "an unnamed worker"


def _short(text: str | None) -> str:
    text = " ".join((text or "").split())
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."
