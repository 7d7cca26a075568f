"""MBX: signals that come before their waiters are buffered, and each goes to exactly one waiter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    BUFFERED,
    DAY,
    HOUR,
    MINUTE,
    NOT_FOUND,
    SECOND,
    SIMILAR_KEYS,
    TERMINAL_RUN_STATUSES,
    advance,
    assert_same,
    expect_fields,
    expect_present,
    get_waiter,
    new_id,
    now,
    observe,
    observe_all,
    outcome_of,
    run_step,
    second_store,
    single,
    start,
)
from flowstore_conformance.checks.volumes import expect_items, expect_result, in_groups
from flowstore_conformance.context import CheckContext, Profile
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    ArchivedDelivery,
    BufferedSignal,
    Capability,
    ConflictError,
    RunArchive,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepStatus,
)
from flowstore_core.signals import MAX_BUFFERED_SIGNALS

MAILBOX = {Capability.MAILBOX}
DELIVERED, ALREADY = SignalDeliveryStatus.DELIVERED, SignalDeliveryStatus.ALREADY_DELIVERED


async def _buffer(context: CheckContext, run_id: UUID, payload: str, name: str = "go") -> None:
    """Deliver an early signal, and expect that it is buffered."""
    result = await context.store.deliver_signal(run_id, name, payload, buffer=True)
    context.expect(result, BUFFERED, f"a signal {name!r} that no open waiter waits for, with buffer")


async def _payloads(context: CheckContext, run_id: UUID) -> list[tuple[str, str]]:
    """The names and payloads that are buffered."""
    return [(one.signal_name, one.payload_json) for one in await context.store.get_buffered_signals(run_id)]


async def _expect_taken(
    context: CheckContext, run_id: UUID, step_key: str, payload: str | None, sentence: str
) -> None:
    """Expect the payload of a waiter, None if it is undelivered."""
    waiter = await get_waiter(context, run_id, step_key)
    found = (waiter.payload_json, waiter.delivered_at is not None, waiter.expired_at)
    context.expect(found, (payload, payload is not None, None), sentence)


# MBX-1


@example("MBX-1", needs=MAILBOX)
async def a_signal_without_an_open_waiter_is_buffered(context: CheckContext) -> None:
    """BUFFERED, without step and time; every store lists the payload; nothing else changes."""
    store, run_id, other = context.store, await start(context), await start(context)
    context.expect(await store.get_buffered_signals(run_id), (), "get_buffered_signals of a new run")
    before = await observe_all(context, run_id, other)
    at = advance(context, SECOND)
    await _buffer(context, run_id, " {} ")
    for one in (store, await second_store(context)):
        buffered = single(await one.get_buffered_signals(run_id), "the buffered signals")
        wanted = {"run_id": run_id, "signal_name": "go", "payload_json": " {} "}
        expect_fields(context, buffered, "a buffered signal", **wanted)
        if context.clock is not None:
            context.expect(buffered.buffered_at, at, "buffered_at of a buffered signal")
    advance(context, -SECOND)
    after = await observe_all(context, run_id, other)
    for shown in (before, after):
        del shown[f"get_buffered_signals of {run_id}"]
    assert_same(context, after, before, "a buffered signal changes nothing else")


@example("MBX-1", needs=MAILBOX)
async def new_waiters_take_payloads_in_the_order_of_their_arrival(context: CheckContext) -> None:
    """First in, first out for each name of a run, in get_buffered_signals too; delivered_at is now."""
    store, run_id, other = context.store, await start(context), await start(context)
    sent = [("go", "1"), ("stop", "2"), ("go", "0"), ("go", "3"), ("stop", "")]
    for name, text in sent:
        await _buffer(context, run_id, text, name)
    await _buffer(context, other, "of another run")
    context.expect(await _payloads(context, run_id), sent, "the buffered signals of several names")
    # Not in the order of the keys.
    waits = [("c", "go"), ("a", "go"), ("b", "stop"), ("d", "go"), ("e", "go")]
    taken = ("1", "0", "2", "3", None)
    for (step_key, name), payload in zip(waits, taken, strict=True):
        at = advance(context, SECOND)
        await store.register_waiter(run_id, step_key, name)
        await _expect_taken(
            context, run_id, step_key, payload, f"the payload that a waiter of {name!r} takes"
        )
        waiter = await get_waiter(context, run_id, step_key)
        if context.clock is not None and payload is not None:
            times = {"created_at": at, "delivered_at": at}
            expect_fields(context, waiter, "the times of a waiter that takes a payload", **times)
        if payload is not None:
            sent.remove((name, payload))
        context.expect(await _payloads(context, run_id), sent, "the buffered signals after one was taken")
    context.expect(await _payloads(context, other), [("go", "of another run")], "those of another run")
    result = await store.deliver_signal(run_id, "go", "4", buffer=True)
    context.expect((result.status, result.step_key), (DELIVERED, "e"), "a signal for an open waiter")


@example("MBX-1", needs=MAILBOX)
async def an_open_waiter_is_delivered_to_as_without_buffer(context: CheckContext) -> None:
    """With buffer the oldest open waiter gets the payload, and nothing is buffered."""
    store, run_id = context.store, await start(context)
    for key in ("b", "a"):
        await store.register_waiter(run_id, key, "go")
        advance(context, SECOND)
    oldest = "b" if context.clock is not None else None
    first = await store.deliver_signal(run_id, "go", "1", buffer=True)
    context.expect(first.status, DELIVERED, "a signal with buffer, for which two waiters are open")
    context.expect(first.step_key, oldest or first.step_key, "the step that gets the signal")
    second = await store.deliver_signal(run_id, "go", "2", buffer=True)
    found = {first.step_key, second.step_key}
    context.expect(found, {"a", "b"}, "the steps that two signals reach")
    context.expect(await _payloads(context, run_id), [], "the buffered signals")
    await _buffer(context, run_id, "3")
    context.expect(await _payloads(context, run_id), [("go", "3")], "the third signal for two waiters")


@example("MBX-1", needs=MAILBOX)
async def a_renamed_waiter_takes_a_payload_of_its_new_name(context: CheckContext) -> None:
    """It keeps created_at, gets expires_at, and is delivered now; another waiter takes the next payload."""
    store, run_id = context.store, await start(context)
    created = now(context)
    await store.register_waiter(run_id, "wait", "other")
    for payload in ("1", "2"):
        await _buffer(context, run_id, payload)
    at, ends = advance(context, MINUTE), now(context) + DAY
    await store.register_waiter(run_id, "wait", "go", expires_at=ends)
    await _expect_taken(context, run_id, "wait", "1", "the payload that a renamed waiter takes")
    waiter = await get_waiter(context, run_id)
    expect_fields(context, waiter, "a renamed waiter", signal_name="go", expires_at=ends)
    if context.clock is not None:
        times = {"created_at": created, "delivered_at": at}
        expect_fields(context, waiter, "the times of a renamed waiter that takes a payload", **times)
    context.expect(await _payloads(context, run_id), [("go", "2")], "the signals that are left")
    await store.register_waiter(run_id, "next", "go")
    await _expect_taken(context, run_id, "next", "2", "the payload that the next waiter takes")


@example("MBX-1", needs=MAILBOX)
async def a_delivered_waiter_takes_nothing(context: CheckContext) -> None:
    """Registered again, or refused under another name, it keeps its payload; removed, it takes the next."""
    store, run_id = context.store, await start(context)
    for payload in ("1", "2", "3"):
        await _buffer(context, run_id, payload)
    await _buffer(context, run_id, "other", "other")
    await store.register_waiter(run_id, "wait", "go")
    at = advance(context, SECOND)
    before = await get_waiter(context, run_id)
    await store.register_waiter(run_id, "wait", "go", expires_at=at + DAY)
    after = await get_waiter(context, run_id)
    kept = {"payload_json": "1", "delivered_at": before.delivered_at, "created_at": before.created_at}
    expect_fields(context, after, "a delivered waiter that is registered again", **kept)
    call = store.register_waiter(run_id, "wait", "other")
    await context.expect_error(call, ConflictError, "another signal_name for a delivered waiter")
    left = [("go", "2"), ("go", "3"), ("other", "other")]
    context.expect(await _payloads(context, run_id), left, "the buffered signals")
    removed = await store.remove_waiter(run_id, "wait")
    context.expect(removed, after, "the removed waiter, with the payload that it had taken")
    context.expect(await _payloads(context, run_id), left, "the buffered signals after remove_waiter")
    await store.register_waiter(run_id, "wait", "go")
    await _expect_taken(context, run_id, "wait", "2", "the payload of a waiter that was removed before")


@example("MBX-1", needs=MAILBOX)
async def delivered_and_removed_waiters_do_not_keep_a_signal_from_the_buffer(context: CheckContext) -> None:
    """With buffer the result is BUFFERED where it would be ALREADY_DELIVERED or NOT_FOUND."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "1")
    await _buffer(context, run_id, "2")
    late = await store.deliver_signal(run_id, "go", "3")
    context.expect((late.status, late.step_key), (ALREADY, "wait"), "the same signal without buffer")
    await store.remove_waiter(run_id, "wait")
    await _buffer(context, run_id, "4")
    result = await store.deliver_signal(run_id, "go", "5")
    context.expect(result, NOT_FOUND, "a signal without buffer while others of its name are buffered")
    wanted = [("go", "2"), ("go", "4")]
    context.expect(await _payloads(context, run_id), wanted, "the buffered signals")


