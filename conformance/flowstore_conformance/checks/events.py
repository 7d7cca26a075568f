"""EVT-1: the event log of a run."""

from __future__ import annotations

import asyncio

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import SECOND, advance, new_id, second_store, start
from flowstore_conformance.context import CheckContext
from flowstore_core import FlowEventRecord


@example("EVT-1")
async def append_event_stores_events_in_order(context: CheckContext) -> None:
    """append_event returns the sequence, which starts at 1 for each run and rises in commit order."""
    store, run_id, other = context.store, await start(context), await start(context)
    other_store = await second_store(context)
    wanted = []
    details = ((None, None), ("charge", "10 \u20ac"), ("charge", ""))
    for number, (step_key, message) in enumerate(details, 1):
        at = advance(context, SECOND)
        writer = other_store if number % 2 else store
        event_type = f"event {number}"
        sequence = await writer.append_event(run_id, event_type, step_key=step_key, message=message)
        context.expect(sequence, number, "the sequence of an event")
        wanted.append(
            FlowEventRecord(
                sequence=number,
                run_id=run_id,
                timestamp=at,
                event_type=event_type,
                step_key=step_key,
                message=message,
            )
        )
        # A clock that steps back does not change the order.
        advance(context, -2 * SECOND)
    context.expect(
        await store.append_event(other, "event"), 1, "the sequence of the first event of another run"
    )
    context.expect(await store.get_run_events(run_id), wanted, "get_run_events by sequence")


@example("EVT-1")
async def after_and_take_limit_the_log(context: CheckContext) -> None:
    """Concurrent calls get the next sequences; get_run_events returns those > after, by default 200."""
    store, run_id = context.store, await start(context)
    # More than the default of take.
    count = context.profile.of(24, 205, 205)
    every = range(1, count + 1)
    appended = await asyncio.gather(*(store.append_event(run_id, f"event {number}") for number in every))
    context.expect(sorted(appended), list(every), f"the sequences of {count} concurrently appended events")
    cuts: tuple[tuple[dict[str, int], range], ...] = (
        ({}, range(1, min(count, 200) + 1)),
        ({"take": context.page_size}, range(1, count + 1)),
        ({"after": 10}, range(11, min(count, 210) + 1)),
        ({"after": 2, "take": 3}, range(3, 6)),
        ({"after": 9, "take": 1}, range(10, 11)),
        ({"after": count}, range(0)),
        ({"after": 2**63 - 1}, range(0)),
        ({"take": 0}, range(0)),
    )
    for arguments, wanted in cuts:
        events = await store.get_run_events(run_id, **arguments)
        sequences = [event.sequence for event in events]
        context.expect(sequences, list(wanted), f"the sequences of get_run_events({arguments})")
    context.expect(await store.get_run_events(new_id(context)), (), "get_run_events of an unknown run")
