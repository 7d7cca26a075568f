"""The Batcher: forming batches, resolving calls, and cancelled callers and workers."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import closing, suppress
from random import Random
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowstore_core import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.batching import REQUEUE, Batcher, BatchError, TaskWorkers, Transfer
from flowstore_core.batching.scheduler import HOLDBACK_THRESHOLD, MAX_BATCH_BYTES, SPLIT_THRESHOLD

Batch = list[Any]
TIMEOUT = 60.0
"""Seconds until a test that hangs fails."""


class FakeDatabase:
    """Records batches; create it with ``blocked=True`` so that calls queue until ``free`` is set."""

    def __init__(self, *, blocked: bool = False) -> None:
        self.batches: list[Batch] = []
        self.written: list[Any] = []
        self.compensated: list[Any] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.free = asyncio.Event()
        self.result: Callable[[Any], Any] = lambda item: ("done", item)
        if not blocked:
            self.free.set()

    async def run(self, items: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(items))
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            await self.free.wait()
            await asyncio.sleep(0)
            results = [self.result(item) for item in items]
            self.written += [item for item, one in zip(items, results, strict=True) if one is not REQUEUE]
            return results
        finally:
            self.in_flight -= 1

    async def compensate(self, outcome: Any) -> None:
        self.compensated.append(outcome)


async def yield_to_loop(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def start_tasks(*calls: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(call) for call in calls]


async def outcomes(tasks: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)


@pytest.fixture(autouse=True)
def no_asyncio_errors(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on errors that asyncio only logs, such as exceptions that were never retrieved."""
    yield
    gc.collect()
    assert [one.getMessage() for one in caplog.records if one.name == "asyncio"] == []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock advances only while no task can run."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select
        # asyncio makes its selector wait until the next timer is due.

        def wait(timeout: float | None = None) -> Any:
            if timeout:
                # The margin keeps rounding from leaving the timer in the future.
                self._now += timeout + 1e-6
            elif timeout is None:
                raise AssertionError("every task waits and no timer is set")
            return select(0)

        self._selector.select = wait

    def time(self) -> float:
        return self._now


# Forming batches


async def test_a_single_call_is_sent_at_once_as_a_batch_of_one() -> None:
    database = FakeDatabase()
    operation = Batcher(workers=2).operation("write", database.run)
    for number in range(3):
        assert await operation.submit(number, number) == ("done", number)
    assert database.batches == [[0], [1], [2]]


async def test_simultaneous_calls_share_a_batch_and_calls_queue_while_the_worker_is_busy() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1).operation("write", database.run)
    first = start_tasks(*(operation.submit(n, n) for n in range(3)))
    await yield_to_loop()
    later = start_tasks(*(operation.submit(n, n) for n in range(3, 40)))
    await yield_to_loop()
    assert database.batches == [[0, 1, 2]]
    database.free.set()
    assert await outcomes(first + later) == [("done", n) for n in range(40)]
    assert database.batches == [[0, 1, 2], list(range(3, 40))]


async def test_no_batch_is_larger_than_max_rows() -> None:
    database = FakeDatabase()
    operation = Batcher(workers=1, max_rows=10).operation("write", database.run)
    assert await outcomes(start_tasks(*(operation.submit(n, n) for n in range(35)))) == [
        ("done", n) for n in range(35)
    ]
    assert [len(batch) for batch in database.batches] == [10, 10, 10, 5]


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_at_most_one_batch_per_worker_is_in_flight(workers: int) -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=workers, max_rows=7).operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(300)))
    await yield_to_loop(10)
    database.free.set()
    await outcomes(tasks)
    assert database.max_in_flight == workers
    assert sorted(database.written) == list(range(300))


async def test_two_free_workers_take_half_of_many_calls_each() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=2).operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(SPLIT_THRESHOLD)))
    await yield_to_loop()
    assert [len(batch) for batch in database.batches] == [SPLIT_THRESHOLD // 2] * 2
    database.free.set()
    await outcomes(tasks)


async def test_no_worker_takes_more_than_its_share_of_queued_and_in_flight_calls() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=2).operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(20)))
    await yield_to_loop()
    tasks += start_tasks(*(operation.submit(n, n) for n in range(20, 220)))
    await yield_to_loop()
    database.free.set()
    await outcomes(tasks)
    # With this many calls, a third is held back for the first free worker.
    assert [len(batch) for batch in database.batches[:2]] == [20, 74]
    assert sum(len(batch) for batch in database.batches) == 220


