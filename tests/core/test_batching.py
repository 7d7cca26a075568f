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
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstore_core import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.batching import REQUEUE, Batcher, BatchError, TaskWorkers, Transfer
from flowstore_core.batching.scheduler import HOLDBACK_THRESHOLD, MAX_BATCH_BYTES, SPLIT_THRESHOLD

Batch = list[Any]
TIMEOUT = 60.0
"""Seconds for what must happen; nothing waits for it to pass."""


class Book:
    """A database with one table. It records batches, and can be held so that calls queue."""

    def __init__(self, *, held: bool = False) -> None:
        self.batches: list[Batch] = []
        self.written: list[Any] = []
        self.returned: list[Any] = []
        self.under_way = 0
        self.most_in_flight = 0
        self.free = asyncio.Event()
        self.answer: Callable[[Any], Any] = lambda item: ("done", item)
        if not held:
            self.free.set()

    async def run(self, items: Sequence[Any]) -> Sequence[Any]:
        self.batches.append(list(items))
        self.under_way += 1
        self.most_in_flight = max(self.most_in_flight, self.under_way)
        try:
            await self.free.wait()
            await asyncio.sleep(0)
            results = [self.answer(item) for item in items]
            self.written += [item for item, one in zip(items, results, strict=True) if one is not REQUEUE]
            return results
        finally:
            self.under_way -= 1

    async def compensate(self, outcome: Any) -> None:
        self.returned.append(outcome)


async def steps(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def begin(*calls: Awaitable[Any]) -> list[asyncio.Task[Any]]:
    return [asyncio.ensure_future(call) for call in calls]


async def outcomes(tasks: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), TIMEOUT)


