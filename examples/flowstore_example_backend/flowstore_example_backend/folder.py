"""The documents of one folder: in memory for reading, on disk before a write returns.

Every write of a run is one change of one document: it works on a copy, puts the copy on disk with one
atomic rename, and only then shows it to readers. So a call has happened or has not (CON-4), an error
changes nothing, and what returned survives a crash (CON-5).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from flowstore_core import Capability, OutcomeUnknownError, StoreUnavailableError
from flowstore_core.backend import ShieldedTasks
from flowstore_example_backend.document import Document, Key, from_json, to_json

T = TypeVar("T")

CLOSING_SECONDS = 10.0


class Folder:
    """One open folder; the noun classes build on it."""

    capabilities: frozenset[Capability]

    def __init__(self, path: Path, now: Callable[[], datetime], *, fsync: bool) -> None:
        self._path = path
        self._now = now
        self._fsync = fsync
        self._documents: dict[UUID, Document] = {}
        self._keys: dict[Key, UUID] = {}
        for draft in path.glob("*.draft"):
            # Of a write that a crash ended before its rename: it never happened.
            draft.unlink()
        for file in path.glob("*.json"):
            self._show(UUID(file.stem), from_json(file.read_text(encoding="utf-8")))
        self._writing = asyncio.Lock()
        self._in_flight = ShieldedTasks()

    async def ping(self) -> None:
        if not self._path.is_dir():
            raise StoreUnavailableError("the folder is gone")

    async def aclose(self) -> None:
        """Wait for the writes that have begun, those of cancelled callers too (CON-4)."""
        await self._in_flight.drain(CLOSING_SECONDS)

    async def _change(
        self,
        run_id: UUID,
        act: Callable[[Document], T],
        give_back: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        """Let ``act`` change the document of a run: all of it, or nothing if it raises.

        A write that has begun goes on to its end when its caller is cancelled; ``give_back`` then
        undoes its effect, and is retried if it fails.
        """
        return await self._in_flight.run(self._write(run_id, act), give_back)

    async def _write(self, run_id: UUID, act: Callable[[Document], T]) -> T:
        async with self._writing:
            before = self._documents.get(run_id) or Document()
            after = before.copy()
            result = act(after)
            if after == Document() != before:
                await self._remove(run_id)
            elif after != before:
                try:
                    await asyncio.to_thread(self._put, run_id, to_json(after))
                except OSError as error:
                    raise self._look(run_id, after, error) from None
                self._show(run_id, after)
            return result

    def _put(self, run_id: UUID, text: str) -> None:
        file = self._path / f"{run_id}.json"
        draft = self._path / f"{run_id}.draft"
        with open(draft, "w", encoding="utf-8", opener=_private) as stream:
            stream.write(text)
            stream.flush()
            if self._fsync:
                os.fsync(stream.fileno())
        draft.replace(file)
        self._sync_folder()

    def _sync_folder(self) -> None:
        # A rename or a removal is durable once its folder is.
        if self._fsync:
            folder = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _look(self, run_id: UUID, after: Document, error: OSError) -> StoreUnavailableError:
        """Whether a failed write has happened is resolved by looking, never by guessing (CON-3)."""
        try:
            found = from_json((self._path / f"{run_id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = Document()
        except OSError:
            return OutcomeUnknownError("a write")
        if found == after:
            # It is in its place, but a power cut may still take it back.
            self._show(run_id, after)
            return OutcomeUnknownError("a write")
        return StoreUnavailableError(f"the folder cannot be written: {error.strerror}")

    def _show(self, run_id: UUID, document: Document) -> None:
        self._forget_keys(run_id)
        self._documents[run_id] = document
        for registered in document.keys:
            self._keys[registered.key] = run_id

    def _forget_keys(self, run_id: UUID) -> None:
        if (document := self._documents.get(run_id)) is not None:
            for registered in document.keys:
                del self._keys[registered.key]

    async def _remove(self, run_id: UUID) -> None:
        try:
            await asyncio.to_thread(self._unlink, run_id)
        except OSError as error:
            raise StoreUnavailableError(f"the folder cannot be written: {error.strerror}") from None
        self._forget_keys(run_id)
        del self._documents[run_id]

    def _unlink(self, run_id: UUID) -> None:
        (self._path / f"{run_id}.json").unlink(missing_ok=True)
        self._sync_folder()

    def _run_id_of(self, key: Key) -> UUID | None:
        return self._keys.get(key)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