async def test_a_third_of_many_calls_is_held_back_and_sent_before_the_first_batch_is_resolved() -> None:
    database = FakeDatabase(blocked=True)
    batcher = Batcher(workers=2)
    operation = batcher.operation("write", database.run)
    batches_at_result: list[int] = []

    async def caller(number: int) -> None:
        await operation.submit(number, number)
        batches_at_result.append(len(database.batches))

    tasks = start_tasks(*(caller(n) for n in range(HOLDBACK_THRESHOLD)))
    await yield_to_loop()
    third = -(-HOLDBACK_THRESHOLD // 3)
    assert [len(batch) for batch in database.batches] == [third, third]
    assert batcher.queued == HOLDBACK_THRESHOLD - 2 * third
    database.free.set()
    await outcomes(tasks)
    # The first free worker sent the last third before its callers resumed.
    assert min(batches_at_result) == len(database.batches) == 3


async def test_coalesced_callers_count_when_workers_split_the_queue() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=2).operation(
        "claim", database.run, keyed=True, coalesce=lambda first, result, later: result
    )
    tasks = start_tasks(*(operation.submit(n // 8, n // 8) for n in range(256)))
    await yield_to_loop()
    # Two callers with 86 calls each; the last key of one is the first of the other.
    assert [len(batch) for batch in database.batches] == [11, 12]
    database.free.set()
    assert await outcomes(tasks) == [("done", n // 8) for n in range(256)]


async def test_extra_workers_start_for_more_than_full_batches_and_stop_when_idle() -> None:
    gates: list[asyncio.Event] = []
    in_flight: list[int] = []

    async def run(items: Sequence[int]) -> Sequence[int]:
        gates.append(gate := asyncio.Event())
        in_flight.append(len(items))
        await gate.wait()
        in_flight.remove(len(items))
        return items

    batcher = Batcher(workers=lambda batcher: TaskWorkers(batcher, 1, limit=3), max_rows=10)
    operation = batcher.operation("write", run)
    tasks: list[asyncio.Task[Any]] = []
    for more, expected in ((10, [10]), (10, [10, 10]), (1, [10, 10, 1]), (12, [10, 10, 1])):
        tasks += start_tasks(*(operation.submit(len(tasks) + n, len(tasks) + n) for n in range(more)))
        await yield_to_loop()
        assert in_flight == expected
    gates[0].set()
    gates[1].set()
    await yield_to_loop()
    # Thirteen calls are left, enough for two workers: the last two calls wait.
    assert (in_flight, batcher.queued) == ([1, 10], 2)
    while not all(task.done() for task in tasks):
        for gate in gates:
            gate.set()
        await yield_to_loop(1)
    assert await outcomes(tasks) == list(range(33))


async def test_a_direct_slot_counts_as_a_worker_and_drain_waits_for_it() -> None:
    database = FakeDatabase(blocked=True)
    batcher = Batcher(workers=2)
    operation = batcher.operation("write", database.run)
    assert batcher.acquire_direct_slot()
    assert not batcher.acquire_direct_slot()
    tasks = start_tasks(operation.submit(0, 0))
    await yield_to_loop()
    tasks += start_tasks(operation.submit(1, 1))
    await yield_to_loop()
    assert database.batches == [[0]]
    batcher.release_direct_slot()
    await yield_to_loop()
    assert database.batches == [[0], [1]]
    assert not batcher.acquire_direct_slot()
    database.free.set()
    await outcomes(tasks)
    await yield_to_loop()
    assert batcher.acquire_direct_slot()
    closing = start_tasks(batcher.drain(TIMEOUT))
    await yield_to_loop()
    assert not closing[0].done()
    batcher.release_direct_slot()
    await outcomes(closing)
    assert not batcher.acquire_direct_slot()


async def test_a_call_may_be_transferred_with_its_coalesced_calls() -> None:
    database, target = FakeDatabase(), FakeDatabase()
    target_operation = Batcher(workers=1).operation("write", target.run)
    operation = Batcher(workers=1).operation("write", database.run, keyed=True, coalesce=lambda *_: "shared")
    database.result = lambda item: Transfer(target_operation.accept_transfer) if item < 2 else item
    tasks = start_tasks(operation.submit("a", 0), operation.submit("a", 1), operation.submit("b", 2))
    assert await outcomes(tasks) == [("done", 0), ("done", 1), 2]
    assert target.written == [0, 1]


async def test_an_ordered_batch_is_sorted_and_decode_creates_the_result() -> None:
    database = FakeDatabase()

    def decode(item: int, outcome: Any) -> int:
        if item == 3:
            raise LookupError(item)
        return outcome[1] * 10

    operation = Batcher(workers=1).operation("write", database.run, keyed=True, ordered=True, decode=decode)
    results = await outcomes(start_tasks(*(operation.submit(n, n) for n in (4, 2, 3, 1))))
    assert database.batches == [[1, 2, 3, 4]]
    assert results[:2] + results[3:] == [40, 20, 10]
    assert isinstance(results[2], LookupError)


async def test_large_items_are_split_over_batches() -> None:
    database = FakeDatabase()
    operation = Batcher(workers=1).operation("write", database.run, size_of=lambda item: int(item))
    sizes = [MAX_BATCH_BYTES // 2, MAX_BATCH_BYTES // 2, 1, 3 * MAX_BATCH_BYTES, 2, 3]
    await outcomes(start_tasks(*(operation.submit(n, size) for n, size in enumerate(sizes))))
    assert database.batches == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


# Order


async def test_the_calls_of_one_caller_run_in_order_and_it_reads_its_writes() -> None:
    database = FakeDatabase()
    batcher = Batcher(workers=2, max_rows=4)
    operations = [batcher.operation(f"write {n}", database.run, keyed=n == 1) for n in range(3)]

    async def caller(name: int) -> None:
        for number in range(20):
            await operations[(name + number) % 3].submit("one key", (name, number))
            assert (name, number) in database.written

    await asyncio.gather(*(caller(name) for name in range(16)))
    for name in range(16):
        assert [item[1] for item in database.written if item[0] == name] == list(range(20))


async def test_the_oldest_call_is_sent_first_so_no_operation_starves() -> None:
    database, batcher = FakeDatabase(blocked=True), Batcher(workers=1, max_rows=10)
    flood, rare = batcher.operation("flood", database.run), batcher.operation("rare", database.run)
    tasks = start_tasks(*(flood.submit(n, f"flood {n}") for n in range(25)))
    await asyncio.sleep(0.002)
    tasks += start_tasks(rare.submit(0, "rare"))
    await asyncio.sleep(0.002)
    stopping = False

    async def flooding() -> None:
        while not stopping:
            await flood.submit(0, "more")

    await yield_to_loop()
    tasks += start_tasks(*(flooding() for _ in range(50)))
    await yield_to_loop()
    database.free.set()
    await asyncio.wait_for(tasks[25], TIMEOUT)
    stopping = True
    await outcomes(tasks)
    # The earlier calls took three batches.
    assert [batch[0] for batch in database.batches].index("rare") == 3


async def test_a_key_occurs_once_per_batch_and_keeps_its_order_on_one_worker() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1).operation("write", database.run, keyed=True)
    tasks = start_tasks(*(operation.submit(n % 3, (n % 3, n)) for n in range(12)))
    await yield_to_loop()
    database.free.set()
    await outcomes(tasks)
    for batch in database.batches:
        assert len({key for key, _ in batch}) == len(batch)
    for key in range(3):
        assert [n for other, n in database.written if other == key] == list(range(key, 12, 3))


async def test_two_workers_may_write_the_same_key_concurrently() -> None:
    # Concurrent callers have no order: the database decides, as it does between processes.
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=2).operation("write", database.run, keyed=True)
    tasks = start_tasks(operation.submit("key", 1), operation.submit("key", 2))
    await yield_to_loop()
    assert sorted(database.batches) == [[1], [2]]
    database.free.set()
    assert await outcomes(tasks) == [("done", 1), ("done", 2)]


# Coalescing


async def test_a_later_call_of_a_key_is_coalesced_or_requeued() -> None:
    database = FakeDatabase(blocked=True)

    def coalesce(first: int, outcome: Any, later: int) -> Any:
        return REQUEUE if later == 2 else ("shared", first, outcome, later)

    operation = Batcher(workers=1).operation("write", database.run, keyed=True, coalesce=coalesce)
    tasks = start_tasks(*(operation.submit("key", n) for n in range(4)))
    await yield_to_loop()
    database.free.set()
    first = ("done", 0)
    assert await outcomes(tasks) == [first, ("shared", 0, first, 1), ("done", 2), ("shared", 0, first, 3)]
    assert database.batches == [[0], [2]]


async def test_coalesced_calls_are_sent_if_the_first_call_fails() -> None:
    database = FakeDatabase()
    database.result = lambda item: ValueError("first") if item == 0 else item
    operation = Batcher(workers=1).operation("write", database.run, keyed=True, coalesce=lambda *_: "shared")
    results = await outcomes(start_tasks(*(operation.submit("key", n) for n in range(3))))
    assert [repr(results[0]), *results[1:]] == ["ValueError('first')", 1, "shared"]


async def test_an_error_in_coalesce_fails_only_the_later_call() -> None:
    database = FakeDatabase()

    def coalesce(first: int, outcome: Any, later: int) -> Any:
        if later == 1:
            raise ZeroDivisionError("in coalesce")
        return "shared"

    operation = Batcher(workers=1).operation("write", database.run, keyed=True, coalesce=coalesce)
    results = await outcomes(
        start_tasks(*(operation.submit("key", n) for n in range(3)), operation.submit("other", 3))
    )
    assert results[0] == ("done", 0)
    assert isinstance(results[1], ZeroDivisionError)
    assert results[2:] == ["shared", ("done", 3)]
    assert await operation.submit("key", 4) == ("done", 4)


async def test_a_batch_may_requeue_items_for_the_next_batch() -> None:
    database = FakeDatabase()
    requeued: set[int] = set()

    def result(item: int) -> Any:
        if item % 2 or item in requeued:
            return item
        requeued.add(item)
        return REQUEUE

    database.result = result
    operation = Batcher(workers=2).operation("write", database.run)
    assert await outcomes(start_tasks(*(operation.submit(n, n) for n in range(8)))) == list(range(8))
    assert database.batches == [list(range(8)), [0, 2, 4, 6]]


async def test_an_item_that_is_always_requeued_fails_after_the_queue_timeout() -> None:
    database = FakeDatabase()
    database.result = lambda item: REQUEUE
    operation = Batcher(workers=1, queue_timeout=0.1).operation("write", database.run)
    assert isinstance((await outcomes(start_tasks(operation.submit(0, 0))))[0], StoreUnavailableError)


# Failures


async def test_an_invalid_row_of_a_batch_is_isolated_and_the_others_are_written_once() -> None:
    written: list[int] = []
    bad = {3, 4, 11}

    async def run(items: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        if bad & set(items):
            raise BatchError(ValueError(f"a row of {len(items)}"))
        written.extend(items)
        return items

    operation = Batcher(workers=1).operation("write", run)
    results = await outcomes(start_tasks(*(operation.submit(n, n) for n in range(20))))
    for number, outcome in enumerate(results):
        if number in bad:
            assert isinstance(outcome, ValueError)
            assert str(outcome) == "a row of 1"
        else:
            assert outcome == number
    assert sorted(written) == [n for n in range(20) if n not in bad]


async def test_an_exception_as_outcome_fails_only_its_call() -> None:
    database = FakeDatabase()
    database.result = lambda item: KeyError(item) if item == 1 else item
    operation = Batcher(workers=1).operation("write", database.run)
    results = await outcomes(start_tasks(*(operation.submit(n, n) for n in range(3))))
    assert [results[0], repr(results[1]), results[2]] == [0, "KeyError(1)", 2]


@pytest.mark.parametrize("returned", [[], [1], [1, 2, 3], None])
async def test_a_wrong_number_of_results_fails_every_caller(returned: Any) -> None:
    async def run(items: Sequence[int]) -> Any:
        return returned if len(items) == 2 else items

    operation = Batcher(workers=1).operation("write", run)
    results = await outcomes(start_tasks(operation.submit(0, 0), operation.submit(1, 1)))
    assert all(isinstance(one, RuntimeError | TypeError) for one in results)
    assert await operation.submit(0, 0) == 0


async def test_each_caller_gets_its_own_copy_of_an_unexpected_exception() -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        raise LookupError("broken")

    operation = Batcher(workers=1).operation("write", run)
    results = await outcomes(start_tasks(*(operation.submit(n, n) for n in range(5))))
    assert [repr(one) for one in results] == ["LookupError('broken')"] * 5
    assert len({id(one) for one in results}) == 5


async def test_every_caller_gets_an_error_that_cannot_be_copied() -> None:
    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    async def run(items: Sequence[int]) -> Sequence[int]:
        raise OddError(1, 2)

    operation = Batcher(workers=1).operation("write", run)
    assert [
        str(one) for one in await outcomes(start_tasks(operation.submit(0, 0), operation.submit(1, 1)))
    ] == ["odd"] * 2


# Cancelled callers


async def test_a_call_cancelled_before_it_was_sent_is_not_sent() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1).operation("write", database.run)
    tasks = start_tasks(operation.submit(0, 0, database.compensate))
    await yield_to_loop()
    tasks += start_tasks(*(operation.submit(n, n, database.compensate) for n in (1, 2, 3)))
    await yield_to_loop()
    tasks[2].cancel()
    await yield_to_loop()
    database.free.set()
    results = await outcomes(tasks)
    assert results[:2] + results[3:] == [("done", n) for n in (0, 1, 3)]
    assert isinstance(results[2], asyncio.CancelledError)
    assert database.written == [0, 1, 3]
    assert database.compensated == []


async def test_a_call_cancelled_after_it_was_sent_is_compensated_once() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1).operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n, database.compensate) for n in range(3)))
    await yield_to_loop()
    tasks[1].cancel()
    await yield_to_loop()
    database.free.set()
    results = await outcomes(tasks)
    await yield_to_loop()
    assert [results[0], results[2]] == [("done", 0), ("done", 2)]
    assert database.compensated == [("done", 1)]


