"""Settling requests: dispatch or skip steps whose predecessors have ended (QUE-4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flowstore_core import StepRequest, StepStatus
from flowstore_core.queues import not_accepted
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_memory.attempts import skip_step
from flowstore_memory.queue_index import index_step
from flowstore_memory.state import Namespace, QueuedDispatch, RunState, StepState


@dataclass(frozen=True, slots=True)
class Settlement:
    """What settling did."""

    dispatched: tuple[str, ...]
    stayed_behind: bool
    """Whether the ``after`` steps of a request have not all ended."""


def settle_requests(
    namespace: Namespace, run: RunState, requests: Sequence[StepRequest], now: datetime
) -> Settlement:
    """Settle the requests in their order; each sees the effects of those before it."""
    dispatched: list[str] = []
    stayed_behind = False
    for request in requests:
        key = request.step_key
        step = run.steps.get(key)
        if step is not None and _is_taken(step, now):
            continue
        statuses = [(other, _ended(run, other)) for other in request.after]
        if any(status is None for _, status in statuses):
            stayed_behind = True
            continue
        if step is None:
            step = run.steps[key] = StepState()
        refused = [
            not_accepted(other, status)
            for other, status in statuses
            if status and status not in request.accept
        ]
        if refused:
            skip_step(run, key, step, request.step_type, refused[0], now)
            step.started_owner = None
        else:
            queued = QueuedDispatch(request.queue, request.priority, request.step_type, request.input_json)
            step.dispatch(now, request.due_at, queued)
            index_step(namespace, run, key, step)
            dispatched.append(key)
    return Settlement(tuple(dispatched), stayed_behind)


def _is_taken(step: StepState, now: datetime) -> bool:
    """Whether a request leaves the step alone."""
    if step.dispatched_at is not None or step.has_live_claim(now):
        return True
    return step.status is StepStatus.RUNNING or step.status in TERMINAL_STEP_STATUSES


def _ended(run: RunState, step_key: str) -> StepStatus | None:
    """The terminal status of a step; None while it has none."""
    step = run.steps.get(step_key)
    return step.status if step is not None and step.status in TERMINAL_STEP_STATUSES else None
