"""Deleting runs (RET)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import RunNotCompletedError, RunStatus, new_claim_token
from flowstore_core.backend import ORPHAN_GRACE
from flowstore_core.status import TERMINAL_RUN_STATUSES
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents
from flowstore_documents.codec import decode
from flowstore_documents.committer import SLOT_LIFETIME
from flowstore_documents.documents import Intent, IntentKind, KeyDocument
from flowstore_documents.run_state import change_run
from flowstore_documents.space import Range, Versioned
from flowstore_documents.transactions import Transaction

BATCH = 200
"""Number of index entries that cleanup reads at once."""
AT_ONCE = 20
"""Number of runs, keys or control records that are deleted at once."""
STAGED_GRACE = timedelta(hours=1)
"""Age of staged pieces whose commit will not come any more."""


class Retention(Access):
    async def cleanup(self, cutoff: datetime) -> int:
        deleted = 0
        for status in sorted(TERMINAL_RUN_STATUSES):
            deleted += await self._delete_completed(status, cutoff)
        await self._delete_orphans(cutoff)
        await self._delete_staged()
        await self._delete_slots()
        return deleted

    async def _delete_completed(self, status: RunStatus, cutoff: datetime) -> int:
        """Delete the runs with a status that completed before the cut-off, one transaction for each."""
        prefix = keys.completed_runs(status)
        start, end = prefix, prefix + keys.time_bytes(cutoff)
        deleted = 0
        while entries := await self._entries(start, end):
            for first in range(0, len(entries), AT_ONCE):
                # Their changes share commits.
                some = entries[first : first + AT_ONCE]
                calls = [self._delete_run(keys.parse_run(key), cutoff) for key in some]
                deleted += sum(await asyncio.gather(*calls))
            start = entries[-1] + b"\0"
        return deleted

    async def _entries(self, start: bytes, end: bytes) -> list[bytes]:
        async def read(tx: Transaction) -> list[bytes]:
            wanted = Range(start, end, BATCH, keys_only=True)
            await finish_intents(tx, ahead=[wanted])
            return [key for key, _ in await tx.scan(wanted)]

        return await self._read("cleanup", read)

    async def _delete_run(self, run_id: UUID, cutoff: datetime) -> bool:
        """Delete a run, unless a retry has reopened it since (RET-2)."""

        async def delete(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, tags=True)
            if run.run is None or run.run.completed_at is None or run.run.completed_at >= cutoff:
                return False
            run.run.intent = Intent(IntentKind.DELETE, new_claim_token())
            return True

        return await self._shielded.run(self._delete("cleanup", run_id, delete))

    async def _delete(
        self, operation: str, run_id: UUID, delete: Callable[[Transaction], Awaitable[bool]]
    ) -> bool:
        """Store the intent, which is the moment of the deletion, and finish it."""
        is_deleted = await self._transactions.run(operation, delete)
        if is_deleted:
            await self._transactions.finish(operation, run_id)
        return is_deleted

    async def delete_run(self, run_id: UUID) -> bool:
        async def delete(tx: Transaction) -> bool:
            run = await change_run(tx, run_id, tags=True)
            if run.run is None:
                return False
            if not run.is_terminal:
                raise RunNotCompletedError(run_id)
            run.run.intent = Intent(IntentKind.DELETE, new_claim_token())
            return True

        return await self._shielded.run(self._delete("delete_run", run_id, delete))

    async def _delete_orphans(self, cutoff: datetime) -> None:
        """Delete old keys and control records whose run never started (RET-4)."""

        async def limit(tx: Transaction) -> bytes:
            now = await tx.now()
            return min(keys.time_bytes(cutoff), keys.after_time(now - ORPHAN_GRACE))

        start, end = keys.ORPHANS, keys.ORPHANS + await self._read("cleanup", limit)
        while entries := await self._entries(start, end):
            for first in range(0, len(entries), AT_ONCE):
                await asyncio.gather(*map(self._delete_orphan, entries[first : first + AT_ONCE]))
            start = entries[-1] + b"\0"

    async def _delete_orphan(self, entry: bytes) -> None:
        run_id, scope = keys.parse_orphan(entry)

        async def delete(tx: Transaction) -> None:
            run = await change_run(tx, run_id)
            tx.delete(entry)
            if run.run is not None:
                return  # It has started: its keys and its control record are deleted with it.
            if not scope:
                tx.delete(keys.control(run_id))
                return
            key, own = keys.idempotency_key(scope), keys.key_of_run(run_id, scope)
            tick = keys.keys_tick(run_id)
            found = (await tx.read([key, tick])).found.get(key)
            if found is not None and decode(KeyDocument, found.value).run_id == run_id:
                tx.delete(key)
            tx.delete(own)
            first = await tx.scan(keys.prefix_range(keys.keys_of_run(run_id), 2, keys_only=True))
            if any(name != own for name, _ in first):
                tx.put(tick)
            else:
                tx.delete(tick)

        await self._write("cleanup", delete)

    async def _delete_staged(self) -> None:
        """Delete the pieces of changes that were never committed."""
        end = keys.STAGED + keys.time_bytes(await self._space_time() - STAGED_GRACE)

        async def read(tx: Transaction) -> list[tuple[bytes, Versioned]]:
            return await tx.scan(Range(keys.STAGED, end, BATCH))

        while marks := await self._read("cleanup", read):
            for mark, tokens in marks:
                for token in tokens.value.decode().split("\0"):
                    while pieces := await self._pieces(keys.parse_staged(mark), token):
                        await self._transactions.write_all("cleanup", {}, {}, pieces)
                await self._transactions.write_all("cleanup", {}, {}, [mark])

    async def _pieces(self, run_id: UUID, token: str) -> list[bytes]:
        prefix = keys.pieces(run_id, token)
        return await self._entries(prefix, keys.end_of(prefix))

    async def _space_time(self) -> datetime:
        return await self._transactions.committer.space_time("cleanup")

    async def _delete_slots(self) -> None:
        """Delete the slots of processes that have died."""
        oldest = keys.time_bytes(await self._space_time() - SLOT_LIFETIME)

        async def read(tx: Transaction) -> list[tuple[bytes, Versioned]]:
            return await tx.scan(keys.prefix_range(keys.SLOTS))

        for key, slot in await self._read("cleanup", read):
            if slot.value < oldest:
                await self._transactions.write_all("cleanup", {key: slot.version}, {}, [key])
