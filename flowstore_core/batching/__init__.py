"""Batching: calls that arrive while the database is busy are sent together.

A database executes one statement of a hundred rows far faster than a hundred statements. While every
worker (a connection, a writer thread) is busy, calls of one operation queue; a worker that becomes free
sends all the calls that an operation has queued as one batch, and each caller gets the result of its
row. There is no timer and no added delay: a call that finds a free worker is sent alone, immediately.

A store makes one Batcher, or several where long calls must not delay short ones, and one operation for each
kind of call. The workers are tasks, a thread, or an implementation of ``BatchWorkers``::

    batcher = Batcher(workers=2)
    claim = batcher.operation("try_claim_step", run_claims, keyed=True)
    won = await claim.submit((run_id, step_key), row)

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
