"""QUE-1, QUE-2, QUE-5, QUE-7, QUE-8: queued steps, their order, and the statistics of queues."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_RUN_STATUSES,
    TERMINAL_STEP_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_fields,
    get_step,
    now,
    observe,
    run_step,
    single,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_core import (
    Capability,
    ClaimedStep,
    ClaimLostError,
    QueueStatistics,
    RunStatus,
    StaleAttemptError,
    StepClaim,
    StepStatus,
)
from flowstore_core.steps import superseded_by

CLOCK = [Capability.VIRTUAL_CLOCK]


def new_queue(context: CheckContext) -> str:
    """The name of a queue that no other example uses."""
    return f"queue {context.random.getrandbits(64):x}"


async def enqueue(context: CheckContext, run_id: UUID, queue: str, *step_keys: str, **more: Any) -> None:
    """Dispatch steps to a queue."""
    for step_key in step_keys:
        given = {"queue": queue, "step_type": "http", **more}
        answer = await context.store.try_record_dispatch(run_id, step_key, **given)
        context.expect(answer, True, f"dispatching {step_key!r}, which has no dispatch, to a queue")


async def claim_all(context: CheckContext, *queues: str, **more: Any) -> Sequence[ClaimedStep]:
    given = {"lease": MINUTE, "limit": 1000, **more}
    return await context.store.claim_next_steps(queues, **given)


async def claim_one(context: CheckContext, queue: str, **more: Any) -> ClaimedStep:
    """Claim the only ready step of a queue."""
    return single(await claim_all(context, queue, **more), "the steps claimed in a queue with one ready step")


async def expect_claimed(context: CheckContext, queue: str, wanted: Sequence[str], sentence: str) -> None:
    """Claim every ready step of a queue and compare the keys."""
    found = [step.step_key for step in await claim_all(context, queue)]
    context.expect(sorted(found), sorted(wanted), sentence)


# QUE-1


@example("QUE-1")
async def a_claimed_step_shows_its_run_its_dispatch_and_its_claim(context: CheckContext) -> None:
    """Every field of a ClaimedStep; the claim and the open attempt are stored with it."""
    store, queue = context.store, new_queue(context)
    run_id = await start(context, flow_name="invoices")
    due = now(context) - HOUR
    more: dict[str, Any] = {"priority": 4, "step_type": "mail", "input_json": '{"to": 1}', "due_at": due}
    await enqueue(context, run_id, queue, "charge", **more)
    dispatch = single(await store.get_dispatches(run_id), "the dispatch")
    step = await claim_one(context, queue, lease=HOUR, worker="worker 7")
    claim = single(await store.get_step_claims(run_id), "the claim of claim_next_steps")
    shown = {
        "run_id": run_id,
        "flow_id": FLOW,
        "flow_name": "invoices",
        "step_key": "charge",
        "step_type": "mail",
        "input_json": '{"to": 1}',
        "attempt": 1,
        "queue": queue,
        "priority": 4,
        "dispatched_at": dispatch.dispatched_at,
        "due_at": due,
        "expires_at": step.claimed_at + HOUR,
        "cancel_requested": False,
    }
    expect_fields(context, step, "the step that claim_next_steps returned", **shown)
    stored = StepClaim(
        run_id=run_id,
        step_key="charge",
        owner=step.owner,
        claimed_at=step.claimed_at,
        expires_at=step.expires_at,
    )
    context.expect(claim, stored, "the stored claim of a step that claim_next_steps returned")
    attempt = single((await get_step(context, run_id)).attempts, "the attempt that claim_next_steps opened")
    opened: dict[str, Any] = {"attempt": 1, "status": StepStatus.RUNNING, "step_type": "mail"}
    opened |= {"input_json": '{"to": 1}', "job_id": "worker 7", "output_json": None, "completed_at": None}
    expect_fields(context, attempt, "the attempt that claim_next_steps opened", **opened)
    kept = single(await store.get_dispatches(run_id), "the dispatch of a claimed step")
    context.expect(kept, dispatch, "the dispatch of a claimed step, which stays")


@example("QUE-1")
async def owners_are_new_and_workers_optional(context: CheckContext) -> None:
    """Each claim has an owner of its own; an attempt has a job_id and an input only if they were given."""
    store, queue = context.store, new_queue(context)
    runs = [await start(context) for _ in range(3)]
    for run_id in runs:
        await enqueue(context, run_id, queue, "a", "b")
    claimed = [*await claim_all(context, queue)]
    for step in claimed:
        await store.release_step_claim(step.run_id, step.step_key, owner=step.owner)
    claimed += await claim_all(context, queue)
    context.expect(len(claimed), 12, "the steps claimed twice, after their claims were released")
    owners = {step.owner for step in claimed}
    context.expect(len(owners), 12, "the number of different owners of 12 claims")
    started = await get_step(context, runs[0], "a")
    expect_fields(context, started, "a step claimed without worker and input", job_id=None, input_json=None)


@example("QUE-1", needs=CLOCK)
async def only_ready_steps_are_claimed(context: CheckContext) -> None:
    """Neither a dispatch without queue, nor a held, waiting, scheduled or finished step, nor an ended run."""
    store, queue, at = context.store, new_queue(context), now(context)
    run_id = await start(context)
    ready = ("fresh", "due", "delivered", "expired", "wait is over", "lease ended", "open", "polled")
    held = ("leased", "held", "waiting", "waiting until later", "held and waiting")
    await enqueue(context, run_id, queue, *ready, *held)
    await enqueue(context, run_id, queue, "later", due_at=at + TICK + SECOND)
    await enqueue(context, run_id, f"{queue} ", "other queue")
    await store.try_record_dispatch(run_id, "no queue")
    await store.record_step_start(run_id, "no dispatch", "http")
    await store.try_claim_step(run_id, "lease ended", owner="o", lease=SECOND)
    await store.try_claim_step(run_id, "leased", owner="o", lease=SECOND + TICK)
    for key in ("held", "held and waiting"):
        await store.try_claim_step(run_id, key, owner="o")
    await store.register_waiter(run_id, "waiting", "go")
    await store.register_waiter(run_id, "waiting until later", "go", expires_at=at + SECOND + TICK)
    await store.register_waiter(run_id, "held and waiting", "go", expires_at=at)
    await store.register_waiter(run_id, "delivered", "came")
    await store.deliver_signal(run_id, "came", "{}")
    await store.register_waiter(run_id, "wait is over", "go", expires_at=at + SECOND)
    await store.register_waiter(run_id, "expired", "go", expires_at=at)
    await store.expire_waiter(run_id, "expired")
    await store.record_step_start(run_id, "open", "by hand")
    await run_step(context, run_id, "polled", StepStatus.PENDING)
    for status in TERMINAL_STEP_STATUSES:
        await enqueue(context, run_id, queue, f"is {status}")
        await run_step(context, run_id, f"is {status}", status)
    for end in TERMINAL_RUN_STATUSES:
        ended = await start(context)
        await enqueue(context, ended, queue, f"in a {end} run")
        await store.complete_run(ended, end)
    advance(context, SECOND)
    await expect_claimed(context, queue, ready, "the ready steps of a queue")
    await expect_claimed(context, queue, (), "the ready steps of a queue whose ready steps are claimed")
    attempts = (await get_step(context, run_id, "open")).attempts
    shown = [(each.step_type, each.status, each.error_message) for each in attempts]
    wanted = [("by hand", StepStatus.FAILED, superseded_by(2)), ("http", StepStatus.RUNNING, None)]
    context.expect(shown, wanted, "the attempts of a step whose open attempt no claim protected")
    context.expect((await get_step(context, run_id, "polled")).attempt_count, 2, "attempts of a polled step")


@example("QUE-1", needs=CLOCK)
async def a_step_is_ready_at_the_latest_of_its_times(context: CheckContext) -> None:
    """It is ready at the latest of due time, end of the lease and end of the wait, and not a tick before."""
    store = context.store
    for latest in ("due_at", "lease", "waiter"):
        queue, run_id, at = new_queue(context), await start(context), now(context)
        ends = {name: HOUR if name == latest else MINUTE for name in ("due_at", "lease", "waiter")}
        await enqueue(context, run_id, queue, "charge", due_at=at + ends["due_at"])
        await store.try_claim_step(run_id, "charge", owner="o", lease=ends["lease"])
        await store.register_waiter(run_id, "charge", "go", expires_at=at + ends["waiter"])
        advance(context, HOUR - TICK)
        await expect_claimed(context, queue, (), f"a tick before the time of the {latest}")
        advance(context, TICK)
        step = await claim_one(context, queue)
        context.expect(step.claimed_at, at + HOUR, f"a step at the latest of its times, that of the {latest}")


@example("QUE-1")
async def the_claim_is_an_ordinary_one(context: CheckContext) -> None:
    """Its owner starts, renews and releases it as after try_claim_step; nobody else gets the step."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "charge")
    step = await claim_one(context, queue, lease=HOUR)
    number = await store.record_step_start(run_id, "charge", "other", job_id="J", owner=step.owner)
    context.expect(number, 1, "record_step_start by the owner of the claim, whose attempt is open")
    answer = await store.try_claim_step(run_id, "charge", owner="other")
    context.expect(answer, False, "try_claim_step of a step that claim_next_steps claimed")
    answer = await store.try_claim_step(run_id, "charge", owner=step.owner)
    context.expect(answer, True, "try_claim_step by the owner that claim_next_steps returned")
    call = store.record_step_start(run_id, "charge", "http", owner="other")
    await context.expect_error(call, ClaimLostError, "record_step_start by another owner")
    renewed = await store.renew_step_claim(run_id, "charge", step.owner, DAY)
    context.expect(renewed, True, "renewing the claim of claim_next_steps")
    context.expect(await store.get_claimed_step_keys(run_id), {"charge"}, "the keys that are claimed")
    await expect_claimed(context, queue, (), "the ready steps while the only one is claimed")
    await store.release_step_claim(run_id, "charge", owner="other")
    await expect_claimed(context, queue, (), "the ready steps after a release by another owner")
    await store.release_step_claim(run_id, "charge", owner=step.owner)
    again = await claim_one(context, queue)
    context.expect(again.attempt, 2, "the attempt of a step that was released and claimed again")


