"""The memory backend beyond the contract: names, scratch namespaces, URLs."""

from __future__ import annotations

import asyncio
import threading
from uuid import UUID

import pytest

from flowstore_core import Capability, ConfigurationError, RunStatus, open_store
from flowstore_core.plugins import find_backend
from tests.calls import new_run, together


async def test_memory_without_a_name_is_private_to_each_open() -> None:
    async with open_store("memory://") as one, open_store("memory://") as other:
        run_id = await new_run(one)
        assert await other.get_run_status(run_id) is None
    async with open_store("memory://") as later:
        assert await later.get_runs() == ()


async def test_memory_with_a_name_is_shared_until_the_process_ends() -> None:
    async with open_store("memory://shared-1") as one:
        run_id = await new_run(one)
        async with open_store("memory://shared-1") as other:
            assert await other.get_run_status(run_id) is RunStatus.RUNNING
        async with open_store("memory://shared-2") as different:
            assert await different.get_run_status(run_id) is None
    async with open_store("MEMORY://shared-1?migrate=false") as later:
        assert await later.get_run_status(run_id) is RunStatus.RUNNING


async def test_memory_names_are_compared_exactly() -> None:
    async with open_store("memory://Name") as one, open_store("memory://name") as other:
        run_id = await new_run(one)
        assert await other.get_run_status(run_id) is None


async def test_memory_a_name_is_shared_by_threads_that_open_it_concurrently() -> None:
    barrier = threading.Barrier(6)
    outcomes: list[str] = []
    run_id = UUID(int=1)

    async def work(number: int) -> None:
        await asyncio.to_thread(barrier.wait)
        async with open_store("memory://of-threads") as store:
            try:
                await new_run(store, run_id=run_id)
            except Exception as error:  # noqa: BLE001 - counted below
                outcomes.append(type(error).__name__)
            else:
                outcomes.append("started")

    await together(asyncio.to_thread(asyncio.run, work(number)) for number in range(6))
    assert sorted(outcomes) == ["RunAlreadyExistsError"] * 5 + ["started"]


async def test_memory_scratch_is_empty_and_removed_afterwards() -> None:
    backend = find_backend("memory")[1]
    async with backend.scratch("memory://kept") as url, backend.scratch("memory://kept") as other_url:
        assert url != other_url
        async with (
            open_store("memory://kept") as kept,
            open_store(url) as store,
            open_store(other_url) as other,
        ):
            run_id = await new_run(store)
            assert await kept.get_runs() == await other.get_runs() == ()
            async with open_store(url) as reopened:
                assert await reopened.get_run_status(run_id) is RunStatus.RUNNING
    async with open_store(url) as store:
        assert await store.get_runs() == ()


@pytest.mark.parametrize(
    "url",
    [
        "memory:///name",
        "memory://name/path",
        "memory://name:80",
        "memory://user@name",
        "memory://user:secret@name",
        "memory://a b",
        "memory://a%20b",
        "memory://name#part",
        "memory:///",
    ],
)
async def test_memory_rejects_urls_with_other_parts(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with open_store(url):
            pass
    assert "secret" not in str(caught.value)
    with pytest.raises(ConfigurationError):
        async with find_backend("memory")[1].scratch(url):
            pass


async def test_memory_has_no_options() -> None:
    with pytest.raises(ConfigurationError, match="pool_size"):
        async with open_store("memory://?pool_size=1"):
            pass


async def test_memory_declares_its_capabilities() -> None:
    async with open_store("memory://") as store:
        missing = frozenset(Capability) - store.capabilities
        assert missing == {Capability.DURABLE, Capability.MULTI_PROCESS, Capability.SHARED_CLOCK}
