"""What became of a write whose acknowledgement was lost (CON-3).

Nothing is guessed: the server is asked, and only once it can no longer act on what was sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowstore_core import FlowStoreError, OutcomeUnknownError, StoreUnavailableError
from flowstore_postgres.connection import Connection, Peer
from flowstore_postgres.errors import Retry

if TYPE_CHECKING:
    from flowstore_postgres.database import Database

# A lost statement can take effect only as long as the process that got it lives.
TERMINATE_BACKEND = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid = $1 AND backend_start = $2
"""
TERMINATE_TRANSACTION = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_xid::text = $1
"""
# xid8 has 64 bits; pg_stat_activity shows the low 32, which is enough to find a living one.
TRANSACTION_STATUS = "SELECT pg_xact_status($1::text::xid8)"


@dataclass(frozen=True, slots=True)
class Lost:
    """A statement that was sent and not answered."""

    peer: Peer
    over: float
    """From this time of the event loop on it cannot take effect any more."""


async def settle(database: Database, connection: Connection, lost: Sequence[Lost], operation: str) -> None:
    """Return once no lost statement can take effect any more (CON-3)."""
    loop = asyncio.get_running_loop()
    give_up = loop.time() + database.within(database.retry_timeout)
    for one in lost:
        while loop.time() < one.over:
            if one.peer.started is not None:
                alive = await database.ask(connection, TERMINATE_BACKEND, one.peer.pid, one.peer.started)
                if alive is None:
                    break
            if loop.time() > give_up:
                raise OutcomeUnknownError(operation)
            await asyncio.sleep(0.02)


async def was_committed(database: Database, xid: str, operation: str) -> bool:
    """What became of a transaction whose COMMIT got no answer."""

    async def ask() -> bool:
        async with database.connection() as connection:
            low = str(int(xid) & 0xFFFFFFFF)
            status = await database.ask(connection, TRANSACTION_STATUS, xid)
            if status is None or status[0] == "in progress":
                await database.ask(connection, TERMINATE_TRANSACTION, low)
                raise Retry(StoreUnavailableError("a transaction is still in progress"))
            return bool(status[0] == "committed")

    try:
        return await database.retrying(ask, failed=True)
    except FlowStoreError:
        raise OutcomeUnknownError(operation) from None