@example("QUE-1")
async def a_hand_made_claim_takes_a_queued_step(context: CheckContext) -> None:
    """try_claim_step wins a queued step as any other; then claim_next_steps passes over it."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "a", "b", "c")
    await store.try_claim_step(run_id, "a", owner="me")
    await store.try_claim_step(run_id, "b", owner="me", lease=HOUR)
    await expect_claimed(context, queue, ["c"], "the ready steps beside two that try_claim_step has taken")


@example("QUE-1", needs=CLOCK)
async def a_claim_protects_a_step_until_its_lease_ends(context: CheckContext) -> None:
    """Then the next caller gets the step and the next attempt; the old worker changes nothing any more."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "charge")
    first = await claim_one(context, queue, lease=MINUTE)
    advance(context, MINUTE - TICK)
    await expect_claimed(context, queue, (), "the ready steps a tick before the end of the lease")
    advance(context, TICK)
    second = await claim_one(context, queue, lease=MINUTE)
    context.expect(second.attempt, 2, "the attempt of a step whose lease had ended")
    context.expect_that(second.owner != first.owner, "a claim after the end of a lease has a new owner")
    attempts = (await get_step(context, run_id)).attempts
    shown = [(each.status, each.error_message) for each in attempts]
    wanted = [(StepStatus.FAILED, superseded_by(2)), (StepStatus.RUNNING, None)]
    context.expect(shown, wanted, "the attempts of a step whose lease had ended")
    before = await observe(context, run_id)
    succeeded = StepStatus.SUCCEEDED
    late = store.advance_run(run_id, "charge", succeeded, attempt=first.attempt, owner=first.owner)
    await context.expect_error(late, StaleAttemptError, "advance_run by a worker whose lease has ended")
    late = store.advance_run(run_id, "charge", succeeded, attempt=second.attempt, owner=first.owner)
    await context.expect_error(late, ClaimLostError, "advance_run by another owner than the attempt's")
    assert_same(context, await observe(context, run_id), before, "a worker whose lease has ended")


