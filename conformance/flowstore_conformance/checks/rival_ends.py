"""CON-1 and RET-1: ends and deletions of many runs at once, beside single calls that need the runs.

A store that ends or deletes runs in batches holds each of them for as long as the batch takes. Single calls
of another store on these runs, one after another, meet that time, while concurrent ones would be batched too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    advance,
    new_id,
    outcome_of,
    require_clock,
    second_store,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, FlowStore, RunStatus, StepStatus

Rival = Callable[[FlowStore, UUID], Awaitable[object]]

RIVALS: dict[str, Rival] = {
    "try_claim_step": lambda store, run_id: store.try_claim_step(run_id, "b"),
    "try_record_dispatch": lambda store, run_id: store.try_record_dispatch(run_id, "b"),
    "record_step_start": lambda store, run_id: store.record_step_start(run_id, "b", "http"),
}
"""Calls that a run refuses after its end, and after which it does not match the expectation any more."""


@check("CON-1", "RUN-2", "RUN-4", "CLM-1", kind=Kind.RACE, isolated=False, rotation="rivals of an end")
async def an_end_that_expects_no_claim_has_one_winner(context: CheckContext) -> None:
    """Of the end of a run that expects its steps, and a call that changes them, exactly one succeeds."""
    other = await second_store(context)
    for _ in range(context.profile.of(1, 3, 20)):
        for name, rival in RIVALS.items():
            runs = [new_id(context) for _ in range(context.profile.of(32, 48, 64))]
            await asyncio.gather(*(start(context, run_id=run_id) for run_id in runs))
            await asyncio.gather(*(context.store.record_skipped_step(run_id, "a", "http") for run_id in runs))
            ending = asyncio.gather(
                *(
                    outcome_of(
                        context.store.complete_run(
                            run_id, RunStatus.SUCCEEDED, expected={"a": StepStatus.SKIPPED}
                        )
                    )
                    for run_id in runs
                )
            )
            answers = []
            for run_id in context.random.sample(runs, len(runs)):
                await asyncio.sleep(0)
                answers.append((run_id, await outcome_of(rival(other, run_id))))
            ended = dict(zip(runs, await ending, strict=True))
            for run_id, answer in answers:
                took_effect = answer is not False and answer != "<RunCompletedError raised>"
                context.expect(
                    (ended[run_id], took_effect),
                    (not took_effect, took_effect),
                    f"whether the end of a run that expects only step 'a' succeeded, and {name} of step 'b'",
                )


@check(
    "RET-1",
    "UNK",
    "CON-1",
    needs=[Capability.VIRTUAL_CLOCK, Capability.OUTPUTS],
    kind=Kind.RACE,
    rotation="rivals of a deletion",
)
async def nothing_survives_a_deletion_that_it_meets(context: CheckContext) -> None:
    """What a call writes to a run while a cleanup deletes it goes with the run, or the call is refused."""

    async def clean(runs: Sequence[UUID]) -> int:
        return await context.store.cleanup(require_clock(context).now)

    await _write_beside(context, clean)


@check(
    "RET-5",
    "UNK",
    "CON-1",
    needs=[Capability.DELETION, Capability.OUTPUTS],
    kind=Kind.RACE,
    isolated=False,
    rotation="rivals of a deletion",
)
async def nothing_survives_delete_run_that_it_meets(context: CheckContext) -> None:
    """What a call writes to a run while delete_run deletes it goes with the run, or the call is refused."""

    async def delete(runs: Sequence[UUID]) -> int:
        return sum(await asyncio.gather(*(context.store.delete_run(run_id) for run_id in runs)))

    await _write_beside(context, delete)


async def _write_beside(context: CheckContext, delete: Callable[[Sequence[UUID]], Awaitable[int]]) -> None:
    """Write to many ended runs while they are deleted; ``delete`` returns the number of deleted runs."""
    other = await second_store(context)
    for _ in range(context.profile.of(2, 6, 40)):
        runs = [new_id(context) for _ in range(context.profile.of(48, 100, 200))]
        await asyncio.gather(*(start(context, run_id=run_id) for run_id in runs))
        await asyncio.gather(*(context.store.complete_run(run_id, RunStatus.FAILED) for run_id in runs))
        advance(context, timedelta(seconds=1))
        deleting = asyncio.ensure_future(delete(runs))
        for run_id in runs:
            if deleting.done():
                break
            await outcome_of(other.save_output(run_id, "late", "1"))
            if Capability.EVENTS in context.capabilities:
                await outcome_of(other.append_event(run_id, "late"))
        context.expect(await deleting, len(runs), "the number of deleted runs")
        # The same ids again: a leftover of the old runs would belong to the new ones.
        for run_id in context.random.sample(runs, len(runs)):
            outputs = dict(await context.store.get_outputs(run_id))
            context.expect(outputs, {}, "the outputs of a deleted run")
            if Capability.EVENTS in context.capabilities:
                context.expect(await context.store.get_run_events(run_id), (), "the events of a deleted run")
