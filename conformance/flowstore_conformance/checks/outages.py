"""CON-2, CON-4, CLM-6 and CLM-7 beside a locked or unavailable database.

A backend offers locks and interruptions through OutageInjectable of flowstore_core.backend; without it these
checks are UNSUPPORTED.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID

from flowstore_conformance.checks.cancelled_rivals import RIGHTS, Contest, end_compensations, end_tasks
from flowstore_conformance.checks.fixtures import FLOW, new_id, new_store, now, start
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Unsupported
from flowstore_conformance.history import Call
from flowstore_conformance.model import State
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import ModelState, describe_outcome, invoke, outcome_of
from flowstore_conformance.write_scenarios import Scenario, available, new_scenario
from flowstore_core import (
    Capability,
    ConfigurationError,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.backend import OutageInjectable, OutageInjector

LOCK_SECONDS = 0.25
"""Long enough that the calls of every store have begun to wait, and short for a store's patience."""
KEYS = tuple(f"key {number}" for number in range(8))
MEBIBYTE = 2**20
MAX_PINGS = 20
"""Number of pings, on a store with short timeouts, until a loaded machine has connected it."""


@asynccontextmanager
async def _outages(context: CheckContext) -> AsyncIterator[OutageInjector]:
    if not isinstance(context.backend, OutageInjectable):
        raise Unsupported("the backend does not implement OutageInjectable, so its database is never locked")
    try:
        async with context.backend.inject_outages(context.url) as injector:
            yield injector
    except ConfigurationError as error:
        raise Unsupported(f"no outage can be injected: {error}") from error


# Locks


@check("CON-2", "CON-1", kind=Kind.FAULT, isolated=False, rotation="locks")
async def a_locked_database_is_waited_for(context: CheckContext) -> None:
    """A write that meets another client's lock waits, and then succeeds."""
    by_operation: dict[str, Scenario] = {}
    for factory in available(context.capabilities).values():
        scenario = new_scenario(context, factory)
        if scenario.call.method != "claim_next_steps":  # It may pass over locked steps (QUE-2).
            by_operation.setdefault(scenario.call.method, scenario)
    scenarios = list(by_operation.values())

    async def prepare(calls: Sequence[Call]) -> None:
        for call in calls:
            await invoke(context.store, call)

    await asyncio.gather(*(prepare(one.setup) for one in scenarios))
    clock = context.clock or (lambda: datetime.now(UTC))
    async with _outages(context) as injector:
        async with injector.lock():
            writes = [
                asyncio.ensure_future(outcome_of(context.store, one.call, exact_times=context.exact_times))
                for one in scenarios
            ]
            await asyncio.sleep(LOCK_SECONDS)
        outcomes = await asyncio.gather(*writes)
    for one, outcome in zip(scenarios, outcomes, strict=True):
        state = ModelState(clock, State())
        for call in (*one.setup, one.call):
            state = state.apply(call, exact_times=context.exact_times)
        assert state.outcome is not None
        context.expect_that(
            outcome == state.outcome,
            f"{one.call.method} beside a lock that another client held for {LOCK_SECONDS:g} s: expected "
            f"{describe_outcome(state.outcome)}, got {describe_outcome(outcome)}",
        )


