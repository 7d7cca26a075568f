"""CLK: processes whose clocks are wrong go by the clock of the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import FLOW, HOUR, MINUTE, expect_present, new_id, single, start
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.diffing import brief
from flowstore_conformance.history import Call, Raised, Returned
from flowstore_conformance.races import Race
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.worker_pool import ProcessRunner, Unavailable, open_skewed_process
from flowstore_core import Capability, FlowStore, RunStatus

SHORT = timedelta(milliseconds=20)
"""A lease whose end the check waits for."""
ENDED_SECONDS = 30.0
"""Time in which a process must see the end of a short lease."""
TICK_SECONDS = 0.05


class _OtherProcess:
    """A process with a wrong clock. Its calls raise Unavailable where the clause allows it."""

    def __init__(self, runner: ProcessRunner, name: str) -> None:
        self._runner = runner
        self.name = name

    async def call(self, method: str, **arguments: Any) -> Any:
        (run,) = await self._runner.run(
            [Race(setup=(), clients=((Call(method=method, arguments=arguments),),), final=())]
        )
        if run.unavailable:
            raise Unavailable
        outcome = run.history.operations[0].outcome
        if isinstance(outcome, Returned):
            return outcome.value
        if isinstance(outcome, Raised):
            raise ContractViolation(f"{method} in {self.name}: expected no error, got {outcome.error}")
        raise Inconclusive(f"{method} in {self.name} has an unknown outcome")


@check("CLK-1", needs=[Capability.MULTI_PROCESS], kind=Kind.RACE)
async def processes_with_wrong_clocks_go_by_the_stores_clock(context: CheckContext) -> None:
    """Leases, due times, deadlines and timestamps agree in processes whose clocks are hours apart."""
    store = await context.open(clock=None)
    skew = max(6 * HOUR, 10 * expect_present(store.max_skew, "max_skew of a store with SHARED_CLOCK"))
    # A store may need other callers to notice that one clock is wrong.
    async with _calling(store, await start(context)):
        for by in context.random.sample((skew, -skew), context.profile.of(1, 2, 2)):
            run_id = new_id(context)
            await store.start_run(FLOW, "clocks", run_id, "manual")
            if Capability.LEASES in context.capabilities:
                await store.try_claim_step(run_id, "live", owner="me", lease=skew / 2)
            ahead = "ahead" if by > timedelta(0) else "behind"
            name = f"a process whose clock is {abs(by) // MINUTE:,} minutes {ahead}"
            try:
                async with open_skewed_process(context, by) as runner:
                    await _expect_one_clock(context, store, _OtherProcess(runner, name), run_id, skew / 2)
                context.notes.append(f"{name} went by the clock of the store")
            except Unavailable:
                context.notes.append(f"{name} got StoreUnavailableError")
            status = await store.get_run_status(run_id)
            context.expect(status, RunStatus.RUNNING, "the status of a run that another process has used")
            await _expect_live(context, store, run_id)


@asynccontextmanager
async def _calling(store: FlowStore, run_id: UUID) -> AsyncIterator[None]:
    """Let a store read its clock again and again."""

    async def keep_calling() -> None:
        while True:
            await store.try_claim_step(run_id, "tick")
            await store.release_step_claim(run_id, "tick")
            await asyncio.sleep(TICK_SECONDS)

    calling = asyncio.ensure_future(keep_calling())
    try:
        yield
    finally:
        calling.cancel()
        with suppress(asyncio.CancelledError):
            await calling


async def _expect_live(context: CheckContext, store: FlowStore, run_id: UUID) -> None:
    """Expect that a long lease has not ended, whatever another process believes."""
    if Capability.LEASES in context.capabilities:
        won = await store.try_claim_step(run_id, "live", owner="rival", lease=MINUTE)
        context.expect(won, False, "a claim on a step whose lease ends in hours")


async def _expect_one_clock(
    context: CheckContext, store: FlowStore, other: _OtherProcess, run_id: UUID, later: timedelta
) -> None:
    """Expect that the other process and this one agree on what has passed; ``later`` is in the future."""
    theirs = new_id(context)
    before = await _read_clock(context, store)
    await other.call("start_run", flow_id=FLOW, flow_name="clocks", run_id=theirs, trigger_key="manual")
    after = await _read_clock(context, store)
    started = expect_present(await store.get_run(theirs), "a run of another process").started_at
    context.expect_that(
        before <= started <= after,
        f"the start of a run in {other.name}: expected between {before} and {after}, got {started}",
    )
    await _expect_same_due_times(context, store, other, run_id, after, later)
    if Capability.LEASES in context.capabilities:
        await _expect_same_leases(context, store, other, run_id, later)


async def _read_clock(context: CheckContext, store: FlowStore) -> datetime:
    run = await store.start_run(FLOW, "clocks", new_id(context), "manual")
    return run.started_at


async def _expect_same_leases(
    context: CheckContext, store: FlowStore, other: _OtherProcess, run_id: UUID, later: timedelta
) -> None:
    claimed = await other.call("get_claimed_step_keys", run_id=run_id)
    context.expect_that("live" in claimed, f"a lease that ends in hours, seen by {other.name}, is live")
    won = await other.call("try_claim_step", run_id=run_id, step_key="live", owner="thief", lease=MINUTE)
    context.expect(won, False, f"a claim by {other.name} on a step whose lease ends in hours")

    # Ended for this process, so ended for the other.
    await store.try_claim_step(run_id, "ours", owner="me", lease=SHORT)
    await _wait_for_end(lambda: store.get_claimed_step_keys(run_id), "ours")
    claimed = await other.call("get_claimed_step_keys", run_id=run_id)
    context.expect_that(
        "ours" not in claimed, f"a lease whose end this process saw has ended for {other.name}"
    )
    renewed = await other.call("renew_step_claim", run_id=run_id, step_key="ours", owner="me", lease=MINUTE)
    context.expect(renewed, False, f"renewing in {other.name} a lease whose end this process saw")
    given = {"run_id": run_id, "step_key": "ours", "owner": "other", "lease": later}
    context.expect(await other.call("try_claim_step", **given), True, f"its next claim, by {other.name}")
    claim = single(
        [one for one in await store.get_step_claims(run_id) if one.step_key == "ours"], "the claim"
    )
    end = expect_present(claim.expires_at, "the end of its lease")
    context.expect(end - claim.claimed_at, later, f"the lease of a claim by {other.name}")
    at = await _read_clock(context, store)
    context.expect_that(
        at - MINUTE < claim.claimed_at <= at,
        f"the time of a claim by {other.name}: got {claim.claimed_at} at {at}",
    )

    # And the other way round.
    await other.call("try_claim_step", run_id=run_id, step_key="theirs", owner="other", lease=SHORT)
    await _wait_for_end(lambda: other.call("get_claimed_step_keys", run_id=run_id), "theirs")
    renewed = await store.renew_step_claim(run_id, "theirs", "other", MINUTE)
    context.expect(renewed, False, f"renewing a lease whose end {other.name} saw")
    won = await store.try_claim_step(run_id, "theirs", owner="me", lease=MINUTE)
    context.expect(won, True, f"claiming a step whose lease has ended for {other.name}")


async def _wait_for_end(read: Callable[[], Awaitable[Any]], key: str) -> None:
    end = time.monotonic() + ENDED_SECONDS
    while time.monotonic() < end:
        if key not in await read():
            return
        await asyncio.sleep(0.005)
    lease = SHORT.total_seconds() * 1000
    raise ContractViolation(f"a lease of {lease:.0f} ms has not ended after {ENDED_SECONDS:.0f} s")


async def _expect_same_due_times(
    context: CheckContext,
    store: FlowStore,
    other: _OtherProcess,
    run_id: UUID,
    passed: datetime,
    later: timedelta,
) -> None:
    """Compare times that have passed, and times that have not, in both processes."""
    await store.try_record_dispatch(run_id, "is due", due_at=passed)
    await store.try_record_dispatch(run_id, "comes later", due_at=passed + later)
    await store.register_waiter(run_id, "has waited", "go", expires_at=passed)
    await store.register_waiter(run_id, "still waits", "go", expires_at=passed + later)
    if Capability.RECOVERY in context.capabilities:
        await _expect_listed(context, other, "get_stalled_steps", "is due", "comes later")
    if Capability.WAITERS in context.capabilities:
        for key, is_over in (("has waited", True), ("still waits", False)):
            await other.call("expire_waiter", run_id=run_id, step_key=key)
            waiter = expect_present(await store.get_waiter(run_id, key), "a waiter")
            sentence = f"expire_waiter in {other.name} of a step that {key}: whether it expired"
            context.expect(waiter.expired_at is not None, is_over, sentence)
    if Capability.DEADLINES in context.capabilities:
        late, early = new_id(context), new_id(context)
        for id_, at in ((late, passed), (early, passed + later)):
            await store.start_run(FLOW, "clocks", id_, "manual")
            await store.configure_run(id_, FLOW, "manual", timeout_at=at)
        await _expect_listed(context, other, "get_runs_to_stop", str(late), str(early))
        for id_ in (late, early):
            await store.complete_run(id_, "Cancelled")
    if Capability.QUEUES in context.capabilities:
        queue = f"queue of {run_id}"
        for key, due_at in (("is ready", passed), ("gets ready later", passed + later)):
            await store.try_record_dispatch(run_id, key, queue=queue, step_type="http", due_at=due_at)
        await other.call("claim_next_steps", queues=[queue], lease=later, limit=10)
        taken = {claim.step_key for claim in await store.get_step_claims(run_id)}
        context.expect_that("is ready" in taken, f"claim_next_steps in {other.name} takes a step that is due")
        context.expect_that(
            "gets ready later" not in taken,
            f"claim_next_steps in {other.name} takes no step that is due later",
        )


async def _expect_listed(
    context: CheckContext, other: _OtherProcess, method: str, present: str, absent: str
) -> None:
    """Expect that a list of the other process names what is due, and not what comes later."""
    listed = repr(await other.call(method, take=context.page_size))
    context.expect_that(
        present in listed, f"{method} in {other.name}: expected {present!r} in {brief(listed)}"
    )
    context.expect_that(absent not in listed, f"{method} in {other.name} lists {absent!r}, hours too early")
