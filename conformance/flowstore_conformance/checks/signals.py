"""SIG: waiters and deliveries."""

from __future__ import annotations

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    MINUTE,
    NOT_FOUND,
    SECOND,
    SIMILAR_KEYS,
    TERMINAL_RUN_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_fields,
    expect_present,
    get_waiter,
    new_id,
    now,
    observe_all,
    outcome_of,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import (
    Capability,
    ConflictError,
    FlowSignalWaiter,
    SignalDeliveryResult,
    SignalDeliveryStatus,
)

DELIVERED = SignalDeliveryStatus.DELIVERED
ALREADY = SignalDeliveryStatus.ALREADY_DELIVERED

KEYS = ("b", "a", "\u00e9", "Z", "\U0001f600", "\uffff")
"""Step keys in neither code point order nor the order of any language."""

# SIG-1


@example("SIG-1")
async def register_waiter_creates_a_waiter(context: CheckContext) -> None:
    """The waiter stores every argument; its step need not have started, and does not start."""
    store, run_id = context.store, await start(context)
    at = advance(context, SECOND)
    for key, expires_at in (("wait", at + MINUTE), ("ever", None)):
        await store.register_waiter(run_id, key, "go", expires_at=expires_at)
        wanted = FlowSignalWaiter(
            run_id=run_id,
            step_key=key,
            signal_name="go",
            created_at=at,
            expires_at=expires_at,
            delivered_at=None,
            payload_json=None,
            expired_at=None,
        )
        context.expect(await store.get_waiter(run_id, key), wanted, "the registered waiter")
    context.expect(await store.get_step_statuses(run_id), {}, "the statuses with a registered waiter")


@example("SIG-1")
async def registering_again_updates_only_name_and_expiry(context: CheckContext) -> None:
    """created_at and a delivered payload are kept; after remove_waiter the waiter is new."""
    store, run_id = context.store, await start(context)
    made = now(context)
    await store.register_waiter(run_id, "wait", "go", expires_at=made + MINUTE)
    advance(context, SECOND)
    await store.register_waiter(run_id, "wait", "stop")
    changed = {"signal_name": "stop", "expires_at": None, "created_at": made}
    expect_fields(context, await get_waiter(context, run_id), "the waiter after registering again", **changed)
    context.expect(
        await store.deliver_signal(run_id, "go", "{}"), NOT_FOUND, "a signal by the waiter's old name"
    )
    at = advance(context, SECOND)
    delivery = await store.deliver_signal(run_id, "stop", "payload")
    context.expect(delivery.status, DELIVERED, "a signal by the waiter's new name")
    advance(context, SECOND)
    await store.register_waiter(run_id, "wait", "stop", expires_at=now(context) + MINUTE)
    kept = {"created_at": made, "delivered_at": at, "payload_json": "payload", "signal_name": "stop"}
    waiter = await get_waiter(context, run_id)
    sentence = "a delivered waiter after registering again"
    expect_fields(context, waiter, sentence, **kept, expires_at=now(context) + MINUTE)
    delivery = await store.deliver_signal(run_id, "stop", "another")
    context.expect(delivery.status, ALREADY, "a delivery to a delivered, reregistered waiter")
    await store.remove_waiter(run_id, "wait")
    fresh = advance(context, SECOND)
    await store.register_waiter(run_id, "wait", "go")
    new = {"created_at": fresh, "delivered_at": None, "payload_json": None, "signal_name": "go"}
    expect_fields(context, await get_waiter(context, run_id), "a waiter registered after a removal", **new)


