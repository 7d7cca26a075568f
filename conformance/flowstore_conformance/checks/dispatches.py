"""CLM-1, CLM-3 and CLM-7 for the dispatch ledger; and what is given back of claims and dispatches (CON-4)."""

from __future__ import annotations

import asyncio
from uuid import UUID

from flowstore_conformance import observation
from flowstore_conformance.bench import Bench
from flowstore_conformance.checks.examples import example
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.checks.scenes import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    STEP_ENDS,
    another,
    expect_alike,
    has,
    later,
    look,
    new_id,
    now,
    only,
    run_step,
    start,
    the_run,
    the_step,
    told,
)
from flowstore_core import RunStatus, StepDispatch, StepStatus


@example("CLM-1")
async def one_dispatch_wins_until_it_is_released(bench: Bench) -> None:
    """try_record_dispatch is True once per key; losing is False, never an exception, and changes nothing."""
    store, run_id, other = bench.store, await start(bench), await start(bench)
    first = now(bench)
    answer = await told(store.try_record_dispatch(run_id, "b", due_at=first + MINUTE))
    bench.expect(answer, True, "dispatching a free key")
    second = later(bench, SECOND)
    bench.expect(await told(store.try_record_dispatch(run_id, "a")), True, "dispatching another free key")
    answer = await told(store.try_record_dispatch(other, "b"))
    bench.expect(answer, True, "dispatching the same key of another run")
    times = {"a": (second, None), "b": (first, first + MINUTE)}
    wanted = tuple(
        StepDispatch(run_id=run_id, step_key=key, dispatched_at=at, due_at=due, job_id=None)
        for key, (at, due) in times.items()
    )
    bench.expect(await store.get_dispatches(run_id), wanted, "get_dispatches by step_key")
    later(bench, HOUR)
    for due_at in (None, now(bench)):
        answer = await told(store.try_record_dispatch(run_id, "b", due_at=due_at))
        bench.expect(answer, False, "dispatching a key that is dispatched")
    bench.expect(await store.get_dispatches(run_id), wanted, "a losing dispatch changes nothing")
    bench.expect(await store.get_dispatched_step_keys(run_id), {"a", "b"}, "get_dispatched_step_keys")
    bench.expect(await store.get_step_statuses(run_id), {}, "a dispatched key is no step")
    bench.expect((await the_run(bench, run_id)).steps, (), "a dispatched key is in no detail")


@example("CLM-3")
async def releasing_a_dispatch_frees_that_key_alone(bench: Bench) -> None:
    """It is idempotent, keeps the claim, and the next dispatch is a new one, without the old job."""
    store, run_id, other = bench.store, await start(bench), await start(bench)
    for one, key in ((run_id, "a"), (run_id, "b"), (other, "a")):
        await store.try_record_dispatch(one, key, due_at=now(bench))
        await store.annotate_dispatch(one, key, "job")
    await store.try_claim_step(run_id, "a", owner="me")
    for again in ("", " again"):
        bench.expect(await told(store.release_dispatch(run_id, "a")), None, f"releasing a dispatch{again}")
        bench.expect(await store.get_dispatched_step_keys(run_id), {"b"}, f"the ledger afterwards{again}")
    bench.expect(await store.get_dispatched_step_keys(other), {"a"}, "the dispatch in another run")
    bench.expect(await store.get_claimed_step_keys(run_id), {"a"}, "releasing a dispatch keeps the claim")
    bench.expect(await told(store.try_record_dispatch(run_id, "a")), True, "dispatching a released key")
    fresh = [one for one in await store.get_dispatches(run_id) if one.step_key == "a"]
    dispatch = only(fresh, "the dispatch after one was released")
    has(bench, dispatch, "a dispatch after one was released is a new one", job_id=None, due_at=None)
    due = now(bench) + HOUR
    await store.release_dispatch(run_id, "a")
    await store.try_record_dispatch(run_id, "a", due_at=due)
    fresh = [one for one in await store.get_dispatches(run_id) if one.step_key == "a"]
    dispatch = only(fresh, "the third dispatch of a key")
    has(bench, dispatch, "a dispatch of a key that is claimed and was dispatched before", due_at=due)


@example("CLM-3")
async def the_ledger_keeps_dispatches_of_every_step(bench: Bench) -> None:
    """Starting, completing and skipping a step, and completing the run, keep its dispatch."""
    store, run_id = bench.store, await start(bench)
    keys = {*(status.value for status in STEP_ENDS), "running", "pending", "unstarted", "skipped"}
    for key in keys:
        await store.try_record_dispatch(run_id, key)
    for status in (*STEP_ENDS, StepStatus.PENDING):
        await run_step(bench, run_id, "pending" if status is StepStatus.PENDING else status, status)
    await store.record_step_start(run_id, "running", "http")
    await store.record_skipped_step(run_id, "skipped", "http")
    for how in ("that lie in the ledger", "that lie in the ledger of a terminal run"):
        bench.expect(await store.get_dispatched_step_keys(run_id), keys, f"the keys {how}")
        found = [dispatch.step_key for dispatch in await store.get_dispatches(run_id)]
        bench.expect(found, sorted(keys), f"the dispatches {how}")
        await store.complete_run(run_id, RunStatus.SUCCEEDED)


