"""CON-4: undoing a cancelled dispatch leaves the dispatch that a reschedule has recorded since."""

from __future__ import annotations

import asyncio

from flowstore_conformance.checks.fixtures import new_store, start
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability

KEYS = 4


@check(
    "CON-4",
    needs=[Capability.RECOVERY, Capability.OUTPUTS],
    kind=Kind.CANCELLATION,
    isolated=False,
    rotation="cancelled rivals",
)
async def a_cancelled_dispatch_leaves_the_one_of_a_reschedule(context: CheckContext) -> None:
    """A reschedule replaces a dispatch whose caller is cancelled before it gets its result."""
    run_id, text = await start(context), "x" * context.text_size(4 * 2**20)
    for number in range(context.profile.of(1, 6, 20)):
        store = await new_store(context)
        keys = [f"{number} {key}" for key in range(KEYS)]
        for key in keys:
            await context.store.record_step_start(run_id, key, "http")
        # Large writes keep the store busy. So the calls between them may share a transaction, whose results
        # come after the cancellation.
        before = asyncio.ensure_future(store.save_output(run_id, "before", text))
        await asyncio.sleep(0)
        cancelled = [asyncio.ensure_future(store.try_record_dispatch(run_id, key)) for key in keys]
        rescheduled = [asyncio.ensure_future(store.reschedule_step(run_id, key, attempt=1)) for key in keys]
        behind = [asyncio.ensure_future(store.save_output(run_id, f"{n}", text)) for n in range(3)]
        await before
        for _ in range(context.random.randrange(4)):
            await asyncio.sleep(0)
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        await asyncio.gather(*rescheduled, *behind)
        if store is not context.store:
            # Closing waits until the cancelled calls are undone.
            await store.aclose()
        dispatched = await context.store.get_dispatched_step_keys(run_id)
        found = sorted(dispatched.intersection(keys))
        context.expect(found, keys, "the dispatches of reschedule_step after a cancelled dispatch")
