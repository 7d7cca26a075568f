"""The three backends agree on random call histories: every result and every read is compared.

The conformance suite compares each backend with its model. These tests compare the backends with each other,
which covers error attributes too: the model specifies only the class of an error.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID
from weakref import WeakKeyDictionary

import pytest
from flowstore_conformance.archives import with_known_owners
from flowstore_conformance.claim_tokens import ANY_OWNER, ClaimToken, comparable_owner
from flowstore_conformance.differential import GLOBAL_READS, expected_outcome
from flowstore_conformance.history import Call
from flowstore_conformance.model import Model
from flowstore_conformance.operations import available_strategies, draw_call, draw_clock_advance
from flowstore_conformance.state_probe import invoke, probe_calls
from flowstore_conformance.strategies import FLOWS, KEYS, RandomChoices, Universe

from flowstore_core import (
    Capability,
    ClaimedStep,
    FlowStore,
    FlowStoreError,
    RunArchive,
    StepClaim,
    open_store,
)
from flowstore_core.plugins import find_backend
from tests.virtual_clock import VirtualClock

OWNERS: WeakKeyDictionary[FlowStore, dict[Any, str]] = WeakKeyDictionary()
"""The random owners of the claims of claim_next_steps in each store, by the model's owner."""
SEEDS = 6
CALLS = 150
CALLS_PER_STATE = 50
"""After so many calls the state is compared too; the suite compares it with the model more often."""
# The facts about processes name no operation.
ALL = frozenset(Capability)
for _name in ("memory", "sqlite", "postgresql"):
    ALL &= find_backend(_name)[1].capabilities
RUNS = [UUID(int=number) for number in (1, 2, 3)]


@pytest.fixture
async def stores(
    postgresql_url: str, memory_path: Path, clock: VirtualClock
) -> AsyncIterator[dict[str, FlowStore]]:
    """One store per backend, all on one clock."""
    urls = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{memory_path}/flows.db",
        "postgresql": postgresql_url,
    }
    async with AsyncExitStack() as stack:
        opened = {}
        for name, url in urls.items():
            fresh = await stack.enter_async_context(find_backend(name)[1].scratch(url))
            opened[name] = await stack.enter_async_context(open_store(fresh, clock=clock))
        yield opened


def _facts_of(error: FlowStoreError) -> Any:
    return type(error), error.__dict__


async def _outcome(store: FlowStore, call: Call) -> Any:
    """Return the result of a call, or the class and the attributes of its error."""
    owners: dict[Any, str] = OWNERS.setdefault(store, {})
    if (owner := owners.get(call.arguments.get("owner"))) is not None:
        call = replace(call, arguments={**call.arguments, "owner": owner})
    try:
        result = await invoke(store, call)
    except FlowStoreError as error:
        return _facts_of(error)
    if isinstance(result, RunArchive):
        return with_known_owners(result, ANY_OWNER)
    if not isinstance(result, tuple):
        return result
    owners |= {
        ClaimToken.of(each.run_id, each.step_key): each.owner
        for each in result
        if isinstance(each, ClaimedStep)
    }
    return tuple(map(_comparable, result))


def _comparable(one: Any) -> Any:
    """An item of a result, the same on every backend: advance_runs returns errors."""
    if isinstance(one, FlowStoreError):
        return _facts_of(one)
    if isinstance(one, (ClaimedStep, StepClaim)):
        return replace(one, owner=comparable_owner(one.owner))
    return one


async def _assert_agreement(stores: dict[str, FlowStore], history: list[Call], call: Call) -> Any:
    outcomes = {name: await _outcome(store, call) for name, store in stores.items()}
    first = outcomes["memory"]
    for name, outcome in outcomes.items():
        calls = "\n".join(f"  {each.source()}" for each in history)
        assert outcome == first, f"memory and {name} differ in {call.source()} after:\n{calls}"
    return first


async def _assert_same_state(stores: dict[str, FlowStore], history: list[Call]) -> None:
    for run_id in RUNS:
        for call in probe_calls(run_id, ALL):
            await _assert_agreement(stores, history, call)
    for operation in (one for one in GLOBAL_READS if one.is_offered(ALL)):
        await _assert_agreement(stores, history, Call(method=operation.name))


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_backends_agree_on_random_histories(
    stores: dict[str, FlowStore], clock: VirtualClock, seed: int
) -> None:
    rng = random.Random(seed)
    choices = RandomChoices(rng)
    # The model only supplies the state for drawing calls; the suite compares its results.
    model = Model(clock)
    universe = Universe(model=model, runs=RUNS, flows=FLOWS, keys=KEYS[:3], capabilities=ALL)
    methods = {name: one.weight for name, one in available_strategies(ALL).items()}
    history: list[Call] = []
    errors = 0
    for number in range(CALLS):
        if rng.random() < 0.3:
            clock.now += draw_clock_advance(choices, universe)
        [method] = rng.choices(list(methods), list(methods.values()))
        call = draw_call(choices, universe, "start_run" if number < 2 else method)
        outcome = await _assert_agreement(stores, history, call)
        expected_outcome(model, call)
        history.append(call)
        errors += isinstance(outcome, tuple) and bool(outcome) and isinstance(outcome[0], type)
        if len(history) % CALLS_PER_STATE == 0:
            await _assert_same_state(stores, history)
    # A history with only errors, or with none, would test little.
    assert CALLS // 20 < errors < CALLS // 2
