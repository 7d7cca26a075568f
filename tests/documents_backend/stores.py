"""Stores of the document toolkit on spaces in memory, for tests that look below the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from datetime import datetime

from flowstore_core import StoreConfig
from flowstore_documents import (
    Change,
    DocumentStore,
    KeyValueSpace,
    Range,
    Version,
    View,
    capabilities_of,
    open_documents,
)
from flowstore_documents.memory_space import MemoryData, MemorySpace


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition on the requests of a space."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - nothing tells of requests
            await asyncio.sleep(0)


@asynccontextmanager
async def open_on(
    space: KeyValueSpace, *, retry_timeout: float = 5.0, clock: Callable[[], datetime] | None = None
) -> AsyncIterator[DocumentStore]:
    config = StoreConfig(
        url="documents://",
        scheme="documents",
        options={"retry_timeout": retry_timeout},
        clock=clock,
        migrate=True,
    )
    capabilities = capabilities_of(snapshots=space.snapshots)
    async with open_documents(space, config, backend="documents", capabilities=capabilities) as store:
        yield store


class CountingSpace(MemorySpace):
    """Counts what the store asks for and sends."""

    def __init__(self, data: MemoryData, *, snapshots: bool = True) -> None:
        super().__init__(data, snapshots=snapshots)
        self.reset()

    def reset(self) -> None:
        self.reads = self.items = self.bytes_read = 0
        self.commits: list[Sequence[Change]] = []

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        view = await super().read(keys, ranges, at=at)
        values = [*view.found.values(), *(value for page in view.pages for _, value in page.items)]
        self.reads += 1
        self.items += len(values)
        self.bytes_read += sum(len(value.value) for value in values)
        return view

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        self.commits.append(changes)
        return await super().commit(changes)


class PausingSpace(MemorySpace):
    """Waits before a commit that writes a key."""

    def __init__(self, data: MemoryData, *, snapshots: bool = True) -> None:
        super().__init__(data, snapshots=snapshots)
        self._paused: dict[bytes, tuple[asyncio.Event, asyncio.Event]] = {}

    def pause(self, key: bytes) -> tuple[asyncio.Event, asyncio.Event]:
        """The events that tell that the next commit waits, and let it go on."""
        self._paused[key] = asyncio.Event(), asyncio.Event()
        return self._paused[key]

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        written = {key for change in changes for key in (*change.puts, *change.deletes)}
        for key in written & set(self._paused):
            waits, goes_on = self._paused.pop(key)
            waits.set()
            await goes_on.wait()
        return await super().commit(changes)
