"""The ThreadWorker, and BatchWorkers implemented by a backend."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any

import pytest

from flowstore_core import OutcomeUnknownError, StoreClosedError, StoreUnavailableError
from flowstore_core.batching import REQUEUE, Batcher, BatchError, PendingCall, ThreadWorker


class FakeDatabase:
    """Records batches in one thread; clear ``free`` to block the thread so that calls queue."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.threads: set[str] = set()
        self.free = threading.Event()
        self.free.set()
        self.result: Callable[[Any], Any] = lambda item: ("done", item)
        self.compensated: list[Any] = []

    def run(self, calls: Sequence[PendingCall]) -> Sequence[Any]:
        self.threads.add(threading.current_thread().name)
        self.batches.append([call.item for call in calls])
        assert self.free.wait(60)
        return [self.result(call.item) for call in calls]

    async def compensate(self, outcome: Any) -> None:
        self.compensated.append(outcome)

    async def wait_for_batches(self, count: int) -> None:
        """Wait until the thread has received ``count`` batches."""
        for _ in range(1000):
            if len(self.batches) >= count:
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"received only the batches {self.batches}")


@pytest.fixture
def database() -> Iterator[FakeDatabase]:
    created = FakeDatabase()
    yield created
    created.free.set()


def batcher_of(workers: Callable[[Batcher], Any] = ThreadWorker, **options: Any) -> Batcher:
    return Batcher(workers=workers, **options)