@check("CON-4", kind=Kind.FAULT, isolated=False, rotation="locks")
async def calls_cancelled_behind_a_lock_keep_nothing(context: CheckContext) -> None:
    """A claim or dispatch that is cancelled while it waits for a lock is undone, also by a closing store."""
    for closes in (False, True):
        store, run_id = await new_store(context), await start(context)
        if store is context.store:
            raise Unsupported("the backend allows one store at a time")
        contests = [Contest(right, run_id) for right in RIGHTS]
        async with _outages(context) as injector:
            # Connected before the lock.
            await store.get_run_status(run_id)
            async with injector.lock():
                others: list[asyncio.Future[object]] = []
                if not closes:
                    others.append(asyncio.ensure_future(store.try_claim_step(run_id, "first", owner="me")))
                tasks = []
                for key in KEYS:
                    # A store may treat calls differently that meet a lock for which others wait already.
                    await asyncio.sleep(0 if closes else LOCK_SECONDS / 4)
                    tasks += [asyncio.ensure_future(contest.take(store, key)) for contest in contests]
                await asyncio.sleep(0.05)
                for task in tasks:
                    if closes or context.random.random() < 0.8:
                        task.cancel()
                if closes:
                    others.append(asyncio.ensure_future(store.aclose()))
                await asyncio.sleep(0.02)
            await end_tasks([*tasks, *others])
        await end_compensations(context, store)
        for contest in contests:
            how = "behind a lock, on a store that closes" if closes else "behind a lock"
            await contest.expect_only_wins(context, (), KEYS, how)


@check("CON-4", kind=Kind.FAULT, isolated=False, rotation="cancelled claims")
async def undoing_a_cancelled_call_spares_a_later_winner(context: CheckContext) -> None:
    """A claim or dispatch that another caller wins before a cancelled one is undone stays with its winner."""
    if Capability.OUTPUTS not in context.capabilities:
        raise Unsupported("the store has no large write that delays the compensation")
    store, other, run_id = await new_store(context), context.store, await start(context)
    contests = [Contest(right, run_id) for right in RIGHTS]
    text = "x" * context.text_size(16 * MEBIBYTE)

    async def release_and_take(contest: Contest, key: str) -> None:
        await contest.right.give_back(store, run_id, key)
        await contest.take(other, key)

    async with _outages(context) as injector:
        await store.get_run_status(run_id)
        async with injector.lock():
            # While the first call waits, the others queue, and may share its successor's transaction.
            first = asyncio.ensure_future(store.try_claim_step(run_id, "first", owner="me"))
            await asyncio.sleep(0.02)
            pairs = [(contest, key) for contest in contests for key in KEYS]
            cancelled = [
                asyncio.ensure_future(contest.right.take(store, run_id, key)) for contest, key in pairs
            ]
            later = [asyncio.ensure_future(release_and_take(contest, key)) for contest, key in pairs]
            # The compensations wait for these writes; the releases do not.
            writes = [
                asyncio.ensure_future(store.save_output(run_id, f"{number}", text)) for number in range(3)
            ]
            await asyncio.sleep(0)
        await first
        for _ in range(3):
            await asyncio.sleep(0)
        for task in cancelled:
            task.cancel()
        await end_tasks([*cancelled, *later, *writes])
    await end_compensations(context, store)
    for contest in contests:
        await contest.expect_only_wins(context, (), KEYS, "that follows a cancelled call and a release")


@check("CLM-6", "CLM-1", needs=[Capability.LEASES], kind=Kind.FAULT, isolated=False, rotation="locks")
async def leases_begin_when_a_lock_ends(context: CheckContext) -> None:
    """A lease is granted after the wait for another client's lock, and then lasts its whole time."""
    lease, run_id = LOCK_SECONDS, await start(context)
    store, rival = [await new_store(context, clock=None) for _ in range(2)]
    async with _outages(context) as injector:
        for one in (store, rival):
            await one.get_run_status(run_id)
        async with injector.lock():
            claims = [
                asyncio.ensure_future(
                    store.try_claim_step(run_id, key, owner=key, lease=timedelta(seconds=lease))
                )
                for key in KEYS
            ]
            await asyncio.sleep(lease)
            started = asyncio.ensure_future(rival.start_run(FLOW, "orders", new_id(context), "manual"))
            await asyncio.wait({started}, timeout=0.05)
            during_lock = started.result().started_at if started.done() else None
            unlocked = time.monotonic()
        won = await asyncio.gather(*claims)
        await started
    context.expect(won, [True] * len(KEYS), "claims of free steps behind a lock")
    if during_lock is not None:
        first = min(claim.claimed_at for claim in await store.get_step_claims(run_id))
        context.expect_that(
            first >= during_lock,
            f"the first of the claims that waited for a lock: expected claimed_at after {during_lock}, when "
            f"the lock was still held, got {first}: read the clock after every wait",
        )
    for key in KEYS:
        taken = await rival.try_claim_step(run_id, key, owner="rival")
        passed = time.monotonic() - unlocked
        context.expect_that(
            not taken or passed > lease * 0.95,
            f"a lease of {lease * 1000:.0f} ms ended {passed * 1000:.0f} ms after the lock for which its "
            "claim waited: read the clock after every wait",
        )


