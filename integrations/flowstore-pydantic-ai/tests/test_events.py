"""External events on every backend: approvals that wait in the store."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta

import pytest
from agents import Log, ask_in_file, asked, refund_agent, until
from flowstore_pydantic_ai import DurableRunner, EventNotOpenError, FlowstoreDurability
from pydantic import JsonValue
from pydantic_ai import Agent
from pydantic_ai.exceptions import UserError
from pydantic_ai.external_events import wait_for_external_event
from pydantic_ai.models.test import TestModel
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, RunContext

from flowstore import FlowStore, RunStatus, open_store

LEASE = timedelta(minutes=1)
"""Longer than any pause of a loaded machine."""
APPROVED = "approved: refunded 20"


async def _token(log: Log, number: int = 0) -> tuple[str, str]:
    """The token that the agent handed out, and the id of the tool call that it is for."""
    await until(lambda: len(asked(log)) > number)
    return asked(log)[number]


async def _is_suspended(store: FlowStore, queue: str = "pydantic-ai refunds") -> None:
    """Wait until the run needs no process."""
    while True:
        [run] = await store.get_runs()
        waiting = [one.waiting for one in await store.get_queues() if one.queue == queue]
        if waiting == [1] and not await store.get_claimed_step_keys(run.run_id):
            return
        await asyncio.sleep(0.01)


async def test_an_approval_waits_without_a_process(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store, lease=LEASE)
    run = asyncio.create_task(runner.run(refund_agent(log, ask_in_file(log)), "go", run_id="1"))
    token, call = await _token(log)
    await _is_suspended(store)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    # No worker takes the run as long as it waits.
    assert not await store.claim_next_steps(["pydantic-ai refunds"], lease=LEASE)
    approver = DurableRunner(store)
    await approver.resolve(token, {"approvals": {call: True}})
    await approver.resolve(token, {"approvals": {call: True}})
    with pytest.raises(EventNotOpenError):
        await approver.resolve(token, {"approvals": {call: False}})
    worker = asyncio.create_task(runner.work([refund_agent(log, ask_in_file(log))]))
    [stored] = await store.get_runs()
    status = await store.wait_for_run(stored.run_id, timeout=timedelta(minutes=1))
    assert status is RunStatus.SUCCEEDED
    worker.cancel()
    with suppress(asyncio.CancelledError):
        await worker
    assert (await runner.run(refund_agent(log, ask_in_file(log)), run_id="1")).output == APPROVED
    assert log.lines == ["model 0", f"ask {token} {call}", "refund 20", "model 1"]


async def test_a_run_call_waits_for_the_answer(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store, lease=LEASE)
    run = asyncio.create_task(runner.run(refund_agent(log, ask_in_file(log)), "go", run_id="1"))
    token, call = await _token(log)
    await runner.resolve(token, DeferredToolResults(approvals={call: True}))
    assert (await run).output == APPROVED
    assert log.lines.count("refund 20") == 1


async def test_a_wait_that_fails_or_times_out_denies_the_call(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store, lease=LEASE)
    run = asyncio.create_task(runner.run(refund_agent(log, ask_in_file(log)), "go", run_id="1"))
    token, _ = await _token(log)
    await runner.fail(token, "nobody is there")
    assert "nobody is there" in (await run).output
    timed = refund_agent(log, ask_in_file(log), timeout=timedelta(seconds=0.5))
    for _ in range(2):
        assert "No resolution arrived within 0:00:00.5" in (await runner.run(timed, "go", run_id="2")).output
    late, _ = await _token(log, 1)
    with pytest.raises(EventNotOpenError):
        await runner.resolve(late, None)
    assert "refund 20" not in log.lines


async def test_an_answer_in_place(store: FlowStore, log: Log) -> None:
    async def ask(
        context: RunContext[None], requests: DeferredToolRequests, token: str
    ) -> DeferredToolResults | None:
        log.append("ask")
        return requests.build_results(approve_all=True)

    runner = DurableRunner(store)
    for _ in range(2):
        assert (await runner.run(refund_agent(log, ask), "go", run_id="1")).output == APPROVED
        assert log.lines == ["model 0", "ask", "refund 20", "model 1"]


async def test_several_waits_of_one_run(store: FlowStore, log: Log) -> None:
    agent = refund_agent(log, ask_in_file(log), count=3)
    runner = DurableRunner(store, lease=LEASE)
    run = asyncio.create_task(runner.run(agent, "go", run_id="1"))
    tokens = []
    for number in range(3):
        token, call = await _token(log, number)
        tokens.append(token)
        await runner.resolve(token, {"approvals": {call: True}})
    assert (await run).output == ", ".join([APPROVED] * 3)
    assert len(set(tokens)) == 3
    assert log.lines.count("refund 20") == 3
    assert len(asked(log)) == 3


async def test_a_process_that_dies_before_it_asked(url: str, log: Log) -> None:
    # The waiter is stored, and the question is not: the run must not wait for an answer to it. The waiter
    # expires with the lease.
    lease = timedelta(seconds=1)

    async def never(context: RunContext[None], requests: DeferredToolRequests, token: str) -> None:
        log.append(f"began {token}")
        await asyncio.Event().wait()

    async with open_store(url) as store, open_store(url) as other:
        runner = DurableRunner(store, lease=lease)
        first = asyncio.create_task(runner.run(refund_agent(log, never), "go", run_id="1"))
        await until(lambda: any(line.startswith("began") for line in log.lines))
        first.cancel()
        with suppress(asyncio.CancelledError):
            await first
        resumed = DurableRunner(other, lease=lease)
        worker = asyncio.create_task(resumed.work([refund_agent(log, ask_in_file(log))]))
        token, call = await _token(log)
        assert f"began {token}" in log.lines
        await resumed.resolve(token, {"approvals": {call: True}})
        assert (await runner.run(refund_agent(log, never), run_id="1")).output == APPROVED
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker


async def test_tokens_that_no_run_waits_for(store: FlowStore, log: Log) -> None:
    runner = DurableRunner(store)
    for token in ("", "x", "x.y", "00000000000000000000000000000000.x"):
        with pytest.raises(EventNotOpenError):
            await runner.resolve(token, None)


async def test_a_wait_inside_a_tool_is_refused(store: FlowStore) -> None:
    agent: Agent[None, str] = Agent(TestModel(), name="waits", capabilities=[FlowstoreDurability()])

    @agent.tool_plain
    async def wait() -> JsonValue:
        return await wait_for_external_event("now", ask=lambda token: None)

    with pytest.raises(UserError, match="inside a durable unit"):
        await DurableRunner(store).run(agent, "go", run_id="1")
