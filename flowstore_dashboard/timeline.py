"""The timeline of a run: its steps and attempts as bars on one time axis.

Positions are percentages of the axis, so that a page scales them to any width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from flowstore_core import (
    FlowRunDetail,
    FlowSignalWaiter,
    FlowStepAttemptRecord,
    FlowStepRecord,
    StepClaim,
    StepDispatch,
    StepStatus,
)
from flowstore_core.steps import SUPERSEDED_BY
from flowstore_dashboard.wording import length, seconds_between

MIN_WIDTH = 0.25
"""Minimum width of a bar, in percent, so that a short attempt stays visible."""
MOST_TICKS = 6
STEPS_OF_AXIS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


class Kind(StrEnum):
    """What a bar shows; also its class in the style sheet."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    RUNNING = "running"
    POLLED = "polled"
    """An attempt that ended as Pending: a poll, or a step that put itself off."""
    SKIPPED = "skipped"
    TAKEN_OVER = "taken-over"
    """An attempt that never reported a result, because the next one replaced it."""
    QUEUED = "queued"
    """Dispatched, before the first attempt."""
    BETWEEN = "between"
    """Between two attempts, or before the next."""
    SIGNAL = "signal"
    """Waiting for a signal."""


WORDS = {
    Kind.SUCCEEDED: "succeeded",
    Kind.FAILED: "failed",
    Kind.RUNNING: "running",
    Kind.POLLED: "ended as Pending",
    Kind.SKIPPED: "skipped",
    Kind.TAKEN_OVER: "taken over",
    Kind.QUEUED: "waiting for a worker",
    Kind.BETWEEN: "waiting for the next attempt",
    Kind.SIGNAL: "waiting for a signal",
}

_ENDED = {
    StepStatus.SUCCEEDED: Kind.SUCCEEDED,
    StepStatus.FAILED: Kind.FAILED,
    StepStatus.SKIPPED: Kind.SKIPPED,
    StepStatus.PENDING: Kind.POLLED,
    StepStatus.RUNNING: Kind.RUNNING,
}


@dataclass(frozen=True, slots=True)
class Bar:
    """A period of a step on the axis."""

    kind: Kind
    left: float
    width: float
    text: str
    """The same in words."""


@dataclass(frozen=True, slots=True)
class Tick:
    left: float
    label: str


@dataclass(frozen=True, slots=True)
class Row:
    """A step on the timeline."""

    number: int
    """Its position among all steps of the run, from 1."""
    step: FlowStepRecord
    bars: tuple[Bar, ...]
    took: str
    text: str
    """The row in words, for screen readers."""


@dataclass(frozen=True, slots=True)
class Timeline:
    rows: tuple[Row, ...]
    ticks: tuple[Tick, ...]
    kinds: tuple[Kind, ...]
    """The kinds that occur, for the legend."""


def kind_of(attempt: FlowStepAttemptRecord) -> Kind:
    if attempt.status is StepStatus.FAILED and was_superseded(attempt):
        return Kind.TAKEN_OVER
    return _ENDED[attempt.status]


def was_superseded(attempt: FlowStepAttemptRecord) -> bool:
    """Whether the store closed the attempt because the next one began (STP-1)."""
    return (attempt.error_message or "") == f"{SUPERSEDED_BY}{attempt.attempt + 1}"


