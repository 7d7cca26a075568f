"""Declared capabilities, tested both ways; and opening, closing and dropping stores."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    assert_same,
    expect_fields,
    expect_present,
    get_run,
    new_id,
    new_store,
    now,
    observe,
    outcome_of,
    run_step,
    single,
    start,
)
from flowstore_conformance.checks.operations import (
    ARGUMENT_KINDS,
    RUN,
    hostile_arguments,
    legal_arguments,
    offered_arguments,
)
from flowstore_conformance.context import CheckContext, VirtualClock
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    ConfigurationError,
    FlowStore,
    FlowStoreError,
    InvalidArgumentError,
    NotSupportedError,
    RunStatus,
    StoreClosedError,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.backend import NonDurableUrls, ScratchClearable
from flowstore_core.operations import CAPABILITY_METHODS, KEYWORD_CAPABILITIES, OPERATIONS
from flowstore_core.urls import redact

_OPERATIONS_OF_CAPABILITIES = [
    (capability, one) for capability, names in CAPABILITY_METHODS.items() for one in names
]

NEEDED = {
    Capability.QUEUES: {Capability.LEASES, Capability.TRIGGER, Capability.RECOVERY, Capability.WAITERS},
    Capability.TRANSFER: {
        Capability.QUEUES,
        Capability.OUTPUTS,
        Capability.EVENTS,
        Capability.TAGS,
        Capability.MAILBOX,
    },
}

CONCURRENT_STARTS = 60
"""Number of runs that start in a namespace before it is emptied, half of them at once."""

# These checks belong to CON-2 and CON-6, which apply to every backend. A clause of the capability itself
# would skip them on a backend without it.


@example("CON-2", kind=Kind.CAPABILITY)
async def declared_capabilities_work_and_others_are_refused(context: CheckContext) -> None:
    """Each operation of a capability works if it is declared, and raises NotSupportedError otherwise."""
    store = context.store
    declared = store.capabilities
    context.expect_that(type(declared) is frozenset, "store.capabilities is a frozenset")
    unknown = sorted(set(declared) - set(Capability))
    context.expect(unknown, [], "every declared capability is one of the contract")
    for capability, needed in NEEDED.items():
        lacking = sorted(needed - declared) if capability in declared else []
        context.expect(
            lacking, [], f"the capabilities that {capability} needs and the store does not declare"
        )
    await start(context, run_id=RUN)
    await store.try_claim_step(RUN, "charge", owner="charge")
    await store.record_step_start(RUN, "charge", "http", owner="charge")
    for capability, operation in _OPERATIONS_OF_CAPABILITIES:
        arguments = offered_arguments(operation, declared)
        if operation == "trigger_run":
            arguments["run_id"] = new_id(context)
        call = getattr(store, operation)(**arguments)
        if capability in declared:
            answer = await outcome_of(call)
            sentence = f"{operation} works where {capability} is declared"
            context.expect_that(
                answer != "<NotSupportedError raised>", f"{sentence}: it raised NotSupportedError"
            )
        else:
            await _expect_unsupported(context, call, capability, operation)
    for operation, keywords in KEYWORD_CAPABILITIES.items():
        for capability in sorted(set(keywords.values())):
            arguments = offered_arguments(operation, {*declared, capability})
            if operation == "trigger_run":
                arguments["run_id"] = new_id(context)
            if OPERATIONS[operation].capability in (None, *declared):
                call = getattr(store, operation)(**arguments)
                if capability in declared:
                    answer = await outcome_of(call)
                    sentence = f"{operation} with {', '.join(keywords)} where {capability} is declared"
                    context.expect_that(answer != "<NotSupportedError raised>", f"{sentence}: it raised it")
                else:
                    await _expect_unsupported(context, call, capability, operation)
    for operation in ARGUMENT_KINDS:
        # Arguments are checked before capabilities.
        for name, arguments in list(hostile_arguments(operation, ("id", "take", "datetime")))[:1]:
            call = getattr(store, operation)(**arguments)
            sentence = f"{operation} with an illegal {name} and without capability"
            await context.expect_error(call, InvalidArgumentError, sentence)


async def _expect_unsupported(
    context: CheckContext, call: Any, capability: Capability, operation: str
) -> None:
    sentence = f"{operation} where {capability} is not declared"
    error = await context.expect_error(call, NotSupportedError, sentence)
    named = {"backend": context.store.backend, "capability": capability.value, "operation": operation}
    expect_fields(context, error, f"{sentence}: the error", **named)


@example("CON-2", kind=Kind.CAPABILITY)
async def a_clock_is_honoured_or_refused(context: CheckContext) -> None:
    """With VIRTUAL_CLOCK each store uses the clock it was opened with; without it a clock is refused."""
    ahead = VirtualClock(datetime(2050, 1, 1, tzinfo=UTC))
    if Capability.VIRTUAL_CLOCK in context.capabilities:
        sentence = "a timestamp of the store's given clock"
        async with context.backend.scratch(context.base_url) as url, open_store(url, clock=ahead) as store:
            run = await store.start_run(FLOW, "orders", new_id(context), "manual")
            context.expect(run.started_at, ahead.now, sentence)
        other = await new_store(context, clock=ahead)
        if other is not context.store:
            run_id = await start(context)
            await other.complete_run(run_id, RunStatus.SUCCEEDED)
            sentence = f"{sentence}, with two stores on different clocks"
            wanted = {"started_at": now(context), "completed_at": ahead.now}
            expect_fields(context, await get_run(context, run_id), sentence, **wanted)
        return
    try:
        async with open_store(context.url, clock=ahead):
            pass
    except FlowStoreError as error:
        sentence = "open_store(clock=...) without VIRTUAL_CLOCK"
        context.expect(type(error).__name__, "NotSupportedError", sentence)
    else:
        context.expect_that(False, "open_store(clock=...) raises NotSupportedError without VIRTUAL_CLOCK")


@example("CON-2", kind=Kind.CAPABILITY)
async def without_a_clock_the_stores_own_is_used(context: CheckContext) -> None:
    """Its timestamps are current and rising, and it judges leases, deadlines and retention by them."""
    before = datetime.now(UTC)
    async with context.backend.scratch(context.base_url) as url, open_store(url) as store:
        run = await store.start_run(FLOW, "orders", new_id(context), "manual")
        await store.record_skipped_step(run.run_id, "charge", "http")
        await store.complete_run(run.run_id, RunStatus.SUCCEEDED)
        detail = expect_present(await store.get_run_detail(run.run_id), "get_run_detail of a stored run")
        await _check_comparisons_with_its_clock(context, store)
    step = single(detail.steps, "the step of a run that has one")
    stamps = [detail.started_at, step.started_at, step.completed_at, detail.completed_at]
    # Generous limits, for slow machines and skewed server clocks.
    limits = [before - DAY, *stamps, datetime.now(UTC) + DAY]
    rising = all(a is not None and b is not None and a <= b for a, b in pairwise(limits))
    context.expect_that(rising, f"the store's own clock: expected current, rising timestamps, got {stamps}")


async def _check_comparisons_with_its_clock(context: CheckContext, store: FlowStore) -> None:
    """Compare with times two days ago and two days ahead, which tolerates clock skew."""
    past, future = datetime.now(UTC) - 2 * DAY, datetime.now(UTC) + 2 * DAY
    run_id = new_id(context)
    await store.start_run(FLOW, "orders", run_id, "manual")
    if Capability.LEASES in context.capabilities:
        leased: dict[str, Any] = {"owner": "me", "lease": DAY}
        context.expect(await store.try_claim_step(run_id, "leased", **leased), True, "claiming with a lease")
        answer = await store.try_claim_step(run_id, "leased", owner="other", lease=DAY)
        context.expect(answer, False, "claiming a step that another owner has leased for a day")
        context.expect(
            await store.renew_step_claim(run_id, "leased", "me", 2 * DAY), True, "renewing a lease"
        )
        claim = single(await store.get_step_claims(run_id), "the claim")
        end = expect_present(claim.expires_at, "expires_at of a leased claim")
        context.expect_that(
            end - claim.claimed_at >= 2 * DAY, "the end of a lease is claimed_at plus the lease"
        )
        context.expect(await store.get_claimed_step_keys(run_id), {"leased"}, "the keys that are claimed")
        number = await store.record_step_start(run_id, "leased", "http", owner="me")
        context.expect(number, 1, "starting under a live claim")
    for key, at in (("past", past), ("future", future)):
        await store.try_record_dispatch(run_id, key, due_at=at)
        await store.register_waiter(run_id, key, key, expires_at=at)
        if Capability.WAITERS in context.capabilities:
            waiter = expect_present(await store.expire_waiter(run_id, key), "the waiter")
            sentence = f"expiring a waiter whose expires_at is in the {key}: whether it expired"
            context.expect(waiter.expired_at is not None, key == "past", sentence)
    if Capability.RECOVERY in context.capabilities:
        stalled = [step.step_key for step in await store.get_stalled_steps()]
        context.expect(stalled, ["past"], "the stalled steps by the store's own clock")
    if Capability.DASHBOARD in context.capabilities:
        active = (await store.get_statistics()).active_runs
        context.expect(active, 1, "the active runs by the store's own clock")
    for timeout_at, listed in ((future, []), (past, [run_id])):
        await store.configure_run(run_id, FLOW, "manual", timeout_at=timeout_at)
        if Capability.DEADLINES in context.capabilities:
            found = [run.run_id for run in await store.get_runs_to_stop()]
            context.expect(found, listed, "the runs to stop by the store's own clock")
    orphan = new_id(context)
    await store.try_register_idempotency_key(FLOW, "manual", "key", orphan)
    context.expect(await store.cleanup(past), 0, "a cleanup with a cutoff two days ago")
    context.expect(await store.cleanup(future), 1, "a cleanup with a cutoff in two days")
    found_id = await store.find_run_id_by_idempotency_key(FLOW, "manual", "key")
    context.expect(found_id, orphan, "the run of a key younger than an hour by the store's own clock")


@example("CON-2", kind=Kind.CAPABILITY)
async def a_closed_store_raises_store_closed(context: CheckContext) -> None:
    """aclose is idempotent; afterwards each operation with legal arguments raises StoreClosedError."""
    async with context.backend.scratch(context.base_url) as url:
        async with open_store(url) as store:
            context.expect(await outcome_of(store.ping()), None, "ping of an open store")
            await asyncio.gather(*(store.aclose() for _ in range(3)))
            context.expect(await outcome_of(store.aclose()), None, "aclose of a closed store")
            await _expect_closed(context, store)
        try:
            async with open_store(url) as store:
                raise ZeroDivisionError
        except ZeroDivisionError:
            await context.expect_error(
                store.ping(), StoreClosedError, "ping of a store whose context exited with an error"
            )
    other = await new_store(context)
    if other is not context.store:
        await other.aclose()
        run_id = await start(context)
        status = await context.store.get_run_status(run_id)
        context.expect(status, RunStatus.RUNNING, "a read through another store after closing one")
        closing = await new_store(context)
        keys = [f"step {number}" for number in range(12)]
        calls = [
            asyncio.ensure_future(outcome_of(closing.try_claim_step(run_id, key, owner="me"))) for key in keys
        ]
        await asyncio.sleep(0)
        await closing.aclose()
        claimed = await context.store.get_claimed_step_keys(run_id)
        for key, answer in zip(keys, await asyncio.gather(*calls), strict=True):
            held = answer is True and key in claimed
            sentence = f"a call in flight at aclose: expected its result or StoreClosedError, got {answer}"
            context.expect_that(held or answer == f"<{StoreClosedError.__name__} raised>", sentence)


async def _expect_closed(context: CheckContext, store: FlowStore) -> None:
    await context.expect_error(store.ping(), StoreClosedError, "ping of a closed store")
    for operation in ARGUMENT_KINDS:
        call = getattr(store, operation)(**legal_arguments(operation))
        await context.expect_error(call, StoreClosedError, f"{operation} of a closed store")
        for name, arguments in list(hostile_arguments(operation, ("id", "take", "datetime")))[:1]:
            call = getattr(store, operation)(**arguments)
            sentence = f"{operation} of a closed store with an illegal {name}"
            await context.expect_error(call, InvalidArgumentError, sentence)


@example("CON-6", kind=Kind.CAPABILITY)
async def an_unknown_option_is_refused(context: CheckContext) -> None:
    """By keyword and in the URL's query it raises ConfigurationError, and nothing is opened."""
    name = "no_such_option"
    context.expect_that(name not in context.backend.options, f"the backend does not list {name}")
    mark = "&" if "?" in context.url else "?"
    attempts: tuple[tuple[str, dict[str, Any]], ...] = (
        (context.url, {name: 1}),
        (f"{context.url}{mark}{name}=1", {}),
    )
    for url, options in attempts:
        where = "by keyword" if options else "in the query"
        try:
            async with open_store(url, **options):
                pass
        except FlowStoreError as error:
            sentence = f"an unknown option {where}"
            context.expect(type(error).__name__, ConfigurationError.__name__, sentence)
        else:
            context.expect_that(False, f"an unknown option {where}: expected ConfigurationError, got a store")