@example("SIG-1")
async def a_delivered_waiter_does_not_change_its_name(context: CheckContext) -> None:
    """Registering it under another signal_name raises ConflictError and changes nothing."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "payload")
    before = await get_waiter(context, run_id)
    for name in ("stop", "Go", "go "):
        call = store.register_waiter(run_id, "wait", name, expires_at=now(context))
        sentence = f"registering a delivered waiter under another signal_name ({name!r})"
        error = await context.expect_error(call, ConflictError, sentence)
        expect_fields(context, error, f"{sentence}: the error", run_id=run_id, step_key="wait")
    context.expect(await get_waiter(context, run_id), before, "the waiter after a refused registration")


@example("SIG-1", needs=[Capability.WAITERS])
async def an_expired_waiter_must_be_removed_first(context: CheckContext) -> None:
    """Registering it again raises ConflictError and changes nothing."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "wait", "go", expires_at=now(context) - DAY)
    await store.expire_waiter(run_id, "wait")
    before = await get_waiter(context, run_id)
    for name in ("go", "stop"):
        call = store.register_waiter(run_id, "wait", name)
        await context.expect_error(call, ConflictError, f"registering an expired waiter for {name!r}")
    context.expect(await get_waiter(context, run_id), before, "the waiter after a refused registration")
    await store.remove_waiter(run_id, "wait")
    call = store.register_waiter(run_id, "wait", "go")
    context.expect(await outcome_of(call), None, "registering after the expired waiter was removed")


# SIG-2


@example("SIG-2")
async def a_delivery_stores_the_payload_on_the_waiter(context: CheckContext) -> None:
    """DELIVERED carries step_key and delivered_at; only the run and the exact name match."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        await store.register_waiter(one, "wait", "go")
        await store.register_waiter(one, "else", "gone")
    for name in ("Go", "go ", " go", "g", "g%", "g_", "g\u00f3", "o"):
        answer = await store.deliver_signal(run_id, name, "{}")
        context.expect(answer, NOT_FOUND, f"a signal {name!r} with a waiter for 'go'")
    at = advance(context, SECOND)
    result = await store.deliver_signal(run_id, "go", ' {"a": 1} ')
    wanted = SignalDeliveryResult(status=DELIVERED, step_key="wait", delivered_at=at)
    context.expect(result, wanted, "the result of a delivery")
    kept = {"delivered_at": at, "payload_json": ' {"a": 1} ', "expired_at": None}
    expect_fields(context, await get_waiter(context, run_id), "the delivered waiter", **kept)
    for one, key in ((run_id, "else"), (other, "wait"), (other, "else")):
        waiter = await get_waiter(context, one, key)
        context.expect(waiter.delivered_at, None, "delivered_at of waiters of other names and runs")


@example("SIG-2")
async def the_oldest_waiter_gets_the_payload(context: CheckContext) -> None:
    """Oldest by created_at, which registering again keeps, then by step_key in code point order."""
    store, run_id = context.store, await start(context)
    if context.clock is not None:
        for key in ("z", "y", "x"):
            await store.register_waiter(run_id, key, "by age")
            advance(context, TICK)
        await store.register_waiter(run_id, "z", "by age")
        got = [(await store.deliver_signal(run_id, "by age", "{}")).step_key for _ in "123"]
        context.expect(got, ["z", "y", "x"], "three deliveries to waiters of different age")
        for key in KEYS:
            await store.register_waiter(run_id, key, "by key")
        got = [(await store.deliver_signal(run_id, "by key", key)).step_key for key in KEYS]
        context.expect(got, sorted(KEYS), "deliveries to waiters with equal created_at")
    await store.register_waiter(run_id, "older", "own clock")
    await store.deliver_signal(run_id, "own clock", "one")
    await store.register_waiter(run_id, "newer", "own clock")
    result = await store.deliver_signal(run_id, "own clock", "two")
    context.expect(result.step_key, "newer", "the waiter of a second delivery")
    waiter = await get_waiter(context, run_id, "older")
    context.expect(waiter.payload_json, "one", "the payload of a waiter after a second delivery")


@example("SIG-2")
async def a_delivery_id_is_delivered_once(context: CheckContext) -> None:
    """A repeated id returns the first result for any signal name, also after its waiter was removed."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        for key in ("a", "b"):
            await store.register_waiter(one, key, "go")
    first = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
    context.expect(first.status, DELIVERED, "the first delivery of an id")
    before = await observe_all(context, run_id)
    advance(context, SECOND)
    for name in ("go", "another name"):
        again = await store.deliver_signal(run_id, name, "two", delivery_id="id")
        context.expect(again, first, f"the repeated delivery_id for the signal {name!r}")
    advance(context, -SECOND)
    assert_same(context, await observe_all(context, run_id), before, "a repeated delivery_id changes nothing")
    other_delivery = await store.deliver_signal(other, "go", "{}", delivery_id="id")
    context.expect(other_delivery.status, DELIVERED, "a delivery with the same delivery_id to another run")
    second = await store.deliver_signal(run_id, "go", "two", delivery_id="ID")
    context.expect(
        (second.status, second.step_key), (DELIVERED, "b"), "a delivery with the delivery_id in upper case"
    )
    await store.remove_waiter(run_id, "a")
    again = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
    context.expect(again, first, "the repeated delivery_id after its waiter was removed")
    await store.register_waiter(run_id, "a", "go")
    again = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
    context.expect(again, first, "the repeated delivery_id after its waiter was registered again")
    context.expect(
        (await get_waiter(context, run_id, "a")).delivered_at,
        None,
        "delivered_at of a new waiter after a repeated delivery_id",
    )


