"""Idempotency keys (IDM): each is a document of the key, and one of its run."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from flowstore_documents import keys
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import KeyDocument
from flowstore_documents.run_state import read_run
from flowstore_documents.transactions import Transaction


async def find_key(tx: Transaction, scope: bytes) -> UUID | None:
    """The run that is registered under an idempotency key. The commit then needs it unchanged."""
    key = keys.idempotency_key(scope)
    found = (await tx.read([key])).found.get(key)
    if found is None:
        return None
    run_id = decode(KeyDocument, found.value).run_id
    # The keys of a run that is being deleted do not count any more.
    await read_run(tx, run_id)
    return run_id


def register_key(tx: Transaction, run_id: UUID, scope: bytes, created_at: datetime) -> None:
    document = encode(KeyDocument(run_id, created_at))
    tx.put(keys.idempotency_key(scope), document)
    tx.put(keys.key_of_run(run_id, scope), document)