@example("CON-6", kind=Kind.CAPABILITY)
async def scratch_creates_a_fresh_namespace_and_drops_it(context: CheckContext) -> None:
    """Two namespaces are separate, each starts empty, and nothing is left of a dropped or emptied one."""
    run_id = await start(context)
    urls = []
    for _ in range(2):
        async with context.new_namespace() as other:
            urls.append(other.url)
            context.expect_that(other.url != context.url, "scratch creates a different namespace each time")
            context.expect(await other.store.get_runs(), (), "a fresh namespace is empty")
            await start(other, run_id=RUN)
            context.expect(
                await context.store.get_run_status(RUN), None, "the status of a run of another namespace"
            )
            if isinstance(other.backend, ScratchClearable):
                await _expect_emptied(other, other.backend)
    context.expect_that(urls[0] != urls[1], "scratch creates a different namespace each time")
    status = await context.store.get_run_status(run_id)
    context.expect(status, RunStatus.RUNNING, "a run after other namespaces were created and dropped")
    for url in urls:
        try:
            async with open_store(url, migrate=False) as store:
                left: object = await store.get_runs()
        except FlowStoreError:
            # The namespace is gone, and migrate=False creates nothing in its place.
            left = ()
        context.expect(left, (), "the runs of a dropped namespace")


