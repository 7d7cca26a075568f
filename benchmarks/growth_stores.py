"""The stores of the growth benchmark: opened, filled behind their back, cleaned up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import NamedTuple
from uuid import UUID

from benchmarks.baselines import postgres_deletes, sqlite_deletes
from benchmarks.copies import Copy, copy_into_postgres, copy_into_sqlite
from benchmarks.workload import StoreRecords, WrongAnswerError, store_url
from flowstore_core import FlowStore, RunPosition, StoreConfig, new_run_id, open_store
from flowstore_core.open import resolve_store


@dataclass(slots=True)
class Namespace:
    """A store with so many completed runs."""

    name: str
    store: FlowStore
    runs: int
    ends: list[datetime]
    """When each stored run was completed, in order."""
    after: RunPosition
    """The position of the run before the deep page."""
    delete_by_hand: Callable[[int], Awaitable[None]]
    """Deletes so many of the oldest runs behind the store's back."""
    new_id: Callable[[], UUID] = new_run_id
    cleaned: int = 0
    random_ids: bool = False
    records: StoreRecords = field(init=False)

    def __post_init__(self) -> None:
        self.records = StoreRecords(self.store)

    async def clean(self, runs: int) -> float:
        """Delete the oldest runs; how many seconds it took."""
        self.cleaned += runs
        began = perf_counter()
        removed = await self.store.cleanup(self.ends[self.cleaned])
        seconds = perf_counter() - began
        if removed != runs:
            raise WrongAnswerError(f"runs cleaned up: expected {runs}, found {removed}")
        return seconds


Copier = Callable[[list[Copy]], Awaitable[None]]
Migration = Callable[[], Awaitable[None]]


class Place(NamedTuple):
    """A store that is open, and what can be done to its database besides."""

    store: FlowStore
    copy: Copier
    migrate: Migration
    delete_by_hand: Callable[[int], Awaitable[None]]


Open = Callable[[AsyncExitStack, str], Awaitable[Place]]


async def open_postgres(url: str, stack: AsyncExitStack, name: str) -> Place:
    place = f"{url}&schema={name}"
    return Place(
        await stack.enter_async_context(open_store(place)),
        partial(copy_into_postgres, url, name),
        partial(_migrate, place),
        partial(postgres_deletes.delete_oldest, url, name),
    )


async def open_sqlite(folder: Path, stack: AsyncExitStack, name: str) -> Place:
    path = folder / f"{name}.db"

    async def copy(copies: list[Copy]) -> None:
        await asyncio.to_thread(copy_into_sqlite, path, copies)

    async def delete_by_hand(runs: int) -> None:
        await asyncio.to_thread(sqlite_deletes.delete_oldest, path, runs)

    store = await stack.enter_async_context(open_store(store_url(path)))
    return Place(store, copy, partial(_migrate, store_url(path)), delete_by_hand)


async def _migrate(url: str) -> None:
    """What ``flowstore migrate up`` does: after a bulk load it brings the backend's indexes up."""
    _, backend, config = resolve_store(url)
    migrate: Callable[[StoreConfig], Awaitable[int]] | None = getattr(backend, "migrate", None)
    if migrate is not None:
        await migrate(config)