@example("SIG-2")
async def delivery_ids_are_compared_exactly(context: CheckContext) -> None:
    """Ids that are equal as numbers, in another case, without blanks or normalised are different ids."""
    store, run_id = context.store, await start(context)
    ids = (*SIMILAR_KEYS, "1e0", "+1", " 1", "1 ", "0x1", "True", "true", "null", "None")
    for delivery_id in ids:
        await store.register_waiter(run_id, f"wait {delivery_id}", "go")
    results = [await store.deliver_signal(run_id, "go", "{}", delivery_id=one) for one in ids]
    wanted = [(DELIVERED, f"wait {one}") for one in ids]
    found = sorted((one.status, one.step_key or "") for one in results)
    context.expect(found, sorted(wanted), "the results of deliveries with similar delivery_ids")
    again = [await store.deliver_signal(run_id, "go", "{}", delivery_id=one) for one in ids]
    context.expect(again, results, "the results of the repeated deliveries with similar delivery_ids")


@example("SIG-2")
async def a_delivery_id_is_remembered_on_a_terminal_run(context: CheckContext) -> None:
    """The same id returns the first result after the run has ended, whatever waiters it has by then."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.register_waiter(run_id, "a", "go")
        first = await store.deliver_signal(run_id, "go", "one", delivery_id="id")
        await store.register_waiter(run_id, "b", "go")
        await store.complete_run(run_id, status)
        before = await observe_all(context, run_id)
        for name in ("go", "another name"):
            again = await store.deliver_signal(run_id, name, "two", delivery_id="id")
            context.expect(again, first, f"a repeated delivery_id on a {status} run")
        assert_same(
            context, await observe_all(context, run_id), before, "a repeated delivery_id changes nothing"
        )


@example("SIG-2")
async def only_successful_delivery_ids_are_remembered(context: CheckContext) -> None:
    """A delivery_id that got NOT_FOUND or ALREADY_DELIVERED can be delivered later."""
    store, run_id = context.store, await start(context)
    answer = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    context.expect(answer, NOT_FOUND, "a delivery without waiter")
    await store.register_waiter(run_id, "a", "go")
    await store.deliver_signal(run_id, "go", "{}")
    late = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    context.expect(late.status, ALREADY, "a delivery with a delivery_id that got NOT_FOUND")
    await store.register_waiter(run_id, "b", "go")
    result = await store.deliver_signal(run_id, "go", "{}", delivery_id="id")
    found = (result.status, result.step_key)
    context.expect(found, (DELIVERED, "b"), "a delivery with a delivery_id that got ALREADY_DELIVERED")


# SIG-3


@example("SIG-3")
async def already_delivered_names_the_oldest_delivered_waiter(context: CheckContext) -> None:
    """ALREADY_DELIVERED carries the step and time of the oldest delivered waiter and delivers nothing."""
    store, run_id = context.store, await start(context)
    for key in ("c", "a", "b"):
        await store.register_waiter(run_id, key, "go")
        advance(context, SECOND)
    results = []
    for payload in ("one", "two", "three"):
        results.append(await store.deliver_signal(run_id, "go", payload))
        advance(context, SECOND)
    context.expect([each.status for each in results], [DELIVERED] * 3, "three deliveries to three waiters")
    # Without a virtual clock waiters may have equal created_at; then step_key decides.
    oldest = results[0]
    before = await observe_all(context, run_id)
    for delivery_id in (None, "id"):
        late = await store.deliver_signal(run_id, "go", "four", delivery_id=delivery_id)
        named = {"status": ALREADY, "step_key": oldest.step_key, "delivered_at": oldest.delivered_at}
        expect_fields(context, late, "a delivery with only delivered waiters", **named)
    assert_same(context, await observe_all(context, run_id), before, "a late delivery changes nothing")
    other = await store.deliver_signal(run_id, "stop", "{}")
    context.expect(other, NOT_FOUND, "a signal without waiter")
    if context.clock is not None:
        keys = [f"{key} of equal age" for key in KEYS]
        for key in keys:
            await store.register_waiter(run_id, key, "of equal age")
        for payload in (*keys, "late"):
            late = await store.deliver_signal(run_id, "of equal age", payload)
        named = {"status": ALREADY, "step_key": min(keys)}
        expect_fields(
            context,
            late,
            "a late delivery to delivered waiters of equal age",
            **named,
        )
    await store.register_waiter(run_id, "d", "go")
    result = await store.deliver_signal(run_id, "go", "four")
    context.expect(
        (result.status, result.step_key), (DELIVERED, "d"), "a delivery after a new waiter was registered"
    )


@example("SIG-3")
async def without_a_matching_waiter_a_delivery_is_not_found(context: CheckContext) -> None:
    """NOT_FOUND before any waiter is registered, and after the delivered one was removed."""
    store, run_id = context.store, await start(context)
    context.expect(await store.deliver_signal(run_id, "go", "{}"), NOT_FOUND, "a signal before any waiter")
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", "{}")
    await store.remove_waiter(run_id, "wait")
    answer = await store.deliver_signal(run_id, "go", "{}")
    context.expect(answer, NOT_FOUND, "a signal after the delivered waiter was removed")
    if Capability.WAITERS in context.capabilities:
        await store.register_waiter(run_id, "expired", "go", expires_at=now(context) - DAY)
        await store.expire_waiter(run_id, "expired")
        answer = await store.deliver_signal(run_id, "go", "{}")
        context.expect(answer, NOT_FOUND, "a signal with only an expired waiter")
        await store.register_waiter(run_id, "fresh", "go")
        for status in (DELIVERED, ALREADY):
            result = await store.deliver_signal(run_id, "go", "{}")
            found = (result.status, result.step_key)
            context.expect(found, (status, "fresh"), "a signal with an expired and an open waiter")


@example("SIG-3")
async def on_a_terminal_run_only_delivered_waiters_match(context: CheckContext) -> None:
    """ALREADY_DELIVERED if a waiter of that name was delivered, even if another is not; else NOT_FOUND."""
    store = context.store
    for status in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.register_waiter(run_id, "delivered", "go")
        delivered = await store.deliver_signal(run_id, "go", "one")
        for key, name in (("a", "go"), ("b", "stop")):
            await store.register_waiter(run_id, key, name)
        await store.complete_run(run_id, status)
        for delivery_id in (None, "id"):
            late = await store.deliver_signal(run_id, "go", "two", delivery_id=delivery_id)
            named = {"status": ALREADY, "step_key": "delivered", "delivered_at": delivered.delivered_at}
            expect_fields(context, late, f"a delivery to a {status} run with a delivered waiter", **named)
            answer = await store.deliver_signal(run_id, "stop", "{}", delivery_id=delivery_id)
            context.expect(answer, NOT_FOUND, f"a delivery to a {status} run without a delivered waiter")
        for key in ("a", "b"):
            waiter = await get_waiter(context, run_id, key)
            kept = {"delivered_at": None, "payload_json": None}
            expect_fields(context, waiter, f"an undelivered waiter of a {status} run", **kept)


# SIG-4


@example("SIG-4")
async def expires_at_alone_does_not_expire_a_waiter(context: CheckContext) -> None:
    """A waiter past its expires_at stays open and is delivered to until expire_waiter closes it."""
    store, run_id = context.store, await start(context)
    await store.register_waiter(run_id, "wait", "go", expires_at=now(context) - DAY)
    advance(context, DAY)
    context.expect(
        (await get_waiter(context, run_id)).expired_at, None, "expired_at of a waiter past its expires_at"
    )
    result = await store.deliver_signal(run_id, "go", "{}")
    context.expect(result.status, DELIVERED, "a delivery to a waiter past its expires_at")


@example("SIG-4")
async def expire_waiter_closes_a_due_waiter(context: CheckContext) -> None:
    """It sets expired_at and returns the row; a waiter that is not due or is delivered stays unchanged."""
    store, run_id = context.store, await start(context)
    due = now(context) + MINUTE if context.clock is not None else now(context) - DAY
    await store.register_waiter(run_id, "due", "go", expires_at=due)
    await store.register_waiter(run_id, "later", "go", expires_at=due + 3650 * DAY)
    await store.register_waiter(run_id, "ever", "go")
    await store.register_waiter(run_id, "delivered", "came", expires_at=due)
    await store.deliver_signal(run_id, "came", "payload")
    if context.clock is not None:
        advance(context, MINUTE - TICK)
        before = await get_waiter(context, run_id, "due")
        answer = await store.expire_waiter(run_id, "due")
        context.expect(answer, before, "expire_waiter a microsecond before expires_at")
    at = advance(context, TICK)
    for key in ("later", "ever", "delivered", "due"):
        before = await get_waiter(context, run_id, key)
        answer = expect_present(await store.expire_waiter(run_id, key), f"expire_waiter of {key!r}")
        stored = await get_waiter(context, run_id, key)
        context.expect(stored, answer, f"the stored waiter after expire_waiter ({key})")
        if key != "due":
            context.expect(
                answer, before, f"expire_waiter of a waiter that is not due or is delivered ({key})"
            )
    closed = {"expired_at": at, "delivered_at": None, "payload_json": None, "expires_at": due}
    expired = await get_waiter(context, run_id, "due")
    expect_fields(context, expired, "a due waiter after expire_waiter", **closed)
    advance(context, SECOND)
    again = await store.expire_waiter(run_id, "due")
    context.expect(again, expired, "an expired waiter after a later expire_waiter")
    for key in ("later", "ever"):
        await store.remove_waiter(run_id, key)
    context.expect(
        await store.deliver_signal(run_id, "go", "{}"), NOT_FOUND, "a delivery to an expired waiter"
    )
    context.expect(await store.expire_waiter(run_id, "unknown"), None, "expire_waiter without waiter")


@example("SIG-1")
async def remove_waiter_returns_the_removed_row(context: CheckContext) -> None:
    """The row with a delivered payload, if any; None if there is no waiter or it was removed before."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one in (run_id, other):
        await store.register_waiter(one, "delivered", "came", expires_at=now(context))
        await store.deliver_signal(one, "came", "payload")
        await store.register_waiter(one, "open", "go")
    for key in ("open", "delivered"):
        before = await get_waiter(context, run_id, key)
        removed = await store.remove_waiter(run_id, key)
        context.expect(removed, before, f"the row that remove_waiter returns ({key})")
        context.expect(await store.get_waiter(run_id, key), None, "a removed waiter")
        context.expect(await store.remove_waiter(run_id, key), None, "removing a waiter twice")
        await get_waiter(context, other, key)
    context.expect(
        await store.remove_waiter(run_id, "unknown"), None, "removing a waiter that was never registered"
    )


@check("QRY-1", needs=[Capability.WAITERS], isolated=False)
async def waiters_are_listed_by_step_key(context: CheckContext) -> None:
    """get_waiters lists every waiter of the run by step_key in code point order."""
    store, run_id, other = context.store, await start(context), await start(context)
    for key in KEYS:
        await store.register_waiter(run_id, key, "go")
        advance(context, SECOND)
    await store.register_waiter(other, "c", "go")
    await store.deliver_signal(run_id, "go", "{}")
    wanted = [await store.get_waiter(run_id, key) for key in sorted(KEYS)]
    context.expect(await store.get_waiters(run_id), wanted, "get_waiters by step_key")
    context.expect(await store.get_waiters(new_id(context)), (), "get_waiters of an unknown run")