class _Axis:
    def __init__(self, start: datetime, end: datetime) -> None:
        self.start = start
        self.seconds = max(seconds_between(start, end), 0.001)

    def position(self, value: datetime) -> float:
        return min(max(seconds_between(self.start, value) / self.seconds * 100, 0.0), 100.0)

    def bar(self, kind: Kind, start: datetime, end: datetime, text: str) -> Bar:
        left = self.position(start)
        width = max(self.position(end) - left, MIN_WIDTH)
        # A bar at the very end stays inside.
        return Bar(kind, round(min(left, 100 - width), 3), round(width, 3), text)

    def ticks(self) -> tuple[Tick, ...]:
        whole = next((size for size in STEPS_OF_AXIS if self.seconds / size <= MOST_TICKS), 0)
        if self.seconds < 1:
            step = self.seconds / 2
        else:
            step = whole or 86400 * -(-int(self.seconds / 86400) // MOST_TICKS)
        marks = []
        offset = 0.0
        while offset <= self.seconds * 1.0001:
            marks.append(Tick(round(offset / self.seconds * 100, 3), _offset(offset)))
            offset += step
        return tuple(marks)


def _offset(seconds: float) -> str:
    if seconds < 1:
        return "0" if not seconds else f"{seconds * 1000:.0f}ms"
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    parts = ((days, "d"), (hours, "h"), (minutes, "m"), (rest, "s"))
    return " ".join(f"{number}{unit}" for number, unit in parts if number)


def draw_timeline(
    run: FlowRunDetail,
    steps: Iterable[tuple[int, FlowStepRecord]],
    dispatches: Sequence[StepDispatch],
    waiters: Sequence[FlowSignalWaiter],
    claims: Sequence[StepClaim],
    now: datetime,
) -> Timeline:
    """The timeline of some steps of a run, given with their numbers, on the axis of the whole run."""
    axis = _Axis(run.started_at, _end(run, now))
    dispatched = {one.step_key: one for one in dispatches}
    waits = {one.step_key: one for one in waiters}
    held = {one.step_key: one for one in claims}
    rows = tuple(
        _row(
            axis,
            number,
            step,
            dispatched.get(step.step_key),
            waits.get(step.step_key),
            held.get(step.step_key),
            _end(run, now),
        )
        for number, step in steps
    )
    occurring = {bar.kind for row in rows for bar in row.bars}
    return Timeline(rows, axis.ticks(), tuple(kind for kind in Kind if kind in occurring))


def _end(run: FlowRunDetail, now: datetime) -> datetime:
    if run.completed_at is None:
        return now
    ends = (attempt.completed_at for step in run.steps for attempt in step.attempts)
    return max(run.completed_at, *(end for end in ends if end is not None), run.started_at)


def _row(
    axis: _Axis,
    number: int,
    step: FlowStepRecord,
    dispatch: StepDispatch | None,
    waiter: FlowSignalWaiter | None,
    claim: StepClaim | None,
    end: datetime,
) -> Row:
    bars: list[Bar] = []
    first = step.attempts[0].started_at if step.attempts else step.started_at
    if dispatch is not None and dispatch.dispatched_at < first:
        ready = max(dispatch.dispatched_at, dispatch.due_at or dispatch.dispatched_at)
        if ready < first:
            bars.append(axis.bar(Kind.QUEUED, ready, first, f"waited {length(ready, first)} for a worker"))
    previous: datetime | None = None
    for attempt in step.attempts:
        if previous is not None and previous < attempt.started_at:
            text = f"{length(previous, attempt.started_at)} until attempt {attempt.attempt}"
            bars.append(axis.bar(Kind.BETWEEN, previous, attempt.started_at, text))
        kind = kind_of(attempt)
        bars.append(
            axis.bar(kind, attempt.started_at, attempt.completed_at or end, attempt_text(attempt, kind, end))
        )
        previous = attempt.completed_at
    if not step.status.is_terminal and previous is not None and previous < end:
        text = f"for {length(previous, end)} no attempt since attempt {step.attempts[-1].attempt}"
        bars.append(axis.bar(Kind.BETWEEN, previous, end, text))
    if waiter is not None:
        until = waiter.delivered_at or waiter.expired_at or end
        text = f"waited {length(waiter.created_at, until)} for signal {waiter.signal_name}"
        bars.append(axis.bar(Kind.SIGNAL, waiter.created_at, until, text))
    words = "; ".join(bar.text for bar in bars)
    text = f"Step {step.step_key}: {step.status}. {words}."
    if claim is not None and claim.expires_at is not None and claim.expires_at < end and _is_held(step):
        text += f" The lease of its worker expired {length(claim.expires_at, end)} ago."
    finish = step.completed_at if step.completed_at is not None else end
    return Row(number, step, tuple(bars), length(first, finish), text)


def _is_held(step: FlowStepRecord) -> bool:
    return step.status is StepStatus.RUNNING


def attempt_text(attempt: FlowStepAttemptRecord, kind: Kind, end: datetime) -> str:
    """An attempt in words: its number, result, length and worker."""
    took = length(attempt.started_at, attempt.completed_at or end)
    worker = f" on {attempt.job_id}" if attempt.job_id else ""
    after = "for" if kind is Kind.RUNNING else "after"
    return f"attempt {attempt.attempt} {WORDS[kind]} {after} {took}{worker}"


def activity(run: FlowRunDetail, now: datetime, columns: int = 120) -> Sequence[Mapping[Kind, float]]:
    """The mean number of attempts in progress in each part of the run, by the result that they have.

    For runs with more steps than one screen shows.
    """
    start = run.started_at
    width = max(seconds_between(start, _end(run, now)) / columns, 0.001)
    parts: list[dict[Kind, float]] = [{} for _ in range(columns)]
    for step in run.steps:
        for attempt in step.attempts:
            begin = max(seconds_between(start, attempt.started_at), 0.0)
            end = seconds_between(start, attempt.completed_at or now)
            kind = kind_of(attempt)
            for index in range(int(begin / width), min(int(end / width), columns - 1) + 1):
                overlap = min(end, (index + 1) * width) - max(begin, index * width)
                parts[index][kind] = parts[index].get(kind, 0.0) + overlap / width
    return parts
