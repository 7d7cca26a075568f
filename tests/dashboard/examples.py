"""Runs that show every part of the dashboard: written through the store, as an engine would."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid5

from flowstore_core import FlowStore, RunStatus, StepRequest, StepStatus, new_claim_token
from tests.virtual_clock import VirtualClock

LEASE = timedelta(seconds=30)
ORDERS, IMPORT, INVOICES = (UUID(f"f10a0000-0000-4000-8000-00000000000{number}") for number in (1, 2, 3))
NAMES = {ORDERS: "orders", IMPORT: "nightly-import", INVOICES: "invoices"}
TIMEOUT_ERROR = "TimeoutError: POST /v1/charges took longer than 10 s\n  at charge (payments.py, line 88)"


@dataclass(frozen=True, slots=True)
class Examples:
    """The ids of the runs."""

    taken_over: UUID
    failed: UUID
    waiting: UUID
    running: UUID
    derived: UUID


class Writer:
    """Writes runs at a virtual time."""

    def __init__(self, store: FlowStore, clock: VirtualClock) -> None:
        self._store, self._clock = store, clock
        self._numbers = 0

    def new_id(self) -> UUID:
        """An id that is the same every time, so that screenshots do not change without a reason."""
        self._numbers += 1
        return uuid5(ORDERS, str(self._numbers))

    async def start(self, flow: UUID, trigger: str = "schedule", source: UUID | None = None) -> UUID:
        run_id = self.new_id()
        number = 1000 + self._numbers
        data = json.dumps({"order": number, "customer": "Ada Lovelace", "total": 129.9})
        await self._store.trigger_run(
            flow, NAMES[flow], run_id, trigger, trigger_data=data, source_run_id=source
        )
        return run_id

    async def begin(self, run_id: UUID, step: str, worker: str) -> int:
        """Dispatch, claim and start a step."""
        await self._store.try_record_dispatch(run_id, step, queue="default", step_type="task")
        self._clock.advance(seconds=0.4)
        token = new_claim_token()
        assert await self._store.try_claim_step(run_id, step, owner=token, lease=LEASE)
        return await self._store.record_step_start(
            run_id, step, "task", job_id=worker, owner=token, input_json='{"order": 1001}'
        )

    async def end(self, run_id: UUID, step: str, seconds: float, error: str | None = None) -> None:
        self._clock.advance(seconds=seconds)
        status = StepStatus.SUCCEEDED if error is None else StepStatus.FAILED
        output = json.dumps({"step": step, "rows": 1_284, "ok": True}) if error is None else None
        await self._store.record_step_complete(run_id, step, status, output_json=output, error_message=error)

    async def step(
        self, run_id: UUID, step: str, worker: str, seconds: float, error: str | None = None
    ) -> None:
        await self.begin(run_id, step, worker)
        await self.end(run_id, step, seconds, error)

    async def fail_once(
        self, run_id: UUID, step: str, worker: str, seconds: float, error: str, *, retry_after: float
    ) -> None:
        """An attempt that fails and is retried, by the engine's own decision."""
        attempt = await self.begin(run_id, step, worker)
        self._clock.advance(seconds=seconds)
        due = self._clock.now + timedelta(seconds=retry_after)
        await self._store.reschedule_step(run_id, step, attempt=attempt, error_message=error, due_at=due)
        self._clock.advance(seconds=retry_after)

    async def complete(self, run_id: UUID, status: RunStatus) -> None:
        await self._store.complete_run(run_id, status)


