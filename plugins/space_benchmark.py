"""A store on the document toolkit beside raw requests of its space. benchmark.py of each plugin uses it.

Both sides take turns in one run, and the table shows the median of the rounds. The raw side makes the same
number of reads and commits over the same space, with changes that compare and put as many keys, also up to
``limits.changes`` in one request; it does not decide, encode, retry or keep slots. A lifecycle is start_run,
claim, start and completion of a step, and complete_run; an advance is claim_next_steps and advance_run with
a dispatch of the next step, in a queue of each caller or in one queue for all.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_core import FlowStore, RunStatus, StepStatus, new_run_id, open_store
from flowstore_core.queues import StepRequest
from flowstore_documents import Change, KeyValueSpace
from flowstore_documents.committer import MAX_COMMITS
from flowstore_documents.senders import Senders
from flowstore_documents.shared_reads import SharedReads

FLOW = UUID(int=7)
LEASE = timedelta(minutes=10)
CALLERS = (1, 64, 256)
LIFECYCLE = ((1, 3, 6), (1, 3, 4), (1, 3, 3), (1, 3, 4), (1, 4, 7))
"""The reads, comparisons and puts of each call, as docs/document-toolkit.md lists them."""
ADVANCE = ((2, 4, 5), (1, 6, 5))

Work = Callable[[int], Awaitable[None]]


class Raw:
    """Reads and commits without a store, in groups as the store's committer makes them."""

    def __init__(self, space: KeyValueSpace) -> None:
        self._space = space
        self._reads = SharedReads(space)
        self._waiting: list[tuple[Change, asyncio.Future[None]]] = []
        self._senders = Senders(self._send, MAX_COMMITS)

    async def work(self, caller: int, calls: Sequence[tuple[int, int, int]]) -> None:
        name = f"{caller:04}{secrets.token_hex(8)}".encode()
        for call, (reads, compares, puts) in enumerate(calls):
            keys = [b"%s/%d/%d" % (name, call, number) for number in range(max(compares, puts))]
            for _ in range(reads):
                await self._reads.read(keys[:compares])
            change = Change(dict.fromkeys(keys[:compares]), dict.fromkeys(keys[:puts], b"v" * 100))
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((change, done))
            self._senders.wake()
            await done

    async def _send(self) -> None:
        limit = self._space.limits.changes
        while group := self._waiting[:limit]:
            del self._waiting[:limit]
            for version in await self._space.commit([change for change, _ in group]):
                assert version is not None
            for _, done in group:
                done.set_result(None)


async def lifecycle(store: FlowStore) -> None:
    run_id = new_run_id()
    await store.start_run(FLOW, "flow", run_id, "manual")
    await store.try_claim_step(run_id, "a", owner="me")
    await store.record_step_start(run_id, "a", "type")
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json="1")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)


async def prepare_queue(store: FlowStore, queue: str) -> None:
    run_id = new_run_id()
    await store.start_run(FLOW, "flow", run_id, "manual")
    await store.try_record_dispatch(run_id, "0", queue=queue, step_type="type")


async def advance(store: FlowStore, queue: str) -> None:
    (step,) = await store.claim_next_steps([queue], lease=LEASE)
    follower = StepRequest(step_key=str(int(step.step_key) + 1), step_type="type", queue=queue)
    await store.advance_run(
        step.run_id,
        step.step_key,
        StepStatus.SUCCEEDED,
        attempt=step.attempt,
        owner=step.owner,
        dispatch=[follower],
    )


async def per_second(work: Work, callers: int, seconds: float) -> tuple[float, float]:
    """How often the callers did the work, and the processor seconds of this process for 1,000 times."""
    counts = [0] * callers
    began, spent = time.perf_counter(), time.process_time()

    async def call(number: int) -> None:
        while time.perf_counter() < began + seconds:
            await work(number)
            counts[number] += 1

    await asyncio.gather(*map(call, range(callers)))
    total = sum(counts)
    return total / (time.perf_counter() - began), (time.process_time() - spent) / total * 1000


def new_prefix(side: str) -> str:
    return f"{side}-{secrets.token_hex(4)}"


def new_parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("url", nargs="?", help="of a store; its prefix is not used")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure of a round")
    return parser