@pytest.fixture(autouse=True)
def no_noise(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail on errors that asyncio only logs, such as exceptions that were never retrieved."""
    yield
    gc.collect()
    assert [one.getMessage() for one in caplog.records if one.name == "asyncio"] == []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock advances only when it is idle."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select
        # asyncio makes its selector wait until the next timer is due.

        def wait(timeout: float | None = None) -> Any:
            if timeout:
                # A little longer, as with a real clock: rounding must not leave the timer short of due.
                self._now += timeout + 1e-6
            elif timeout is None:
                raise AssertionError("everybody waits, and for nothing")
            return select(0)

        self._selector.select = wait

    def time(self) -> float:
        return self._now


# Forming batches


async def test_alone_a_call_leaves_at_once_as_a_batch_of_one() -> None:
    book = Book()
    operation = Batcher(workers=2).operation("write", book.run)
    for number in range(3):
        assert await operation.submit(number, number) == ("done", number)
    assert book.batches == [[0], [1], [2]]


async def test_simultaneous_calls_share_a_batch_and_calls_queue_while_the_worker_is_busy() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1).operation("write", book.run)
    first = begin(*(operation.submit(n, n) for n in range(3)))
    await steps()
    later = begin(*(operation.submit(n, n) for n in range(3, 40)))
    await steps()
    assert book.batches == [[0, 1, 2]]
    book.free.set()
    assert await outcomes(first + later) == [("done", n) for n in range(40)]
    assert book.batches == [[0, 1, 2], list(range(3, 40))]


async def test_no_batch_is_larger_than_largest() -> None:
    book = Book()
    operation = Batcher(workers=1, max_rows=10).operation("write", book.run)
    assert await outcomes(begin(*(operation.submit(n, n) for n in range(35)))) == [
        ("done", n) for n in range(35)
    ]
    assert [len(batch) for batch in book.batches] == [10, 10, 10, 5]


@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_at_most_one_batch_per_worker_is_in_flight(workers: int) -> None:
    book = Book(held=True)
    operation = Batcher(workers=workers, max_rows=7).operation("write", book.run)
    tasks = begin(*(operation.submit(n, n) for n in range(300)))
    await steps(10)
    book.free.set()
    await outcomes(tasks)
    assert book.most_in_flight == workers
    assert sorted(book.written) == list(range(300))


async def test_two_free_workers_take_half_each_of_many_calls() -> None:
    book = Book(held=True)
    operation = Batcher(workers=2).operation("write", book.run)
    tasks = begin(*(operation.submit(n, n) for n in range(SPLIT_THRESHOLD)))
    await steps()
    assert [len(batch) for batch in book.batches] == [SPLIT_THRESHOLD // 2] * 2
    book.free.set()
    await outcomes(tasks)


async def test_no_worker_takes_more_than_its_share_of_queued_and_in_flight_calls() -> None:
    book = Book(held=True)
    operation = Batcher(workers=2).operation("write", book.run)
    tasks = begin(*(operation.submit(n, n) for n in range(20)))
    await steps()
    tasks += begin(*(operation.submit(n, n) for n in range(20, 220)))
    await steps()
    book.free.set()
    await outcomes(tasks)
    # With this many calls, a third is held back for the first free worker.
    assert [len(batch) for batch in book.batches[:2]] == [20, 74]
    assert sum(len(batch) for batch in book.batches) == 220


async def test_a_third_of_many_calls_is_held_back_and_sent_before_the_first_batch_is_resolved() -> None:
    book = Book(held=True)
    batcher = Batcher(workers=2)
    operation = batcher.operation("write", book.run)
    answered_at: list[int] = []

    async def caller(number: int) -> None:
        await operation.submit(number, number)
        answered_at.append(len(book.batches))

    tasks = begin(*(caller(n) for n in range(HOLDBACK_THRESHOLD)))
    await steps()
    third = -(-HOLDBACK_THRESHOLD // 3)
    assert [len(batch) for batch in book.batches] == [third, third]
    assert batcher.queued == HOLDBACK_THRESHOLD - 2 * third
    book.free.set()
    await outcomes(tasks)
    # The first free worker sent the last third before its callers resumed.
    assert min(answered_at) == len(book.batches) == 3


async def test_coalesced_callers_count_when_workers_split_the_queue() -> None:
    book = Book(held=True)
    operation = Batcher(workers=2).operation(
        "claim", book.run, keyed=True, coalesce=lambda first, answer, later: answer
    )
    tasks = begin(*(operation.submit(n // 8, n // 8) for n in range(256)))
    await steps()
    # Two callers with 86 calls each; the last key of one is the first of the other.
    assert [len(batch) for batch in book.batches] == [11, 12]
    book.free.set()
    assert await outcomes(tasks) == [("done", n // 8) for n in range(256)]


async def test_extra_workers_start_for_more_than_full_batches_and_end_again() -> None:
    gates: list[asyncio.Event] = []
    under_way: list[int] = []

    async def run(items: Sequence[int]) -> Sequence[int]:
        gates.append(gate := asyncio.Event())
        under_way.append(len(items))
        await gate.wait()
        under_way.remove(len(items))
        return items

    batcher = Batcher(workers=lambda batcher: TaskWorkers(batcher, 1, limit=3), max_rows=10)
    operation = batcher.operation("write", run)
    tasks: list[asyncio.Task[Any]] = []
    for more, expected in ((10, [10]), (10, [10, 10]), (1, [10, 10, 1]), (12, [10, 10, 1])):
        tasks += begin(*(operation.submit(len(tasks) + n, len(tasks) + n) for n in range(more)))
        await steps()
        assert under_way == expected
    gates[0].set()
    gates[1].set()
    await steps()
    # Thirteen calls are left, enough for two workers: the last two calls wait.
    assert (under_way, batcher.queued) == ([1, 10], 2)
    while not all(task.done() for task in tasks):
        for gate in gates:
            gate.set()
        await steps(1)
    assert await outcomes(tasks) == list(range(33))


async def test_a_direct_slot_counts_as_a_worker_and_drain_waits_for_it() -> None:
    book = Book(held=True)
    batcher = Batcher(workers=2)
    operation = batcher.operation("write", book.run)
    assert batcher.acquire_direct_slot()
    assert not batcher.acquire_direct_slot()
    tasks = begin(operation.submit(0, 0))
    await steps()
    tasks += begin(operation.submit(1, 1))
    await steps()
    assert book.batches == [[0]]
    batcher.release_direct_slot()
    await steps()
    assert book.batches == [[0], [1]]
    assert not batcher.acquire_direct_slot()
    book.free.set()
    await outcomes(tasks)
    await steps()
    assert batcher.acquire_direct_slot()
    closing = begin(batcher.drain(TIMEOUT))
    await steps()
    assert not closing[0].done()
    batcher.release_direct_slot()
    await outcomes(closing)
    assert not batcher.acquire_direct_slot()


async def test_a_call_may_be_transferred_with_its_coalesced_calls() -> None:
    book, other = Book(), Book()
    there = Batcher(workers=1).operation("write", other.run)
    operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=lambda *_: "shared")
    book.answer = lambda item: Transfer(there.accept_transfer) if item < 2 else item
    tasks = begin(operation.submit("a", 0), operation.submit("a", 1), operation.submit("b", 2))
    assert await outcomes(tasks) == [("done", 0), ("done", 1), 2]
    assert other.written == [0, 1]


async def test_an_ordered_batch_is_sorted_and_decode_creates_the_result() -> None:
    book = Book()

    def tell(item: int, outcome: Any) -> int:
        if item == 3:
            raise LookupError(item)
        return outcome[1] * 10

    operation = Batcher(workers=1).operation("write", book.run, keyed=True, ordered=True, decode=tell)
    found = await outcomes(begin(*(operation.submit(n, n) for n in (4, 2, 3, 1))))
    assert book.batches == [[1, 2, 3, 4]]
    assert found[:2] + found[3:] == [40, 20, 10]
    assert isinstance(found[2], LookupError)


async def test_heavy_items_are_spread_over_batches() -> None:
    book = Book()
    operation = Batcher(workers=1).operation("write", book.run, size_of=lambda item: int(item))
    sizes = [MAX_BATCH_BYTES // 2, MAX_BATCH_BYTES // 2, 1, 3 * MAX_BATCH_BYTES, 2, 3]
    await outcomes(begin(*(operation.submit(n, size) for n, size in enumerate(sizes))))
    assert book.batches == [sizes[:2], sizes[2:3], sizes[3:4], sizes[4:]]


# Order


async def test_one_callers_calls_happen_in_its_order_and_it_reads_its_writes() -> None:
    book = Book()
    batcher = Batcher(workers=2, max_rows=4)
    methods = [batcher.operation(f"write {n}", book.run, keyed=n == 1) for n in range(3)]

    async def caller(name: int) -> None:
        for number in range(20):
            await methods[(name + number) % 3].submit("one key", (name, number))
            assert (name, number) in book.written

    await asyncio.gather(*(caller(name) for name in range(16)))
    for name in range(16):
        assert [item[1] for item in book.written if item[0] == name] == list(range(20))


async def test_the_oldest_call_is_sent_first_and_a_flood_starves_no_operation() -> None:
    book, batcher = Book(held=True), Batcher(workers=1, max_rows=10)
    flood, rare = batcher.operation("flood", book.run), batcher.operation("rare", book.run)
    tasks = begin(*(flood.submit(n, f"flood {n}") for n in range(25)))
    await asyncio.sleep(0.002)
    tasks += begin(rare.submit(0, "rare"))
    await asyncio.sleep(0.002)
    ending = False

    async def flooding() -> None:
        while not ending:
            await flood.submit(0, "more")

    await steps()
    tasks += begin(*(flooding() for _ in range(50)))
    await steps()
    book.free.set()
    await asyncio.wait_for(tasks[25], TIMEOUT)
    ending = True
    await outcomes(tasks)
    # The earlier calls took three batches.
    assert [batch[0] for batch in book.batches].index("rare") == 3


async def test_a_key_occurs_once_per_batch_and_keeps_its_order_on_one_worker() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1).operation("write", book.run, keyed=True)
    tasks = begin(*(operation.submit(n % 3, (n % 3, n)) for n in range(12)))
    await steps()
    book.free.set()
    await outcomes(tasks)
    for batch in book.batches:
        assert len({key for key, _ in batch}) == len(batch)
    for key in range(3):
        assert [n for other, n in book.written if other == key] == list(range(key, 12, 3))


async def test_two_workers_may_write_the_same_key_concurrently() -> None:
    # Concurrent callers have no order: the database decides, as between processes.
    book = Book(held=True)
    operation = Batcher(workers=2).operation("write", book.run, keyed=True)
    tasks = begin(operation.submit("key", 1), operation.submit("key", 2))
    await steps()
    assert sorted(book.batches) == [[1], [2]]
    book.free.set()
    assert await outcomes(tasks) == [("done", 1), ("done", 2)]


# Coalescing


async def test_a_later_call_of_a_key_is_coalesced_or_requeued() -> None:
    book = Book(held=True)

    def share(first: int, outcome: Any, later: int) -> Any:
        return REQUEUE if later == 2 else ("shared", first, outcome, later)

    operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=share)
    tasks = begin(*(operation.submit("key", n) for n in range(4)))
    await steps()
    book.free.set()
    first = ("done", 0)
    assert await outcomes(tasks) == [first, ("shared", 0, first, 1), ("done", 2), ("shared", 0, first, 3)]
    assert book.batches == [[0], [2]]


async def test_followers_of_a_first_that_fails_are_sent_themselves() -> None:
    book = Book()
    book.answer = lambda item: ValueError("first") if item == 0 else item
    operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=lambda *_: "shared")
    found = await outcomes(begin(*(operation.submit("key", n) for n in range(3))))
    assert [repr(found[0]), *found[1:]] == ["ValueError('first')", 1, "shared"]


async def test_an_error_in_coalesce_fails_the_later_call_only() -> None:
    book = Book()

    def share(first: int, outcome: Any, later: int) -> Any:
        if later == 1:
            raise ZeroDivisionError("in share")
        return "shared"

    operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=share)
    found = await outcomes(
        begin(*(operation.submit("key", n) for n in range(3)), operation.submit("other", 3))
    )
    assert found[0] == ("done", 0)
    assert isinstance(found[1], ZeroDivisionError)
    assert found[2:] == ["shared", ("done", 3)]
    assert await operation.submit("key", 4) == ("done", 4)


async def test_a_run_may_leave_items_for_the_next_batch() -> None:
    book = Book()
    seen: set[int] = set()

    def answer(item: int) -> Any:
        if item % 2 or item in seen:
            return item
        seen.add(item)
        return REQUEUE

    book.answer = answer
    operation = Batcher(workers=2).operation("write", book.run)
    assert await outcomes(begin(*(operation.submit(n, n) for n in range(8)))) == list(range(8))
    assert book.batches == [list(range(8)), [0, 2, 4, 6]]


async def test_an_item_that_is_always_left_fails_after_the_patience() -> None:
    book = Book()
    book.answer = lambda item: REQUEUE
    operation = Batcher(workers=1, queue_timeout=0.1).operation("write", book.run)
    assert isinstance((await outcomes(begin(operation.submit(0, 0))))[0], StoreUnavailableError)


# Failures


async def test_a_row_that_fails_a_batch_is_found_and_the_others_happen_exactly_once() -> None:
    written: list[int] = []
    bad = {3, 4, 11}

    async def run(items: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        if bad & set(items):
            raise BatchError(ValueError(f"a row of {len(items)}"))
        written.extend(items)
        return items

    operation = Batcher(workers=1).operation("write", run)
    found = await outcomes(begin(*(operation.submit(n, n) for n in range(20))))
    for number, outcome in enumerate(found):
        if number in bad:
            assert isinstance(outcome, ValueError)
            assert str(outcome) == "a row of 1"
        else:
            assert outcome == number
    assert sorted(written) == [n for n in range(20) if n not in bad]


async def test_an_exception_as_outcome_reaches_its_caller_only() -> None:
    book = Book()
    book.answer = lambda item: KeyError(item) if item == 1 else item
    operation = Batcher(workers=1).operation("write", book.run)
    found = await outcomes(begin(*(operation.submit(n, n) for n in range(3))))
    assert [found[0], repr(found[1]), found[2]] == [0, "KeyError(1)", 2]


@pytest.mark.parametrize("results", [[], [1], [1, 2, 3], None])
async def test_a_wrong_number_of_results_fails_every_caller(results: Any) -> None:
    async def run(items: Sequence[int]) -> Any:
        return results if len(items) == 2 else items

    operation = Batcher(workers=1).operation("write", run)
    found = await outcomes(begin(operation.submit(0, 0), operation.submit(1, 1)))
    assert all(isinstance(one, RuntimeError | TypeError) for one in found)
    assert await operation.submit(0, 0) == 0


async def test_an_unexpected_exception_reaches_every_caller_as_an_object_of_its_own() -> None:
    async def run(items: Sequence[int]) -> Sequence[int]:
        raise LookupError("broken")

    operation = Batcher(workers=1).operation("write", run)
    found = await outcomes(begin(*(operation.submit(n, n) for n in range(5))))
    assert [repr(one) for one in found] == ["LookupError('broken')"] * 5
    assert len({id(one) for one in found}) == 5


async def test_an_error_that_cannot_be_copied_reaches_every_caller_all_the_same() -> None:
    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__("odd")

    async def run(items: Sequence[int]) -> Sequence[int]:
        raise OddError(1, 2)

    operation = Batcher(workers=1).operation("write", run)
    assert [str(one) for one in await outcomes(begin(operation.submit(0, 0), operation.submit(1, 1)))] == [
        "odd"
    ] * 2


# Cancelled callers


async def test_a_caller_cancelled_before_its_call_was_sent_never_happens() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1).operation("write", book.run)
    tasks = begin(operation.submit(0, 0, book.compensate))
    await steps()
    tasks += begin(*(operation.submit(n, n, book.compensate) for n in (1, 2, 3)))
    await steps()
    tasks[2].cancel()
    await steps()
    book.free.set()
    found = await outcomes(tasks)
    assert found[:2] + found[3:] == [("done", n) for n in (0, 1, 3)]
    assert isinstance(found[2], asyncio.CancelledError)
    assert book.written == [0, 1, 3]
    assert book.returned == []


async def test_a_sent_call_of_a_cancelled_caller_is_compensated_for_once() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1).operation("write", book.run)
    tasks = begin(*(operation.submit(n, n, book.compensate) for n in range(3)))
    await steps()
    tasks[1].cancel()
    await steps()
    book.free.set()
    found = await outcomes(tasks)
    await steps()
    assert [found[0], found[2]] == [("done", 0), ("done", 2)]
    assert book.returned == [("done", 1)]


async def test_a_caller_cancelled_when_its_call_is_resolved_is_compensated_for_once() -> None:
    for turns in range(12):
        book = Book(held=True)
        operation = Batcher(workers=1).operation("write", book.run)
        tasks = begin(operation.submit(0, 0, book.compensate), operation.submit(1, 1))
        await steps()
        book.free.set()
        await steps(turns)
        told = not tasks[0].cancel()
        found = await outcomes(tasks)
        await steps()
        if isinstance(found[0], asyncio.CancelledError):
            assert book.returned == [("done", 0)], turns
        else:
            assert told, turns
            assert book.returned == [], turns
        assert found[1] == ("done", 1)


async def test_an_error_or_a_failing_gift_of_a_cancelled_caller_makes_no_noise_in_the_loop(
    caplog: pytest.LogCaptureFixture,
) -> None:
    book = Book(held=True)
    book.answer = lambda item: ValueError(item) if item == 0 else item
    operation = Batcher(workers=1).operation("write", book.run)

    async def fail(outcome: Any) -> None:
        raise ValueError("cannot compensate")

    def fail_at_once(outcome: Any) -> Awaitable[None]:
        raise ValueError("cannot compensate")

    tasks = begin(
        *(operation.submit(n, n, give) for n, give in enumerate((book.compensate, fail, fail_at_once)))
    )
    await steps()
    for task in tasks:
        task.cancel()
    book.free.set()
    with caplog.at_level(logging.WARNING, "flowstore_core"):
        await outcomes(tasks)
        await steps()
    assert book.returned == []
    assert [one.name for one in caplog.records] == ["flowstore_core"] * 2
    assert await operation.submit(5, 5) == 5


class Compensation:
    """A compensation that fails the first few times."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.given: list[Any] = []
        self.done = asyncio.Event()

    async def __call__(self, outcome: Any) -> None:
        self.given.append(outcome)
        if len(self.given) <= self.failures:
            raise StoreUnavailableError("no connection")
        self.done.set()


async def cancel_one(compensation: Compensation, answer: Callable[[int], Any]) -> Batcher:
    """Cancel a call that was sent, then resolve it."""
    book = Book(held=True)
    book.answer = answer
    batcher = Batcher(workers=1)
    tasks = begin(batcher.operation("write", book.run).submit(0, 0, compensation))
    await steps()
    tasks[0].cancel()
    book.free.set()
    await outcomes(tasks)
    return batcher


async def test_a_compensation_that_fails_is_retried_until_it_succeeds() -> None:
    compensation = Compensation(failures=3)
    await cancel_one(compensation, lambda item: "won")
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert compensation.given == ["won"] * 4


async def test_a_call_whose_outcome_is_unknown_is_compensated_for() -> None:
    compensation, unknown = Compensation(failures=1), OutcomeUnknownError("write")
    await cancel_one(compensation, lambda item: unknown)
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert compensation.given == [unknown] * 2


async def test_a_call_that_did_not_happen_is_not_compensated_for() -> None:
    compensation = Compensation(failures=0)
    batcher = await cancel_one(compensation, lambda item: StoreUnavailableError("it did not happen"))
    await batcher.drain(TIMEOUT)
    assert compensation.given == []


async def test_closing_retries_a_compensation_at_once_and_waits_for_it() -> None:
    compensation = Compensation(failures=1)
    batcher = await cancel_one(compensation, lambda item: "won")
    await steps()
    began = asyncio.get_running_loop().time()
    await batcher.drain(TIMEOUT)
    assert compensation.given == ["won"] * 2
    assert asyncio.get_running_loop().time() - began < 1


async def test_closing_does_not_wait_for_ever_for_a_compensation() -> None:
    others = asyncio.all_tasks()
    compensation = Compensation(failures=10_000)
    batcher = await cancel_one(compensation, lambda item: "won")
    await batcher.drain(0.3)
    assert len(compensation.given) > 1
    assert asyncio.all_tasks() == others


async def test_a_call_sent_by_a_cancelled_worker_is_compensated_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flowstore_core.batching.scheduler.ABANDON_DELAY", 0.01)
    book, compensation = Book(held=True), Compensation(failures=0)
    tasks = begin(Batcher(workers=1).operation("write", book.run).submit(0, 0, compensation))
    await steps()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await outcomes(tasks)
    await asyncio.wait_for(compensation.done.wait(), TIMEOUT)
    assert [type(one) for one in compensation.given] == [OutcomeUnknownError]


async def test_cancelling_a_coalesced_or_first_call_does_not_affect_the_others() -> None:
    for cancelled in (0, 1):
        book = Book(held=True)
        operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=lambda *_: "shared")
        tasks = begin(*(operation.submit("key", n, book.compensate) for n in range(3)))
        await steps()
        tasks[cancelled].cancel()
        await steps()
        book.free.set()
        found = await outcomes(tasks)
        await steps()
        assert isinstance(found.pop(cancelled), asyncio.CancelledError)
        assert found[-1] == "shared"
        assert book.written == [0]
        assert book.returned == ([("done", 0)] if cancelled == 0 else [])


