"""Agent runs on every backend: replay, failures, two processes on one run, leases, workers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from agents import ORDER, ORDER_CHARGED_TWICE, ORDER_OUTPUT, Log, order_agent, tool_returns, until
from flowstore_pydantic_ai import DurableRunner, FlowstoreDurability, OperationFailedError, RunFailedError
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext
from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel
from pydantic_ai.models.test import TestModel

from flowstore import FlowStore, InvalidArgumentError, RunStatus, StepStatus, open_store

LONG = timedelta(hours=1)
"""A lease that does not end while a test runs."""


async def test_every_operation_is_a_step_and_is_replayed(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store)
    result = await runner.run(order_agent(log), "go", run_id="order 7")
    assert result.output == ORDER_OUTPUT
    assert sorted(log.lines) == ORDER
    # Another runner and another agent object know nothing but the store.
    again = await DurableRunner(store).run(order_agent(log), "go", run_id="order 7")
    assert sorted(log.lines) == ORDER
    assert again.output == result.output
    assert again.usage == result.usage
    responses = [one for one in result.all_messages() if isinstance(one, ModelResponse)]
    assert [one for one in again.all_messages() if isinstance(one, ModelResponse)] == responses
    [run] = await store.get_runs()
    assert (run.flow_name, run.status, run.job_id) == ("orders", RunStatus.SUCCEEDED, "order 7")
    statuses = await store.get_step_statuses(run.run_id)
    assert set(statuses.values()) == {StepStatus.SUCCEEDED}


async def test_the_keys_of_the_steps_do_not_change(store: FlowStore, log: Log) -> None:
    # They are stored: a change would make the runs of an earlier version execute everything again.
    await DurableRunner(store).run(order_agent(log), "go", run_id="order 7")
    [run] = await store.get_runs()
    keys = list(await store.get_step_statuses(run.run_id))
    calls = sorted(key for key in keys if ".call_tool:" in key)
    assert [key for key in keys if key not in calls] == [
        "agent",
        "orders__model.request #1",
        "orders__model.request #2",
        "orders__model.request #3",
    ]
    assert [key.split(" ")[0] for key in calls] == [
        "orders__function_toolset__<agent>.call_tool:charge",
        "orders__function_toolset__<agent>.call_tool:pack",
        "orders__function_toolset__<agent>.call_tool:pack",
    ]
    assert all(key.split(" ")[1].startswith("pyd_ai_") and key.endswith(" #1") for key in calls)


async def test_the_test_model_with_a_structured_output(store: FlowStore, log: Log) -> None:
    class Answer(BaseModel):
        number: int

    agent = Agent(TestModel(), name="numbers", output_type=Answer, capabilities=[FlowstoreDurability()])

    @agent.tool_plain
    def count() -> int:
        log.append("count")
        return 3

    runner = DurableRunner(store)
    result = await runner.run(agent, "go", run_id="1")
    assert isinstance(result.output, Answer)
    assert (await runner.run(agent, run_id="1")).output == result.output
    assert log.lines == ["count"]
    follow_up = await runner.run(agent, "more", run_id="2", message_history=result.all_messages())
    assert len(follow_up.all_messages()) == len(result.all_messages()) + len(follow_up.new_messages())
    assert (await runner.run(agent, run_id="2")).output == follow_up.output


async def test_a_model_retry_is_a_recorded_result(store: FlowStore, log: Log) -> None:
    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        if "right" in tool_returns(messages):
            return ModelResponse(parts=[TextPart("done")])
        return ModelResponse(parts=[ToolCallPart("guess", {"number": len(messages)})])

    agent = Agent(FunctionModel(respond), name="guesses", capabilities=[FlowstoreDurability()])

    @agent.tool_plain
    def guess(number: int) -> str:
        log.append(str(number))
        if number == 1:
            raise ModelRetry("higher")
        return "right"

    runner = DurableRunner(store)
    for _ in range(2):
        assert (await runner.run(agent, "go", run_id="1")).output == "done"
        assert log.lines == ["1", "3"]


async def test_a_failed_run_is_retried_where_it_failed(store: FlowStore, log: Log) -> None:
    is_down = True
    agent: Agent[None, str] = Agent(
        TestModel(custom_output_text="paid"), name="payments", capabilities=[FlowstoreDurability()]
    )

    @agent.tool_plain
    def pay() -> str:
        log.append("pay")
        if is_down:
            raise ConnectionError("the bank does not answer")
        return "paid"

    runner = DurableRunner(store)
    with pytest.raises(ConnectionError):
        await runner.run(agent, "go", run_id="1")
    for _ in range(2):
        with pytest.raises(RunFailedError, match="ConnectionError: the bank does not answer"):
            await runner.run(agent, "go", run_id="1")
    is_down = False
    await runner.retry("1")
    await runner.retry("1")
    assert (await runner.run(agent, "go", run_id="1")).output == "paid"
    await runner.retry("1")
    assert log.lines == ["pay", "pay"]
    [run] = await store.get_runs()
    assert run.status is RunStatus.SUCCEEDED


async def test_the_error_of_a_step_is_replayed(store: FlowStore, log: Log) -> None:
    # The process died after it had recorded the failed step, before it had recorded the failed run.
    agent = order_agent(log)
    runner = DurableRunner(store)
    run_id = await runner.start(agent, "go", run_id="1")
    key = "orders__model.request #1"
    await store.record_step_start(run_id, key, "ModelRequestId")
    await store.record_step_complete(run_id, key, StepStatus.FAILED, error_message="ModelAPIError: down")
    with pytest.raises(OperationFailedError, match="ModelAPIError: down"):
        await runner.run(agent, run_id="1")
    assert log.lines == []
    assert await store.get_run_status(run_id) is RunStatus.FAILED


@pytest.mark.parametrize("size", [10, 17 * 1024 * 1024])
async def test_a_result_that_the_store_refuses_fails_the_run(store: FlowStore, log: Log, size: int) -> None:
    agent: Agent[None, str] = Agent(TestModel(), name="large", capabilities=[FlowstoreDurability()])

    @agent.tool_plain
    def create() -> str:
        log.append("create")
        if size < 100:
            raise ConnectionError("\0\ud800")
        return "x" * size

    runner = DurableRunner(store)
    with pytest.raises(InvalidArgumentError if size > 100 else ConnectionError):
        await runner.run(agent, "go", run_id="1")
    with pytest.raises(RunFailedError):
        await runner.run(agent, "go", run_id="1")
    assert log.lines == ["create"]
    [run] = await store.get_runs()
    assert run.status is RunStatus.FAILED


async def test_concurrent_retries_reopen_a_run_once(store: FlowStore, log: Log) -> None:
    def respond(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        log.append("model")
        if len(log.lines) == 1:
            raise ConnectionError
        return ModelResponse(parts=[TextPart("done")])

    agent = Agent(FunctionModel(respond), name="retries", capabilities=[FlowstoreDurability()])
    runner = DurableRunner(store)
    with pytest.raises(ConnectionError):
        await runner.run(agent, "go", run_id="1")
    worker = asyncio.create_task(runner.work([agent]))
    await asyncio.gather(*(runner.retry("1") for _ in range(10)))
    [run] = await store.get_runs()
    assert await store.wait_for_run(run.run_id, timeout=timedelta(minutes=1)) is RunStatus.SUCCEEDED
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert log.lines == ["model", "model"]


async def test_two_processes_on_one_run_execute_it_once(url: str, log: Log) -> None:
    async with open_store(url) as first, open_store(url) as second:
        runs = [DurableRunner(store).run(order_agent(log), "go", run_id="1") for store in (first, second) * 4]
        results = await asyncio.gather(*runs)
    assert [one.output for one in results] == [ORDER_OUTPUT] * 8
    assert sorted(log.lines) == ORDER


async def _wait_for_renewal(store: FlowStore, run_id: UUID) -> None:
    """Wait until the leases of the driver and of the charge have been extended."""

    async def ends() -> dict[str, datetime]:
        claims = await store.get_step_claims(run_id)
        held = {one.step_key: one.expires_at for one in claims if one.expires_at is not None}
        return {key: end for key, end in held.items() if key == "agent" or "charge" in key}

    before = await ends()
    assert len(before) == 2
    while True:
        if all(end > before[key] for key, end in (await ends()).items()):
            return
        await asyncio.sleep(0.1)


async def test_the_lease_is_renewed_while_a_tool_runs(url: str, log: Log) -> None:
    charged = asyncio.Event()
    agent = order_agent(log, charged=charged)
    # Renewed every 2.5 seconds; a loaded machine may stall for 7.
    lease = timedelta(seconds=10)
    async with open_store(url) as first, open_store(url) as second:
        worker = asyncio.create_task(DurableRunner(second, lease=lease).work([agent]))
        run = asyncio.create_task(DurableRunner(first, lease=lease).run(agent, "go", run_id="1"))
        await until(lambda: "charge 20" in log.lines)
        [stored] = await first.get_runs()
        for _ in range(2):
            await _wait_for_renewal(first, stored.run_id)
        charged.set()
        assert (await run).output == ORDER_OUTPUT
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
    assert sorted(log.lines) == ORDER


async def test_a_cancelled_run_is_resumed_at_once(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store, lease=LONG)
    run = asyncio.create_task(runner.run(order_agent(log, charged=asyncio.Event()), "go", run_id="1"))
    await until(lambda: "charge 20" in log.lines)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert (await runner.run(order_agent(log), "go", run_id="1")).output == ORDER_OUTPUT
    # The result of the first charge was not recorded.
    assert sorted(log.lines) == ORDER_CHARGED_TWICE


async def test_a_process_that_lost_its_claim_executes_nothing_more(url: str, log: Log) -> None:
    async with open_store(url) as first, open_store(url) as second:
        # It notices after a quarter of its lease.
        runner = DurableRunner(first, lease=timedelta(seconds=4))
        slow = asyncio.create_task(runner.run(order_agent(log, charged=asyncio.Event()), "go", run_id="1"))
        await until(lambda: "charge 20" in log.lines)
        [stored] = await second.get_runs()
        # As when its lease had ended.
        for claim in await second.get_step_claims(stored.run_id):
            if claim.step_key == "agent" or "charge" in claim.step_key:
                await second.release_step_claim(stored.run_id, claim.step_key)
        fast = await DurableRunner(second, lease=LONG).run(order_agent(log), "go", run_id="1")
        # The slow one notices, waits, and returns the result of the other one.
        assert (await slow).output == fast.output == ORDER_OUTPUT
    assert sorted(log.lines) == ORDER_CHARGED_TWICE


async def test_a_worker_executes_runs_and_survives_failing_ones(
    store: FlowStore, log: Log, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        raise ConnectionError("no model")

    failing = Agent(FunctionModel(fail), name="failing", capabilities=[FlowstoreDurability()])
    orders = order_agent(log)
    runner = DurableRunner(store)
    with caplog.at_level(logging.CRITICAL, "flowstore_pydantic_ai"):
        worker = asyncio.create_task(runner.work([orders, failing], limit=2))
        ids = [await runner.start(agent, "go", run_id=agent.name or "") for agent in (failing, orders)]
        statuses = [await store.wait_for_run(run_id, timeout=timedelta(minutes=1)) for run_id in ids]
        worker.cancel()
        with pytest.raises(asyncio.CancelledError):
            await worker
    assert statuses == [RunStatus.FAILED, RunStatus.SUCCEEDED]
    assert sorted(log.lines) == ORDER
    assert (await runner.run(orders, run_id="orders")).output == ORDER_OUTPUT


async def test_a_worker_that_ends_leaves_its_runs_to_others(store: FlowStore, log: Log) -> None:
    slow = order_agent(log, charged=asyncio.Event())
    runner = DurableRunner(store, lease=LONG)
    worker = asyncio.create_task(runner.work([slow]))
    await runner.start(slow, "go", run_id="1")
    await until(lambda: "charge 20" in log.lines)
    worker.cancel()
    with pytest.raises(asyncio.CancelledError):
        await worker
    assert (await runner.run(order_agent(log), run_id="1")).output == ORDER_OUTPUT
    assert sorted(log.lines) == ORDER_CHARGED_TWICE


async def test_events_reach_a_handler_once(store: FlowStore, log: Log) -> None:
    async def handle(context: RunContext[None], events: AsyncIterable[Any]) -> None:
        async for event in events:
            log.append(type(event).__name__)

    agent: Agent[None, str] = Agent(
        TestModel(), name="events", capabilities=[FlowstoreDurability(event_stream_handler=handle)]
    )

    @agent.tool_plain
    def nothing() -> None:
        return None

    runner = DurableRunner(store)
    await runner.run(agent, "go", run_id="1")
    seen = log.lines
    assert "FunctionToolCallEvent" in seen
    assert "FinalResultEvent" in seen
    await runner.run(agent, run_id="1")
    assert log.lines == seen


async def test_an_agent_in_a_tool_is_part_of_the_step_of_the_tool(store: FlowStore, log: Log) -> None:
    inner = order_agent(log)
    outer = Agent(TestModel(), name="outer", capabilities=[FlowstoreDurability()])

    @outer.tool_plain
    async def delegate() -> str:
        return (await inner.run("go")).output

    runner = DurableRunner(store)
    for _ in range(2):
        assert ORDER_OUTPUT in (await runner.run(outer, "go", run_id="1")).output
        assert sorted(log.lines) == ORDER
    [run] = await store.get_runs()
    assert not any(key.startswith("orders") for key in await store.get_step_statuses(run.run_id))


async def test_dependencies_are_passed_with_each_call(store: FlowStore) -> None:
    agent = Agent(TestModel(), name="deps", deps_type=str, capabilities=[FlowstoreDurability()])

    @agent.tool
    def greet(context: RunContext[str]) -> str:
        return f"hello {context.deps}"

    result = await DurableRunner(store).run(agent, "go", run_id="1", deps="you")
    assert "hello you" in result.output


async def test_an_agent_without_the_runner_is_not_durable(log: Log) -> None:
    assert (await order_agent(log).run("go")).output == ORDER_OUTPUT
    assert sorted(log.lines) == ORDER


async def test_what_is_refused(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store)
    agent = order_agent(log)
    await runner.start(agent, "go", run_id="1")
    assert await runner.start(agent, "go", run_id="1") == await runner.start(agent, run_id="1")
    other: Agent[None, str] = Agent(TestModel(), name="other", capabilities=[FlowstoreDurability()])
    plain = Agent(TestModel(), name="plain")
    with pytest.raises(ValueError, match="was started with another input"):
        await runner.run(agent, "stop", run_id="1")
    with pytest.raises(ValueError, match="belongs to the agent 'orders'"):
        await runner.run(other, "go", run_id="1")
    with pytest.raises(ValueError, match="no run '2' is stored"):
        await runner.run(agent, run_id="2")
    with pytest.raises(ValueError, match="must have the capability FlowstoreDurability"):
        await runner.run(plain, "go", run_id="2")
    with pytest.raises(ValueError, match="limit must be at least 1, not 0"):
        await runner.work([agent], limit=0)
    for agents in ([], [agent, agent]):
        with pytest.raises(ValueError, match="agents with different names"):
            await runner.work(agents)
    with pytest.raises(ValueError, match="lease must be at least"):
        DurableRunner(store, lease=timedelta())
    assert len(await store.get_runs()) == 1
    assert log.lines == []


async def test_a_changed_agent_cannot_rebuild_a_result(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store)
    agent: Agent[None, str] = Agent(TestModel(), name="orders", capabilities=[FlowstoreDurability()])
    await runner.run(agent, "go", run_id="1")
    changed: Agent[None, str] = Agent(
        TestModel(), name="orders", capabilities=[FlowstoreDurability(name="renamed")]
    )
    with pytest.raises(RunFailedError, match=r"'renamed__model\.request #1' has no recorded result"):
        await runner.run(changed, run_id="1")