@example("QUE-1", needs=CLOCK)
async def latches_and_deadlines_do_not_hide_steps(context: CheckContext) -> None:
    """Compensations must run: steps of cancelled and timed-out runs are claimed; cancel_requested tells."""
    store, queue, at = context.store, new_queue(context), now(context)
    runs = {name: await start(context) for name in ("plain", "cancelled", "timed out", "late")}
    for name, run_id in runs.items():
        await enqueue(context, run_id, queue, name)
    await store.configure_run(runs["late"], FLOW, "manual", timeout_at=at - HOUR)
    await store.configure_run(runs["timed out"], FLOW, "manual", timeout_at=at - HOUR)
    await store.mark_timed_out(runs["timed out"], as_of=at)
    await store.request_cancel(runs["cancelled"], "enough")
    found = {step.step_key: step.cancel_requested for step in await claim_all(context, queue)}
    wanted = {"plain": False, "cancelled": True, "timed out": True, "late": False}
    context.expect(found, wanted, "cancel_requested of the claimed steps")


# QUE-2


@example("QUE-2", needs=CLOCK)
async def steps_come_by_priority_time_run_and_key(context: CheckContext) -> None:
    """Priority (higher first), ready_at, run_id and step_key by code point, across all named queues."""
    one, other, at = new_queue(context), new_queue(context), now(context)
    low, high = sorted(UUID(int=context.random.getrandbits(127)) for _ in range(2))
    for run_id in (high, low):
        await start(context, run_id=run_id)
    # Priority, ready_at before now, run, key, queue: in the wanted order.
    wanted = [
        (9, MINUTE, high, "b", one),
        (9, TICK, low, "z", other),
        (3, HOUR, high, "early", other),
        (3, MINUTE, low, "Z", one),
        (3, MINUTE, low, "a", other),
        (3, MINUTE, low, "\u00e9", one),
        (3, MINUTE, low, "\uffff", other),
        (3, MINUTE, low, "\U0001f600", one),
        (3, MINUTE, high, "A", one),
        (3, MINUTE - TICK, low, "0", one),
        (0, DAY, low, "oldest", one),
        (0, HOUR, low, "old", other),
    ]
    for priority, ago, run_id, key, queue in context.random.sample(wanted, len(wanted)):
        await enqueue(context, run_id, queue, key, priority=priority, due_at=at - ago)
    await enqueue(context, low, one, "later", priority=9, due_at=at + TICK)
    order = [(run_id, key) for _, _, run_id, key, _ in wanted]
    for limit in (1, 2, 5, 1000):
        claimed: list[ClaimedStep] = []
        while found := await claim_all(context, one, other, limit=limit):
            context.expect_that(len(found) <= limit, f"claim_next_steps with limit={limit} returns no more")
            claimed += found
        keys = [(step.run_id, step.step_key) for step in claimed]
        context.expect(keys, order, f"the order of the steps of two queues, claimed with limit={limit}")
        for step in claimed:
            # A released step has the ready_at that it had before.
            await context.store.release_step_claim(step.run_id, step.step_key)


