"""The store beside raw transactions of etcd: ``python plugins/flowstore_etcd/benchmark.py``.

Without a URL it starts a server that syncs its files. Both sides take turns in one run, and
the table shows the median of the rounds. The raw side makes the same number of reads and commits over the
same connection code, with changes that compare and put as many keys, also up to 60 in one request; it does
not decide, encode, retry or keep slots. A lifecycle is start_run, claim, start and completion of a step, and
complete_run; an advance is claim_next_steps and advance_run with a dispatch of the next step.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import runpy
import secrets
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from uuid import UUID

from flowstore_etcd.settings import read_settings
from flowstore_etcd.space import EtcdSpace

from flowstore_core import FlowStore, RunStatus, StepStatus, StoreConfig, new_run_id, open_store
from flowstore_core.queues import StepRequest
from flowstore_core.urls import parse_url
from flowstore_documents import Change
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

    def __init__(self, space: EtcdSpace) -> None:
        self._space = space
        self._reads = SharedReads(space)
        self._waiting: list[tuple[Change, asyncio.Future[None]]] = []
        self._senders: set[asyncio.Task[None]] = set()

    async def work(self, caller: int, calls: Sequence[tuple[int, int, int]]) -> None:
        name = f"{caller:04}{secrets.token_hex(8)}".encode()
        for call, (reads, compares, puts) in enumerate(calls):
            keys = [b"%s/%d/%d" % (name, call, number) for number in range(max(compares, puts))]
            for _ in range(reads):
                await self._reads.read(keys[:compares])
            change = Change(dict.fromkeys(keys[:compares]), dict.fromkeys(keys[:puts], b"v" * 100))
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((change, done))
            if len(self._senders) < 4:
                sender = asyncio.create_task(self._send())
                self._senders.add(sender)
                sender.add_done_callback(self._senders.discard)
            await done

    async def _send(self) -> None:
        while group := self._waiting[:60]:
            del self._waiting[:60]
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


async def measure(url: str, rounds: int, seconds: float) -> None:
    parts = parse_url(url)
    options = MappingProxyType(dict(parts.options))
    raw_url = parts.with_path(f"raw-{secrets.token_hex(4)}")
    config = StoreConfig(url=raw_url, scheme="etcd", options=options, clock=None, migrate=True)
    space = EtcdSpace(read_settings(config))
    raw = Raw(space)
    print(f"{os.cpu_count()} processors, {len(parts.hosts.split(','))} members; per second")
    print(f"{'':28}{'raw':>8}{'store':>8}{'ratio':>8}   processor s per 1,000: raw, store")
    async with open_store(parts.with_path(f"store-{secrets.token_hex(4)}")) as store:
        queues = [secrets.token_hex(8) for _ in range(max(CALLERS))]
        await asyncio.gather(*(prepare_queue(store, queue) for queue in queues))
        sides: dict[str, tuple[Work, Work]] = {
            "lifecycles": (lambda number: raw.work(number, LIFECYCLE), lambda number: lifecycle(store)),
            "claim + advance": (
                lambda number: raw.work(number, ADVANCE),
                lambda number: advance(store, queues[number]),
            ),
        }
        for name, works in sides.items():
            for callers in CALLERS:
                found: tuple[list[tuple[float, float]], ...] = ([], [])
                for _ in range(rounds):
                    for side, work in zip(found, works, strict=True):
                        side.append(await per_second(work, callers, seconds))
                (theirs, spent), (ours, own) = (
                    (statistics.median(rate for rate, _ in side), statistics.median(cost for _, cost in side))
                    for side in found
                )
                title = f"{name}, {callers} caller{'s' * (callers > 1)}"
                print(
                    f"{title:28}{theirs:8,.0f}{ours:8,.0f}{ours / theirs:8.2f}   {spent:.2f}, {own:.2f}",
                    flush=True,
                )
    await space.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", help="of an etcd store; its prefix is not used")
    parser.add_argument("--members", type=int, default=1, help="of the cluster that is started")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure of a round")
    arguments = parser.parse_args()
    if arguments.url:
        asyncio.run(measure(arguments.url, arguments.rounds, arguments.seconds))
        return
    cluster = runpy.run_path(str(Path(__file__).parent / "tests" / "etcd_cluster.py"))["running_cluster"]
    with cluster(arguments.members, durable=True) as running:
        asyncio.run(measure(running.url(), arguments.rounds, arguments.seconds))


if __name__ == "__main__":
    main()