async def test_a_call_cancelled_while_it_is_resolved_is_compensated_once() -> None:
    for yields in range(12):
        database = FakeDatabase(blocked=True)
        operation = Batcher(workers=1).operation("write", database.run)
        tasks = start_tasks(operation.submit(0, 0, database.compensate), operation.submit(1, 1))
        await yield_to_loop()
        database.free.set()
        await yield_to_loop(yields)
        resolved = not tasks[0].cancel()
        results = await outcomes(tasks)
        await yield_to_loop()
        if isinstance(results[0], asyncio.CancelledError):
            assert database.compensated == [("done", 0)], yields
        else:
            assert resolved, yields
            assert database.compensated == [], yields
        assert results[1] == ("done", 1)


async def test_errors_of_cancelled_calls_and_compensations_are_not_logged_by_asyncio(
    caplog: pytest.LogCaptureFixture,
) -> None:
    database = FakeDatabase(blocked=True)
    database.result = lambda item: ValueError(item) if item == 0 else item
    operation = Batcher(workers=1).operation("write", database.run)

    async def fail(outcome: Any) -> None:
        raise ValueError("cannot compensate")

    def fail_synchronously(outcome: Any) -> Awaitable[None]:
        raise ValueError("cannot compensate")

    tasks = start_tasks(
        *(
            operation.submit(n, n, compensate)
            for n, compensate in enumerate((database.compensate, fail, fail_synchronously))
        )
    )
    await yield_to_loop()
    for task in tasks:
        task.cancel()
    database.free.set()
    with caplog.at_level(logging.WARNING, "flowstore_core"):
        await outcomes(tasks)
        await yield_to_loop()
    assert database.compensated == []
    assert [one.name for one in caplog.records] == ["flowstore_core"] * 2
    assert await operation.submit(5, 5) == 5