@example("QUE-2", needs=CLOCK)
async def ready_at_orders_also_by_leases_and_waits(context: CheckContext) -> None:
    """A step whose lease or wait ended later comes later, although it was dispatched earlier."""
    store, queue, at = context.store, new_queue(context), now(context)
    run_id = await start(context)
    for key in ("lease", "wait", "due"):
        await enqueue(context, run_id, queue, key, due_at=at - DAY)
    await store.try_claim_step(run_id, "lease", owner="o", lease=2 * MINUTE)
    await store.register_waiter(run_id, "wait", "go", expires_at=at + MINUTE)
    await enqueue(context, run_id, queue, "late", due_at=at + MINUTE + TICK)
    advance(context, HOUR)
    found = [step.step_key for step in await claim_all(context, queue)]
    context.expect(found, ["due", "wait", "late", "lease"], "the order of steps whose leases and waits ended")


@example("QUE-2", needs=CLOCK)
async def a_ready_step_is_found_among_many_sleepers(context: CheckContext) -> None:
    """Steps that are due later, of every priority, hide none that is ready."""
    queue, at, limit = new_queue(context), now(context), context.profile.of(120, 600, 3000)
    run_id = await start(context)
    sleepers = [f"sleeper {number}" for number in range(limit)]
    for number, key in enumerate(sleepers):
        await enqueue(context, run_id, queue, key, priority=number % 10, due_at=at + HOUR + number * TICK)
    await expect_claimed(context, queue, (), "the ready steps of a queue of sleepers")
    await enqueue(context, run_id, queue, "low", priority=0)
    await enqueue(context, run_id, queue, "middle", priority=5)
    found = [step.step_key for step in await claim_all(context, queue, limit=2)]
    context.expect(found, ["middle", "low"], "the ready steps among many that are due later")


# QUE-5

Change = Callable[[], Awaitable[object]]


