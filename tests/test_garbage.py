"""Calls leave no reference cycles: only the garbage collector would free them, and it is slow.

It visits all objects that live, so an engine with hundreds of calls in progress pays for each collection.
"""

from __future__ import annotations

import gc
from collections import Counter
from uuid import uuid4

import pytest
from flowstore_conformance.state_probe import observe
from flowstore_conformance.write_scenarios import SCENARIOS, available, probes_of

from flowstore_core import FlowStore, open_store
from flowstore_documents.memory_space import MemoryData, MemorySpace
from tests.documents_backend.stores import open_on


async def play(store: FlowStore, scenario: str) -> None:
    """Make the writes of a scenario, and every read."""
    run_id, flow_id = uuid4(), uuid4()
    setup, call = SCENARIOS[scenario](run_id, flow_id)
    await observe(store, [*setup, call, *probes_of(run_id, flow_id, store.capabilities)], exact_times=False)


async def check_scenarios(store: FlowStore) -> None:
    scenarios = available(store.capabilities)
    for scenario in scenarios:
        await play(store, scenario)  # The first time may fill caches.
    gc.collect()
    gc.disable()
    try:
        for scenario in scenarios:
            await play(store, scenario)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        garbage = Counter(map(type, gc.garbage))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not garbage


async def test_calls_leave_no_garbage(namespace: str) -> None:
    async with open_store(namespace) as store:
        await check_scenarios(store)


@pytest.mark.parametrize("snapshots", [True, False])
async def test_calls_of_the_document_toolkit_leave_no_garbage(snapshots: bool) -> None:
    async with open_on(MemorySpace(MemoryData(), snapshots=snapshots)) as store:
        await check_scenarios(store)
