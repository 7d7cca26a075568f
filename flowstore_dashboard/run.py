"""One run: what happened, the timeline, and every step with its attempts, inputs, outputs and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core import (
    Capability,
    FlowEventRecord,
    FlowRunControlRecord,
    FlowRunDetail,
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepRecord,
    FlowStore,
    RunNotFoundError,
    RunStatus,
    StepClaim,
    StepDispatch,
    StepStatus,
)
from flowstore_core.inspection.events import last_events
from flowstore_dashboard.incidents import find_incidents
from flowstore_dashboard.site import Site, parameter, refuse, run_of
from flowstore_dashboard.timeline import Kind, activity, draw_timeline, kind_of
from flowstore_dashboard.wording import TextBudget

EVENTS = 200
"""Number of newest events on the page."""
STEPS = 200
"""Number of steps on a page."""
OUTPUTS = 200
"""Maximum number of outputs on the page."""
DERIVED = 50
INCIDENTS = 40
"""Maximum number of incidents on the page."""
MANY_INCIDENTS = 6
OPEN_INCIDENTS = 2
"""Number of incidents that are not folded, if there are many: the timeline should not be far below."""
ACTIVITY_FROM = 30
"""Number of steps from which the page shows how many attempts were in progress."""


@dataclass(frozen=True, slots=True)
class RunView:
    """All that the store knows about one run, for one page."""

    run: FlowRunDetail
    control: FlowRunControlRecord | None
    claims: Sequence[StepClaim]
    dispatches: Sequence[StepDispatch]
    waiters: Sequence[FlowSignalWaiter] | None
    """None if the backend lacks the capability, as for outputs and events."""
    outputs: Mapping[str, str] | None
    events: Sequence[FlowEventRecord] | None
    source: FlowRunRecord | None
    derived: Sequence[FlowRunRecord]


async def read_run(store: FlowStore, run_id: UUID) -> RunView:
    """Read a run with everything that belongs to it. Raises RunNotFoundError."""
    run = await store.get_run_detail(run_id)
    if run is None:
        raise RunNotFoundError(run_id)
    offered = store.capabilities
    control, claims, dispatches, derived = await asyncio.gather(
        store.get_run_control(run_id),
        store.get_step_claims(run_id),
        store.get_dispatches(run_id),
        store.get_derived_runs(run_id, take=DERIVED),
    )
    return RunView(
        run=run,
        control=control,
        claims=claims,
        dispatches=dispatches,
        waiters=await store.get_waiters(run_id) if Capability.WAITERS in offered else None,
        outputs=await store.get_outputs(run_id, take=OUTPUTS) if Capability.OUTPUTS in offered else None,
        events=await last_events(store, run_id, EVENTS) if Capability.EVENTS in offered else None,
        source=await store.get_run(run.source_run_id) if run.source_run_id else None,
        derived=derived,
    )


Numbered = tuple[int, FlowStepRecord]

SELECTIONS: dict[str, tuple[str, Callable[[FlowStepRecord], bool]]] = {
    "all": ("All", lambda step: True),
    "failed": ("Failed", lambda step: step.status is StepStatus.FAILED),
    "retried": ("Retried", lambda step: len(step.attempts) > 1),
    "taken-over": (
        "Taken over",
        lambda step: any(kind_of(attempt) is Kind.TAKEN_OVER for attempt in step.attempts),
    ),
    "open": ("Open", lambda step: not step.status.is_terminal),
    "skipped": ("Skipped", lambda step: step.status is StepStatus.SKIPPED),
}
"""The choices of steps, each with its name and its rule."""


def describe_run(
    view: RunView, now: datetime, *, chosen: str = "all", page_number: int = 1, most: int = STEPS
) -> dict[str, Any]:
    """The values of the template for a page of the chosen steps."""
    run = view.run
    numbered = list(enumerate(run.steps, 1))
    choices = [
        (name, label, number)
        for name, (label, rule) in SELECTIONS.items()
        if (number := sum(rule(step) for step in run.steps)) or name == "all"
    ]
    selected = [one for one in numbered if SELECTIONS[chosen][1](one[1])]
    pages = max(-(-len(selected) // most), 1)
    page_number = min(page_number, pages)
    shown = selected[(page_number - 1) * most : page_number * most]
    budget = TextBudget()
    incidents = find_incidents(run, view.control, view.claims, view.waiters or (), view.events or (), now)
    of_steps = {step.step_key: step.output_json for step in run.steps}
    return {
        "view": view,
        "run": run,
        "incidents": incidents[:INCIDENTS],
        "folded_from": OPEN_INCIDENTS if len(incidents) >= MANY_INCIDENTS else INCIDENTS,
        "incidents_left": max(len(incidents) - INCIDENTS, 0),
        "pages_of": {step.step_key: (number - 1) // most + 1 for number, step in numbered},
        "timeline": draw_timeline(run, shown, view.dispatches, view.waiters or (), view.claims, now),
        "activity": _activity(run, now) if len(run.steps) >= ACTIVITY_FROM else None,
        "choices": choices,
        "chosen": chosen,
        "page_number": page_number,
        "pages": pages,
        "selected": len(selected),
        "outputs": {key: value for key, value in (view.outputs or {}).items() if of_steps.get(key) != value},
        "claim_of": {claim.step_key: claim for claim in view.claims},
        "dispatch_of": {dispatch.step_key: dispatch for dispatch in view.dispatches},
        "open_waiters": [
            waiter
            for waiter in view.waiters or ()
            if waiter.delivered_at is None and waiter.expired_at is None
        ],
        "unstarted": [one for one in view.dispatches if one.step_key not in of_steps],
        "excerpt": budget.excerpt,
        "kind_of": kind_of,
        "max_events": EVENTS,
        "max_outputs": OUTPUTS,
    }


def _activity(run: FlowRunDetail, now: datetime) -> dict[str, Any]:
    parts = activity(run, now)
    most = max((sum(part.values()) for part in parts), default=0.0)
    width = 100 / len(parts)
    bars = []
    for index, part in enumerate(parts):
        top = 100.0
        for kind in Kind:
            if number := part.get(kind):
                height = number / most * 100
                top -= height
                bars.append((kind, round(index * width, 3), round(top, 2), round(width, 3), round(height, 2)))
    return {"bars": bars, "most": round(most)}


class RunPage:
    path = "/runs/{run_id}"

    def __init__(self, site: Site) -> None:
        self._site = site

    async def show(self, request: Request) -> Response:
        view = await read_run(self._site.store, run_of(request))
        chosen = parameter(request, "show") or "all"
        if chosen not in SELECTIONS:
            refuse(f"show must be one of {', '.join(SELECTIONS)}")
        number = parameter(request, "page") or "1"
        if not number.isdecimal() or not 0 < int(number) < 1_000_000:
            refuse("page must be a number from 1 on")
        values = describe_run(view, datetime.now(UTC), chosen=chosen, page_number=int(number))
        return self._site.render(
            request, "run.html", can_delete=self._site.has(Capability.DELETION), **values
        )

    async def version(self, request: Request) -> object:
        """A value that changes with the run; it contains none of the run's texts, which may be large."""
        store, run_id = self._site.store, run_of(request)
        run = await store.get_run(run_id)
        if run is None:
            return None
        waiters = await store.get_waiters(run_id) if self._site.has(Capability.WAITERS) else ()
        events = await last_events(store, run_id, 1) if self._site.has(Capability.EVENTS) else ()
        derived = await store.get_derived_runs(run_id, take=DERIVED)
        return (
            (run.status, run.completed_at, _ticks(run)),
            tuple((await store.get_step_statuses(run_id)).items()),
            tuple(await store.get_step_claims(run_id)),
            tuple((one.step_key, one.dispatched_at) for one in await store.get_dispatches(run_id)),
            tuple((one.step_key, one.delivered_at, one.expired_at) for one in waiters),
            await store.get_run_control(run_id),
            tuple(event.sequence for event in events),
            tuple((one.run_id, one.status) for one in derived),
        )

    async def wait(self, request: Request, seconds: float) -> None:
        """Wait until the run may have changed: for its end, where the store can watch it."""
        store, run_id = self._site.store, run_of(request)
        if self._site.has(Capability.WATCH) and await store.get_run_status(run_id) is RunStatus.RUNNING:
            await store.wait_for_run(run_id, timeout=timedelta(seconds=seconds))
        else:
            await asyncio.sleep(seconds)


_TICK = timedelta(seconds=5)
_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def _ticks(run: FlowRunRecord) -> int:
    """A number that grows while a run is Running, so that its bars do."""
    return (datetime.now(UTC) - _EPOCH) // _TICK if run.status is RunStatus.RUNNING else 0