@example("QUE-5", needs=CLOCK)
async def every_change_takes_effect_at_once(context: CheckContext) -> None:
    """Whichever operation changes the state, the next claim of the queue goes by the new state."""
    store, at = context.store, now(context)

    async def expect(changes: Sequence[tuple[str, bool, Change]]) -> None:
        """Make the changes one after another; after each, is the step ready?"""
        for sentence, ready, change in changes:
            await change()
            found = await claim_all(context, queue)
            context.expect(len(found), int(ready), f"the ready steps after {sentence}")
            for step in found:
                await store.release_step_claim(step.run_id, step.step_key)

    run_id, key, queue = await start(context), "charge", new_queue(context)
    other = f"{queue}/2"
    dispatch: dict[str, Any] = {"queue": queue, "step_type": "http"}
    await expect(
        [
            ("a dispatch", True, lambda: store.try_record_dispatch(run_id, key, **dispatch)),
            ("its release", False, lambda: store.release_dispatch(run_id, key)),
            (
                "a dispatch to another queue",
                False,
                lambda: store.try_record_dispatch(run_id, key, queue=other, step_type="http"),
            ),
            ("a redispatch to this queue", True, lambda: store.redispatch_step(run_id, key, queue=queue)),
            ("a redispatch for later", False, lambda: store.redispatch_step(run_id, key, due_at=at + HOUR)),
            ("a redispatch for now", True, lambda: store.redispatch_step(run_id, key, due_at=at)),
            ("a redispatch with priority", True, lambda: store.redispatch_step(run_id, key, priority=9)),
            ("a claim by hand", False, lambda: store.try_claim_step(run_id, key, owner="o")),
            ("its release", True, lambda: store.release_step_claim(run_id, key, owner="o")),
            ("registering a waiter", False, lambda: store.register_waiter(run_id, key, "go")),
            ("removing it", True, lambda: store.remove_waiter(run_id, key)),
            ("registering another", False, lambda: store.register_waiter(run_id, key, "go")),
            ("a new end", True, lambda: store.register_waiter(run_id, key, "go", expires_at=at)),
            ("a later end", False, lambda: store.register_waiter(run_id, key, "go", expires_at=at + HOUR)),
            ("a delivery", True, lambda: store.deliver_signal(run_id, "go", "{}")),
            ("a start by hand", True, lambda: store.record_step_start(run_id, key, "http")),
            ("an outcome Pending", True, lambda: _end(context, run_id, key, StepStatus.PENDING)),
            ("an outcome Failed", False, lambda: _end(context, run_id, key, StepStatus.FAILED)),
            ("a start of the failed step", True, lambda: store.record_step_start(run_id, key, "http")),
            ("another outcome Failed", False, lambda: _end(context, run_id, key, StepStatus.FAILED)),
            ("retry_step, which drops the dispatch", False, lambda: store.retry_step(run_id, key)),
            ("a new dispatch", True, lambda: store.try_record_dispatch(run_id, key, **dispatch)),
            ("a reschedule", False, lambda: _reschedule(context, run_id, key, at + HOUR)),
            ("a redispatch for now", True, lambda: store.redispatch_step(run_id, key, due_at=at)),
            ("the end of the run", False, lambda: store.complete_run(run_id, RunStatus.FAILED)),
        ]
    )


async def _end(context: CheckContext, run_id: UUID, key: str, status: StepStatus) -> None:
    """Start an attempt and end it."""
    number = await context.store.record_step_start(run_id, key, "http")
    await context.store.record_step_complete(run_id, key, status, attempt=number)


async def _reschedule(context: CheckContext, run_id: UUID, key: str, due_at: Any) -> None:
    number = await context.store.record_step_start(run_id, key, "http")
    await context.store.reschedule_step(run_id, key, attempt=number, due_at=due_at)


@example("QUE-5", needs=CLOCK)
async def time_alone_makes_a_step_ready(context: CheckContext) -> None:
    """Also if the time was set after the dispatch: by a lease, its renewal, a waiter, or a redispatch."""
    store, at = context.store, now(context)

    async def lease(run_id: UUID) -> None:
        await store.try_claim_step(run_id, "charge", owner="o", lease=MINUTE)

    async def renewal(run_id: UUID) -> None:
        await lease(run_id)
        await store.renew_step_claim(run_id, "charge", "o", HOUR)

    async def waiter(run_id: UUID) -> None:
        await store.register_waiter(run_id, "charge", "go", expires_at=at + HOUR)

    async def redispatch(run_id: UUID) -> None:
        await store.redispatch_step(run_id, "charge", due_at=at + HOUR)

    for change, span in ((lease, MINUTE), (renewal, HOUR), (waiter, HOUR), (redispatch, HOUR)):
        for is_read_before in (False, True):
            queue, run_id = new_queue(context), await start(context)
            await enqueue(context, run_id, queue, "charge", due_at=at - DAY)
            await change(run_id)
            name = change.__name__
            if is_read_before:
                await expect_claimed(context, queue, (), f"the ready steps before the end of the {name}")
            advance(context, span - TICK)
            if is_read_before:
                await expect_claimed(context, queue, (), f"the ready steps a tick before that of the {name}")
            advance(context, TICK)
            await expect_claimed(context, queue, ["charge"], f"the ready steps at the end of the {name}")
            advance(context, -span)


