"""PostgreSQL, minimal batching of concurrent calls: the limit of batching with callers.

The set-based statements on one row per step, but each row has a waiting caller. A store's other duties are
left out: checks of input, latches, leases and terminal runs, probe tokens, cancelled callers, failing rows,
bounds. The remaining cost is that of callers of any store on this machine: a task wake-up and a future per
call, and the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from operator import itemgetter
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.baselines.postgres_sets import BATCH, COUNT_ONE_ROW, SetBased
from benchmarks.workload import WrongAnswerError
from flowstore_core import StepStatus

CONNECTIONS = 2
DISPATCH, ANNOTATE, CLAIM, START, COMPLETE = range(5)
# A claim of a step without an earlier dispatch.
CLAIM_NEW = """
INSERT INTO {schema}.steps (run_id, step_key, claimed_at)
SELECT k.run_id, k.step_key, now()
FROM unnest($1::uuid[], $2::text[]) AS k (run_id, step_key)
     JOIN {schema}.runs r ON r.run_id = k.run_id AND r.status = 'Running'
ON CONFLICT (run_id, step_key) DO UPDATE SET claimed_at = excluded.claimed_at
WHERE steps.claimed_at IS NULL RETURNING run_id, step_key
"""
COUNT_CLAIMED = """
SELECT count(*) FROM {schema}.steps WHERE run_id = ANY($1::uuid[]) AND claimed_at IS NOT NULL
"""

Waiting = tuple[int, str, UUID, "asyncio.Future[bool]"]


class Grouped(SetBased):
    """The five calls; each free connection takes an even share of the queued calls."""

    def __init__(self, connections: Sequence[Any], schema: str) -> None:
        super().__init__(connections, schema, one_row=True)
        self._statements[CLAIM] = self.sql(CLAIM_NEW)
        self._loop = asyncio.get_running_loop()
        self._queues: list[list[Waiting]] = [[] for _ in self._statements]
        self._idle = list(connections)
        self._sent = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def try_record_dispatch(self, run_id: UUID, step_key: str, /) -> bool:
        await self._call(DISPATCH, run_id, step_key)
        return True

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str, /) -> None:
        await self._call(ANNOTATE, run_id, step_key)

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        return await self._call(CLAIM, run_id, step_key)

    async def record_step_start(
        self, run_id: UUID, step_key: str, step_type: str, /, *, input_json: str | None = None
    ) -> int:
        await self._call(START, run_id, step_key)
        return 1

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        /,
        *,
        output_json: str | None = None,
        attempt: int | None = None,
    ) -> None:
        await self._call(COMPLETE, run_id, step_key)

    async def count_completed(self, run_ids: Sequence[UUID]) -> int:
        return int(await self._connections[0].fetchval(self.sql(COUNT_ONE_ROW), run_ids))

    async def count_claimed(self, run_ids: Sequence[UUID]) -> int:
        return int(await self._connections[0].fetchval(self.sql(COUNT_CLAIMED), run_ids))

    def _call(self, number: int, run_id: UUID, step_key: str) -> asyncio.Future[bool]:
        result: asyncio.Future[bool] = self._loop.create_future()
        self._queues[number].append((run_id.int, step_key, run_id, result))
        if self._idle:
            task = self._loop.create_task(self._serve(self._idle.pop()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return result

    async def _serve(self, connection: Any) -> None:
        """Send batches until the queue is empty."""
        while any(self._queues):
            number = max(range(len(self._queues)), key=lambda one: len(self._queues[one]))
            queue = self._queues[number]
            # An even share for each connection, so that no connection idles.
            share = -(-(sum(map(len, self._queues)) + self._sent) // CONNECTIONS)
            group = queue[: min(share, BATCH)]
            del queue[: len(group)]
            # In a fixed order, so that two batches cannot deadlock.
            group.sort(key=itemgetter(0, 1))
            self._sent += len(group)
            send = self._send_claims if number == CLAIM else self._send
            await send(connection, self._statements[number], group)
            self._sent -= len(group)
            # Let resumed callers queue their next calls before the next batch is formed.
            await asyncio.sleep(0)
        self._idle.append(connection)

    async def _send(self, connection: Any, statement: str, group: Sequence[Waiting]) -> None:
        rows = await connection.fetch(statement, [one[2] for one in group], [one[1] for one in group])
        if len(rows) != len(group):
            raise WrongAnswerError(f"{len(rows)} rows of {len(group)} were changed")
        for one in group:
            one[3].set_result(True)

    async def _send_claims(self, connection: Any, statement: str, group: Sequence[Waiting]) -> None:
        """Like _send, but only one of several claims of the same step is sent; the others lose."""
        sent = {one[:2]: one for one in group}
        rows = await connection.fetch(
            statement, [one[2] for one in sent.values()], [one[1] for one in sent.values()]
        )
        won = sent if len(rows) == len(sent) else {(row[0].int, row[1]): None for row in rows}
        for one in group:
            one[3].set_result(one is sent[one[:2]] and one[:2] in won)


@asynccontextmanager
async def grouped_callers(url: str) -> AsyncIterator[Grouped]:
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(CONNECTIONS):
            connections.append(await asyncpg.connect(url))
            stack.push_async_callback(connections[-1].close)
        baseline = Grouped(connections, "grouped")
        await baseline.create()
        yield baseline