@example("MBX-1", needs={*MAILBOX, Capability.WAITERS})
async def a_closed_waiter_neither_takes_nor_gives_back(context: CheckContext) -> None:
    """A signal for a closed waiter is buffered, registering it again raises; a due open waiter takes one."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "closed", "go", expires_at=now(context) - DAY)
    await store.expire_waiter(run_id, "closed")
    for payload in ("1", "2"):
        await _buffer(context, run_id, payload)
    before = await observe(context, run_id)
    call = store.register_waiter(run_id, "closed", "go")
    await context.expect_error(call, ConflictError, "registering a closed waiter")
    assert_same(context, await observe(context, run_id), before, "a refused registration changes nothing")
    # Only expire_waiter closes a waiter (SIG-4).
    await store.register_waiter(run_id, "due", "go", expires_at=now(context) - DAY)
    await _expect_taken(context, run_id, "due", "1", "the payload of a new waiter past its expires_at")
    taken = await get_waiter(context, run_id, "due")
    context.expect(await store.expire_waiter(run_id, "due"), taken, "expire_waiter after a payload was taken")
    context.expect(await _payloads(context, run_id), [("go", "2")], "the signals that are left")


@example("MBX-1", needs=MAILBOX)
async def a_terminal_run_buffers_nothing(context: CheckContext) -> None:
    """As without buffer: NOT_FOUND or ALREADY_DELIVERED, nothing is stored, and no id is remembered."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.register_waiter(run_id, "wait", "came")
        first = await store.deliver_signal(run_id, "came", "1")
        await run_step(context, run_id, "failed", StepStatus.FAILED)
        await store.complete_run(run_id, status)
        before = await observe_all(context, run_id)
        result = await store.deliver_signal(run_id, "go", "1", delivery_id="id", buffer=True)
        context.expect(result, NOT_FOUND, f"a signal with buffer to a {status} run")
        late = await store.deliver_signal(run_id, "came", "2", delivery_id="id", buffer=True)
        wanted = SignalDeliveryResult(status=ALREADY, step_key="wait", delivered_at=first.delivered_at)
        context.expect(late, wanted, f"a signal with buffer to a {status} run with a delivered waiter")
        assert_same(context, await observe_all(context, run_id), before, "a signal to a terminal run")
        await store.retry_step(run_id, "failed")
        again = await store.deliver_signal(run_id, "go", "1", delivery_id="id", buffer=True)
        context.expect(again, BUFFERED, "the same delivery_id after retry_step reopened the run")