@example("QUE-5")
async def a_reopened_run_brings_back_its_queued_steps(context: CheckContext) -> None:
    """All of them, not only the step that retry_step names; the dispatch of that one is gone."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "failed", "waiting for it", "opened", "leased")
    await run_step(context, run_id, "failed", StepStatus.FAILED)
    await store.record_step_start(run_id, "opened", "http")
    await store.try_claim_step(run_id, "leased", owner="o", lease=HOUR)
    await store.complete_run(run_id, RunStatus.FAILED)
    await expect_claimed(context, queue, (), "the ready steps of a failed run")
    await store.release_step_claim(run_id, "leased")
    await expect_claimed(context, queue, (), "the ready steps of a failed run")
    await store.retry_step(run_id, "failed")
    wanted = ["leased", "opened", "waiting for it"]
    await expect_claimed(context, queue, wanted, "the ready steps of a run that retry_step has reopened")


@example("QUE-5", needs=CLOCK)
async def nothing_is_left_of_a_deleted_run(context: CheckContext) -> None:
    """A run with the id of a deleted one has none of its queued steps, and rejects its owners."""
    async with context.new_namespace() as alone:
        store, queue, run_id = alone.store, new_queue(context), await start(alone)
        await enqueue(alone, run_id, queue, "charge", "ship")
        old = single(await store.claim_next_steps([queue], lease=HOUR), "the claimed step")
        await store.complete_run(run_id, RunStatus.CANCELLED)
        advance(alone, DAY)
        context.expect(await store.cleanup(now(alone)), 1, "the number of deleted runs")
        context.expect(await store.get_queues(), (), "the queues after all runs were deleted")
        await start(alone, run_id=run_id)
        await expect_claimed(alone, queue, (), "the ready steps of a run with the id of a deleted one")
        await enqueue(alone, run_id, queue, old.step_key)
        new = await claim_one(alone, queue)
        context.expect(new.attempt, old.attempt, "the first attempt of a run with the id of a deleted one")
        late = store.advance_run(
            run_id, old.step_key, StepStatus.SUCCEEDED, attempt=old.attempt, owner=old.owner
        )
        sentence = "advance_run by an owner of the deleted run, with the number of the new attempt"
        await context.expect_error(late, ClaimLostError, sentence)
        await store.advance_run(
            run_id, new.step_key, StepStatus.SUCCEEDED, attempt=new.attempt, owner=new.owner
        )


# QUE-7


@example("QUE-7")
async def a_dispatch_keeps_its_queue(context: CheckContext) -> None:
    """A second dispatch changes nothing; neither do an annotation, a claim, a start and a completion."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    due = now(context) + HOUR
    given: dict[str, Any] = {"priority": 9, "step_type": "mail", "input_json": "", "due_at": due}
    await enqueue(context, run_id, queue, "charge", **given)
    first = single(await store.get_dispatches(run_id), "the dispatch")
    expect_fields(context, first, "a dispatch to a queue", queue=queue, job_id=None, **given)
    for more in ({}, {"queue": "other", "step_type": "other", "priority": 1}, {"due_at": now(context)}):
        again: dict[str, Any] = more
        answer = await store.try_record_dispatch(run_id, "charge", **again)
        context.expect(answer, False, "a second dispatch of a step")
        kept = single(await store.get_dispatches(run_id), "the dispatch after a second one")
        context.expect(kept, first, "the dispatch after a second one was refused")
    await store.annotate_dispatch(run_id, "charge", "J1")
    await store.try_claim_step(run_id, "charge", owner="o")
    await store.record_step_start(run_id, "charge", "by hand", input_json="{}", owner="o")
    await store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED)
    kept = single(await store.get_dispatches(run_id), "the dispatch of a finished step")
    context.expect(kept, replace(first, job_id="J1"), "the dispatch after an attempt by hand")