async def test_a_first_call_cancelled_before_it_was_sent_is_replaced_by_the_next() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1).operation("write", book.run, keyed=True, coalesce=lambda *_: "shared")
    tasks = begin(operation.submit("busy", "busy"))
    await steps()
    tasks += begin(*(operation.submit("key", n) for n in range(3)))
    await steps()
    tasks[1].cancel()
    book.free.set()
    found = await outcomes(tasks)
    assert found[2:] == [("done", 1), "shared"]


# Bounds


async def test_beyond_the_capacity_callers_wait_for_a_slot_in_fifo_order() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1, max_queued=4, max_rows=2).operation("write", book.run)
    tasks = begin(*(operation.submit(n, n) for n in range(30)))
    await steps()
    book.free.set()
    assert await outcomes(tasks) == [("done", n) for n in range(30)]
    assert book.written == list(range(30))


async def test_a_call_without_a_slot_in_time_fails_with_the_hint_and_never_happens() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1, max_queued=2, queue_timeout=0.05, timeout_hint="buy a disk").operation(
        "write", book.run
    )
    sent = begin(operation.submit(0, 0))
    await steps()
    queued = begin(operation.submit(1, 1), operation.submit(2, 2))
    await steps()
    waiting = begin(operation.submit(3, 3), operation.submit(4, 4))
    found = await outcomes(queued + waiting)
    assert [type(one) for one in found] == [StoreUnavailableError] * 4
    assert all("0.05 s" in str(one) and "buy a disk" in str(one) for one in found)
    assert "2 calls were queued" in str(found[2])
    book.free.set()
    assert await outcomes(sent) == [("done", 0)]
    assert await operation.submit(5, 5) == ("done", 5)
    assert book.written == [0, 5]


