"""Flows by name: a store knows flows by their ids, people by their names."""

from __future__ import annotations

from uuid import UUID

from flowstore_core.store import FlowStore


async def flows_named(store: FlowStore, name: str) -> dict[UUID, int]:
    """The flows with this name, each with the number of its runs that match a search for the name.

    A flow has the name of the newest of these runs. Usually one page is enough: the list is complete when
    the runs of the flows found so far add up to all matches.
    """
    names: dict[UUID, str] = {}
    counts: dict[UUID, int] = {}
    take = store.limits.page_size
    page = await store.get_runs_page(search=name, take=take)
    while page.runs:
        for run in page.runs:
            if run.flow_id not in names:
                names[run.flow_id] = run.flow_name
                counted = await store.get_runs_page(run.flow_id, search=name, take=0)
                counts[run.flow_id] = counted.total_count
        if sum(counts.values()) >= page.total_count:
            break
        page = await store.get_runs_page(search=name, take=take, after=page.runs[-1].position)
    return {flow_id: counts[flow_id] for flow_id, found in names.items() if found == name}
