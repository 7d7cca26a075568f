"""The documents of one folder: cached in memory for reads, on disk before a write returns.

Every write changes one document. It works on a copy, saves the copy with one atomic rename, and then
publishes it to readers. Therefore a call either has happened or has not (CON-4), an error changes nothing,
and an acknowledged write survives a crash (CON-5).
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

CLOSE_TIMEOUT = 10.0


class Folder:
    """One open folder. Base class of the noun classes."""

    capabilities: frozenset[Capability]

    def __init__(self, path: Path, now: Callable[[], datetime], *, fsync: bool) -> None:
        self._path = path
        self._now = now
        self._fsync = fsync
        self._documents: dict[UUID, Document] = {}
        self._keys: dict[Key, UUID] = {}
        for draft in path.glob("*.draft"):
            # A crash ended this write before its rename, so it has not happened.
            draft.unlink()
        for file in path.glob("*.json"):
            self._publish(UUID(file.stem), from_json(file.read_text(encoding="utf-8")))
        self._write_lock = asyncio.Lock()
        self._in_flight = ShieldedTasks()

    async def ping(self) -> None:
        """Raise StoreUnavailableError unless the folder exists."""
        if not self._path.is_dir():
            raise StoreUnavailableError("the folder is gone")

    async def aclose(self) -> None:
        """Wait for running writes and compensations, in bounded time (CON-4)."""
        await self._in_flight.drain(CLOSE_TIMEOUT)

    async def _change(
        self,
        run_id: UUID,
        change: Callable[[Document], T],
        on_abandoned: Callable[[T | OutcomeUnknownError], Awaitable[None]] | None = None,
    ) -> T:
        """Apply ``change`` to the document of a run, atomically. If it raises, nothing is changed.

        When the caller is cancelled, the write continues to its end. ``on_abandoned`` then receives its
        result and compensates for its effect; it is retried until it succeeds.
        """
        return await self._in_flight.run(self._write(run_id, change), on_abandoned)

    async def _write(self, run_id: UUID, change: Callable[[Document], T]) -> T:
        async with self._write_lock:
            before = self._documents.get(run_id) or Document()
            after = before.copy()
            result = change(after)
            if after == Document() != before:
                await self._delete(run_id)
            elif after != before:
                try:
                    await asyncio.to_thread(self._save, run_id, to_json(after))
                except OSError as error:
                    raise self._resolve_failed_write(run_id, after, error) from None
                self._publish(run_id, after)
            return result

    def _save(self, run_id: UUID, text: str) -> None:
        file = self._path / f"{run_id}.json"
        draft = self._path / f"{run_id}.draft"
        with open(draft, "w", encoding="utf-8", opener=_open_private) as stream:
            stream.write(text)
            stream.flush()
            if self._fsync:
                os.fsync(stream.fileno())
        draft.replace(file)
        self._sync_folder()

    def _sync_folder(self) -> None:
        # A rename or removal is durable after an fsync of the folder.
        if self._fsync:
            folder = os.open(self._path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _resolve_failed_write(self, run_id: UUID, after: Document, error: OSError) -> StoreUnavailableError:
        """The error for a failed write. Reads the file back, because the write may have happened (CON-3)."""
        try:
            found = from_json((self._path / f"{run_id}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            found = Document()
        except OSError:
            return OutcomeUnknownError("a write")
        if found == after:
            # The rename has happened, but a power failure may still undo it.
            self._publish(run_id, after)
            return OutcomeUnknownError("a write")
        return StoreUnavailableError(f"the folder cannot be written: {error.strerror}")

    def _publish(self, run_id: UUID, document: Document) -> None:
        """Make the document and its idempotency keys visible to readers."""
        self._drop_keys(run_id)
        self._documents[run_id] = document
        for registered in document.keys:
            self._keys[registered.key] = run_id

    def _drop_keys(self, run_id: UUID) -> None:
        if (document := self._documents.get(run_id)) is not None:
            for registered in document.keys:
                del self._keys[registered.key]

    async def _delete(self, run_id: UUID) -> None:
        # An error leaves the document published; cleanup deletes it when it is called again.
        try:
            await asyncio.to_thread(self._unlink, run_id)
        except OSError as error:
            raise StoreUnavailableError(f"the folder cannot be written: {error.strerror}") from None
        self._drop_keys(run_id)
        del self._documents[run_id]

    def _unlink(self, run_id: UUID) -> None:
        (self._path / f"{run_id}.json").unlink(missing_ok=True)
        self._sync_folder()

    def _run_id_of(self, key: Key) -> UUID | None:
        return self._keys.get(key)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
