"""A worker process of benchmarks.queues: ``python -m benchmarks.queue_worker ROLE URL [LIMIT]``.

It prints a line of JSON for each result, and ends at end of file on stdin. Roles:

- ``react``: waits for steps, one after another, and prints the time at which each was claimed.
- ``idle``: waits for steps, and prints its processor time for each line on stdin.
- ``drain``: for each line on stdin, claims and advances all steps, with two batches of LIMIT at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from benchmarks.workload import INPUT, OUTPUT, STEPS_PER_RUN
from flowstore_core import ClaimedStep, FlowStore, RunStatus, StepRequest, StepStatus, open_store

QUEUES = ("default",)
LEASE = timedelta(minutes=5)
SIGNAL = "continue"

# The types of steps.
WORK = "work"
WAIT_FOR_SIGNAL = "wait for signal"
CHAIN = "chain"

IDLE_TIMEOUT = timedelta(hours=1)
DRAINED_TIMEOUT = timedelta(seconds=0.5)
"""The time without a ready step after which all work is done."""

Lines = Callable[[], Awaitable[str]]


def request(step_type: str, number: int = 0, **options: Any) -> StepRequest:
    """Request a step of that type; the number counts the steps of a chain."""
    return StepRequest(step_key=f"step-{number}", step_type=step_type, input_json=INPUT, **options)


def reply(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def execute(store: FlowStore, step: ClaimedStep) -> None:
    """Execute a step without work, and record its outcome."""
    if step.step_type == WAIT_FOR_SIGNAL and step.attempt == 1:
        await store.register_waiter(step.run_id, step.step_key, SIGNAL)
        await store.reschedule_step(step.run_id, step.step_key, attempt=step.attempt)
        return
    number = int(step.step_key.removeprefix("step-")) + 1
    follows = step.step_type == CHAIN and number < STEPS_PER_RUN
    await store.advance_run(
        step.run_id,
        step.step_key,
        StepStatus.SUCCEEDED,
        attempt=step.attempt,
        owner=step.owner,
        output_json=OUTPUT,
        dispatch=[request(CHAIN, number)] if follows else (),
        complete_as=RunStatus.SUCCEEDED,
    )


async def react(store: FlowStore) -> None:
    while True:
        claimed = await store.claim_next_steps(QUEUES, lease=LEASE)
        # The clock that due times refer to.
        now = time.time()
        for step in claimed:
            await execute(store, step)
            reply(run=str(step.run_id), at=now)
        if not claimed:
            await store.wait_for_steps(QUEUES, timeout=IDLE_TIMEOUT)


async def idle(store: FlowStore, lines: Lines) -> None:
    waiting = asyncio.create_task(store.wait_for_steps(QUEUES, timeout=IDLE_TIMEOUT))
    while await lines():
        reply(cpu=time.process_time(), waiting=not waiting.done())
    waiting.cancel()
    await asyncio.wait({waiting})


async def drain(store: FlowStore, lines: Lines, limit: int) -> None:
    while await lines():
        calls: list[tuple[float, float, int]] = []
        ended = 0.0

        async def batches(calls: list[tuple[float, float, int]] = calls) -> None:
            nonlocal ended
            while True:
                began = time.time()
                claimed = await store.claim_next_steps(QUEUES, lease=LEASE, limit=limit)
                calls.append((began, time.time(), len(claimed)))
                await asyncio.gather(*(execute(store, step) for step in claimed))
                if claimed:
                    ended = time.time()
                elif not await store.wait_for_steps(QUEUES, timeout=DRAINED_TIMEOUT):
                    return

        await asyncio.gather(batches(), batches())
        reply(calls=calls, ended=ended)


async def main(role: str, url: str, limit: int) -> None:
    loop = asyncio.get_running_loop()
    received: asyncio.Queue[str] = asyncio.Queue()

    def receive() -> None:
        line = sys.stdin.readline()
        received.put_nowait(line)
        if not line:
            loop.remove_reader(sys.stdin)

    loop.add_reader(sys.stdin, receive)
    async with open_store(url) as store:
        reply(ready=True)
        if role == "react":
            working = asyncio.create_task(react(store))
            end_of_file = asyncio.create_task(received.get())
            await asyncio.wait({working, end_of_file}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
            working.cancel()
            await asyncio.wait({working})
        elif role == "idle":
            await idle(store, received.get)
        else:
            await drain(store, received.get, limit)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1))
