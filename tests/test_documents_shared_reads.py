"""Reads of the document toolkit that share requests."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import pytest

from flowstore_core import StoreUnavailableError, new_run_id
from flowstore_documents import Change, NotApplied, Range, View
from flowstore_documents.memory_space import Fault, MemoryData, MemorySpace
from flowstore_documents.shared_reads import MAX_READS, MAX_SHARED, SharedReads
from tests.documents_backend.stores import CountingSpace, open_on

KEYS = [f"k{number:04}".encode() for number in range(400)]


@pytest.fixture
async def space() -> CountingSpace:
    space = CountingSpace(MemoryData())
    await space.commit([Change(puts={key: key for key in KEYS[start : start + 20]}) for start in (0, 20, 40)])
    space.reset()
    return space


async def test_reads_that_wait_share_a_request_and_get_their_own_answers(space: CountingSpace) -> None:
    reads = SharedReads(space)
    calls = [reads.read([key, b"missing"], [Range(key, b"l", 2, keys_only=True)]) for key in KEYS[:50]]
    views = await asyncio.gather(*calls)
    assert [list(view.found) for view in views] == [[key] for key in KEYS[:50]]
    pages = [[key for key, _ in view.pages[0].items] for view in views]
    assert pages == [KEYS[number : number + 2] for number in range(50)]
    assert space.reads <= MAX_READS + -(-50 * 3 // MAX_SHARED)


async def test_reads_of_different_states_do_not_share(space: CountingSpace) -> None:
    reads = SharedReads(space)
    old = (await reads.read([])).at
    await space.commit([Change(puts={KEYS[0]: b"new"})])
    views = await asyncio.gather(*(reads.read([KEYS[0]], at=at) for at in [old, None] * 20))
    assert [view.found[KEYS[0]].value for view in views] == [KEYS[0], b"new"] * 20


async def test_long_reads_are_requests_of_their_own(space: CountingSpace) -> None:
    reads = SharedReads(space)
    everything = Range(b"k", b"l")
    views = await asyncio.gather(reads.read([], [everything]), reads.read(KEYS), reads.read([], [everything]))
    assert [len(view.found) + sum(len(page.items) for page in view.pages) for view in views] == [60] * 3
    assert space.reads == 3


async def test_a_failed_request_fails_its_calls_and_no_other(space: CountingSpace) -> None:
    reads = SharedReads(space)
    space.arm(Fault.NOT_APPLIED)
    failed = await asyncio.gather(*(reads.read([key]) for key in KEYS[:10]), return_exceptions=True)
    assert {type(error) for error in failed} == {NotApplied}
    assert list((await reads.read(KEYS[:1])).found) == KEYS[:1]


async def test_a_cancelled_call_leaves_the_others(space: CountingSpace) -> None:
    reads = SharedReads(space)
    calls = [asyncio.create_task(reads.read([key])) for key in KEYS[:30]]
    await asyncio.sleep(0)
    for call in calls[::3]:
        call.cancel()
    views = await asyncio.gather(*calls, return_exceptions=True)
    assert [isinstance(view, View) for view in views] == [number % 3 > 0 for number in range(30)]


class ImmediateSpace(MemorySpace):
    """Replies without suspending the caller, as an embedded database may."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        return self.data.read(keys, ranges, None)


async def test_no_read_waits_for_a_sender_that_has_ended() -> None:
    reads = SharedReads(ImmediateSpace(MemoryData()))

    async def read() -> int:
        return len([await reads.read([b"a"]) for _ in range(50)])

    async with asyncio.timeout(60):
        assert await asyncio.gather(*(read() for _ in range(8))) == [50] * 8


class SilentSpace(MemorySpace):
    """Never answers a read."""

    async def read(
        self, keys: Collection[bytes], ranges: Sequence[Range] = (), *, at: object | None = None
    ) -> View:
        await asyncio.Event().wait()
        raise AssertionError


async def test_closing_ends_the_requests_in_progress_and_the_calls_that_wait() -> None:
    before = asyncio.all_tasks()
    async with asyncio.timeout(60), open_on(SilentSpace(MemoryData())) as store:
        calls = [
            asyncio.create_task(store.get_run(new_run_id())) for _ in range((MAX_READS + 1) * MAX_SHARED)
        ]
        await asyncio.sleep(0)
        calls[0].cancel()
        await asyncio.gather(calls[0], return_exceptions=True)
        await store.aclose()
        results = await asyncio.gather(*calls[1:], return_exceptions=True)
    assert {(type(result), str(result)) for result in results} == {
        (StoreUnavailableError, str(StoreUnavailableError("the store was closed")))
    }
    assert asyncio.all_tasks() == before