async def _expect_emptied(context: CheckContext, backend: ScratchClearable) -> None:
    """Empty a namespace; the stores that are open on it find nothing, and go on as on a new one."""
    unknown = await observe(context, new_id(context))
    stores = await context.workers(2)
    runs = [new_id(context) for _ in range(CONCURRENT_STARTS)]
    for store in stores:
        mine = runs[: CONCURRENT_STARTS // 2] if store is context.store else runs[CONCURRENT_STARTS // 2 :]
        await asyncio.gather(*(store.start_run(FLOW, "orders", run_id, "manual") for run_id in mine))
    await run_step(context, runs[0])
    await backend.clear_scratch(context.url)
    for store in stores:
        after = await observe(context, runs[0], store=store)
        assert_same(context, after, unknown, "the state of a namespace that clear_scratch has emptied")
    for store in stores:
        run_id = runs.pop(0)
        await store.start_run(FLOW, "orders", run_id, "manual")
        statuses = [await one.get_run_status(run_id) for one in stores]
        sentence = "the status of a run that an open store started after clear_scratch"
        context.expect(statuses, [RunStatus.RUNNING] * len(stores), sentence)


@example("CON-6", kind=Kind.CAPABILITY)
async def many_stores_can_open_a_new_namespace_at_once(context: CheckContext) -> None:
    """A dozen stores open one fresh namespace concurrently, and all work on the same data."""
    count = context.profile.of(4, 12, 12)
    given: dict[str, Any] = {} if context.clock is None else {"clock": context.clock}
    async with context.backend.scratch(context.base_url) as url, AsyncExitStack() as stack:

        async def join() -> FlowStore | FlowStoreError:
            try:
                return await stack.enter_async_context(open_store(url, **given))
            except FlowStoreError as error:
                return error

        stores = await asyncio.gather(*(join() for _ in range(count)))
        opened = [store for store in stores if not isinstance(store, FlowStoreError)]
        failed = [error for error in stores if isinstance(error, FlowStoreError)]
        if Capability.MULTI_PROCESS not in context.capabilities:
            # Without MULTI_PROCESS a backend may allow one store at a time and refuse the others.
            failed = [error for error in failed if not isinstance(error, StoreUnavailableError)]
        names = [type(error).__name__ for error in failed]
        context.expect(names, [], f"{count} stores opening a fresh namespace concurrently")
        context.expect_that(opened, "at least one of many concurrent openers of a fresh namespace succeeds")
        run_id = new_id(context)
        await opened[0].start_run(FLOW, "orders", run_id, "manual")
        won = await asyncio.gather(
            *(
                outcome_of(store.try_claim_step(run_id, "charge", owner=str(n)))
                for n, store in enumerate(opened)
            )
        )
        context.expect(
            sorted(map(str, won)),
            ["False"] * (len(won) - 1) + ["True"],
            "the results of a claim through every store",
        )
        seen = [await store.get_claimed_step_keys(run_id) for store in opened]
        context.expect(seen, [{"charge"}] * len(opened), "the claims read through every store")


@example("CON-6", kind=Kind.CAPABILITY)
async def opening_again_changes_nothing(context: CheckContext) -> None:
    """Opening a migrated namespace with and without migration shows the stored data unchanged."""
    run_id = new_id(context)
    async with context.backend.scratch(context.base_url) as url:
        observations: list[dict[str, Any]] = []
        for migrate in (True, True, False):
            async with open_store(url, migrate=migrate) as store:
                if not observations:
                    await store.start_run(FLOW, "orders", run_id, "manual")
                    await store.record_step_start(run_id, "charge", "http")
                    await store.try_claim_step(run_id, "ship", owner="me")
                observations.append(await observe(context, run_id, store=store))
    for after in observations[1:]:
        assert_same(context, after, observations[0], "opening again changes nothing")


@check("CON-5")
async def stored_data_outlives_every_store(context: CheckContext) -> None:
    """A new store reads all data of closed ones; a store with an option that risks data lacks DURABLE."""
    run_id = await start(context)
    await run_step(context, run_id)
    await context.store.configure_run(run_id, FLOW, "manual", idempotency_key="key")
    await context.store.try_claim_step(run_id, "ship", owner="me")
    before = await observe(context, run_id)
    await context.store.aclose()
    other = await context.open()
    after = await observe(context, run_id, store=other)
    assert_same(context, after, before, "the state after every store was closed")
    await other.aclose()
    if isinstance(context.backend, NonDurableUrls):
        for url in context.backend.non_durable_urls(context.url):
            async with open_store(url) as store:
                declared = Capability.DURABLE in store.capabilities
            context.expect(declared, False, f"whether the store at {redact(url)} declares DURABLE")