@example("QUE-7")
async def a_dispatch_without_queue_names_none(context: CheckContext) -> None:
    """queue, step_type and input_json are None, priority is 0; a release forgets those of the old one."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    none: dict[str, Any] = {"queue": None, "priority": 0, "step_type": None, "input_json": None}
    await store.try_record_dispatch(run_id, "plain")
    plain = single(await store.get_dispatches(run_id), "the dispatch")
    expect_fields(context, plain, "a dispatch without queue", **none)
    await store.release_dispatch(run_id, "plain")
    await enqueue(context, run_id, queue, "plain", priority=9, input_json="{}")
    await store.release_dispatch(run_id, "plain")
    await store.try_record_dispatch(run_id, "plain")
    plain = single(await store.get_dispatches(run_id), "the dispatch")
    expect_fields(context, plain, "a dispatch without queue after one with a queue was released", **none)
    await store.release_dispatch(run_id, "plain")
    await enqueue(context, run_id, queue, "plain")
    queued = single(await store.get_dispatches(run_id), "the dispatch")
    wanted = {**none, "queue": queue, "step_type": "http"}
    expect_fields(context, queued, "a dispatch after one with priority and input was released", **wanted)


@example("QUE-7", needs=CLOCK)
async def redispatch_replaces_the_dispatch(context: CheckContext) -> None:
    """The new one has dispatched_at now and job_id None; None keeps a value, also that of due_at."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    due = now(context) + HOUR
    await enqueue(context, run_id, queue, "charge", priority=3, input_json="{ }", due_at=due)
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"priority": 0},
        {"queue": f"{queue}/2"},
        {"due_at": due - MINUTE},
        {"queue": queue, "priority": 9, "due_at": due + MINUTE},
    )
    for change in changes:
        await store.annotate_dispatch(run_id, "charge", "J1")
        old = single(await store.get_dispatches(run_id), "the dispatch")
        at = advance(context, SECOND)
        answer = await store.redispatch_step(run_id, "charge", **change)
        context.expect(answer, True, f"redispatch_step with {sorted(change)}")
        new = single(await store.get_dispatches(run_id), "the dispatch")
        wanted = replace(old, dispatched_at=at, job_id=None, **change)
        context.expect(new, wanted, f"the dispatch after redispatch_step with {sorted(change)}")


@example("QUE-7", needs=CLOCK)
async def redispatch_is_refused_where_nothing_is_queued_or_free(context: CheckContext) -> None:
    """False, and nothing changes; a claim whose lease has ended does not count."""
    store, queue, run_id = context.store, new_queue(context), await start(context)
    await enqueue(context, run_id, queue, "held", "leased", "ended", "running", "free", "open")
    await store.try_claim_step(run_id, "held", owner="o")
    await store.try_claim_step(run_id, "leased", owner="o", lease=MINUTE)
    await store.try_claim_step(run_id, "ended", owner="o", lease=SECOND)
    await store.try_claim_step(run_id, "running", owner="o")
    await store.record_step_start(run_id, "running", "http", owner="o")
    await store.record_step_start(run_id, "open", "http")
    for status in TERMINAL_STEP_STATUSES:
        await enqueue(context, run_id, queue, status)
        await run_step(context, run_id, status, status)
    await store.try_record_dispatch(run_id, "no queue")
    await store.record_step_start(run_id, "no dispatch", "http")
    advance(context, SECOND)
    refused = ("held", "leased", "running", *TERMINAL_STEP_STATUSES, "no queue", "no dispatch", "unknown")
    before = await observe(context, run_id)
    for key in refused:
        answer = await store.redispatch_step(run_id, key, queue="other", priority=9, due_at=now(context))
        context.expect(answer, False, f"redispatch_step of a step that is not queued or not free ({key})")
    assert_same(context, await observe(context, run_id), before, "a refused redispatch_step")
    for key in ("ended", "free", "open"):
        answer = await store.redispatch_step(run_id, key, priority=9)
        context.expect(answer, True, f"redispatch_step of a queued step without live claim ({key})")
    await store.complete_run(run_id, RunStatus.FAILED)
    before = await observe(context, run_id)
    answer = await store.redispatch_step(run_id, "free", priority=1)
    context.expect(answer, False, "redispatch_step on a terminal run")
    assert_same(context, await observe(context, run_id), before, "redispatch_step on a terminal run")


