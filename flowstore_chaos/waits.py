"""Calls of wait_for_steps that are timed, for scenarios about hints."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from flowstore_chaos.counts import Counts
from flowstore_chaos.server import Server
from flowstore_core import FlowStore, RunStatus, StepStatus

WAITERS = 4
TIMEOUT_SECONDS = 1.0
RETURN_SECONDS = 60.0
"""The time after which a call that should have returned counts as hung; generous, for a slow machine."""
LEASE = timedelta(hours=1)
APPLICATION = "chaos-waits"
"""The application_name of the store that waits."""
START_SECONDS = 60.0
"""The time in which the listener connects."""
_LISTENER = (
    f"SELECT pid FROM pg_stat_activity WHERE application_name = '{APPLICATION}' AND query LIKE 'LISTEN %'"
)


class NoFinalReadMutant:
    """A store whose waits return False at the time-out without reading the store once more."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def wait_for_steps(self, queues: Sequence[str], *, timeout: timedelta) -> bool:
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                return await self._store.wait_for_steps(queues, timeout=timedelta(hours=1))
        except TimeoutError:
            return False


@dataclass(frozen=True, slots=True)
class Wait:
    """A call of wait_for_steps that has returned."""

    found: bool
    started_at: float
    """On the monotonic clock, as the others."""
    ended_at: float
    deadline: float
    """The earliest end of its time-out."""

    @property
    def seconds(self) -> float:
        return self.ended_at - self.started_at


def start_waits(store: Any, queue: str, seconds: float) -> list[asyncio.Task[Wait]]:
    """Start WAITERS concurrent calls with a time-out of ``seconds``."""

    async def wait() -> Wait:
        started_at = time.monotonic()
        found = await store.wait_for_steps([queue], timeout=timedelta(seconds=seconds))
        return Wait(found, started_at, time.monotonic(), started_at + seconds)

    return [asyncio.create_task(wait()) for _ in range(WAITERS)]


async def finish_waits(counts: Counts, waits: Sequence[asyncio.Task[Wait]], what: str) -> list[Wait]:
    """The calls that have returned. A call that does not return counts as wrong, and is cancelled."""
    returned, late = await asyncio.wait(waits, timeout=RETURN_SECONDS)
    for call in late:
        counts.count_wrong(f"{what}: a wait did not return within {RETURN_SECONDS:.0f} s")
        call.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    counts.operations += len(returned)
    return [call.result() for call in returned]


def verify_found(counts: Counts, ended: Sequence[Wait], committed_at: float, what: str) -> None:
    """Each call whose time-out came after the commit of a step found it, by a hint or then."""
    for wait in ended:
        if not wait.found and committed_at < wait.deadline:
            counts.count_wrong(f"{what}: a wait returned False although a step was ready")


def note_longest(counts: Counts, detail: str, seconds: Iterable[float]) -> None:
    longest = max([float(counts.details.get(detail, 0)), *seconds])
    counts.details[detail] = round(longest, 2)


async def expect_one_step(counts: Counts, store: FlowStore, queue: str, what: str) -> None:
    """The queue has exactly one ready step; execute it."""
    claimed = await store.claim_next_steps([queue], lease=LEASE, limit=10)
    counts.operations += 1
    if not claimed:
        counts.count_lost(f"{what}: the step that was committed is not handed out")
    for _ in claimed[1:]:
        counts.count_duplicate(f"{what}: one step was committed, {len(claimed)} were handed out")
    for step in claimed:
        await store.advance_run(
            step.run_id,
            step.step_key,
            StepStatus.SUCCEEDED,
            attempt=step.attempt,
            owner=step.owner,
            complete_as=RunStatus.SUCCEEDED,
        )


async def find_listener(server: Server, earlier: str = "") -> str:
    """The process id of the session that listens for the waiting store, once it is not ``earlier``."""
    async with asyncio.timeout(START_SECONDS):
        while True:
            found = (await server.psql(_LISTENER)).split()
            if found and found[0] != earlier:
                return found[0]
            await asyncio.sleep(0.02)
