"""The stores of the growth benchmark: open, fill directly in the database, clean up."""

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
    """A store with many completed runs."""

    name: str
    store: FlowStore
    runs: int
    ends: list[datetime]
    """Completion times of the stored runs, in order."""
    after: RunPosition
    """The position of the run before the deep page."""
    delete_by_hand: Callable[[int], Awaitable[None]]
    """Deletes a number of the oldest runs directly in the database."""
    new_id: Callable[[], UUID] = new_run_id
    cleaned: int = 0
    random_ids: bool = False
    records: StoreRecords = field(init=False)

    def __post_init__(self) -> None:
        self.records = StoreRecords(self.store)

    async def clean(self, runs: int) -> float:
        """Delete the oldest runs. Returns the duration in seconds."""
        self.cleaned += runs
        began = perf_counter()
        removed = await self.store.cleanup(self.ends[self.cleaned])
        seconds = perf_counter() - began
        if removed != runs:
            raise WrongAnswerError(f"runs cleaned up: expected {runs}, found {removed}")
        return seconds


Copier = Callable[[list[Copy]], Awaitable[None]]
Migration = Callable[[], Awaitable[None]]


class OpenedStore(NamedTuple):
    """An open store, and direct operations on its database."""

    store: FlowStore
    copy: Copier
    migrate: Migration
    delete_by_hand: Callable[[int], Awaitable[None]]


Open = Callable[[AsyncExitStack, str], Awaitable[OpenedStore]]


async def open_postgres(url: str, stack: AsyncExitStack, name: str) -> OpenedStore:
    schema_url = f"{url}&schema={name}"
    return OpenedStore(
        await stack.enter_async_context(open_store(schema_url)),
        partial(copy_into_postgres, url, name),
        partial(_migrate, schema_url),
        partial(postgres_deletes.delete_oldest, url, name),
    )


async def open_sqlite(folder: Path, stack: AsyncExitStack, name: str) -> OpenedStore:
    path = folder / f"{name}.db"

    async def copy(copies: list[Copy]) -> None:
        await asyncio.to_thread(copy_into_sqlite, path, copies)

    async def delete_by_hand(runs: int) -> None:
        await asyncio.to_thread(sqlite_deletes.delete_oldest, path, runs)

    store = await stack.enter_async_context(open_store(store_url(path)))
    return OpenedStore(store, copy, partial(_migrate, store_url(path)), delete_by_hand)


async def _migrate(url: str) -> None:
    """Migrate like ``flowstore migrate up``, which updates the backend's indexes after a bulk load."""
    _, backend, config = resolve_store(url)
    migrate: Callable[[StoreConfig], Awaitable[int]] | None = getattr(backend, "migrate", None)
    if migrate is not None:
        await migrate(config)
