"""The saver's own promises: threads, deletion, errors."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from flowstore_langgraph import FlowstoreSaver
from flowstore_langgraph.keys import FLOW_ID, checkpoint_key, run_id_of
from langgraph.checkpoint.base import CheckpointTuple, empty_checkpoint

from flowstore_core import RunStatus, open_store


def config_of(thread_id: str, **more: str) -> Any:
    return {"configurable": {"thread_id": thread_id, "checkpoint_ns": "", **more}}


def checkpoint(number: int, **values: Any) -> Any:
    one = empty_checkpoint()
    versions = {**dict.fromkeys(values, number)}
    return {**one, "channel_values": values, "channel_versions": versions}


async def put(saver: FlowstoreSaver, thread_id: str, *values: Any) -> Any:
    """A chain of checkpoints; returns the config of the last."""
    config = config_of(thread_id)
    for number, value in enumerate(values):
        one = checkpoint(number, messages=value)
        config = await saver.aput(config, one, {"step": number}, one["channel_versions"])
    return config


def messages(found: CheckpointTuple | None) -> Any:
    assert found is not None
    return found.checkpoint["channel_values"]["messages"]


def test_64_threads_share_a_saver(url: str) -> None:
    def work(number: int) -> Any:
        thread_id = f"thread {number}"
        config = config_of(thread_id)
        for step in range(5):
            one = checkpoint(step, messages=[number, step])
            config = saver.put(config, one, {"step": step}, one["channel_versions"])
            saver.put_writes(config, [("messages", step)], f"task {step}")
        return saver.get_tuple(config_of(thread_id))

    with FlowstoreSaver.from_url(url) as saver, ThreadPoolExecutor(64) as pool:
        found = list(pool.map(work, range(64)))
    assert [messages(one) for one in found] == [[number, 4] for number in range(64)]
    assert [one.pending_writes for one in found] == [[("task 4", "messages", 4)]] * 64


async def test_two_processes_begin_a_thread(url: str) -> None:
    async with FlowstoreSaver.from_url(url) as first, FlowstoreSaver.from_url(url) as second:
        await asyncio.gather(*(put(saver, "thread", [n]) for n in range(20) for saver in (first, second)))
        assert len([one async for one in first.alist(config_of("thread"))]) == 40


async def test_values_of_equal_versions_are_stored_once(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        config = await put(saver, "thread", ["long" * 1000])
        for number in range(1, 4):
            later = checkpoint(0, messages=["long" * 1000])
            config = await saver.aput(config, later, {"step": number}, {})
        stored = await store.get_outputs(run_id_of("thread"), prefix="b/")
        assert len(stored) == 1
        assert messages(await saver.aget_tuple(config)) == ["long" * 1000]


async def test_a_repeated_put_changes_nothing(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        one = checkpoint(1, messages=[1])
        for _ in range(2):
            config = await saver.aput(config_of("thread"), one, {}, one["channel_versions"])
            await saver.aput_writes(config, [("messages", 1), ("messages", 2)], "task")
        assert len(await store.get_outputs(run_id_of("thread"))) == 3
        found = await saver.aget_tuple(config)
        assert found is not None
        assert found.pending_writes == [("task", "messages", 1), ("task", "messages", 2)]


async def test_a_deleted_thread_leaves_nothing(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        await put(saver, "gone", [1], [2])
        await put(saver, "kept", [3])
        await saver.adelete_thread("gone")
        assert await saver.aget_tuple(config_of("gone")) is None
        assert [run.job_id for run in await store.get_runs(FLOW_ID)] == ["kept"]
        await saver.adelete_thread("gone")
        await put(saver, "gone", [4])
        assert messages(await saver.aget_tuple(config_of("gone"))) == [4]


async def test_an_interrupted_deletion_is_finished_by_the_next_read(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        await put(saver, "gone", [1])
        # What a crash leaves behind.
        await store.delete_outputs(run_id_of("gone"), prefix="")
        await store.complete_run(run_id_of("gone"), RunStatus.CANCELLED)
        assert await saver.aget_tuple(config_of("gone")) is None
        assert await store.get_run(run_id_of("gone")) is None


async def test_pruning_keeps_the_values_of_the_newest_checkpoint(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        config = await put(saver, "thread", [1], [2])
        later = checkpoint(1, messages=[2])
        config = await saver.aput(config, later, {}, {})
        await saver.aprune(["thread"])
        assert messages(await saver.aget_tuple(config_of("thread"))) == [2]
        assert len(await store.get_outputs(run_id_of("thread"))) == 2


async def test_the_newest_checkpoint_is_read_without_the_others(url: str) -> None:
    async with open_store(url) as store:
        saver = FlowstoreSaver(store)
        await put(saver, "thread", *([number] for number in range(30)))
        # A later read of an older checkpoint would fail.
        run_id = run_id_of("thread")
        newest = next(iter(await store.get_outputs(run_id, prefix="c/", take=1)))
        for key in await store.get_outputs(run_id, prefix="c/"):
            if key != newest:
                await store.save_output(run_id, key, "damaged")
        assert messages(await saver.aget_tuple(config_of("thread"))) == [29]


@pytest.mark.parametrize("ids", [["a", "b", "c"], ["1", "12", "123"], ["é", "😀"]])
async def test_ids_of_any_text_are_ordered(url: str, ids: list[str]) -> None:
    async with FlowstoreSaver.from_url(url) as saver:
        for one in ids:
            await saver.aput(config_of("thread"), {**checkpoint(0), "id": one}, {}, {})
        found = [one.checkpoint["id"] async for one in saver.alist(config_of("thread"))]
        assert found == ids[::-1]


async def test_sync_calls_in_the_loop_of_the_saver_are_refused(url: str) -> None:
    async with FlowstoreSaver.from_url(url) as saver:
        with pytest.raises(RuntimeError, match="aget_tuple"):
            saver.get_tuple(config_of("thread"))
        assert await asyncio.to_thread(saver.get_tuple, config_of("thread")) is None


def test_async_calls_work_on_a_saver_that_was_opened_without_a_loop(url: str) -> None:
    async def work() -> Any:
        await put(saver, "thread", [1])
        return [messages(one) async for one in saver.alist(config_of("thread"))]

    with FlowstoreSaver.from_url(url) as saver:
        assert asyncio.run(work()) == [[1]]


def test_a_saver_that_is_not_open_says_so() -> None:
    saver = FlowstoreSaver.from_url("memory://")
    with pytest.raises(RuntimeError, match="use: with FlowstoreSaver"):
        saver.get_tuple(config_of("thread"))
    with saver:
        assert saver.get_tuple(config_of("thread")) is None
    with pytest.raises(RuntimeError, match="not open"):
        saver.get_tuple(config_of("thread"))


async def test_bad_input(url: str) -> None:
    async with FlowstoreSaver.from_url(url) as saver:
        with pytest.raises(ValueError, match="thread_id"):
            await saver.aget_tuple({"configurable": {}})
        with pytest.raises(ValueError, match="checkpoint_id"):
            await saver.aput_writes(config_of("thread"), [("a", 1)], "task")
        with pytest.raises(TypeError, match="thread_ids"):
            await saver.aprune("thread")
        with pytest.raises(ValueError, match="keep_latest"):
            await saver.aprune(["thread"], strategy="keep_all")
        with pytest.raises(ValueError, match="80 bytes"):
            await saver.aget_tuple(config_of("thread", checkpoint_id="x" * 81))


def test_keys_are_short() -> None:
    key = checkpoint_key("a|" * 500, "x" * 80)
    assert len(key) < 256