async def test_a_waiter_cancelled_when_it_acquires_a_slot_releases_it() -> None:
    for turns in range(16):
        book = Book(held=True)
        operation = Batcher(workers=1, max_queued=1, queue_timeout=TIMEOUT).operation("write", book.run)
        tasks = begin(operation.submit(0, 0))
        await steps()
        tasks += begin(operation.submit(1, 1))
        await steps()
        waiters = begin(*(operation.submit(n, n) for n in (2, 3, 4)))
        await steps()
        book.free.set()
        await steps(turns)
        waiters[0].cancel()
        waiters[1].cancel()
        # No further call arrives, so a leaked slot would never be noticed.
        found = await asyncio.wait_for(asyncio.gather(*tasks, *waiters, return_exceptions=True), TIMEOUT)
        assert [found[0], found[1], found[4]] == [("done", 0), ("done", 1), ("done", 4)], turns
        assert await asyncio.wait_for(operation.submit(9, 9), TIMEOUT) == ("done", 9)


async def test_queued_calls_behind_hanging_workers_time_out_and_sent_calls_do_not() -> None:
    book = Book(held=True)
    batcher = Batcher(workers=2, queue_timeout=0.05)
    operation = batcher.operation("write", book.run)
    for number in range(2):
        begin(operation.submit(number, number))
        await steps()
    tasks = begin(*(operation.submit(n, n) for n in range(5)))
    await asyncio.sleep(0.03)
    tasks += begin(operation.submit(5, 5))
    assert [type(one) for one in await outcomes(tasks)] == [StoreUnavailableError] * 6
    assert book.batches == [[0], [1]]
    book.free.set()
    await batcher.drain(TIMEOUT)
    assert book.written == [0, 1]