# CLM-7


@example("CLM-7")
async def annotating_stores_a_job_id_and_nothing_else(bench: Bench) -> None:
    """It changes job_id of an existing dispatch alone, makes none, and never raises for a missing one."""
    store, run_id, other = bench.store, await start(bench), await start(bench)
    due = now(bench) + DAY
    for one in (run_id, other):
        await store.try_record_dispatch(one, "charge", due_at=due)
        await store.record_step_start(one, "charge", "http", job_id="of the attempt")
    await store.try_claim_step(run_id, "claimed")
    await run_step(bench, run_id, "started")
    before, dispatch = await look(bench, run_id, other), only(await store.get_dispatches(run_id), "dispatch")
    later(bench, MINUTE)
    for key in ("claimed", "started", "unknown", "Charge"):
        call = store.annotate_dispatch(run_id, key, "job")
        bench.expect(await told(call), None, f"annotating a dispatch that is not there ({key})")
    bench.expect(await told(store.annotate_dispatch(new_id(bench), "charge", "job")), None, "unknown run")
    later(bench, -MINUTE)
    after = await look(bench, run_id, other)
    expect_alike(bench, after, before, "annotating what is not there makes nothing")
    await store.try_record_dispatch(run_id, "claimed")
    ledger = {each.step_key: each.job_id for each in await store.get_dispatches(run_id)}
    bench.expect(ledger["claimed"], None, "the job of a dispatch that was annotated before it was recorded")
    await store.release_dispatch(run_id, "claimed")
    for job_id in ("job 1", "job 2"):
        later(bench, MINUTE)
        await store.annotate_dispatch(run_id, "charge", job_id)
        found = only(await store.get_dispatches(run_id), "the dispatch that was annotated")
        kept = {"dispatched_at": dispatch.dispatched_at, "due_at": dispatch.due_at}
        has(bench, found, "annotating stores the job_id and nothing else", job_id=job_id, **kept)
    elsewhere = only(await store.get_dispatches(other), "the dispatch of another run")
    bench.expect(elsewhere.job_id, None, "annotating leaves the same key of another run alone")
    step = await the_step(bench, run_id)
    for record in (step, step.attempts[0]):
        bench.expect(record.job_id, "of the attempt", "an attempt's job is its own")
    bench.expect((await the_run(bench, run_id)).job_id, None, "the run's job is its own")


# CON-4


@check("CON-4", kind=Kind.CANCELLATION)
async def what_a_cancelled_call_gives_back_is_never_anothers(bench: Bench) -> None:
    """Of many that ask for one key, most cancelled meanwhile, whoever was told True holds it at the end."""
    stores = [bench.store, await another(bench)]
    run_id = await start(bench)
    for turn in range(bench.profile.of(2, 4, 20)):
        for ask, read in (
            ("try_claim_step", "get_claimed_step_keys"),
            ("try_record_dispatch", "get_dispatched_step_keys"),
        ):
            keys = [f"{turn} {number:02}" for number in range(8)] * 4
            bench.random.shuffle(keys)
            tasks = [
                asyncio.ensure_future(told(getattr(stores[number % 2], ask)(run_id, key)))
                for number, key in enumerate(keys)
            ]
            await asyncio.gather(*(_cancel_some(bench, task) for task in tasks))
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            won = sorted(key for key, answer in zip(keys, answers, strict=True) if answer is True)
            bench.expect(won, sorted(set(won)), f"the winners of {ask} beside calls that were cancelled")
            # Where one was told of an error, the key may be held or not.
            doubtful = {key for key, answer in zip(keys, answers, strict=True) if isinstance(answer, str)}
            left = await _left(bench, read, run_id, set(keys) - doubtful, set(won) - doubtful)
            sentence = f"{read}, of the keys that several asked for, once cancelled calls have given back"
            bench.expect(left, set(won) - doubtful, sentence)


async def _cancel_some(bench: Bench, task: asyncio.Future[object]) -> None:
    """Three of four, at different turns of the event loop, the first ones often before they begin."""
    turns = bench.random.choice((0, 0, 1, 2, 3, 5, 8, 13, 21, 34, 55))
    if bench.random.random() < 0.25:
        return
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()


async def _left(bench: Bench, read: str, run_id: UUID, asked: set[str], wanted: set[str]) -> set[str]:
    """Which of the keys are held, as soon as it is as wanted; bounded."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + observation.PATIENCE_SECONDS
    while True:
        held: frozenset[str] = await getattr(bench.store, read)(run_id)
        if held & asked == wanted or loop.time() > deadline:
            return set(held & asked)
        await asyncio.sleep(0.01)