class Compensation:
    """A compensation that fails the first few times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.outcomes: list[Any] = []
        self.done = asyncio.Event()

    async def __call__(self, outcome: Any) -> None:
        self.outcomes.append(outcome)
        if len(self.outcomes) <= self.failures:
            raise StoreUnavailableError("no connection")
        self.done.set()


async def cancel_one(compensation: Compensation, result: Callable[[int], Any]) -> Batcher:
    """Cancel a call that was sent, then resolve it."""
    database = FakeDatabase(blocked=True)
    database.result = result
    batcher = Batcher(workers=1)
    tasks = start_tasks(batcher.operation("write", database.run).submit(0, 0, compensation))
    await yield_to_loop()
    tasks[0].cancel()
    database.free.set()
    await outcomes(tasks)
    return batcher


async def test_a_failed_compensation_is_retried_until_it_succeeds() -> None:
    compensation = Compensation(failures=3)
    await cancel_one(compensation, lambda item: "won")
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert compensation.outcomes == ["won"] * 4


async def test_a_call_whose_outcome_is_unknown_is_compensated() -> None:
    compensation, unknown = Compensation(failures=1), OutcomeUnknownError("write")
    await cancel_one(compensation, lambda item: unknown)
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert compensation.outcomes == [unknown] * 2


async def test_a_call_that_did_not_happen_is_not_compensated() -> None:
    compensation = Compensation(failures=0)
    batcher = await cancel_one(compensation, lambda item: StoreUnavailableError("it did not happen"))
    await batcher.drain(TIMEOUT)
    assert compensation.outcomes == []


def test_drain_retries_a_compensation_at_once_and_waits_for_it() -> None:
    with closing(VirtualTimeLoop()) as loop:
        loop.run_until_complete(_drain_with_a_failing_compensation())


async def _drain_with_a_failing_compensation() -> None:
    compensation = Compensation(failures=1)
    batcher = await cancel_one(compensation, lambda item: "won")
    await yield_to_loop()
    began = asyncio.get_running_loop().time()
    await batcher.drain(TIMEOUT)
    assert compensation.outcomes == ["won"] * 2
    assert asyncio.get_running_loop().time() - began < 1


async def test_drain_stops_waiting_for_a_compensation_at_its_deadline() -> None:
    others = asyncio.all_tasks()
    compensation = Compensation(failures=10_000)
    batcher = await cancel_one(compensation, lambda item: "won")
    await batcher.drain(0.3)
    assert len(compensation.outcomes) > 1
    assert asyncio.all_tasks() == others


async def test_a_call_sent_by_a_cancelled_worker_is_compensated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowstore_core.batching.scheduler.ABANDON_DELAY", 0.01)
    database, compensation = FakeDatabase(blocked=True), Compensation(failures=0)
    tasks = start_tasks(Batcher(workers=1).operation("write", database.run).submit(0, 0, compensation))
    await yield_to_loop()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await outcomes(tasks)
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert [type(one) for one in compensation.outcomes] == [OutcomeUnknownError]


async def test_cancelling_a_coalesced_or_first_call_does_not_affect_the_others() -> None:
    for cancelled in (0, 1):
        database = FakeDatabase(blocked=True)
        operation = Batcher(workers=1).operation(
            "write", database.run, keyed=True, coalesce=lambda *_: "shared"
        )
        tasks = start_tasks(*(operation.submit("key", n, database.compensate) for n in range(3)))
        await yield_to_loop()
        tasks[cancelled].cancel()
        await yield_to_loop()
        database.free.set()
        results = await outcomes(tasks)
        await yield_to_loop()
        assert isinstance(results.pop(cancelled), asyncio.CancelledError)
        assert results[-1] == "shared"
        assert database.written == [0]
        assert database.compensated == ([("done", 0)] if cancelled == 0 else [])


async def test_a_first_call_cancelled_before_it_was_sent_is_replaced_by_the_next() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1).operation("write", database.run, keyed=True, coalesce=lambda *_: "shared")
    tasks = start_tasks(operation.submit("busy", "busy"))
    await yield_to_loop()
    tasks += start_tasks(*(operation.submit("key", n) for n in range(3)))
    await yield_to_loop()
    tasks[1].cancel()
    database.free.set()
    results = await outcomes(tasks)
    assert results[2:] == [("done", 1), "shared"]


# Bounds


async def test_calls_beyond_max_queued_wait_for_a_slot_in_fifo_order() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1, max_queued=4, max_rows=2).operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(30)))
    await yield_to_loop()
    database.free.set()
    assert await outcomes(tasks) == [("done", n) for n in range(30)]
    assert database.written == list(range(30))


async def test_a_call_that_times_out_waiting_for_a_slot_fails_with_the_hint() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1, max_queued=2, queue_timeout=0.05, timeout_hint="buy a disk").operation(
        "write", database.run
    )
    sent = start_tasks(operation.submit(0, 0))
    await yield_to_loop()
    queued = start_tasks(operation.submit(1, 1), operation.submit(2, 2))
    await yield_to_loop()
    waiting = start_tasks(operation.submit(3, 3), operation.submit(4, 4))
    results = await outcomes(queued + waiting)
    assert [type(one) for one in results] == [StoreUnavailableError] * 4
    assert all("0.05 s" in str(one) and "buy a disk" in str(one) for one in results)
    assert "2 calls were queued" in str(results[2])
    database.free.set()
    assert await outcomes(sent) == [("done", 0)]
    assert await operation.submit(5, 5) == ("done", 5)
    assert database.written == [0, 5]


async def test_a_waiter_cancelled_when_it_acquires_a_slot_releases_it() -> None:
    for yields in range(16):
        database = FakeDatabase(blocked=True)
        operation = Batcher(workers=1, max_queued=1, queue_timeout=TIMEOUT).operation("write", database.run)
        tasks = start_tasks(operation.submit(0, 0))
        await yield_to_loop()
        tasks += start_tasks(operation.submit(1, 1))
        await yield_to_loop()
        waiters = start_tasks(*(operation.submit(n, n) for n in (2, 3, 4)))
        await yield_to_loop()
        database.free.set()
        await yield_to_loop(yields)
        waiters[0].cancel()
        waiters[1].cancel()
        # No further call is submitted, so the waiters hang if the slot leaks.
        results = await asyncio.wait_for(asyncio.gather(*tasks, *waiters, return_exceptions=True), TIMEOUT)
        assert [results[0], results[1], results[4]] == [("done", 0), ("done", 1), ("done", 4)], yields
        assert await asyncio.wait_for(operation.submit(9, 9), TIMEOUT) == ("done", 9)


async def test_queued_calls_behind_hanging_workers_time_out_and_sent_calls_do_not() -> None:
    database = FakeDatabase(blocked=True)
    batcher = Batcher(workers=2, queue_timeout=0.05)
    operation = batcher.operation("write", database.run)
    for number in range(2):
        start_tasks(operation.submit(number, number))
        await yield_to_loop()
    tasks = start_tasks(*(operation.submit(n, n) for n in range(5)))
    await asyncio.sleep(0.03)
    tasks += start_tasks(operation.submit(5, 5))
    assert [type(one) for one in await outcomes(tasks)] == [StoreUnavailableError] * 6
    assert database.batches == [[0], [1]]
    database.free.set()
    await batcher.drain(TIMEOUT)
    assert database.written == [0, 1]


# Closing


async def test_drain_resolves_accepted_calls_and_rejects_new_ones() -> None:
    database = FakeDatabase(blocked=True)
    batcher = Batcher(workers=2, max_rows=5, max_queued=30)
    operation = batcher.operation("write", database.run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(30)))
    await yield_to_loop()
    waiting = start_tasks(*(operation.submit(n, n) for n in range(30, 50)))
    await yield_to_loop()
    draining = start_tasks(batcher.drain(TIMEOUT), batcher.drain(TIMEOUT))
    await yield_to_loop()
    with pytest.raises(StoreClosedError):
        await operation.submit(99, 99)
    database.free.set()
    results = await outcomes(tasks)
    assert results == [("done", n) for n in range(30)]
    late = await outcomes(waiting)
    assert all(one == ("done", n) or isinstance(one, StoreClosedError) for n, one in enumerate(late, 30))
    assert sorted(database.written) == [n for n, one in enumerate(results + late) if one == ("done", n)]
    assert await outcomes(draining) == [None, None]
    await batcher.drain(TIMEOUT)
    with pytest.raises(StoreClosedError):
        await operation.submit(99, 99)


@pytest.mark.parametrize("ignores_cancel", [False, True])
async def test_drain_with_a_hanging_worker_is_bounded_and_reports_unknown_outcomes(
    ignores_cancel: bool,
) -> None:
    batcher, release = Batcher(workers=1), asyncio.Event()

    async def hang(items: Sequence[Any]) -> Sequence[Any]:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                if not ignores_cancel:
                    raise
        return items

    database = FakeDatabase()
    operation = batcher.operation("hang", hang, keyed=True, coalesce=lambda *_: "shared")
    sent = start_tasks(operation.submit("key", 1, database.compensate), operation.submit("key", 2))
    await yield_to_loop()
    queued = start_tasks(*(operation.submit(n, n) for n in range(3)))
    await yield_to_loop()
    await asyncio.wait_for(batcher.drain(0.05), TIMEOUT)
    assert [type(one) for one in await outcomes(sent)] == [OutcomeUnknownError, StoreClosedError]
    assert [type(one) for one in await outcomes(queued)] == [StoreClosedError] * 3
    release.set()
    await yield_to_loop()
    assert database.compensated == []


async def test_drain_waits_for_compensations_and_lets_them_call() -> None:
    database = FakeDatabase(blocked=True)
    batcher = Batcher(workers=1)
    operation = batcher.operation("write", database.run)

    async def compensate(outcome: Any) -> None:
        await asyncio.sleep(0.02)
        database.compensated.append(await operation.submit("compensation", "compensation"))

    tasks = start_tasks(operation.submit(0, 0, compensate))
    await yield_to_loop()
    tasks[0].cancel()
    await yield_to_loop()
    database.free.set()
    await batcher.drain(TIMEOUT)
    assert database.written == [0, "compensation"]
    assert database.compensated == [("done", "compensation")]


# Cancelled workers


async def test_calls_work_after_every_task_of_the_loop_was_cancelled() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=2, queue_timeout=TIMEOUT).operation(
        "write", database.run, keyed=True, coalesce=lambda *_: "shared"
    )
    for yields in range(4):
        database.free.clear()
        cancelled = start_tasks(*(operation.submit(n % 3, n) for n in range(5)))
        await yield_to_loop(yields)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        assert all(isinstance(one, asyncio.CancelledError) for one in await outcomes(cancelled))
        database.free.set()
        assert await asyncio.wait_for(operation.submit("later", yields), TIMEOUT) == ("done", yields)


async def test_calls_that_were_not_sent_survive_a_cancelled_worker() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1, queue_timeout=TIMEOUT).operation(
        "write", database.run, keyed=True, coalesce=lambda *_: "shared"
    )
    others = asyncio.all_tasks()
    sent = start_tasks(operation.submit("key", 0), operation.submit("key", 1), operation.submit("other", 2))
    await yield_to_loop()
    queued = start_tasks(operation.submit("queued", 3))
    await yield_to_loop()
    (worker,) = asyncio.all_tasks() - others - {*sent, *queued}
    worker.cancel()
    await yield_to_loop()
    database.free.set()
    results = await outcomes(sent + queued)
    assert [type(results[0]), type(results[2])] == [OutcomeUnknownError] * 2
    assert [results[1], results[3]] == [("done", 1), ("done", 3)]


async def test_a_worker_cancelled_between_halves_leaves_no_call_unresolved() -> None:
    halves: list[int] = []
    never = asyncio.Event()

    async def run(items: Sequence[int]) -> Sequence[int]:
        halves.append(len(items))
        if len(items) == 4:
            raise BatchError(ValueError())
        await never.wait()
        return items

    others = asyncio.all_tasks()
    operation = Batcher(workers=1).operation("write", run)
    tasks = start_tasks(*(operation.submit(n, n) for n in range(4)))
    await yield_to_loop()
    assert halves == [4, 2]
    (worker,) = asyncio.all_tasks() - others - {*tasks}
    worker.cancel()
    assert [type(one) for one in await outcomes(tasks)] == [OutcomeUnknownError] * 4


async def test_workers_stop_when_the_queue_is_empty() -> None:
    database = FakeDatabase()
    others = asyncio.all_tasks()
    operation = Batcher(workers=3).operation("write", database.run)
    await outcomes(start_tasks(*(operation.submit(n, n) for n in range(200))))
    await yield_to_loop()
    assert asyncio.all_tasks() == others


@pytest.mark.parametrize("ending", ["return", "raise KeyboardInterrupt", "await operation.submit(1, 1)"])
def test_a_loop_that_ends_with_queued_calls_prints_nothing(ending: str) -> None:
    program = f"""
    import asyncio, gc
    from flowstore_core.batching import Batcher

    async def main():
        batcher = Batcher(workers=2)

        async def run(items):
            await asyncio.sleep(0.01 if items == [1] else 3600)
            return items

        operation = batcher.operation("write", run, keyed=True, coalesce=lambda *_: "shared")

        async def persistent(n):
            try:
                await operation.submit(n % 7, n)
            finally:
                await operation.submit(1, 1)

        tasks = [asyncio.ensure_future(operation.submit(n % 7, n)) for n in range(500)]
        tasks += [asyncio.ensure_future(persistent(n)) for n in range(5)]
        await asyncio.sleep(0.01)
        tasks += [asyncio.ensure_future(operation.submit(n % 7, n)) for n in range(500)]
        await asyncio.sleep(0)
        if {ending.startswith("await")}:
            for task in asyncio.all_tasks() - {{asyncio.current_task()}}:
                task.cancel()
            await asyncio.sleep(0)
        {ending}

    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    gc.collect()
    print("ended")
    """
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("ended\n", "", 0)


# Leaks

_request: contextvars.ContextVar[str] = contextvars.ContextVar("_request", default="unset")


async def test_the_context_of_a_caller_is_not_visible_to_the_worker() -> None:
    contexts: list[str] = []

    async def run(items: Sequence[int]) -> Sequence[int]:
        contexts.append(_request.get())
        _request.set("the worker's")
        return items

    operation = Batcher(workers=1).operation("write", run)
    _request.set("the caller's")
    await operation.submit(0, 0)
    await outcomes(start_tasks(*(operation.submit(n, n) for n in range(5))))
    assert contexts == ["unset"] * 2
    assert _request.get() == "the caller's"


class _Item:
    """An object whose lifetime a weak reference can check."""


async def test_resolved_calls_are_garbage_collected() -> None:
    batcher = Batcher(workers=2, max_queued=500, max_rows=64)
    alive: weakref.WeakSet[_Item] = weakref.WeakSet()

    async def run(items: Sequence[_Item]) -> Sequence[_Item]:
        await asyncio.sleep(0)
        return items

    async def compensate(outcome: _Item) -> None:
        await asyncio.sleep(0)

    operation = batcher.operation(
        "write", run, keyed=True, coalesce=lambda first, outcome, later: REQUEUE if id(later) % 3 else later
    )

    async def submit_and_cancel(count: int) -> None:
        tasks = []
        for n in range(count):
            item = _Item()
            alive.add(item)
            tasks.append(asyncio.ensure_future(operation.submit(n % 40, item, compensate)))
        del item
        for n, task in enumerate(tasks):
            if n % 3 == 0:
                task.cancel()
            if n % 50 == 0:
                await asyncio.sleep(0)
        await outcomes(tasks)

    async def count_objects() -> int:
        await yield_to_loop(20)
        gc.collect()
        return len(gc.get_objects())

    await submit_and_cancel(1000)
    before = await count_objects()
    for _ in range(20):
        await submit_and_cancel(1000)
    assert await count_objects() < before + 200
    assert len(alive) == 0
    assert batcher.queued == 0


def test_cancelled_calls_behind_a_hanging_worker_do_not_accumulate() -> None:
    # In virtual time, in which the first call reaches its worker before the queue timeout.
    with closing(VirtualTimeLoop()) as loop:
        loop.run_until_complete(_cancel_calls_behind_a_hanging_worker())


async def _cancel_calls_behind_a_hanging_worker() -> None:
    database = FakeDatabase(blocked=True)
    operation = Batcher(workers=1, max_queued=100, queue_timeout=0.02).operation("write", database.run)
    start_tasks(operation.submit("hanging", "hanging"))
    await yield_to_loop()
    alive: weakref.WeakSet[_Item] = weakref.WeakSet()
    for _ in range(50):
        items = [_Item() for _ in range(200)]
        alive.update(items)
        tasks = start_tasks(*(operation.submit(n, item) for n, item in enumerate(items)))
        await yield_to_loop(2)
        for task in tasks:
            task.cancel()
        await outcomes(tasks)
        del items, tasks, task
    await yield_to_loop(2)
    gc.collect()
    assert len(alive) <= 110
    await asyncio.sleep(0.1)
    gc.collect()
    assert len(alive) == 0
    database.free.set()
    with suppress(StoreUnavailableError):
        await operation.submit(0, 0)


# Everything combined


@settings(max_examples=200, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
@example(seed=1400)  # A call is cancelled when the time to drain has passed.
def test_every_call_gets_its_own_outcome_or_is_not_sent(seed: int) -> None:
    with closing(VirtualTimeLoop()) as loop:
        loop.run_until_complete(_run_random_schedule(Random(seed)))


async def _run_random_schedule(rng: Random) -> None:
    # Uses a random generator because Hypothesis can draw only in the task of the test.
    kind = rng.choice(["plain", "keyed", "shared"])
    batcher = Batcher(
        workers=rng.randint(1, 3),
        max_rows=rng.randint(1, 8),
        max_queued=rng.randint(1, 20),
        queue_timeout=rng.choice([0.5, 3.0, 1000.0]),
    )
    pauses = [0, 0, 0.1, 0.4, 1.0, 2.5]
    poison = frozenset(rng.sample(range(30), rng.randint(0, 4)))
    failing = frozenset(rng.sample(range(30), rng.randint(0, 4)))
    written: list[int] = []
    keys: dict[int, int] = {}
    compensated: list[int] = []
    shared: list[int] = []

    async def run(items: Sequence[int]) -> Sequence[Any]:
        if kind != "plain":
            assert len({keys[item] for item in items}) == len(items)
        await asyncio.sleep(rng.choice(pauses))
        if poison & set(items):
            raise BatchError(ValueError("poison"))
        requeued = rng.choice([0, 0, 0, 1]) if len(items) > 1 else 0
        done: list[Any] = []
        for item in items[: len(items) - requeued]:
            if item in failing:
                done.append(KeyError(item))
            else:
                written.append(item)
                done.append(("own", item))
        await asyncio.sleep(rng.choice(pauses))
        return done + [REQUEUE] * requeued

    def coalesce(first: int, outcome: Any, later: int) -> Any:
        assert keys[first] == keys[later]
        assert outcome == ("own", first)
        if later % 4 == 0:
            return REQUEUE
        shared.append(later)
        return ("shared", later)

    async def compensate(outcome: tuple[str, int]) -> None:
        await asyncio.sleep(rng.choice(pauses))
        compensated.append(outcome[1])

    operations = [
        batcher.operation(
            f"write {n}", run, keyed=kind != "plain", coalesce=coalesce if kind == "shared" else None
        )
        for n in range(2)
    ]
    tasks: list[asyncio.Task[Any]] = []
    for number in range(rng.randint(1, 30)):
        keys[number] = rng.randint(0, 4)
        operation = operations[rng.randint(0, 1)]
        tasks += start_tasks(operation.submit(keys[number], number, compensate))
        await asyncio.sleep(rng.choice(pauses))
        if rng.random() < 0.4:
            rng.choice(tasks).cancel()
        if rng.randint(0, 60) == 0:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in sorted(others, key=lambda one: one.get_name()):
                task.cancel()
    if rng.random() < 0.4:
        await asyncio.sleep(rng.choice(pauses))
    await batcher.drain(rng.choice([0.1, 2.0, 1000.0]))
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5000)
    assert batcher.queued == 0
    assert len(asyncio.all_tasks()) == 1

    # No call is lost or executed twice.
    assert len(written) == len(set(written))
    assert len(compensated) == len(set(compensated))
    for number, outcome in enumerate(results):
        if outcome == ("own", number):
            assert number in written
            assert number not in compensated
        elif outcome == ("shared", number):
            assert number in shared
            assert number not in written
        elif type(outcome) in (StoreUnavailableError, StoreClosedError):
            assert number not in written
        elif isinstance(outcome, ValueError):
            assert number in poison
        elif isinstance(outcome, KeyError):
            assert outcome.args == (number,)
            assert number in failing
        else:
            assert isinstance(outcome, asyncio.CancelledError | OutcomeUnknownError), outcome
        if number in compensated:
            assert isinstance(outcome, asyncio.CancelledError)