async def test_calls_queue_while_the_thread_is_busy(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    database.free.clear()
    tasks = [asyncio.create_task(operation.submit(None, number)) for number in range(50)]
    await database.wait_for_batches(1)
    database.free.set()
    assert await asyncio.gather(*tasks) == [("done", number) for number in range(50)]
    assert database.batches == [[0], [*range(1, 50)]]
    assert await operation.submit(None, 50) == ("done", 50)
    await batcher.drain(60)
    assert database.threads == {"flowstore"}
    assert_threads_end()


async def test_keyed_calls_are_coalesced_or_requeued(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation(
        "write",
        database.run,
        keyed=True,
        coalesce=lambda first, result, later: REQUEUE if later == "c" else later,
    )
    database.free.clear()
    first = asyncio.create_task(operation.submit("key", "first"))
    await database.wait_for_batches(1)
    rest = [asyncio.create_task(operation.submit("key", item)) for item in "abc"]
    database.free.set()
    await first
    # b was coalesced with a, c was requeued.
    assert await asyncio.gather(*rest) == [("done", "a"), "b", ("done", "c")]
    assert database.batches == [["first"], ["a"], ["c"]]
    await batcher.drain(60)


async def test_an_error_of_one_call_fails_only_that_call(database: FakeDatabase) -> None:
    def run(calls: Sequence[PendingCall]) -> Sequence[Any]:
        if any(call.item == 7 for call in calls):
            raise BatchError(ValueError("seven"))
        return [KeyError("three") if call.item == 3 else call.item for call in calls]

    batcher = batcher_of()
    operation = batcher.operation("write", run)
    results = await asyncio.gather(
        *(operation.submit(None, number) for number in range(20)), return_exceptions=True
    )
    for number, result in enumerate(results):
        if number in (3, 7):
            assert isinstance(result, KeyError if number == 3 else ValueError)
        else:
            assert result == number
    await batcher.drain(60)


@pytest.mark.parametrize("wrong", [RuntimeError("broken"), None])
async def test_a_failed_batch_fails_all_of_its_calls(wrong: Exception | None) -> None:
    def run(calls: Sequence[PendingCall]) -> Sequence[Any]:
        if wrong is not None:
            raise wrong
        return []

    batcher = batcher_of()
    operation = batcher.operation("write", run)
    results = await asyncio.gather(*(operation.submit(None, n) for n in range(5)), return_exceptions=True)
    assert all(isinstance(result, RuntimeError) for result in results)
    # One object raised in many tasks would accumulate tracebacks; only the first caller gets the original.
    assert len({id(result) for result in results}) >= 4
    await batcher.drain(60)


async def test_cancelled_calls_are_not_sent_or_are_compensated(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    database.free.clear()
    tasks = [asyncio.create_task(operation.submit(None, number, database.compensate)) for number in range(3)]
    await database.wait_for_batches(1)
    for task in tasks[:2]:
        task.cancel()
    database.free.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [asyncio.CancelledError, asyncio.CancelledError, tuple]
    await batcher.drain(60)
    assert database.batches == [[0], [2]]
    assert database.compensated == [("done", 0)]


async def test_drain_sends_queued_calls_and_the_calls_of_compensations(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)

    async def on_abandoned(outcome: Any) -> None:
        await operation.submit(None, ("back", outcome))

    database.free.clear()
    tasks = [asyncio.create_task(operation.submit(None, number, on_abandoned)) for number in range(30)]
    await database.wait_for_batches(1)
    tasks[0].cancel()
    asyncio.get_running_loop().call_later(0.05, database.free.set)
    await batcher.drain(60)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert results[1:] == [("done", number) for number in range(1, 30)]
    assert ("back", ("done", 0)) in database.batches[-1]
    with pytest.raises(StoreClosedError):
        await operation.submit(None, 1)


async def test_drain_abandons_a_hanging_thread(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    database.free.clear()
    tasks = [asyncio.create_task(operation.submit(None, number)) for number in range(3)]
    await database.wait_for_batches(1)
    await asyncio.wait_for(batcher.drain(0.1), 60)
    first, *others = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, OutcomeUnknownError)
    assert all(isinstance(other, StoreClosedError) for other in others)
    # The thread returns a result after its call was abandoned.
    database.free.set()
    await asyncio.sleep(0.05)


async def test_a_cancelled_drain_resolves_all_calls(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    database.free.clear()
    tasks = [asyncio.create_task(operation.submit(None, number)) for number in range(3)]
    await database.wait_for_batches(1)
    draining = asyncio.create_task(batcher.drain(30))
    await asyncio.sleep(0.02)
    draining.cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
    assert isinstance(results[0], OutcomeUnknownError)
    with pytest.raises(asyncio.CancelledError):
        await draining


async def test_calls_fail_if_the_thread_cannot_be_started(
    database: FakeDatabase,
) -> None:
    failures = 2

    async def fail_twice(serve: Callable[[], None]) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreUnavailableError("no thread could be started")
        await asyncio.to_thread(serve)

    batcher = batcher_of(lambda batcher: ThreadWorker(batcher, fail_twice))
    operation = batcher.operation("write", database.run)
    for _ in range(2):
        with pytest.raises(StoreUnavailableError, match="no thread"):
            await operation.submit(None, 1)
    assert await operation.submit(None, 2) == ("done", 2)
    await batcher.drain(60)


async def test_cancelling_every_task_does_not_stop_the_thread(database: FakeDatabase) -> None:
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    assert await operation.submit(None, 1) == ("done", 1)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    await asyncio.sleep(0)
    assert await asyncio.wait_for(operation.submit(None, 2), 60) == ("done", 2)
    await batcher.drain(60)


@pytest.mark.parametrize("missing", ["nothing", "add_reader", "eventfd", "free descriptors"])
async def test_the_thread_wakes_every_loop_and_closes_its_descriptors(
    database: FakeDatabase, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Callable[..., Any]:
        def fail(*arguments: Any) -> Any:
            raise error

        return fail

    before = open_files()
    if missing == "add_reader":
        monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", failing(NotImplementedError()))
    elif missing == "eventfd":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif missing == "free descriptors":
        monkeypatch.setattr(os, "eventfd", failing(OSError(errno.EMFILE, "too many")), raising=False)
    batcher = batcher_of()
    operation = batcher.operation("write", database.run)
    assert await asyncio.gather(*(operation.submit(None, number) for number in range(5))) == [
        ("done", number) for number in range(5)
    ]
    await batcher.drain(60)
    # Earlier tests may close files meanwhile.
    assert open_files() <= before


def assert_threads_end() -> None:
    """Join the worker threads; a thread reports its end shortly before it ends."""
    for thread in threading.enumerate():
        if thread.name == "flowstore":
            thread.join(10)
            assert not thread.is_alive()


def open_files() -> set[str]:
    """The open descriptors of this process; empty if the system does not list them."""
    return set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()


def test_a_thread_ends_with_its_event_loop(database: FakeDatabase) -> None:
    async def abandon_call() -> None:
        database.free.clear()
        operation = batcher_of().operation("write", database.run)
        asyncio.get_running_loop().create_task(operation.submit(None, 1))
        await database.wait_for_batches(1)

    asyncio.run(abandon_call())
    database.free.set()
    assert_threads_end()


async def test_a_backend_provides_its_own_workers() -> None:
    class TimerWorkers:
        """Writes in callbacks of the event loop, one batch at a time."""

        def __init__(self, batcher: Batcher) -> None:
            self.batcher = batcher
            self.busy: asyncio.Future[None] | None = None

        def wake(self) -> None:
            if self.busy is None and (batch := self.batcher.next_batch()) is not None:
                self.busy = self.batcher.loop.create_future()
                self.batcher.loop.call_later(0.001, self.finish, *batch)

        def finish(self, operation: Any, calls: list[PendingCall]) -> None:
            assert self.busy is not None
            self.busy.set_result(None)
            self.busy = None
            self.batcher.resolve(operation, calls, [call.item * 2 for call in calls])
            self.wake()

        def pending(self) -> Collection[asyncio.Future[Any]]:
            return [self.busy] if self.busy is not None else []

        async def stop(self) -> None:
            """Has nothing to cancel."""

    async def unreachable(items: Sequence[int]) -> Sequence[int]:
        raise AssertionError

    batcher = batcher_of(TimerWorkers)
    operation = batcher.operation("double", unreachable)
    calls: list[Awaitable[int]] = [operation.submit(None, number) for number in range(10)]
    assert await asyncio.gather(*calls) == [number * 2 for number in range(10)]
    queued = [asyncio.create_task(operation.submit(None, number)) for number in range(10)]
    await asyncio.sleep(0)
    await batcher.drain(60)
    assert await asyncio.gather(*queued) == [number * 2 for number in range(10)]