async def write_examples(store: FlowStore, clock: VirtualClock) -> Examples:
    """Write one run of each kind; the clock ends about a minute before the runs still in progress began."""
    write = Writer(store, clock)

    taken_over = await write.start(ORDERS, "web")
    await store.append_event(taken_over, "order.received", message="from the web shop")
    await write.step(taken_over, "reserve-stock", "worker-1 (host a)", 2.5)
    await write.begin(taken_over, "charge-card", "worker-2 (host b)")
    clock.advance(seconds=34)
    await write.step(taken_over, "charge-card", "worker-3 (host c)", 3.2)
    await write.step(taken_over, "send-receipt", "worker-1 (host a)", 1.1)
    await write.complete(taken_over, RunStatus.SUCCEEDED)

    clock.advance(minutes=5)
    failed = await write.start(ORDERS, "web")
    await write.step(failed, "reserve-stock", "worker-1 (host a)", 2.0)
    for pause in (4, 8):
        await write.fail_once(
            failed, "charge-card", "worker-3 (host c)", 10, TIMEOUT_ERROR, retry_after=pause
        )
    await write.step(failed, "charge-card", "worker-1 (host a)", 10, TIMEOUT_ERROR)
    await store.record_skipped_step(failed, "send-receipt", "task", "not run: charge-card is Failed")
    await write.complete(failed, RunStatus.FAILED)
    derived = await write.start(ORDERS, "manual", failed)
    await write.step(derived, "reserve-stock", "worker-1 (host a)", 2.0)
    await write.complete(derived, RunStatus.CANCELLED)

    clock.advance(minutes=5)
    waiting = await write.start(INVOICES, "web")
    await write.step(waiting, "draft", "worker-1 (host a)", 6)
    await store.register_waiter(waiting, "approve", "approval", expires_at=clock.now + timedelta(days=2))
    clock.advance(seconds=20)
    running = await write.start(IMPORT)
    await write.step(running, "download", "worker-2 (host b)", 12)
    await write.begin(running, "parse", "worker-2 (host b)")
    dispatch = [
        StepRequest(step_key=f"load-{table}", step_type="task", queue="bulk", due_at=due)
        for table, due in (("customers", None), ("orders", None), ("stock", clock.now + timedelta(hours=1)))
    ]
    for one in dispatch:
        await store.try_record_dispatch(
            running, one.step_key, queue=one.queue, step_type=one.step_type, due_at=one.due_at
        )
    return Examples(taken_over, failed, waiting, running, derived)


async def write_history(store: FlowStore, clock: VirtualClock, *, hours: int) -> None:
    """Write completed runs for some hours, most in the working day; the clock ends that much later."""
    chance = random.Random(7)
    write = Writer(store, clock)
    # Ids differ from those of the examples.
    write._numbers = 10_000
    end = clock.now + timedelta(hours=hours)
    while clock.now < end:
        flow = chance.choices([ORDERS, INVOICES, IMPORT], [6, 3, 1])[0]
        run_id = await write.start(flow, chance.choice(["web", "schedule", "web"]))
        worker = f"worker-{chance.randint(1, 3)} (host {chance.choice('abc')})"
        await write.step(run_id, "prepare", worker, chance.uniform(0.5, 4))
        step, error = "publish", None
        if chance.random() < 0.09:
            step, error = chance.choice(
                [
                    ("charge-card", "CardDeclined: the bank refused the card"),
                    ("charge-card", TIMEOUT_ERROR),
                    ("render-pdf", "MemoryError: page 14 of invoice"),
                ]
            )
        await write.step(run_id, step, worker, chance.lognormvariate(1.4, 0.7), error)
        cancelled = error is None and chance.random() < 0.04
        status = RunStatus.FAILED if error else RunStatus.CANCELLED if cancelled else RunStatus.SUCCEEDED
        await write.complete(run_id, status)
        busy = 1.0 if 7 <= clock.now.hour <= 18 else 0.35
        clock.advance(minutes=chance.expovariate(busy / 8))
    clock.now = end


async def write_long_run(store: FlowStore, clock: VirtualClock, *, steps: int) -> UUID:
    """Write a run of many steps on twelve workers, some of which fail once or are taken over."""
    chance = random.Random(11)
    write = Writer(store, clock)
    write._numbers = 20_000
    run_id = await write.start(IMPORT)
    start = clock.now
    free = [0.0] * 12
    for number in range(steps):
        worker = min(range(len(free)), key=free.__getitem__)
        clock.now = start + timedelta(seconds=free[worker])
        step, name = f"partition-{number:04}", f"worker-{worker + 1}"
        fate = chance.random()
        if fate < 0.03:
            seconds = chance.uniform(0.5, 3)
            await write.fail_once(
                run_id, step, name, seconds, "ConnectionResetError: peer closed", retry_after=2
            )
        elif fate < 0.04:
            await write.begin(run_id, step, name)
            clock.advance(seconds=31)
            name = f"worker-{(worker + 5) % 12 + 1}"
        await write.step(run_id, step, name, chance.lognormvariate(0.3, 0.6))
        free[worker] = (clock.now - start) / timedelta(seconds=1)
    clock.now = start + timedelta(seconds=max(free))
    await write.complete(run_id, RunStatus.SUCCEEDED)
    return run_id


def clock_before_now(**duration: float) -> VirtualClock:
    """A clock that starts some time before now, so that pages show recent runs."""
    return VirtualClock(datetime.now(UTC) - timedelta(**duration))
