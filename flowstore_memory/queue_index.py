"""The index of queued steps: claim_next_steps finds the next ready step without a scan (QUE-1, QUE-2).

There is a heap for each queue and priority. An entry may become outdated: an operation that makes a step
ready later, or not at all, leaves its entry alone, and one that makes it ready earlier adds another. A reader
of the heap compares each entry with the state of its step and moves or drops an outdated one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from heapq import heapify, heappop, heappush
from itertools import count

from flowstore_core import RunStatus
from flowstore_core.queues import MAX_PRIORITY
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_memory.state import Namespace, QueueEntry, RunState, StepState, WaiterState

_numbers = count()


def ready_at(step: StepState, waiter: WaiterState | None) -> datetime | None:
    """The time from which a queued step is ready; None if no time makes it ready (QUE-1)."""
    if step.dispatched_at is None:
        return None
    moment = step.due_at or step.dispatched_at
    if step.claimed_at is not None:
        if step.expires_at is None:
            return None
        moment = max(moment, step.expires_at)
    if waiter is not None and waiter.delivered_at is None:
        if waiter.expires_at is None:
            return None
        moment = max(moment, waiter.expires_at)
    return moment


def index_step(namespace: Namespace, run: RunState, step_key: str, step: StepState) -> None:
    """Index a step after a change that may have made it ready, or ready earlier."""
    queued = step.queued
    if queued is None or run.status is not RunStatus.RUNNING or step.status in TERMINAL_STEP_STATUSES:
        return
    moment = ready_at(step, run.waiters.get(step_key))
    if moment is None or (queued.indexed_at is not None and queued.indexed_at <= moment):
        return
    queued.indexed_at = moment
    heap = namespace.queue_index.setdefault((queued.queue, queued.priority), [])
    heappush(heap, QueueEntry(moment, run.run_id, step_key, next(_numbers), queued))
    namespace.wake()


def index_run(namespace: Namespace, run: RunState) -> None:
    """Index every step of a run that was reopened (QUE-5)."""
    for step_key, step in run.steps.items():
        index_step(namespace, run, step_key, step)


def drop_deleted_runs(namespace: Namespace) -> None:
    """Remove the entries of runs that are not stored any more (RET-1)."""
    for level, heap in list(namespace.queue_index.items()):
        kept = [entry for entry in heap if entry.run_id.int in namespace.runs]
        if kept:
            heapify(kept)
            namespace.queue_index[level] = kept
        else:
            del namespace.queue_index[level]


def take_ready_steps(
    namespace: Namespace, queues: Collection[str], now: datetime
) -> Iterator[tuple[RunState, str, StepState]]:
    """Remove the ready steps from the index, in the order of QUE-2.

    The caller claims each step and indexes it again.
    """
    for priority in range(MAX_PRIORITY, -1, -1):
        # Looked up again for each step: indexing one may make a heap anew.
        while heaps := [heap for queue in queues if (heap := namespace.queue_index.get((queue, priority)))]:
            heap = min(heaps, key=lambda entries: entries[0])
            entry = heap[0]
            if entry.ready_at > now:
                break
            heappop(heap)
            if not heap:
                del namespace.queue_index[entry.queued.queue, priority]
            run = namespace.runs.get(entry.run_id.int)
            step = None if run is None else run.steps.get(entry.step_key)
            if run is None or step is None or step.queued is not entry.queued:
                continue
            if entry.queued.indexed_at != entry.ready_at:
                continue
            entry.queued.indexed_at = None
            moment = ready_at(step, run.waiters.get(entry.step_key))
            if run.status is not RunStatus.RUNNING or step.status in TERMINAL_STEP_STATUSES:
                continue
            if moment == entry.ready_at:
                yield run, entry.step_key, step
            else:
                index_step(namespace, run, entry.step_key, step)