@example("MBX-1", needs=MAILBOX)
async def a_waiter_of_a_terminal_run_takes_a_payload(context: CheckContext) -> None:
    """So no name has both a buffered payload and an open waiter when retry_step reopens the run."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "failed", StepStatus.FAILED)
    for payload in ("1", "2"):
        await _buffer(context, run_id, payload)
    await store.complete_run(run_id, RunStatus.FAILED)
    await store.register_waiter(run_id, "late", "go")
    await _expect_taken(context, run_id, "late", "1", "the payload of a waiter of a terminal run")
    await store.retry_step(run_id, "failed")
    await _expect_taken(context, run_id, "late", "1", "that payload after retry_step reopened the run")
    context.expect(await _payloads(context, run_id), [("go", "2")], "the signals that are left")


@example("MBX-1", needs=MAILBOX)
async def names_of_buffered_signals_are_compared_exactly(context: CheckContext) -> None:
    """Names that some databases treat as equal have buffers of their own; payloads come back unchanged."""
    store, run_id = context.store, await start(context)
    for name in SIMILAR_KEYS:
        await _buffer(context, run_id, f" payload of {name}\n", name)
    wanted = [(name, f" payload of {name}\n") for name in SIMILAR_KEYS]
    context.expect(await _payloads(context, run_id), wanted, "buffered signals with similar names")
    for name, payload in reversed(wanted):
        await store.register_waiter(run_id, name, name)
        await _expect_taken(context, run_id, name, payload, f"the payload that the waiter of {name!r} takes")


@example("MBX-1", needs={*MAILBOX, Capability.QUEUES})
async def a_step_whose_waiter_takes_a_payload_is_ready(context: CheckContext) -> None:
    """It is ready as after a delivery: a new waiter never makes it wait, and a renamed one ends its wait."""
    store, run_id, queue = context.store, await start(context), f"queue {new_id(context)}"
    for name in ("go", "go", "renamed"):
        await _buffer(context, run_id, f"for {name}", name)
    for key in ("a", "b", "c", "d"):
        await store.try_record_dispatch(run_id, key, queue=queue, step_type="http")
    await store.register_waiter(run_id, "a", "go")
    # A payload overrides expires_at, as a delivery does.
    await store.register_waiter(run_id, "b", "go", expires_at=now(context) + DAY)
    for key in ("c", "d"):
        await store.register_waiter(run_id, key, "never")
    for ready, sentence in ((["a", "b"], "two new waiters"), (["c"], "a renamed waiter")):
        if ready == ["c"]:
            await store.register_waiter(run_id, "c", "renamed")
        if context.clock is not None:
            counted = single([one for one in await store.get_queues() if one.queue == queue], "the queue")
            expect_fields(context, counted, f"the steps after {sentence}", ready=len(ready))
        claimed = await store.claim_next_steps([queue], lease=HOUR, limit=10)
        found = sorted(step.step_key for step in claimed)
        context.expect(found, ready, f"the steps that are ready after {sentence} took payloads")


@example("MBX-1", needs={*MAILBOX, Capability.QUEUES})
async def a_step_that_waits_for_an_early_signal_runs_again_at_once(context: CheckContext) -> None:
    """After an early signal, register_waiter and reschedule_step make a claimed step ready again."""
    store, run_id, queue = context.store, await start(context), f"queue {new_id(context)}"
    await store.try_record_dispatch(run_id, "wait", queue=queue, step_type="http")
    await _buffer(context, run_id, "early")
    first = single(await store.claim_next_steps([queue], lease=HOUR), "the claimed step")
    await store.register_waiter(run_id, "wait", "go")
    await store.reschedule_step(run_id, "wait", attempt=first.attempt)
    again = single(await store.claim_next_steps([queue], lease=HOUR), "the step, claimed again")
    context.expect((again.step_key, again.attempt), ("wait", 2), "the step that is ready after the wait")
    await _expect_taken(context, run_id, "wait", "early", "the payload that its second attempt reads")


@example("MBX-1", needs={*MAILBOX, Capability.RECOVERY})
async def a_step_whose_waiter_took_a_payload_may_stall(context: CheckContext) -> None:
    """As after a delivery: get_stalled_steps does not take it for a step that waits (STP-8)."""
    store, run_id = context.store, await start(context)
    for key, name in (("took", "go"), ("waits", "never")):
        await run_step(context, run_id, key, StepStatus.PENDING)
        await _buffer(context, run_id, "1")
        await store.register_waiter(run_id, key, name)
    listed = await store.get_stalled_steps(as_of=now(context) + HOUR, take=context.page_size)
    found = [one.step_key for one in listed if one.run_id == run_id]
    context.expect(found, ["took"], "the stalled steps, of which one waits and one took a payload")


@example("MBX-1", needs=MAILBOX)
async def many_waiters_and_signals_at_once_lose_nothing(context: CheckContext) -> None:
    """Of n signals and n waiters at once each waiter gets one payload, and each payload one waiter."""
    store, other = context.store, await second_store(context)
    count = 12
    for _ in range(context.profile.of(3, 10, 40)):
        run_id = await start(context)
        calls = [
            one.deliver_signal(run_id, "go", f"{number}", buffer=True)
            for number, one in zip(range(count), (store, other) * count, strict=False)
        ]
        calls += [
            one.register_waiter(run_id, f"step {number}", "go")  # type: ignore[misc]
            for number, one in zip(range(count), (other, store) * count, strict=False)
        ]
        context.random.shuffle(calls)
        await asyncio.gather(*calls)
        waiters = [await get_waiter(context, run_id, f"step {number}") for number in range(count)]
        payloads = sorted(str(waiter.payload_json) for waiter in waiters)
        wanted = sorted(f"{number}" for number in range(count))
        context.expect(payloads, wanted, f"the payloads of {count} waiters after {count} signals")
        context.expect(await _payloads(context, run_id), [], "the signals that no waiter took")


# MBX-2


@example("MBX-2", needs=MAILBOX)
async def the_id_of_a_buffered_signal_is_remembered(context: CheckContext) -> None:
    """A repeated id returns BUFFERED and changes nothing, whatever else the call and the run are."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        result = await store.deliver_signal(one, "go", "1", delivery_id="id", buffer=True)
        context.expect(result, BUFFERED, "the first delivery of an id, with buffer")

    async def expect_repeatable(state: str) -> None:
        before = await observe_all(context, run_id)
        for name in ("go", "open", "another name"):
            for buffer in (True, False):
                again = await store.deliver_signal(run_id, name, "2", delivery_id="id", buffer=buffer)
                sentence = f"the repeated id of a buffered signal, for {name!r}, buffer={buffer}, {state}"
                context.expect(again, BUFFERED, sentence)
        after = await observe_all(context, run_id)
        assert_same(context, after, before, f"a repeated delivery_id changes nothing, {state}")

    await store.register_waiter(run_id, "open", "open")
    await expect_repeatable("while it is buffered")
    await store.register_waiter(run_id, "wait", "go")
    await _expect_taken(context, run_id, "wait", "1", "the payload that a waiter takes")
    await expect_repeatable("after a waiter took it")
    await store.remove_waiter(run_id, "wait")
    await expect_repeatable("after that waiter was removed")
    await store.register_waiter(run_id, "wait", "go")
    await _expect_taken(context, run_id, "wait", None, "a waiter after the only payload was taken")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    await expect_repeatable("on a terminal run")
    fresh = await store.deliver_signal(other, "go", "1", delivery_id="ID", buffer=True)
    context.expect(fresh, BUFFERED, "the same id in upper case")
    context.expect(len(await _payloads(context, other)), 2, "the number of signals of two ids")


