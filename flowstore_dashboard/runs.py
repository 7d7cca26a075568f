"""The list of runs: filters, a page at a time, the newest first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core import Capability, RunPage, RunPosition, RunStatus
from flowstore_core.inspection.flows import flows_named
from flowstore_core.validation import MAX_SEARCH
from flowstore_dashboard.site import Site, parameter, refuse

TAKE = 50
"""Number of runs on a page."""
CACHED_FLOWS = 1000


class RunsPage:
    path = "/runs"

    def __init__(self, site: Site) -> None:
        self._site = site
        self._flows: OrderedDict[str, UUID] = OrderedDict()
        """The flows of names that were filtered by: a live page asks every few seconds."""

    async def show(self, request: Request) -> Response:
        page, problem = await self._read(request)
        onward = str(page.runs[-1].position) if len(page.runs) == TAKE else None
        filters = {name: parameter(request, name) or "" for name in ("status", "flow", "search")}
        return self._site.render(
            request,
            "runs.html",
            page=page,
            problem=problem,
            filters=filters,
            is_filtered=any(filters.values()),
            is_first=parameter(request, "after") is None,
            older=None if onward is None else str(request.url.include_query_params(after=onward).query),
            newest=str(request.url.remove_query_params("after").query),
            statuses=tuple(RunStatus),
            flows=sorted({run.flow_name for run in page.runs}),
            can_filter=self._site.has(Capability.DASHBOARD),
            max_search=MAX_SEARCH,
        )

    async def _read(self, request: Request) -> tuple[RunPage, str | None]:
        """The page of the address, and the problem of a filter that selects nothing."""
        store = self._site.store
        position = parameter(request, "after")
        after = None if position is None else RunPosition.parse(position)
        if not self._site.has(Capability.DASHBOARD):
            runs = await store.get_runs(after=after, take=TAKE)
            return RunPage(tuple(runs), 0), None
        status = parameter(request, "status")
        if status is not None and status not in tuple(RunStatus):
            refuse(f"status must be one of {', '.join(RunStatus)}")
        flow_id, problem = None, None
        if flow := parameter(request, "flow"):
            flow_id, problem = await self._find_flow(flow)
        if problem is not None:
            return RunPage((), 0), problem
        search = parameter(request, "search")
        return await store.get_runs_page(flow_id, status=status, after=after, take=TAKE, search=search), None

    async def _find_flow(self, text: str) -> tuple[UUID | None, str | None]:
        try:
            return UUID(text), None
        except ValueError:
            pass  # A name.
        known = self._flows.get(text)
        if known is not None and await self._site.store.get_runs(known, take=1):
            return known, None
        flows = await flows_named(self._site.store, text[:MAX_SEARCH])
        if len(flows) == 1:
            (flow_id,) = flows
            self._flows[text] = flow_id
            if len(self._flows) > CACHED_FLOWS:
                self._flows.popitem(last=False)
            return flow_id, None
        if not flows:
            return None, f"No run belongs to a flow named {text!r}."
        ids = ", ".join(str(flow_id) for flow_id in list(flows)[:10])
        return None, f"{len(flows)} flows are named {text!r}; use the id of one of them: {ids}"

    async def version(self, request: Request) -> object:
        return await self._read(request)

    async def wait(self, request: Request, seconds: float) -> None:
        await asyncio.sleep(seconds)
