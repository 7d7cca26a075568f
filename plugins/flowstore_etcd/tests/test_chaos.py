"""Faults of a cluster of three under load: nothing lost, nothing twice, bounded unavailability.

Each test prints its figures: ``python -m pytest -n 0 -s tests/test_chaos.py``. FLOWSTORE_CHAOS_CYCLES
is the number of faults of each test.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import random
import time
import urllib.error
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus

import etcd_cluster
import pytest
from flowstore_etcd.fault_injection import inject_faults
from load import Ledger, Load, Verdict, verify
from peer_network import PeerNetwork, cluster_with_network

from flowstore_core import FlowStore, open_store

CYCLES = int(os.environ.get("FLOWSTORE_CHAOS_CYCLES", "1"))
CALLS = 200
"""Acknowledged calls between two faults."""
QUOTA = 16 * 2**20
"""Maximum size of the database in the test that fills it."""
FILLING = "YWFh" * 250_000
"""Base64, like the keys: 750,000 bytes."""
SIZE_BEFORE_LOAD = 0.6 * QUOTA
"""The size of the database when the load starts, which must store less than half of the quota itself."""
MAX_GAP = 30.0
"""Seconds without any acknowledgement, on a loaded machine: an election takes 1 to 2 seconds, and a request
without an answer is given up after another 2."""
OPTIONS = "?request_timeout=2&connect_timeout=1&retry_timeout=10"

pytestmark = [
    pytest.mark.skipif(etcd_cluster.BINARY is None, reason=etcd_cluster.MISSING),
    pytest.mark.timeout(900),
]


@asynccontextmanager
async def stores_at(urls: Sequence[str]) -> AsyncIterator[Sequence[FlowStore]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(open_store(url)) for url in urls]


def urls_of(cluster: etcd_cluster.Cluster) -> Sequence[str]:
    """One URL for each member, which begins with this member."""
    addresses = [member.address for member in cluster.members]
    return [
        f"etcd://{','.join(addresses[number:] + addresses[:number])}/chaos{OPTIONS}"
        for number in range(len(addresses))
    ]


def report(title: str, ledger: Ledger, verdict: Verdict, faults: int, **more: object) -> None:
    facts = {
        "faults": faults,
        "runs": verdict.runs,
        "acknowledged": ledger.acknowledged,
        "unavailable": ledger.unavailable,
        "unknown": ledger.unknown,
        "lost": len(verdict.lost),
        "twice": len(verdict.twice),
        "longest pause": f"{ledger.longest_gap:.1f} s",
        "slowest call": f"{ledger.slowest:.1f} s",
        **more,
    }
    print(f"\n{title}: " + ", ".join(f"{name} {value}" for name, value in facts.items()))  # noqa: T201
    assert not verdict.lost, verdict.lost[:5]
    assert not verdict.twice, verdict.twice[:5]
    assert ledger.longest_gap < MAX_GAP


@pytest.fixture
async def three() -> AsyncIterator[tuple[etcd_cluster.Cluster, PeerNetwork]]:
    async with cluster_with_network(3) as running:
        yield running


async def end(load: Load, stores: Sequence[FlowStore]) -> tuple[Ledger, Verdict]:
    ledger = await load.stop()
    return ledger, await verify(stores[0], ledger)


Three = tuple[etcd_cluster.Cluster, PeerNetwork]


@pytest.mark.parametrize("whom", ["leader", "follower"])
async def test_a_killed_member(three: Three, whom: str) -> None:
    cluster, _ = three
    async with stores_at(urls_of(cluster)) as stores:
        load = Load(stores, workers=18)
        for _ in range(CYCLES):
            await load.progress(CALLS)
            leader = await asyncio.to_thread(lambda: cluster.leader)
            member = leader if whom == "leader" else next(one for one in cluster.members if one is not leader)
            await asyncio.to_thread(member.kill)
            # A majority works on without it.
            await load.progress(CALLS)
            cluster.start_member(member)
            await asyncio.to_thread(etcd_cluster.wait_for, lambda one=member: one.is_ready, "it is back")
        await load.progress(CALLS)
        report(f"{whom} killed", *await end(load, stores), CYCLES)


async def test_a_leader_that_is_cut_off_from_the_others(three: Three) -> None:
    cluster, network = three
    async with stores_at(urls_of(cluster)) as stores:
        load = Load(stores, workers=18)
        for _ in range(CYCLES):
            await load.progress(CALLS)
            # The stores reach all members, also the one that is cut off.
            network.separate([await asyncio.to_thread(lambda: cluster.leader)])
            await load.progress(CALLS)
            network.join()
            await asyncio.to_thread(
                etcd_cluster.wait_for, lambda: all(one.is_ready for one in cluster.members), "it is back"
            )
        await load.progress(CALLS)
        assert network.delayed
        report("leader cut off", *await end(load, stores), CYCLES, held=network.delayed)


async def test_without_a_majority_nothing_is_acknowledged(three: Three) -> None:
    cluster, network = three
    async with stores_at(urls_of(cluster)) as stores:
        load = Load(stores, workers=18)
        pauses = []
        for _ in range(CYCLES):
            await load.progress(CALLS)
            network.separate(cluster.members[:1])
            await asyncio.to_thread(cluster.members[1].kill)
            # Calls that were acknowledged by the members may still be on their way to the workers.
            await asyncio.sleep(2)
            before = load.ledger.acknowledged
            await asyncio.sleep(3)
            assert load.ledger.acknowledged == before
            began = time.monotonic()
            network.join()
            cluster.start_member(cluster.members[1])
            await load.progress(1)
            pauses.append(time.monotonic() - began)
        await load.progress(CALLS)
        ledger, verdict = await end(load, stores)
        report("no majority", ledger, verdict, CYCLES, back_after=f"{max(pauses):.1f} s")


async def test_a_slow_member(three: Three) -> None:
    cluster, network = three
    async with stores_at(urls_of(cluster)) as stores:
        load = Load(stores, workers=18)
        for cycle in range(CYCLES):
            await load.progress(CALLS)
            leader = await asyncio.to_thread(lambda: cluster.leader)
            slow = leader if cycle % 2 else next(one for one in cluster.members if one is not leader)
            network.slow_down([slow], 0.1)
            await load.progress(CALLS)
            network.join()
            # And a member that does nothing for longer than an election takes.
            await asyncio.to_thread(slow.pause)
            await load.progress(CALLS)
            slow.resume()
        await load.progress(CALLS)
        assert network.delayed
        report("slow member", *await end(load, stores), CYCLES, delayed=network.delayed)


async def test_lost_late_and_refused_requests(three: Three) -> None:
    cluster, _ = three
    chance = random.Random(7)
    injected = 0
    async with AsyncExitStack() as stack:
        injectors = [await stack.enter_async_context(inject_faults(url)) for url in urls_of(cluster)]
        stores = await stack.enter_async_context(stores_at([injector.url for injector in injectors]))
        direct = await stack.enter_async_context(stores_at(urls_of(cluster)))
        load = Load(stores, workers=18)
        for _ in range(CYCLES * 30):
            injector = chance.choice(injectors)
            kind = chance.choice(["lose_reply", "hold_request", "refuse_request"])
            getattr(injector, kind)(skip=chance.randrange(3))
            await load.progress(20)
            injected += injector.disarm()
            await injector.release_request()
        ledger = await load.stop()
        assert injected
        report("lost requests", ledger, await verify(direct[0], ledger), injected)


async def test_a_full_database() -> None:
    arguments = [f"--quota-backend-bytes={QUOTA}"]
    async with cluster_with_network(3, arguments) as (cluster, _), stores_at(urls_of(cluster)) as stores:
        leader = await asyncio.to_thread(lambda: cluster.leader)
        numbers = itertools.count()
        await asyncio.to_thread(write_fillings, leader, numbers, SIZE_BEFORE_LOAD)
        load = Load(stores, workers=18)
        await load.progress(CALLS)
        with pytest.raises(urllib.error.HTTPError) as refused:
            await asyncio.to_thread(write_fillings, leader, numbers, math.inf)
        assert refused.value.code == HTTPStatus.TOO_MANY_REQUESTS
        await load.refused(CALLS)
        await asyncio.to_thread(empty, cluster, leader, load.ledger)
        # The load writes far less than the quota from here to its end.
        await load.progress(CALLS)
        report("database full", *await end(load, stores), 1)


def write_fillings(member: etcd_cluster.Member, numbers: Iterator[int], size: float) -> None:
    """Write until the database has a size in bytes, or refuses to grow."""
    while int(member.call("maintenance/status")["dbSize"]) < size:
        member.call("kv/put", key=f"{next(numbers):04}".rjust(8, "A"), value=FILLING)


def empty(cluster: etcd_cluster.Cluster, member: etcd_cluster.Member, ledger: Ledger) -> None:
    """Compact, defragment and disarm the alarm, as an operator does, until calls succeed.

    Followers compact later than the leader, and a member that is still full when a request comes raises the
    alarm again.
    """
    acknowledged = ledger.acknowledged
    seen: list[object] = []

    def is_done() -> bool:
        sizes = [int(one.call("maintenance/status")["dbSize"]) for one in cluster.members]
        alarms = member.call("maintenance/alarm").get("alarms", [])
        seen[:] = [sizes, alarms]
        if max(sizes) > QUOTA / 2:
            for one in cluster.members:
                one.call("maintenance/defragment")
            return False
        for alarm in alarms:
            member.call("maintenance/alarm", action="DEACTIVATE", memberID=alarm["memberID"], alarm="NOSPACE")
        return not alarms and ledger.acknowledged > acknowledged

    member.call("kv/deleterange", key="AAAA", range_end="AQ==")
    revision = member.call("maintenance/status")["header"]["revision"]
    member.call("kv/compaction", revision=revision, physical=True)
    etcd_cluster.wait_for(is_done, lambda: f"calls succeed (sizes, alarms: {seen}; {ledger})")