# QUE-8


@example("QUE-8", needs=CLOCK)
async def each_queued_step_counts_once(context: CheckContext) -> None:
    """As running, waiting, scheduled or ready, in this order; finished steps and ended runs do not count."""
    async with context.new_namespace() as alone:
        store, at = alone.store, now(alone)
        context.expect(await store.get_queues(), (), "get_queues without runs")
        run_id, ended = await start(alone), await start(alone)
        one, other, third = "mail", "Mail", "\u00e9mail"
        running = ("claimed", "claimed and waiting", "claimed and late")
        waiting = ("waiting", "waiting until later", "waiting and late")
        scheduled = ("lease ended, but late", "wait over, but late")
        ready = ("ready", "lease ended", "wait over", "expired", "open")
        await enqueue(alone, run_id, one, *running[:2], *waiting[:2], *ready)
        await enqueue(alone, run_id, one, running[2], waiting[2], *scheduled, due_at=at + HOUR)
        for key in running:
            await store.try_claim_step(run_id, key, owner="o", lease=MINUTE)
        for key in ("lease ended", "lease ended, but late"):
            await store.try_claim_step(run_id, key, owner="o", lease=SECOND)
        for key in ("claimed and waiting", "waiting", "waiting and late"):
            await store.register_waiter(run_id, key, "go")
        await store.register_waiter(run_id, "waiting until later", "go", expires_at=at + HOUR)
        for key in ("wait over", "wait over, but late", "expired"):
            await store.register_waiter(run_id, key, "go", expires_at=at + SECOND)
        await store.record_step_start(run_id, "open", "http")
        await enqueue(alone, run_id, other, "z", due_at=at + DAY)
        await enqueue(alone, run_id, third, "oldest", due_at=at - DAY)
        await enqueue(alone, run_id, third, "older", due_at=at - HOUR)
        await enqueue(alone, run_id, "finished", *TERMINAL_STEP_STATUSES)
        for status in TERMINAL_STEP_STATUSES:
            await run_step(alone, run_id, status, status)
        await enqueue(alone, ended, "ended", "a")
        await store.complete_run(ended, RunStatus.SUCCEEDED)
        await store.try_record_dispatch(run_id, "no queue")
        advance(alone, SECOND)
        await store.expire_waiter(run_id, "expired")
        none: dict[str, Any] = dict.fromkeys(("ready", "scheduled", "waiting", "running"), 0)
        none["oldest_ready_at"] = None
        counted: dict[str, Any] = {"ready": 5, "scheduled": 2, "waiting": 3, "running": 3}
        counted["oldest_ready_at"] = at
        wanted = (
            QueueStatistics(queue=other, **{**none, "scheduled": 1}),
            QueueStatistics(queue=one, **counted),
            QueueStatistics(queue=third, **{**none, "ready": 2, "oldest_ready_at": at - DAY}),
        )
        context.expect(await store.get_queues(), wanted, "the statistics of the queues")
        taken = await claim_all(alone, one, third)
        context.expect(len(taken), 7, "the number of ready steps that claim_next_steps finds")
        after = {each.queue: (each.ready, each.running) for each in await store.get_queues()}
        context.expect(
            after, {other: (0, 0), one: (0, 8), third: (0, 2)}, "ready and running after the claims"
        )


@example("INP-4", needs=[Capability.QUEUES])
async def limits_of_queues_are_inclusive(context: CheckContext) -> None:
    """Names, numbers and collections of queues at their limits are accepted; a duplicate name counts once."""
    store, run_id = context.store, await start(context)
    long, astral = "q" * 256, "\U0001f600" * (context.limits.key_bytes // 4)
    await enqueue(context, run_id, long, "a", priority=9, input_json="x")
    await enqueue(context, run_id, astral, "b", priority=0)
    names = [f"queue {number}" for number in range(98)]
    queues = [long, *names, astral, long, *names]
    found = await store.claim_next_steps(queues, lease=366 * DAY, limit=1000, worker="w" * 1024)
    context.expect([step.step_key for step in found], ["a", "b"], "the steps of two of 100 queues")
    empty = await store.claim_next_steps({"no such queue"}, lease=TICK, limit=1)
    context.expect(empty, (), "the steps of a queue that nothing was dispatched to")