@example("MBX-2", needs=MAILBOX)
async def the_id_of_a_delivered_signal_stays_delivered(context: CheckContext) -> None:
    """With buffer a repeated id returns the first result, and buffers nothing."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "wait", "go")
    first = await store.deliver_signal(run_id, "go", "1", delivery_id="id", buffer=True)
    context.expect(first.status, DELIVERED, "a delivery with buffer to an open waiter")
    for name in ("go", "other"):
        again = await store.deliver_signal(run_id, name, "2", delivery_id="id", buffer=True)
        context.expect(again, first, f"the repeated id of a delivered signal, for {name!r}")
    context.expect(await _payloads(context, run_id), [], "the buffered signals")


@example("MBX-2", needs=MAILBOX)
async def without_an_id_every_call_buffers(context: CheckContext) -> None:
    """Equal signals without delivery_id are different payloads."""
    store, run_id = context.store, await start(context)
    for _ in range(3):
        await _buffer(context, run_id, "same")
    context.expect(await _payloads(context, run_id), [("go", "same")] * 3, "three equal signals")
    for key in ("a", "b", "c", "d"):
        await store.register_waiter(run_id, key, "go")
    found = [(await get_waiter(context, run_id, key)).payload_json for key in ("a", "b", "c", "d")]
    context.expect(found, ["same", "same", "same", None], "the payloads of four waiters")


@example("MBX-2", needs=MAILBOX)
async def ends_and_retries_keep_buffered_signals(context: CheckContext) -> None:
    """complete_run and retry_step, of the run's own steps too, keep them and what a waiter took."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "wait", StepStatus.FAILED)
    for payload in ("1", "2"):
        await _buffer(context, run_id, payload)
    await store.register_waiter(run_id, "wait", "go")
    for status in TERMINAL_RUN_STATUSES:
        await store.complete_run(run_id, status)
        context.expect(await _payloads(context, run_id), [("go", "2")], f"the signals of a {status} run")
        await store.retry_step(run_id, "wait")
        context.expect(await _payloads(context, run_id), [("go", "2")], "the signals after retry_step")
        await _expect_taken(context, run_id, "wait", "1", "a payload that was taken, after retry_step")
        await run_step(context, run_id, "wait", StepStatus.FAILED)