# Interruptions


@check("CON-2", "CLM-7", "CLM-2", kind=Kind.FAULT)
async def an_unavailable_database_is_reported(context: CheckContext) -> None:
    """Without a database calls raise StoreUnavailableError within bounded time; annotate_dispatch logs."""
    async with _outages(context) as injector:
        numbers = range(len(injector.interruptions))
    cases: list[Callable[[CheckContext], Awaitable[None]]] = [
        *(partial(_interrupt, number=number) for number in numbers),
        _outlast_the_patience_of_early_calls,
    ]
    async with AsyncExitStack() as stack:
        contexts = [context, *[await stack.enter_async_context(context.new_namespace()) for _ in cases[1:]]]
        done = await asyncio.gather(
            *(case(one) for case, one in zip(cases, contexts, strict=True)), return_exceptions=True
        )
    for error in done:
        # A database without locks has interruptions alone.
        if isinstance(error, BaseException) and not isinstance(error, Unsupported):
            raise error


@asynccontextmanager
async def _connected(context: CheckContext, injector: OutageInjector) -> AsyncIterator[FlowStore]:
    """Open a store with short timeouts."""
    for _ in range(MAX_PINGS):
        try:
            async with open_store(injector.url, clock=context.clock) as store:
                await store.ping()
                yield store
                return
        except StoreUnavailableError:
            continue
    raise Inconclusive("the store with short timeouts cannot be opened on this machine")


async def _interrupt(context: CheckContext, *, number: int) -> None:
    run_id = await start(context)
    await context.store.try_record_dispatch(run_id, "a")
    async with _outages(context) as injector, AsyncExitStack() as stack:
        store = await stack.enter_async_context(_connected(context, injector))
        with suppress(StoreUnavailableError):
            # A store that checks its database only before its first write has now checked.
            await store.try_record_dispatch(run_id, "b")
        phrase, interruption = list(injector.interruptions.items())[number]
        new = new_id(context)
        async with interruption():
            calls: dict[str, Awaitable[object]] = {
                "annotate_dispatch": store.annotate_dispatch(run_id, "a", "job"),
                "ping": store.ping(),
                "get_run_status": store.get_run_status(run_id),
                "try_claim_step": store.try_claim_step(run_id, "a"),
                "start_run": store.start_run(FLOW, "orders", new, "manual"),
            }
            outcomes = dict(zip(calls, await asyncio.gather(*map(_outcome, calls.values())), strict=True))
            # By now the store has no connection whose request could have arrived.
            again = await _outcome(store.annotate_dispatch(run_id, "a", "job"))
            _expect_unavailable(context, phrase, "annotate_dispatch", again)
            await _expect_same_database(context, phrase, store, new, outcomes["start_run"])
        for name, outcome in outcomes.items():
            _expect_unavailable(context, phrase, name, outcome)


async def _outcome(call: Awaitable[object]) -> object:
    try:
        return await call
    except FlowStoreError as error:
        return error