# Closing


async def test_drain_resolves_accepted_calls_and_rejects_new_ones() -> None:
    book = Book(held=True)
    batcher = Batcher(workers=2, max_rows=5, max_queued=30)
    operation = batcher.operation("write", book.run)
    tasks = begin(*(operation.submit(n, n) for n in range(30)))
    await steps()
    begin_waiting = begin(*(operation.submit(n, n) for n in range(30, 50)))
    await steps()
    draining = begin(batcher.drain(TIMEOUT), batcher.drain(TIMEOUT))
    await steps()
    with pytest.raises(StoreClosedError):
        await operation.submit(99, 99)
    book.free.set()
    found = await outcomes(tasks)
    assert found == [("done", n) for n in range(30)]
    late = await outcomes(begin_waiting)
    assert all(one == ("done", n) or isinstance(one, StoreClosedError) for n, one in enumerate(late, 30))
    assert sorted(book.written) == [n for n, one in enumerate(found + late) if one == ("done", n)]
    assert await outcomes(draining) == [None, None]
    await batcher.drain(TIMEOUT)
    with pytest.raises(StoreClosedError):
        await operation.submit(99, 99)


@pytest.mark.parametrize("deaf", [False, True])
async def test_drain_with_a_hanging_worker_is_bounded_and_reports_unknown_outcomes(deaf: bool) -> None:
    batcher, release = Batcher(workers=1), asyncio.Event()

    async def hang(items: Sequence[Any]) -> Sequence[Any]:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                if not deaf:
                    raise
        return items

    book = Book()
    operation = batcher.operation("hang", hang, keyed=True, coalesce=lambda *_: "shared")
    sent = begin(operation.submit("key", 1, book.compensate), operation.submit("key", 2))
    await steps()
    queued = begin(*(operation.submit(n, n) for n in range(3)))
    await steps()
    await asyncio.wait_for(batcher.drain(0.05), TIMEOUT)
    assert [type(one) for one in await outcomes(sent)] == [OutcomeUnknownError, StoreClosedError]
    assert [type(one) for one in await outcomes(queued)] == [StoreClosedError] * 3
    release.set()
    await steps()
    assert book.returned == []


