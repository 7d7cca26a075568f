"""A run of 20 steps whose store loses its leader half-way: ``python survive_a_killed_leader.py URL``.

It asks every member who leads, and kills that etcd process on this machine (kill -9) after the tenth step.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from uuid import UUID

from flowstore_etcd.connection import Connection
from flowstore_etcd.settings import read_settings

from flowstore import RunStatus, StepStatus, new_run_id, open_store
from flowstore_core import StoreConfig

STEPS = 20


async def find_leader(url: str) -> str:
    """The address of the leader."""
    config = StoreConfig.from_url(url)
    connection = Connection(read_settings(config))
    statuses = await connection.statuses()
    await connection.aclose()
    (leader,) = (
        address
        for address, status in statuses.items()
        if not isinstance(status, str) and status.leader == status.header.member_id
    )
    return leader


def kill(address: str) -> None:
    """Kill the etcd process of this machine that listens there."""
    processes = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    option = rf"--listen-client-urls[= ]http://{re.escape(address)}\b"
    found = re.search(rf"^ *(\d+) .*{option}", processes, re.MULTILINE)
    if found is None:
        sys.exit(f"no process was started with --listen-client-urls http://{address}")
    os.kill(int(found[1]), signal.SIGKILL)


async def main(url: str) -> None:
    run_id = new_run_id()
    slowest = 0.0
    async with open_store(url) as store:
        await store.start_run(UUID(int=1), "orders", run_id, "manual")
        for number in range(STEPS):
            if number == STEPS // 2:
                leader = await find_leader(url)
                await asyncio.to_thread(kill, leader)
                print(f"killed the leader, {leader}")
            began, step = time.perf_counter(), f"step {number:02}"
            assert await store.try_claim_step(run_id, step, owner="me")
            await store.record_step_start(run_id, step, "work")
            await store.record_step_complete(run_id, step, StepStatus.SUCCEEDED)
            slowest = max(slowest, time.perf_counter() - began)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        found = await store.get_run_detail(run_id)
    assert found is not None
    done = sum(step.status is StepStatus.SUCCEEDED and len(step.attempts) == 1 for step in found.steps)
    print(f"{found.status}: {done} of {STEPS} steps done, each once; the slowest took {slowest:.1f} s")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
