"""The list of runs: filters, a page at a time, the newest first."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from flowstore_core import Capability, RunPage, RunPosition, RunStatus
from flowstore_core.inspection.flows import flows_named
from flowstore_core.inspection.tags import add_tag
from flowstore_core.validation import MAX_KEY, MAX_SEARCH
from flowstore_dashboard.site import Site, parameter, refuse

TAKE = 50
"""Number of runs on a page."""
CACHED_FLOWS = 1000
MAX_TAG = 2 * MAX_KEY + 1
"""Maximum length of KEY=VALUE, in characters."""


@dataclass(frozen=True, slots=True)
class TagFilter:
    """The tags that the runs of a page have."""

    tags: Mapping[str, str]
    rejected: str = ""
    """The last text that is not a tag, or contradicts another one: the form shows it again."""
    problem: str | None = None


def read_tags(request: Request) -> TagFilter:
    """The tags of the address; empty ones come from an empty field of the form."""
    tags: dict[str, str] = {}
    rejected, problem = "", None
    for text in request.query_params.getlist("tag"):
        if len(text) > MAX_TAG:
            refuse(f"tag must have at most {MAX_TAG} characters; got {len(text):,}")
        if not text.strip():
            continue
        try:
            add_tag(tags, text)
        except ValueError as error:
            rejected, problem = text, str(error)
    return TagFilter(tags, rejected, problem)


def _query(filters: Mapping[str, str], tags: Mapping[str, str]) -> str:
    """The query of the first page of the runs that match."""
    named = [(name, value) for name, value in filters.items() if value]
    return urlencode([*named, *(("tag", f"{key}={value}") for key, value in tags.items())])


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
        by_tag = read_tags(request)
        query = _query(filters, by_tag.tags)
        return self._site.render(
            request,
            "runs.html",
            page=page,
            problem=problem,
            filters=filters,
            by_tag=by_tag,
            # Each tag with the query that finds runs without it.
            chosen_tags=[
                (
                    key,
                    value,
                    _query(filters, {name: by_tag.tags[name] for name in by_tag.tags if name != key}),
                )
                for key, value in by_tag.tags.items()
            ],
            add_to=f"{query}&" if query else "",
            is_filtered=bool(query or by_tag.rejected),
            is_first=parameter(request, "after") is None,
            older=None if onward is None else str(request.url.include_query_params(after=onward).query),
            newest=str(request.url.remove_query_params("after").query),
            statuses=tuple(RunStatus),
            flows=sorted({run.flow_name for run in page.runs}),
            can_filter=self._site.has(Capability.DASHBOARD),
            can_filter_tags=self._site.has(Capability.TAGS),
            max_search=MAX_SEARCH,
            max_tag=MAX_TAG,
        )

    async def _read(self, request: Request) -> tuple[RunPage, str | None]:
        """The page of the address, and the problem of a filter that selects nothing."""
        store = self._site.store
        position = parameter(request, "after")
        after = None if position is None else RunPosition.parse(position)
        by_tag = read_tags(request)
        if by_tag.problem is not None:
            return RunPage((), 0), f"{by_tag.problem[0].upper()}{by_tag.problem[1:]}."
        tags = by_tag.tags or None
        if not self._site.has(Capability.DASHBOARD):
            runs = await store.get_runs(after=after, take=TAKE, tags=tags)
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
        page = await store.get_runs_page(
            flow_id, status=status, after=after, take=TAKE, search=search, tags=tags
        )
        return page, None

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