async def test_drain_waits_for_compensations_and_lets_them_call() -> None:
    book = Book(held=True)
    batcher = Batcher(workers=1)
    operation = batcher.operation("write", book.run)

    async def undo(outcome: Any) -> None:
        await asyncio.sleep(0.02)
        book.returned.append(await operation.submit("undo", "undo"))

    tasks = begin(operation.submit(0, 0, undo))
    await steps()
    tasks[0].cancel()
    await steps()
    book.free.set()
    await batcher.drain(TIMEOUT)
    assert book.written == [0, "undo"]
    assert book.returned == [("done", "undo")]


# Workers that end


async def test_later_calls_work_when_somebody_cancelled_every_task_of_the_loop() -> None:
    book = Book(held=True)
    operation = Batcher(workers=2, queue_timeout=TIMEOUT).operation(
        "write", book.run, keyed=True, coalesce=lambda *_: "shared"
    )
    for turns in range(4):
        book.free.clear()
        lost = begin(*(operation.submit(n % 3, n) for n in range(5)))
        await steps(turns)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        assert all(isinstance(one, asyncio.CancelledError) for one in await outcomes(lost))
        book.free.set()
        assert await asyncio.wait_for(operation.submit("later", turns), TIMEOUT) == ("done", turns)


async def test_calls_that_were_not_sent_outlive_their_worker() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1, queue_timeout=TIMEOUT).operation(
        "write", book.run, keyed=True, coalesce=lambda *_: "shared"
    )
    others = asyncio.all_tasks()
    sent = begin(operation.submit("key", 0), operation.submit("key", 1), operation.submit("other", 2))
    await steps()
    queued = begin(operation.submit("queued", 3))
    await steps()
    (worker,) = asyncio.all_tasks() - others - {*sent, *queued}
    worker.cancel()
    await steps()
    book.free.set()
    found = await outcomes(sent + queued)
    assert [type(found[0]), type(found[2])] == [OutcomeUnknownError] * 2
    assert [found[1], found[3]] == [("done", 1), ("done", 3)]


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
    tasks = begin(*(operation.submit(n, n) for n in range(4)))
    await steps()
    assert halves == [4, 2]
    (worker,) = asyncio.all_tasks() - others - {*tasks}
    worker.cancel()
    assert [type(one) for one in await outcomes(tasks)] == [OutcomeUnknownError] * 4


