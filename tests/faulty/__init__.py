"""Backends that hang, have wrong signatures, or raise exceptions outside the contract.

``faulty-<name>://`` is the memory backend with one fault, ``faulty-<name>-sqlite:///path`` the SQLite one,
which several processes can use. The fault is in try_claim_step unless its name says otherwise.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

from flowstore_core import Backend, StoreConfig, hookimpl
from flowstore_core.plugins import declared_max_skew
from flowstore_memory.plugin import MemoryBackend
from flowstore_sqlite.plugin import SqliteBackend

DIST = Path(__file__).parent / "dist"
"""Contains the dist-info folder of the plugin, as for an installed distribution."""

LONG = 3600.0

released = threading.Event()
"""Set to release blocked threads."""


class Waits:
    async def try_claim_step(self, **arguments: Any) -> bool:
        return await self._never()

    async def _never(self) -> bool:
        return bool(await asyncio.Event().wait())


class WaitsForItsTask:
    async def try_claim_step(self, **arguments: Any) -> bool:
        task = asyncio.create_task(self._work())
        return await asyncio.shield(task)

    async def _work(self) -> bool:
        await asyncio.sleep(LONG)
        return True


class WaitsForAThread:
    async def try_claim_step(self, **arguments: Any) -> bool:
        await asyncio.to_thread(_sleep_long)
        return True


class IgnoresCancellation:
    async def try_claim_step(self, **arguments: Any) -> bool:
        while True:
            try:
                await asyncio.sleep(LONG)
            except asyncio.CancelledError:
                continue


class Sleeps:
    async def try_claim_step(self, **arguments: Any) -> bool:
        _sleep_long()
        return True


class Locks:
    async def try_claim_step(self, **arguments: Any) -> bool:
        lock = threading.Lock()
        return lock.acquire() and lock.acquire()


class Loops:
    async def try_claim_step(self, **arguments: Any) -> bool:
        number = 0
        while True:
            number += 1


class HangsOnClose:
    @asynccontextmanager
    async def around(self, config: StoreConfig) -> AsyncIterator[None]:
        yield
        await self._wait_for_writers()

    async def _wait_for_writers(self) -> None:
        await asyncio.Event().wait()


class HangsOnOpen:
    @asynccontextmanager
    async def around(self, config: StoreConfig) -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield


class LacksParameter:
    async def try_claim_step(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> bool:
        return bool(
            await super().try_claim_step(run_id=run_id, step_key=step_key, owner=owner, lease=None)  # type: ignore[misc]
        )


class RenamesParameter:
    async def try_claim_step(
        self, run_id: UUID, step_key: str, *, owner: str | None = None, lease_time: Any = None
    ) -> bool:
        return bool(
            await super().try_claim_step(  # type: ignore[misc]
                run_id=run_id, step_key=step_key, owner=owner, lease=lease_time
            )
        )


class TakesByPosition:
    async def try_claim_step(
        self, run_id: UUID, step_key: str, /, *, owner: str | None = None, lease: Any = None
    ) -> bool:
        return True


class RequiresMore:
    async def try_claim_step(
        self, run_id: UUID, step_key: str, *, worker: str, owner: str | None = None, lease: Any = None
    ) -> bool:
        return True


class IsNoCoroutine:
    def try_claim_step(
        self, run_id: UUID, step_key: str, *, owner: str | None = None, lease: Any = None
    ) -> bool:
        return True


class ReturnsAnAwaitable:
    """Correct: a plain function may return an awaitable."""

    def try_claim_step(self, run_id: UUID, step_key: str, *, owner: Any = None, lease: Any = None):  # type: ignore[no-untyped-def]
        return super().try_claim_step(run_id=run_id, step_key=step_key, owner=owner, lease=lease)  # type: ignore[misc]


class LacksMethod:
    """Declares LEASES without renew_step_claim."""

    renew_step_claim = None


class LacksBaseMethod:
    release_dispatch = property()


class Raises:
    async def try_claim_step(self, **arguments: Any) -> bool:
        return self._row({})

    def _row(self, rows: dict[str, bool]) -> bool:
        return rows["claim"]


class LeaksUrl:
    """Raises an exception with the URL and its password in the text."""

    url = ""

    @asynccontextmanager
    async def around(self, config: StoreConfig) -> AsyncIterator[None]:
        self.url = config.url
        yield

    async def try_claim_step(self, **arguments: Any) -> bool:
        raise ConnectionError(f"cannot connect to {self.url}")


class LetsCancellationOut:
    async def try_claim_step(self, **arguments: Any) -> bool:
        raise asyncio.CancelledError


FAULTS: dict[str, type] = {
    "waits": Waits,
    "waits-for-its-task": WaitsForItsTask,
    "waits-for-a-thread": WaitsForAThread,
    "ignores-cancellation": IgnoresCancellation,
    "sleeps": Sleeps,
    "locks": Locks,
    "loops": Loops,
    "hangs-on-close": HangsOnClose,
    "hangs-on-open": HangsOnOpen,
    "lacks-parameter": LacksParameter,
    "renames-parameter": RenamesParameter,
    "takes-by-position": TakesByPosition,
    "requires-more": RequiresMore,
    "is-no-coroutine": IsNoCoroutine,
    "returns-an-awaitable": ReturnsAnAwaitable,
    "lacks-method": LacksMethod,
    "lacks-base-method": LacksBaseMethod,
    "raises": Raises,
    "leaks-url": LeaksUrl,
    "lets-cancellation-out": LetsCancellationOut,
}


def _sleep_long() -> None:
    # Block the thread, not its event loop; the test releases it at its end.
    released.wait(LONG)


class FaultyBackend:
    """The descriptor of a backend with one fault."""

    contract_version = 1

    def __init__(self, name: str, fault: type, base: Backend) -> None:
        self.name = name
        self.schemes = frozenset({name})
        self.capabilities = base.capabilities
        self.max_skew = declared_max_skew(base)
        self.options = base.options
        self._fault = fault
        self._base = base

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[Any]:
        url = self._of_base(config.url)
        async with self._base.open(replace(config, url=url, scheme=self._base.name)) as store:
            store.__class__ = type(self._fault.__name__, (self._fault, type(store)), {})
            around: Callable[[StoreConfig], Any] | None = getattr(store, "around", None)
            if around is None:
                yield store
                return
            async with around(config):
                yield store

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        who, at, _ = url.partition("://")[2].rpartition("@")
        async with self._base.scratch(self._of_base(url)) as fresh:
            yield f"{self.name}://{who}{at}{fresh.partition('://')[2]}"

    def _of_base(self, url: str) -> str:
        """Return the URL for the base backend, without user and password."""
        return f"{self._base.name}://{url.partition('://')[2].rpartition('@')[2]}"


@hookimpl
def flowstore_backends() -> list[Backend]:
    found: list[Backend] = [
        FaultyBackend(f"faulty-{name}", one, MemoryBackend()) for name, one in FAULTS.items()
    ]
    found += [FaultyBackend(f"faulty-{name}-sqlite", one, SqliteBackend()) for name, one in FAULTS.items()]
    return found