async def measure(space: KeyValueSpace, url: str, title: str, arguments: argparse.Namespace) -> None:
    """Print the table: raw requests of the space beside the store at the URL. Closes the space."""
    raw = Raw(space)
    print(f"{os.cpu_count()} processors, {title}; per second")
    print(f"{'':40}{'raw':>8}{'store':>8}{'ratio':>8}   processor s per 1,000: raw, store")
    async with open_store(url) as store:
        queues = [secrets.token_hex(8) for _ in range(max(CALLERS))]
        await asyncio.gather(*(prepare_queue(store, queue) for queue in [*queues, *["shared"] * len(queues)]))
        sides: dict[str, tuple[Work, Work]] = {
            "lifecycles": (lambda number: raw.work(number, LIFECYCLE), lambda number: lifecycle(store)),
            "claim + advance": (
                lambda number: raw.work(number, ADVANCE),
                lambda number: advance(store, queues[number]),
            ),
            "claim + advance, one queue": (
                lambda number: raw.work(number, ADVANCE),
                lambda number: advance(store, "shared"),
            ),
        }
        for name, works in sides.items():
            for callers in CALLERS:
                found: tuple[list[tuple[float, float]], ...] = ([], [])
                for _ in range(arguments.rounds):
                    for side, work in zip(found, works, strict=True):
                        side.append(await per_second(work, callers, arguments.seconds))
                (theirs, spent), (ours, own) = (
                    (statistics.median(rate for rate, _ in side), statistics.median(cost for _, cost in side))
                    for side in found
                )
                title = f"{name}, {callers} caller{'s' * (callers > 1)}"
                print(
                    f"{title:40}{theirs:8,.0f}{ours:8,.0f}{ours / theirs:8.2f}   {spent:.2f}, {own:.2f}",
                    flush=True,
                )
    await space.aclose()


Seconds = Callable[[], float]


async def show_cost(title: str, work: Callable[[], Awaitable[object]], server_seconds: Seconds) -> None:
    """Print the processor time of this process and of the servers for one call."""
    times = 200
    await work()
    began, server_began = time.process_time(), server_seconds()
    for _ in range(times):
        await work()
    client, servers = time.process_time() - began, server_seconds() - server_began
    print(f"{title:40}{client / times * 1e3:8.2f}{servers / times * 1e3:9.2f}", flush=True)


async def repeat(work: Callable[[], Awaitable[object]], times: int) -> None:
    """Do the work so often, by many callers."""
    left = iter(range(times))

    async def call() -> None:
        for _ in left:
            await work()

    await asyncio.gather(*(call() for _ in range(max(CALLERS))))


async def measure_growth(url: str, runs: int, server_seconds: Seconds) -> None:
    """Print what calls cost in small and large runs, beside few and many active runs, and after deletions.

    ``server_seconds`` is the processor time that the servers have used.
    """
    print(f"{'processor ms, one caller':40}{'client':>8}{'servers':>9}")
    async with open_store(url) as store:
        for steps in (10, 1_000) * 3:
            numbers = itertools.count()
            runs_of_steps = [new_run_id() for _ in range(10)]
            for run_id in runs_of_steps:
                await store.start_run(FLOW, "flow", run_id, "manual")

            async def start_step(
                run_ids: Sequence[UUID] = runs_of_steps, numbers: Iterator[int] = numbers
            ) -> tuple[UUID, str]:
                number = next(numbers)
                step = run_ids[number % len(run_ids)], str(number)
                await store.record_step_start(*step, "type")
                return step

            async def step(start: Callable[[], Awaitable[tuple[UUID, str]]] = start_step) -> None:
                await store.record_step_complete(*await start(), StepStatus.SUCCEEDED, output_json="1")

            await repeat(start_step, steps * len(runs_of_steps))
            await show_cost(f"a step of a run of {steps:,} steps", step, server_seconds)
        queue, active = secrets.token_hex(8), 0
        for count in (count for count in (100, 1_000, 10_000, 100_000) if count <= runs):
            await repeat(lambda: prepare_queue(store, queue), count - active)
            active = count
            await show_cost(
                f"a claim beside {count:,} active runs", lambda: advance(store, queue), server_seconds
            )
        ended = runs // 10
        await repeat(lambda: lifecycle(store), ended)
        await show_cost("a lifecycle", lambda: lifecycle(store), server_seconds)
        await store.cleanup(datetime.now(UTC) + timedelta(days=1))
        await show_cost(f"after the cleanup of {ended:,} runs", lambda: lifecycle(store), server_seconds)
