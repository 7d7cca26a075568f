"""CLM-6 in real time: leases under contention, without a virtual clock.

A stalled machine delays calls, but it cannot end a lease early. So the check compares only bounds that a
delay cannot falsify: a claim is granted between its call and its return, and after the call of any read that
still returned the previous claim.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_conformance.checks.fixtures import FLOW, new_id
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    ConfigurationError,
    FlowStore,
    OutcomeUnknownError,
    StepStatus,
    StoreUnavailableError,
    new_claim_token,
    open_store,
)

STORES = 3
CLAIMANTS = 6
TOLERANCE = 0.005
"""Seconds by which the clocks of the store and of this process may drift apart during a lease."""
FREE_SECONDS = 10.0
"""Time in which one of many claims wins a step that is free."""
MAX_REFUSED = 100
"""So many claims may be refused meanwhile: a stalled machine makes fewer calls."""
KEY = "hot"


@dataclass(frozen=True, slots=True)
class Win:
    """A successful claim; times are seconds of the monotonic clock."""

    owner: str
    called: float
    returned: float


class Contest:
    """Claimants that claim one step of a run again and again, each call under another owner."""

    def __init__(self, stores: Sequence[FlowStore], run_id: UUID, lease: float) -> None:
        self.run_id = run_id
        self.lease = lease
        self.wins: list[Win] = []
        self._refused = 0
        """Number of claims of the free step that lost since the last win."""
        self._stores = stores
        self._began = (time.monotonic(), datetime.now(UTC))

    async def claim(self, store: FlowStore) -> bool | None:
        """Claim the step under a new owner. None if the store refused the call because of the load."""
        owner, called = new_claim_token(), time.monotonic()
        lease = timedelta(seconds=self.lease)
        try:
            won = await store.try_claim_step(self.run_id, KEY, owner=owner, lease=lease)
        except OutcomeUnknownError as error:
            raise Inconclusive(f"a claim has an unknown outcome: {error}") from error
        except StoreUnavailableError:
            return None
        if won:
            self.wins.append(Win(owner, called, time.monotonic()))
            self._refused = 0
        return won

    async def run(self, wins: int, *, is_free: bool = True) -> None:
        """Let all claimants claim until there are so many wins, and challenge each win at once.

        ``is_free`` is whether nobody else claims the step.
        """

        async def compete(store: FlowStore) -> None:
            while len(self.wins) < wins:
                if await self.claim(store) is False and is_free:
                    self._expect_a_win()
                await asyncio.sleep(0)

        rivals = [self._stores[number % len(self._stores)] for number in range(CLAIMANTS)]
        await asyncio.gather(*(compete(store) for store in rivals))

    def _expect_a_win(self) -> None:
        """Called after a lost claim."""
        free_since = self.wins[-1].returned + self.lease if self.wins else self._began[0]
        seconds = time.monotonic() - free_since
        self._refused += seconds > 0
        if seconds > FREE_SECONDS and self._refused > MAX_REFUSED and not self._clock_was_set():
            what = "the last lease ended" if self.wins else "the run started"
            raise ContractViolation(
                f"{self._refused} claims have lost since {what}, {seconds:.0f} s ago: expected one to win"
            )

    def check(self, context: CheckContext, *, not_before: float = 0.0) -> None:
        """Expect that the leases of all wins fit one after another into the time between their calls.

        No claim was granted before ``not_before``.
        """
        if self._clock_was_set():
            return
        wins = [Win(win.owner, max(win.called, not_before), win.returned) for win in self.wins]
        for first in wins:
            for last in wins:
                inside = [win for win in wins if win.called >= first.called and win.returned <= last.returned]
                if len(inside) < 2:
                    continue
                context.assertions += 1
                available = last.returned - first.called
                # All leases but the last one end before the last claim is granted.
                if available < (len(inside) - 1) * self.lease - TOLERANCE:
                    raise ContractViolation(
                        f"{len(inside)} owners won one claim with a lease of {self.lease * 1000:.0f} ms "
                        f"within {available * 1000:.0f} ms, so a lease ended early: expires_at must be the "
                        "time at which the claim was granted plus the lease, from a clock that is read after "
                        "the call has waited for locks, connections and other callers"
                    )

    async def check_end(self, context: CheckContext) -> None:
        """Expect that the claim is free when the lease of the last win has ended."""
        end = max(win.returned for win in self.wins) + self.lease + TOLERANCE
        await asyncio.sleep(max(0.0, end - time.monotonic()))
        while (won := await self.claim(self._stores[0])) is None:
            pass
        context.assertions += 1
        if not won and not self._clock_was_set():
            raise ContractViolation(
                f"claiming {self.lease * 1000:.0f} ms after the last successful claim with such a lease had "
                "returned: expected True, got False, so a lease ends later than promised"
            )

    def _clock_was_set(self) -> bool:
        """Whether the machine's clock was set since the contest began."""
        monotonic, wall = self._began
        elapsed = (datetime.now(UTC) - wall).total_seconds()
        return abs(elapsed - (time.monotonic() - monotonic)) > TOLERANCE


@asynccontextmanager
async def _real_time_stores(context: CheckContext) -> AsyncIterator[list[FlowStore]]:
    """Open several stores on their own clock in a new namespace; one if the backend admits no more."""
    async with context.backend.scratch(context.base_url) as url, AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_store(url))]
        while len(stores) < STORES:
            try:
                stores.append(await stack.enter_async_context(open_store(url)))
            except (ConfigurationError, StoreUnavailableError):
                break
        yield stores


@check("CLM-6", "CLM-1", kind=Kind.RACE)
async def leases_last_as_promised_under_contention(context: CheckContext) -> None:
    """A lease begins when the claim is granted, after every wait, and no rival wins before it ends."""
    of = context.profile.of
    async with _real_time_stores(context) as stores:
        for lease in (0.004, 0.02)[: of(1, 2, 2)] * of(1, 2, 10):
            run_id = new_id(context)
            await stores[0].start_run(FLOW, "orders", run_id, "manual")
            contest = Contest(stores, run_id, lease)
            await contest.run(of(6, 16, 40))
            contest.check(context)
            await contest.check_end(context)
        for _ in range(of(1, 3, 20)):
            await _wait_for_a_large_write(context, stores)


async def _wait_for_a_large_write(context: CheckContext, stores: Sequence[FlowStore]) -> None:
    """Let claimants wait for a retry that removes the claim of the holder and moves a large output."""
    store, run_id = stores[0], new_id(context)
    await store.start_run(FLOW, "orders", run_id, "manual")
    size = context.text_size(context.profile.of(2, 8, 8) * 2**20)
    output = context.random.randbytes(size // 2).hex()
    await store.try_claim_step(run_id, KEY, owner="holder")
    await store.record_step_start(run_id, KEY, "http", owner="holder")
    await store.record_step_complete(run_id, KEY, StepStatus.PENDING, output_json=output)
    contest = Contest(stores[1:] or stores, run_id, context.profile.of(100, 300, 300) / 1000)
    held = time.monotonic()

    async def watch() -> None:
        """Find the last time at which the holder certainly had the claim."""
        nonlocal held
        while True:
            called = time.monotonic()
            if "holder" not in [claim.owner for claim in await stores[-1].get_step_claims(run_id)]:
                return
            held = called
            await asyncio.sleep(0)

    await asyncio.gather(store.retry_step(run_id, KEY), watch(), contest.run(2, is_free=False))
    contest.check(context, not_before=held)
    await contest.check_end(context)
