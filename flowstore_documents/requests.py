"""Settling requests: dispatch or skip steps whose predecessors have ended (QUE-4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from flowstore_core import StepRequest, StepStatus, new_claim_token
from flowstore_core.backend import not_accepted
from flowstore_documents.documents import Dispatch, StepDocument
from flowstore_documents.run_state import RunState
from flowstore_documents.transactions import Transaction


@dataclass(frozen=True, slots=True)
class Settlement:
    """What settling did."""

    dispatched: tuple[str, ...]
    stayed_behind: bool
    """Whether the ``after`` steps of a request have not all ended."""


def keys_of_requests(requests: Sequence[StepRequest]) -> list[str]:
    """The steps that settling reads."""
    return [key for request in requests for key in (request.step_key, *request.after)]


def settle_requests(
    tx: Transaction, run: RunState, requests: Sequence[StepRequest], now: datetime
) -> Settlement:
    """Settle the requests in their order; each sees the effects of those before it."""
    dispatched: list[str] = []
    stayed_behind = False
    for request in requests:
        key = request.step_key
        step = run.step(key)
        if _is_taken(step, now):
            continue
        statuses = [(other, _ended(run.step(other))) for other in request.after]
        if any(status is None for _, status in statuses):
            stayed_behind = True
            continue
        refused = [
            not_accepted(other, status)
            for other, status in statuses
            if status and status not in request.accept
        ]
        if refused:
            run.skip_step(key, request.step_type, refused[0], now)
            step.started_owner = None
        else:
            step.dispatch = Dispatch(
                token=new_claim_token(),
                dispatched_at=now,
                due_at=request.due_at,
                queue=request.queue,
                priority=request.priority,
                step_type=request.step_type,
                input_json=tx.text(request.input_json),
            )
            dispatched.append(key)
    return Settlement(tuple(dispatched), stayed_behind)


def _is_taken(step: StepDocument, now: datetime) -> bool:
    """Whether a request leaves the step alone."""
    if step.dispatch is not None or step.has_live_claim(now):
        return True
    return step.status is StepStatus.RUNNING or step.is_terminal


def _ended(step: StepDocument) -> StepStatus | None:
    """The terminal status of a step; None while it has none."""
    return step.status if step.is_terminal else None