async def test_no_worker_stays_when_the_queue_is_empty() -> None:
    book = Book()
    others = asyncio.all_tasks()
    operation = Batcher(workers=3).operation("write", book.run)
    await outcomes(begin(*(operation.submit(n, n) for n in range(200))))
    await steps()
    assert asyncio.all_tasks() == others


@pytest.mark.parametrize("ending", ["return", "raise KeyboardInterrupt", "await operation.submit(1, 1)"])
def test_a_loop_that_ends_with_calls_queued_ends_quietly(ending: str) -> None:
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

_request: contextvars.ContextVar[str] = contextvars.ContextVar("_request", default="nobody's")


async def test_a_callers_context_does_not_reach_the_worker() -> None:
    seen: list[str] = []

    async def run(items: Sequence[int]) -> Sequence[int]:
        seen.append(_request.get())
        _request.set("the worker's")
        return items

    operation = Batcher(workers=1).operation("write", run)
    _request.set("the caller's")
    await operation.submit(0, 0)
    await outcomes(begin(*(operation.submit(n, n) for n in range(5))))
    assert seen == ["nobody's"] * 2
    assert _request.get() == "the caller's"


class _Item:
    """An object whose lifetime a weak reference can check."""


async def test_nothing_is_kept_of_calls_that_are_over() -> None:
    batcher = Batcher(workers=2, max_queued=500, max_rows=64)
    left: weakref.WeakSet[_Item] = weakref.WeakSet()

    async def run(items: Sequence[_Item]) -> Sequence[_Item]:
        await asyncio.sleep(0)
        return items

    async def compensate(outcome: _Item) -> None:
        await asyncio.sleep(0)

    operation = batcher.operation(
        "write", run, keyed=True, coalesce=lambda first, outcome, later: REQUEUE if id(later) % 3 else later
    )

    async def round_of(count: int) -> None:
        tasks = []
        for n in range(count):
            item = _Item()
            left.add(item)
            tasks.append(asyncio.ensure_future(operation.submit(n % 40, item, compensate)))
        del item
        for n, task in enumerate(tasks):
            if n % 3 == 0:
                task.cancel()
            if n % 50 == 0:
                await asyncio.sleep(0)
        await outcomes(tasks)

    async def objects() -> int:
        await steps(20)
        gc.collect()
        return len(gc.get_objects())

    await round_of(1000)
    before = await objects()
    for _ in range(20):
        await round_of(1000)
    assert await objects() < before + 200
    assert len(left) == 0
    assert batcher.queued == 0


