"""Queues under concurrency: workers that run whole runs, runs that end, and claims that are cancelled."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from uuid import UUID

from flowstore_conformance import state_probe
from flowstore_conformance.checks.advances import request
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    advance,
    get_run,
    new_id,
    now,
    outcome_of,
    second_store,
    start,
)
from flowstore_conformance.checks.queues import enqueue, expect_claimed, new_queue
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    ClaimedStep,
    EndedStep,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunAdvance,
    RunStatus,
    StepRequest,
    StepStatus,
    StoreUnavailableError,
)

SUCCEEDED, FAILED, SKIPPED = StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED
MAX_ROUNDS = 200
"""How often all workers may find nothing, far more than the runs need."""


def _plan(width: int, queue: str) -> Sequence[StepRequest]:
    """A fan-out from ``first`` to a number of parts, and steps that wait for all of them."""
    parts = [f"part {number}" for number in range(width)]
    return (
        *(request(part, "first", queue=queue, priority=number % 3) for number, part in enumerate(parts)),
        request("join", *parts, queue=queue, priority=5),
        request("after join", "join", queue=queue),
        request("cleanup", *parts, queue=queue, accept=(SUCCEEDED, FAILED, SKIPPED)),
    )


@dataclass
class _Workload:
    """Workers that claim steps and advance their runs until nothing is left."""

    context: CheckContext
    queue: str
    plan: Sequence[StepRequest]
    failing: dict[UUID, str] = field(default_factory=dict)
    """The part that fails in some of the runs."""
    claimed: Counter[tuple[UUID, str, int]] = field(default_factory=Counter)
    abandoned: Counter[tuple[UUID, str]] = field(default_factory=Counter)
    dispatched: Counter[tuple[UUID, str]] = field(default_factory=Counter)
    completed: Counter[UUID] = field(default_factory=Counter)

    async def work(self, store: FlowStore) -> None:
        """Claim and advance until nothing is ready."""
        random = self.context.random
        while True:
            limit = random.choice((1, 1, 2, 5, 20))
            try:
                steps = await store.claim_next_steps([self.queue], lease=MINUTE, limit=limit)
            except (StoreUnavailableError, OutcomeUnknownError) as error:
                # Its claims, if any, end only with their leases.
                raise Inconclusive("claim_next_steps was unavailable") from error
            if not steps:
                return
            ended = [end for step in steps if (end := await self._run(step)) is not None]
            if random.random() < 0.3:
                self._count(ended, await store.advance_runs(ended))
                continue
            for step in ended:
                arguments = {each.name: getattr(step, each.name) for each in fields(step)}
                self._count([step], [await store.advance_run(**arguments)])

    def _count(self, steps: Sequence[EndedStep], results: Sequence[RunAdvance | FlowStoreError]) -> None:
        for step, done in zip(steps, results, strict=True):
            if isinstance(done, FlowStoreError):
                raise done
            self.dispatched.update((step.run_id, key) for key in done.dispatched)
            self.completed[step.run_id] += done.run_completed

    async def _run(self, step: ClaimedStep) -> EndedStep | None:
        """The end of a claimed step; None if its worker dies."""
        name = step.run_id, step.step_key
        self.claimed[(*name, step.attempt)] += 1
        # As if the worker died. Without a virtual clock the lease would have to be waited for.
        if self.context.clock is not None and not self.abandoned[name] and self.context.random.random() < 0.1:
            self.abandoned[name] += 1
            return None
        for _ in range(self.context.random.choice((0, 0, 1, 3))):
            await asyncio.sleep(0)
        status = FAILED if self.failing.get(step.run_id) == step.step_key else SUCCEEDED
        others = [each for each in self.plan if each.step_key != step.step_key]
        return EndedStep(
            run_id=step.run_id,
            step_key=step.step_key,
            status=status,
            attempt=step.attempt,
            owner=step.owner,
            dispatch=others,
            complete_as=RunStatus.SUCCEEDED,
        )


@check("QUE-6", "QUE-4", "QUE-1", "QUE-2", kind=Kind.RACE)
async def workers_finish_every_run(context: CheckContext) -> None:
    """Workers that claim and advance on several stores end every run; each step runs once, none is lost."""
    store, queue = context.store, new_queue(context)
    stores = await context.workers(3)
    workload = _Workload(context, queue, _plan(context.profile.of(3, 6, 12), queue))
    runs = [new_id(context) for _ in range(context.profile.of(6, 24, 200))]
    for run_id in runs:
        if context.random.random() < 0.4:
            workload.failing[run_id] = "part 1"
        first = [request("first", queue=queue)]
        await store.trigger_run(FLOW, "orders", run_id, "manual", dispatch=first)
    active = set(runs)
    for _ in range(MAX_ROUNDS):
        await asyncio.gather(*(workload.work(one) for one in stores * 2))
        active = {run.run_id for run in await store.get_active_runs()} & set(runs)
        if not active:
            break
        if not await _more_is_ready(context, workload):
            sentence = f"{len(active)} of {len(runs)} runs are Running, and nothing in them is ready"
            shown = [dict(await store.get_step_statuses(run_id)) for run_id in sorted(active)[:1]]
            raise ContractViolation(
                f"{sentence}, although every advance had complete_as; the steps of one: {shown[0]}. "
                "Advances of one run must be serial, and the last must find every other step ended"
            )
    context.expect(len(active), 0, "the runs that workers leave Running")
    await _expect_finished(context, workload, runs)


async def _more_is_ready(context: CheckContext, workload: _Workload) -> bool:
    """Whether a step is ready while no call is in flight, now or after the leases of dead workers."""
    before = workload.claimed.total()
    for span in (0 * HOUR, HOUR):
        advance(context, span)
        await workload.work(context.store)
        if workload.claimed.total() > before:
            return True
    return False


async def _expect_finished(context: CheckContext, workload: _Workload, runs: Sequence[UUID]) -> None:
    """Every step ran once, apart from abandoned attempts; every request was settled once."""
    twice = [name for name, count in workload.claimed.items() if count > 1]
    if twice:
        sentence = f"attempt {twice[0][2]} of step {twice[0][1]!r} was claimed by two calls"
        raise ContractViolation(sentence, clause="QUE-1")
    for run_id in runs:
        fails = run_id in workload.failing
        detail = await get_run(context, run_id)
        wanted_end = RunStatus.FAILED if fails else RunStatus.SUCCEEDED
        context.expect(detail.status, wanted_end, "the status of a run that workers finished")
        context.expect(workload.completed[run_id], 1, "the number of advances that completed a run")
        keys = ["first", *(each.step_key for each in workload.plan)]
        wanted = dict.fromkeys(keys, SUCCEEDED)
        if fails:
            wanted |= {"part 1": FAILED, "join": SKIPPED, "after join": SKIPPED}
        found = {step.step_key: step.status for step in detail.steps}
        context.expect(found, wanted, "the statuses of the steps of a run that workers finished")
        for step in detail.steps:
            count = 1 + workload.abandoned[run_id, step.step_key]
            sentence = f"the attempts of step {step.step_key!r}, whose workers died {count - 1} times"
            context.expect(step.attempt_count, count, sentence)
            if step.step_key != "first":
                dispatches = int(step.status is not SKIPPED)
                settled = workload.dispatched[run_id, step.step_key]
                context.expect(settled, dispatches, f"how often step {step.step_key!r} was dispatched")


# QUE-5 and QUE-8


@check("QUE-5", "QUE-8", "STP-8", kind=Kind.RACE, rotation="rivals of an end")
async def a_run_that_ends_beside_other_calls_leaves_the_queues(context: CheckContext) -> None:
    """No step of an ended run is counted in a queue, claimed or stalled, whatever ran beside the end."""
    store, other, queue = context.store, await second_store(context), new_queue(context)
    runs = [new_id(context) for _ in range(context.profile.of(18, 90, 600))]
    for number, run_id in enumerate(runs):
        dispatch = [request("queued", queue=queue), request("not queued")]
        await store.trigger_run(FLOW, "orders", run_id, "manual", dispatch=dispatch)
        (step,) = await store.claim_next_steps([queue], lease=HOUR, limit=1)
        await store.try_start_step(run_id, "not queued", "http", owner="me", lease=HOUR)
        beside: Sequence[Callable[[], Awaitable[object]]] = (
            partial(other.renew_step_claim, run_id, "queued", step.owner, DAY),
            partial(other.renew_step_claim, run_id, "not queued", "me", DAY),
            partial(other.annotate_dispatch, run_id, "queued", "job"),
            partial(other.release_step_claim, run_id, "not queued"),
            partial(other.record_step_complete, run_id, "queued", StepStatus.PENDING),
            partial(other.try_record_dispatch, run_id, "another", queue=queue, step_type="http"),
        )
        expected = await store.get_step_statuses(run_id) if context.random.random() < 0.5 else None
        calls = [
            store.complete_run(run_id, RunStatus.FAILED, expected=expected),
            outcome_of(beside[number % len(beside)]()),
        ]
        context.random.shuffle(calls)
        await asyncio.gather(*calls)
        # Unless it has ended: the other call may have come first.
        await store.complete_run(run_id, RunStatus.FAILED)
    of = f"after the ends of all {len(runs)} runs"
    context.expect(await store.get_queues(), (), f"get_queues {of}", clause="QUE-8")
    if Capability.RECOVERY in context.capabilities:
        stalled = await store.get_stalled_steps(as_of=now(context) + 2 * DAY)
        context.expect(stalled, (), f"get_stalled_steps {of}", clause="STP-8")
    if context.clock is not None:
        advance(context, 2 * DAY)
    await expect_claimed(context, queue, [], f"the steps claimed {of}")


# QUE-3


@check("QUE-3", kind=Kind.CANCELLATION)
async def a_cancelled_claim_gives_its_steps_back(context: CheckContext) -> None:
    """Claims cancelled at any time leave each step with one caller or ready; their attempts end Pending."""
    rounds = context.profile.of(4, 15, 100)
    took_effect = False
    for _ in range(rounds):
        queue, runs = new_queue(context), [await start(context) for _ in range(2)]
        for run_id in runs:
            await enqueue(context, run_id, queue, "a", "b", "c", "d")
        kept = await _cancel_some(context, queue)
        names = {(run_id, key) for run_id in runs for key in ("a", "b", "c", "d")}
        free = names - {(step.run_id, step.step_key) for step in kept}
        given_back = await _claim_given_back(context, queue, free)
        for step in given_back:
            detail = await get_run(context, step.run_id)
            attempts = next(each for each in detail.steps if each.step_key == step.step_key).attempts
            took_effect |= len(attempts) > 1
            ends = {attempt.status for attempt in attempts[:-1]}
            sentence = "the ends of the attempts of cancelled calls"
            context.expect(ends - {StepStatus.PENDING}, set(), f"{sentence}: statuses other than Pending")
            context.expect(step.attempt, len(attempts), "the attempt of a step that was given back")
    if not took_effect:
        context.notes.append("no cancelled claim_next_steps had claimed a step")


async def _cancel_some(context: CheckContext, queue: str) -> list[ClaimedStep]:
    """Make several claims at once and cancel most of them; return the steps of those that returned."""
    calls = [
        asyncio.ensure_future(context.store.claim_next_steps([queue], lease=HOUR, limit=limit))
        for limit in (3, 2, 4, 1)
    ]
    for call in calls[:3]:
        for _ in range(context.random.choice((0, 1, 1, 2, 3, 5, 8, 20))):
            await asyncio.sleep(0)
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    kept = [step for result in results if not isinstance(result, BaseException) for step in result]
    names = {(step.run_id, step.step_key) for step in kept}
    context.expect(len(names), len(kept), "the number of different steps that concurrent calls returned")
    return kept


async def _claim_given_back(
    context: CheckContext, queue: str, free: set[tuple[UUID, str]]
) -> list[ClaimedStep]:
    """Claim until every free step came once; a cancelled call may give its steps back a little later."""
    deadline = asyncio.get_running_loop().time() + state_probe.SETTLE_SECONDS
    found: list[ClaimedStep] = []
    while True:
        found += await context.store.claim_next_steps([queue], lease=HOUR, limit=1000)
        names = Counter((step.run_id, step.step_key) for step in found)
        twice = [key for (_, key), count in names.items() if count > 1]
        context.expect(twice, [], "the steps that were claimed twice after cancelled calls")
        surplus = sorted(key for _, key in names.keys() - free)
        context.expect(surplus, [], "the steps that were claimed although a call had returned them")
        if names.keys() == free:
            return found
        if asyncio.get_running_loop().time() > deadline:
            missing = sorted(key for _, key in free - names.keys())
            raise ContractViolation(
                f"{len(missing)} of 8 steps did not become ready again after claim_next_steps was cancelled: "
                f"{', '.join(missing)}. A cancelled call releases its claims"
            )
        await asyncio.sleep(0.01)
