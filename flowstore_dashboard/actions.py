"""Actions on a run: retry a step, cancel, deliver a signal, delete. Each asks back, and is a plain POST."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable
from urllib.parse import quote
from uuid import UUID

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flowstore_core import (
    Capability,
    ConflictError,
    FlowRunRecord,
    SignalDeliveryStatus,
    StepStatus,
)
from flowstore_core.inspection.retries import queue_request
from flowstore_dashboard.site import Site, not_found, parameter, read_form, refuse, run_of

Handler = Callable[[Request], Awaitable[Response]]


class Actions:
    """The forms that ask back, and the requests that act."""

    def __init__(self, site: Site) -> None:
        self._site = site

    def routes(self) -> list[Route]:
        forms: dict[str, tuple[Handler, Handler]] = {
            "retry": (self.ask_retry, self.retry),
            "cancel": (self.ask_cancel, self.cancel),
            "signal": (self.ask_signal, self.signal),
            "delete": (self.ask_delete, self.delete),
        }
        return [
            Route(f"/runs/{{run_id}}/{name}", handler, methods=[method])
            for name, (ask, act) in forms.items()
            for method, handler in (("GET", ask), ("POST", act))
        ]

    async def _run(self, request: Request) -> FlowRunRecord:
        """The run of the request, if actions are allowed."""
        if self._site.read_only:
            refuse("This dashboard is read-only.", 403)
        run_id = run_of(request)
        run = await self._site.store.get_run(run_id)
        return not_found(run_id) if run is None else run

    async def ask_retry(self, request: Request) -> Response:
        run = await self._run(request)
        key = parameter(request, "step") or ""
        step = await self._site.store.get_step(run.run_id, key) if key else None
        if step is None:
            refuse("The run has no started step with this key.", 404)
        statuses = await self._site.store.get_step_statuses(run.run_id)
        skipped = sum(status is StepStatus.SKIPPED for status in statuses.values())
        return self._site.render(
            request,
            "confirm.html",
            action="retry",
            run=run,
            step=step,
            last_attempt=step.attempts[-1].attempt if step.attempts else None,
            skipped=skipped,
        )

    async def retry(self, request: Request) -> Response:
        run, form = await self._run(request), await read_form(self._site, request)
        key = form.get("step", "")
        reset: list[str] = []
        if form.get("reset"):
            statuses = await self._site.store.get_step_statuses(run.run_id)
            reset = [name for name, status in statuses.items() if status is StepStatus.SKIPPED]
        await self._site.store.retry_step(
            run.run_id,
            key,
            # Refused if another person was faster.
            attempt=_number(form, "attempt"),
            reset=reset,
            dispatch=await queue_request(self._site.store, run.run_id, key),
        )
        return self._done(request, run.run_id, f"Step {key} is reopened for one more attempt.")

    async def ask_cancel(self, request: Request) -> Response:
        run = await self._run(request)
        return self._site.render(request, "confirm.html", action="cancel", run=run)

    async def cancel(self, request: Request) -> Response:
        run, form = await self._run(request), await read_form(self._site, request)
        if run.status.is_terminal:
            raise ConflictError(
                f"The run is {run.status} already, so there is nothing to cancel.", run_id=run.run_id
            )
        requested = await self._site.store.request_cancel(run.run_id, form.get("reason") or None)
        text = "Cancellation requested. The engine completes the run as Cancelled."
        return self._done(
            request, run.run_id, text if requested else "Cancellation had been requested before."
        )

    async def ask_signal(self, request: Request) -> Response:
        run = await self._run(request)
        name = parameter(request, "name") or ""
        return self._site.render(
            request, "confirm.html", action="signal", run=run, signal=name, delivery_id=secrets.token_hex(16)
        )

    async def signal(self, request: Request) -> Response:
        run, form = await self._run(request), await read_form(self._site, request)
        name, payload = form.get("name", ""), form.get("payload", "")
        try:
            json.loads(payload)
        except (ValueError, RecursionError):
            refuse('The payload must be JSON, such as null or {"approved": true}. Nothing was delivered.')
        result = await self._site.store.deliver_signal(
            # A form that is sent twice delivers once.
            run.run_id,
            name,
            payload,
            delivery_id=form.get("delivery_id") or None,
        )
        if result.status is SignalDeliveryStatus.DELIVERED:
            text = f"Signal {name} delivered to step {result.step_key}."
        elif result.status is SignalDeliveryStatus.ALREADY_DELIVERED:
            text = f"Step {result.step_key} has signal {name} already, and no other step waits for it."
        else:
            text = f"No step waits for signal {name}. Nothing was delivered."
        return self._done(request, run.run_id, text)

    async def ask_delete(self, request: Request) -> Response:
        run = await self._run(request)
        return self._site.render(request, "confirm.html", action="delete", run=run)

    async def delete(self, request: Request) -> Response:
        run, _ = await self._run(request), await read_form(self._site, request)
        if not self._site.has(Capability.DELETION):
            refuse("This backend cannot delete a run.", 404)
        await self._site.store.delete_run(run.run_id)
        return self._site.done(request, "/runs", f"Run {run.run_id} of flow {run.flow_name} is deleted.")

    def _done(self, request: Request, run_id: UUID, message: str) -> Response:
        return self._site.done(request, f"/runs/{quote(str(run_id))}", message)


def _number(form: QueryParams, name: str) -> int | None:
    text = form.get(name, "")
    if text and not (text.isdecimal() and len(text) < 19):
        refuse(f"{name} must be a number")
    return int(text) if text else None