def _expect_unavailable(context: CheckContext, phrase: str, name: str, outcome: object) -> None:
    got = type(outcome).__name__ if isinstance(outcome, Exception) else repr(outcome)
    if name == "annotate_dispatch":
        context.expect(got, "None", f"annotate_dispatch while {phrase}, which it logs", clause="CLM-7")
    elif name == "ping" or isinstance(outcome, Exception):
        # A read may return from a snapshot that it already has.
        context.expect_that(
            isinstance(outcome, StoreUnavailableError),
            f"{name} while {phrase}: expected StoreUnavailableError, got {got}",
        )


async def _expect_same_database(
    context: CheckContext, phrase: str, store: FlowStore, run_id: UUID, outcome: object
) -> None:
    """Expect that a store that still works has the same database as a new one.

    ``outcome`` is that of the start of a run during the interruption.
    """
    try:
        fresh = await context.open()
    except ContractViolation:
        # A new store finds no database either.
        return
    context.assertions += 1
    if not isinstance(outcome, Exception) and await fresh.get_run_status(run_id) is None:
        message = f"start_run returned although {phrase}, and a new store does not find the run"
        raise ContractViolation(message, clause="CLM-2")
    written = new_id(context)
    await fresh.start_run(FLOW, "orders", written, "manual")
    seen = await _outcome(store.get_run_status(written))
    if seen is None:
        message = f"a read returned although {phrase}, and does not see what a new store wrote"
        raise ContractViolation(message, clause="CLM-2")


async def _outlast_the_patience_of_early_calls(context: CheckContext) -> None:
    """Lock the database until the first of some calls gives up; those that began late must not."""
    run_id = await start(context)
    async with _outages(context) as injector, AsyncExitStack() as stack:
        store = await stack.enter_async_context(_connected(context, injector))
        waited: dict[str, float] = {}

        async def write(key: str) -> object:
            begun = time.monotonic()
            outcome = await _outcome(store.try_record_dispatch(run_id, key))
            waited[key] = time.monotonic() - begun
            return outcome

        async with injector.lock():
            writes = {"first": asyncio.ensure_future(write("first"))}
            while sum(writing.done() for writing in writes.values()) < 2:
                await asyncio.sleep(0.02)
                key = f"later {len(writes)}"
                writes[key] = asyncio.ensure_future(write(key))
        for key, writing in writes.items():
            outcome = await writing
            context.expect_that(
                outcome is True
                or (isinstance(outcome, StoreUnavailableError) and waited[key] > waited["first"] / 4)
                or isinstance(outcome, OutcomeUnknownError),
                f"a dispatch failed after it had waited for a lock for {waited[key]:.2f} s, although an "
                f"earlier one waited for {waited['first']:.2f} s: {outcome!r}",
            )


@check(
    "CTL-2", "CTL-3", "CON-1", needs=[Capability.DEADLINES], kind=Kind.FAULT, isolated=False, rotation="locks"
)
async def a_deadline_extended_behind_a_lock_is_not_missed(context: CheckContext) -> None:
    """If a time-out and an extension of the deadline wait for one lock, no latch is left."""
    due, other = now(context), await new_store(context)
    runs = [await start(context) for _ in KEYS]
    for run_id in runs:
        await context.store.configure_run(run_id, FLOW, "manual", timeout_at=due)
        await other.get_run_status(run_id)
    async with _outages(context) as injector:
        async with injector.lock():
            calls: list[asyncio.Future[bool]] = []
            for extends_first in (True, False):
                for run_id in runs[extends_first::2]:
                    extending = context.store.extend_deadline(run_id, due + timedelta(days=1))
                    marking = other.mark_timed_out(run_id, as_of=due)
                    for call in (extending, marking) if extends_first else (marking, extending):
                        calls.append(asyncio.ensure_future(call))
                        await asyncio.sleep(LOCK_SECONDS / len(KEYS) / 2)
        await end_tasks(calls)
    for run_id in runs:
        control = await context.store.get_run_control(run_id)
        # Whichever came first: an extension clears the latch, or the deadline is not due any more.
        context.expect(
            getattr(control, "timed_out_at", due), None, "timed_out_at after an extension of the deadline"
        )
