"""Tags on the document toolkit: what lists by tag read, and changes of many tags."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest

from flowstore_core import ConflictError, RunStatus, new_run_id
from flowstore_core.tags import encode_tags, order_tags
from flowstore_documents import DocumentStore, keys
from flowstore_documents.memory_space import MemoryData, MemorySpace
from flowstore_documents.space import MAX_KEY_BYTES
from tests.documents_backend.stores import CountingSpace, open_on, until

FLOW, OTHER_FLOW = UUID(int=3), UUID(int=4)
LONGEST = "\N{GRINNING FACE}" * 250


async def fill(store: DocumentStore) -> None:
    """300 runs: all with one tag, five of them with another, half of them of another flow."""
    await asyncio.gather(
        *(
            store.start_run(
                FLOW if number % 2 else OTHER_FLOW,
                "orders",
                new_run_id(),
                "manual",
                tags={"env": "test", "customer": "acme" if number % 60 == 0 else "other"},
            )
            for number in range(300)
        )
    )


@pytest.mark.parametrize("snapshots", [True, False])
async def test_a_list_reads_the_runs_with_the_rarest_tag(snapshots: bool) -> None:
    space = CountingSpace(MemoryData(), snapshots=snapshots)
    async with open_on(space) as store:
        await fill(store)
        space.reset()
        assert len(await store.get_runs(tags={"env": "test", "customer": "acme"})) == 5
        assert space.items <= 5 * (4 if snapshots else 6)
        space.reset()
        assert len(await store.get_runs(FLOW, tags={"customer": "acme"})) == 0
        assert space.items <= 5 * (4 if snapshots else 6)
        space.reset()
        first = await store.get_runs(tags={"env": "test"}, take=10)
        assert len(await store.get_runs(tags={"env": "test"}, after=first[-1].position, take=10)) == 10
        assert space.items <= 20 * (3 if snapshots else 5)


async def test_a_page_reads_the_runs_with_the_rarest_tag() -> None:
    space = CountingSpace(MemoryData())
    async with open_on(space) as store:
        await fill(store)
        for tags in ({"customer": "acme"}, {"customer": "acme", "env": "test"}):
            for status in (None, RunStatus.RUNNING):
                space.reset()
                page = await store.get_runs_page(status=status, tags=tags, take=2)
                assert (len(page.runs), page.total_count) == (2, 5)
                assert space.items <= 5 * 3
        space.reset()
        page = await store.get_runs_page(tags={"env": "test"}, take=10)
        assert (len(page.runs), page.total_count) == (10, 300)
        assert space.items <= 10 * 3


def largest_tags(mark: str) -> dict[str, str]:
    """32 tags with the largest keys and values."""
    return {f"{mark}{number:03}{LONGEST}"[:256]: f"{mark}{number:03}{LONGEST}"[:256] for number in range(32)}


@pytest.mark.parametrize("snapshots", [True, False])
async def test_readers_see_a_change_of_all_tags_whole_or_not_at_all(snapshots: bool) -> None:
    data = MemoryData()
    old, new = largest_tags("a"), largest_tags("b")
    async with (
        open_on(MemorySpace(data, snapshots=snapshots)) as store,
        open_on(MemorySpace(data, snapshots=snapshots)) as other,
    ):
        run = await store.start_run(FLOW, "orders", new_run_id(), "manual", tags=old)
        assert dict(run.tags) == old
        seen: list[list[int]] = []

        async def read() -> None:
            while True:
                found = [await other.get_runs(tags=tags) for tags in (old, new)]
                record = await other.get_run(run.run_id)
                assert record is not None
                assert dict(record.tags) in (old, new)
                seen.append([len(runs) for runs in found])

        reading = asyncio.create_task(read())
        await until(lambda: bool(seen))
        await store.set_tags(run.run_id, {**dict.fromkeys(old), **new})
        await until(lambda: seen[-1] == [0, 1])
        reading.cancel()
        (end,) = await asyncio.gather(reading, return_exceptions=True)
        assert isinstance(end, asyncio.CancelledError)
        # A change between the two lists shows the run in both; no change hides it from both.
        assert [0, 0] not in seen
        assert [len(await other.get_runs(tags=tags)) for tags in (old, new)] == [0, 1]
        with pytest.raises(ConflictError):
            await store.set_tags(run.run_id, {"one": "more"})
        assert max(map(len, data.all_keys())) <= MAX_KEY_BYTES
        await store.complete_run(run.run_id, RunStatus.FAILED)
        assert await store.delete_run(run.run_id)
        assert [key for key in data.all_keys() if not key.startswith(keys.SLOTS)] == []


async def test_changes_of_tags_do_not_disturb_steps() -> None:
    space = CountingSpace(MemoryData())
    async with open_on(space) as store:
        run_id = new_run_id()
        await store.start_run(FLOW, "orders", run_id, "manual")
        space.reset()
        for number in range(3):
            await store.set_tags(run_id, {"progress": f"{number}"})
        written = {key for commit in space.commits for change in commit for key in change.puts}
        assert keys.tags(run_id) in written
        assert not written & {keys.gate(run_id), keys.steps_tick(run_id)}


async def test_tags_that_equal_another_long_text_can_be_changed() -> None:
    """The tags have their own copy of a text, so replacing them leaves the other one."""
    async with open_on(MemorySpace(MemoryData())) as store:
        run_id, tags = new_run_id(), largest_tags("a")
        text = encode_tags(order_tags(tags))
        await store.start_run(FLOW, "orders", run_id, "manual", trigger_data=text, tags=tags)
        await store.set_tags(run_id, dict.fromkeys(tags))
        run = await store.get_run(run_id)
        assert run is not None
        assert (run.tags, run.trigger_data) == ((), text)
