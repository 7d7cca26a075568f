"""The three backends do the same: random histories, with every answer and every read compared.

The memory backend is no judge here. Where two differ, the contract says which one is wrong; what all
three do alike is for the tests in ``contract`` to check.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from flowstore_core import FlowStore, FlowStoreError, open_store
from flowstore_core.plugins import find_backend
from tests.contract.histories import RUNS, Call, first_calls, random_call
from tests.contract.scenes import picture
from tests.virtual_clock import VirtualClock

SEEDS = 12
STEPS = 160


@pytest.fixture
async def stores(
    postgresql_url: str, tmp_path: Path, clock: VirtualClock
) -> AsyncIterator[dict[str, FlowStore]]:
    """A store of each backend, all on one clock."""
    urls = {
        "memory": "memory://",
        "sqlite": f"sqlite:///{tmp_path}/flows.db",
        "postgresql": postgresql_url,
    }
    async with AsyncExitStack() as stack:
        opened = {}
        for name, url in urls.items():
            fresh = await stack.enter_async_context(find_backend(name)[1].scratch(url))
            opened[name] = await stack.enter_async_context(open_store(fresh, clock=clock))
        yield opened


async def _answer(call: Awaitable[Any]) -> Any:
    """What a call returned, or the error with its attributes: equal answers, equal behaviour."""
    try:
        return await call
    except FlowStoreError as error:
        return type(error), error.__dict__


async def _agree(
    stores: dict[str, FlowStore], history: list[Call], ask: Callable[[FlowStore], Awaitable[Any]]
) -> Any:
    answers = {name: await _answer(ask(store)) for name, store in stores.items()}
    first = answers["memory"]
    for name, answer in answers.items():
        told = "\n".join(f"  {operation}(**{arguments!r})" for operation, arguments in history)
        assert answer == first, f"memory and {name} differ after:\n{told}"
    return first


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_backends_agree_on_random_histories(
    stores: dict[str, FlowStore], clock: VirtualClock, seed: int
) -> None:
    rng = random.Random(seed)
    history: list[Call] = []
    for call in first_calls(rng):
        history.append(call)
        await _agree(stores, history, lambda s: s.start_run(**history[-1][1]))
    errors = 0
    for number in range(STEPS):
        if rng.random() < 0.4:
            # Rarely beyond an hour, when cleanup begins to see keys without runs.
            clock.advance(seconds=rng.choice([0.000001, 1, 5, 5, 10, 3700]))
        history.append(random_call(rng, clock))
        answer = await _agree(stores, history, lambda s: getattr(s, history[-1][0])(**history[-1][1]))
        errors += isinstance(answer, tuple) and bool(answer) and isinstance(answer[0], type)
        if number % 8 == 0:
            await _agree(stores, history, lambda s: picture(s, *RUNS))
    await _agree(stores, history, lambda s: picture(s, *RUNS))
    # A history of refusals alone, or of none, would show little.
    assert STEPS // 16 < errors < STEPS * 15 // 16