async def test_cancelled_calls_behind_a_hanging_worker_do_not_accumulate() -> None:
    book = Book(held=True)
    operation = Batcher(workers=1, max_queued=100, queue_timeout=0.02).operation("write", book.run)
    begin(operation.submit("hangs", "hangs"))
    await steps()
    left: weakref.WeakSet[_Item] = weakref.WeakSet()
    for _ in range(50):
        items = [_Item() for _ in range(200)]
        left.update(items)
        tasks = begin(*(operation.submit(n, item) for n, item in enumerate(items)))
        await steps(2)
        for task in tasks:
            task.cancel()
        await outcomes(tasks)
        del items, tasks, task
    await steps(2)
    gc.collect()
    assert len(left) <= 110
    await asyncio.sleep(0.1)
    gc.collect()
    assert len(left) == 0
    book.free.set()
    with suppress(StoreUnavailableError):
        await operation.submit(0, 0)


# Everything combined


@settings(max_examples=200, deadline=None, database=None)
@given(seed=st.integers(0, 2**32))
def test_every_call_has_exactly_its_own_outcome_or_never_happened(seed: int) -> None:
    with closing(VirtualTimeLoop()) as loop:
        loop.run_until_complete(_any_schedule(Random(seed)))


async def _any_schedule(chance: Random) -> None:
    # From a random generator: Hypothesis cannot draw in tasks other than the test's.
    kind = chance.choice(["plain", "keyed", "shared"])
    batcher = Batcher(
        workers=chance.randint(1, 3),
        max_rows=chance.randint(1, 8),
        max_queued=chance.randint(1, 20),
        queue_timeout=chance.choice([0.5, 3.0, 1000.0]),
    )
    pauses = [0, 0, 0.1, 0.4, 1.0, 2.5]
    poison = frozenset(chance.sample(range(30), chance.randint(0, 4)))
    failing = frozenset(chance.sample(range(30), chance.randint(0, 4)))
    written: list[int] = []
    keys: dict[int, int] = {}
    returned: list[int] = []
    shared: list[int] = []

    async def run(items: Sequence[int]) -> Sequence[Any]:
        if kind != "plain":
            assert len({keys[item] for item in items}) == len(items)
        await asyncio.sleep(chance.choice(pauses))
        if poison & set(items):
            raise BatchError(ValueError("poison"))
        left = chance.choice([0, 0, 0, 1]) if len(items) > 1 else 0
        done: list[Any] = []
        for item in items[: len(items) - left]:
            if item in failing:
                done.append(KeyError(item))
            else:
                written.append(item)
                done.append(("own", item))
        await asyncio.sleep(chance.choice(pauses))
        return done + [REQUEUE] * left

    def share(first: int, outcome: Any, later: int) -> Any:
        assert keys[first] == keys[later]
        assert outcome == ("own", first)
        if later % 4 == 0:
            return REQUEUE
        shared.append(later)
        return ("shared", later)

    async def compensate(outcome: tuple[str, int]) -> None:
        await asyncio.sleep(chance.choice(pauses))
        returned.append(outcome[1])

    methods = [
        batcher.operation(
            f"write {n}", run, keyed=kind != "plain", coalesce=share if kind == "shared" else None
        )
        for n in range(2)
    ]
    tasks: list[asyncio.Task[Any]] = []
    for number in range(chance.randint(1, 30)):
        keys[number] = chance.randint(0, 4)
        operation = methods[chance.randint(0, 1)]
        tasks += begin(operation.submit(keys[number], number, compensate))
        await asyncio.sleep(chance.choice(pauses))
        if chance.random() < 0.4:
            chance.choice(tasks).cancel()
        if chance.randint(0, 60) == 0:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in sorted(others, key=lambda one: one.get_name()):
                task.cancel()
    if chance.random() < 0.4:
        await asyncio.sleep(chance.choice(pauses))
    await batcher.drain(chance.choice([0.1, 2.0, 1000.0]))
    found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5000)
    assert batcher.queued == 0
    assert len(asyncio.all_tasks()) == 1

    # No call is lost or executed twice.
    assert len(written) == len(set(written))
    assert len(returned) == len(set(returned))
    for number, outcome in enumerate(found):
        if outcome == ("own", number):
            assert number in written
            assert number not in returned
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
        if number in returned:
            assert isinstance(outcome, asyncio.CancelledError)