@example("MBX-2", needs={*MAILBOX, Capability.DELETION})
async def buffered_signals_go_with_their_run(context: CheckContext) -> None:
    """A run started again under the id has neither the payloads nor the ids; other runs keep theirs."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        for payload in ("1", "2"):
            await store.deliver_signal(one, "go", payload, delivery_id=payload, buffer=True)
    await store.complete_run(run_id, RunStatus.FAILED)
    context.expect(await outcome_of(store.delete_run(run_id)), True, "delete_run of a run with signals")
    context.expect(await _payloads(context, run_id), [], "the signals of a deleted run")
    context.expect(len(await _payloads(context, other)), 2, "the number of signals of another run")
    await start(context, run_id=run_id)
    await store.register_waiter(run_id, "wait", "go")
    await _expect_taken(context, run_id, "wait", None, "a waiter of a run started again")
    result = await store.deliver_signal(run_id, "go", "new", delivery_id="1", buffer=True)
    found = (result.status, result.step_key)
    context.expect(found, (DELIVERED, "wait"), "an id of the deleted run, delivered to the new one")


DELIVERED_IN_QUICK = 40
"""The number of signals that the quick profile delivers to a run that already buffers the others."""


async def _import_buffered(context: CheckContext, names: Sequence[str]) -> UUID:
    """Import a run that buffers a signal of each name; payloads and delivery_ids are their numbers."""
    run = expect_present(await context.store.get_run(await start(context)), "get_run of a stored run")
    run_id, moment = new_id(context), run.started_at
    archive = RunArchive(
        run=replace(run, run_id=run_id),
        deliveries=tuple(
            ArchivedDelivery(delivery_id=delivery_id) for delivery_id in sorted(map(str, range(len(names))))
        ),
        buffered=tuple(
            BufferedSignal(run_id=run_id, signal_name=name, payload_json=f"{number}", buffered_at=moment)
            for number, name in enumerate(names)
        ),
    )
    context.expect(await context.store.import_run(archive), True, "import_run of a run with many signals")
    return run_id


@check("MBX-2", "MBX-1", needs=[Capability.MAILBOX], kind=Kind.VOLUME, isolated=False)
async def a_run_buffers_at_most_a_thousand_signals(context: CheckContext) -> None:
    """One more raises ConflictError and is not remembered; waiters take them in the order of arrival."""
    store, run_id, other = context.store, await start(context), await start(context)
    names = ["stop" if number % 10 == 1 else "go" for number in range(MAX_BUFFERED_SIGNALS)]
    imported = 0
    if context.profile is Profile.QUICK and Capability.TRANSFER in context.capabilities:
        # One call instead of most deliveries, which a store makes one after another.
        imported = MAX_BUFFERED_SIGNALS - DELIVERED_IN_QUICK
        run_id = await _import_buffered(context, names[:imported])

    async def deliver(number: int) -> SignalDeliveryResult:
        return await store.deliver_signal(
            run_id, names[number], f"{number}", delivery_id=f"{number}", buffer=True
        )

    results = await in_groups(lambda number: deliver(imported + number), len(names) - imported)
    what = f"the results of {len(results):,} early signals"
    expect_items(context, results, [BUFFERED] * len(results), what, clause="MBX-1")
    arrived = await _payloads(context, run_id)
    sent = sorted((name, f"{number}") for number, name in enumerate(names))
    expect_items(context, sorted(arrived), sent, f"the {len(names):,} buffered signals", clause="MBX-1")
    before = await observe(context, run_id)
    for name, delivery_id in (("go", "more"), ("new", "more"), ("go", None)):
        call = store.deliver_signal(run_id, name, "{}", delivery_id=delivery_id, buffer=True)
        error = await context.expect_error(call, ConflictError, "one signal more than a run buffers")
        expect_fields(context, error, "the error at the limit", run_id=run_id, step_key=None)
    assert_same(context, await observe(context, run_id), before, "a refused signal changes nothing")
    expect_result(context, await deliver(7), BUFFERED, "a remembered id at the limit", clause="MBX-2")
    result = await store.deliver_signal(run_id, "go", "{}")
    expect_result(context, result, NOT_FOUND, "a signal without buffer at the limit", clause="MBX-1")
    result = await store.deliver_signal(other, "go", "{}", buffer=True)
    expect_result(context, result, BUFFERED, "a signal of another run at the limit", clause="MBX-2")
    await store.register_waiter(run_id, "open", "for a waiter")
    result = await store.deliver_signal(run_id, "for a waiter", "{}", buffer=True)
    found = (result.status, result.step_key)
    expect_result(context, found, (DELIVERED, "open"), "a signal for an open waiter", clause="MBX-2")
    count = context.profile.of(20, 100, 400)
    for number in range(count):
        await store.register_waiter(run_id, f"step {number:03}", "go")
    waiters = [await get_waiter(context, run_id, f"step {number:03}") for number in range(count)]
    oldest = [payload for name, payload in arrived if name == "go"]
    what = f"the payloads that {count} waiters take in turn"
    expect_items(context, [one.payload_json for one in waiters], oldest[:count], what, clause="MBX-1")
    result = await store.deliver_signal(run_id, "go", "{}", delivery_id="more", buffer=True)
    expect_result(context, result, BUFFERED, "the refused id below the limit", clause="MBX-2")
