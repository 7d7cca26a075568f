"""Batching: calls that arrive while the database is busy are sent together.

A database executes one statement of a hundred rows far faster than a hundred statements. While every
worker (a connection, a writer thread) is busy, calls of one operation queue; a worker that becomes free
sends all the calls that an operation has queued as one batch, and each caller gets the result of its
row. There is no timer and no added delay: a call that finds a free worker is sent alone, immediately.

A store makes one Batcher, or several where long calls must not delay short ones, and one operation for each
kind of call. The workers are tasks, a thread (see ThreadWorker), or an implementation of ``BatchWorkers``::

    from flowstore_core import StoreUnavailableError, new_claim_token
    from flowstore_core.backend import REQUEUE, Batcher, BatchError


    class Claims:
        def __init__(self, database):
            self._database = database
            # The number of batches in flight at once: connections reserved for them.
            self._batcher = Batcher(workers=2, timeout_hint="raise pool_size, or send fewer calls at once")
            self._claim = self._batcher.operation(
                "try_claim_step", self._claim_all, keyed=True, coalesce=self._coalesce
            )

        async def try_claim_step(self, *, run_id, step_key, owner, lease):
            token = owner or new_claim_token()

            async def release(claimed):
                # Also when the outcome is unknown. Only a claim with this call's token is released.
                if claimed is not False and owner is None:
                    await self._database.release(run_id, step_key, token)

            return await self._claim.submit((run_id, step_key), (run_id, step_key, token, lease), release)

        async def _claim_all(self, rows):
            # One statement in one transaction; one outcome for each row, in the order of the rows.
            try:
                claimed = await self._database.claim(sorted(rows, key=lambda row: row[:2]))
            except self._database.RowRefused:
                raise BatchError(StoreUnavailableError("the database refused the row")) from None
            return [row[:3] in claimed for row in rows]

        @staticmethod
        def _coalesce(first, claimed, later):
            if claimed:
                return later[2] == first[2]
            # The holder may be the later call's owner: only the database knows.
            return REQUEUE

        async def aclose(self):
            await self._batcher.drain(5.0)

Guarantees, for every backend:

- A call returns after its batch was written, never before, so the calls of one caller happen in its
  order. Concurrent callers have no order, even for one key: two workers may carry the same key.
- Two calls with one key never share a batch of a keyed operation, unless ``coalesce`` derives the
  result of the second from that of the first.
- An error in one row reaches only its caller: ``run`` returns it in the row's place, or raises
  BatchError, and the batch is split in half until the row is alone.
- Cancelling a caller does not affect the batch. A call that was not sent never happens; a call that
  was sent is compensated for by its ``on_abandoned``, which is retried until it succeeds (CON-4).
- The queue is bounded in length and in time: callers wait in FIFO order, then get
  StoreUnavailableError.

These remain the task of a backend:

- Lock order. Two batches that lock rows in different orders deadlock: sort by key (``ordered``), and make
  sure that the plan keeps this order, as a hash join does not.
- One key twice. Most databases reject an upsert that names a row twice: use ``keyed``, with the value that
  the database compares.
- Lost replies concern many calls. Give each row its token, probe for each, and retry only rows that certainly
  had no effect (CON-3).
- Plans. A cached plan that was made for small tables stays in use as they grow.
- Errors without a guilty row, such as a full disk, fail each half again: raise BatchError only for errors
  that a value in one row can cause.
- One slow row delays its batch, which waits for every lock that one of its rows needs.
"""

from flowstore_core.batching.call import REQUEUE, BatchError, PendingCall, Transfer
from flowstore_core.batching.queue import BatchedOperation
from flowstore_core.batching.scheduler import Batcher
from flowstore_core.batching.task_worker import TaskWorkers
from flowstore_core.batching.thread_worker import ThreadWorker, WorkLoop
from flowstore_core.batching.workers import BatchSource, BatchWorkers

__all__ = [
    "REQUEUE",
    "BatchError",
    "BatchSource",
    "BatchWorkers",
    "BatchedOperation",
    "Batcher",
    "PendingCall",
    "TaskWorkers",
    "ThreadWorker",
    "Transfer",
    "WorkLoop",
]
