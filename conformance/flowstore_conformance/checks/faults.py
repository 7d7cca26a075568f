"""CON-1, CON-3, CON-6 and QUE-3 under faults: requests that are lost, late or fail, other schema versions.

A backend offers the faults through protocols of flowstore_core.backend; without them these checks are
UNSUPPORTED. With ``--faults`` proxies lose and delay the requests of a backend without an injector.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from flowstore_conformance.checks import fixtures
from flowstore_conformance.checks.fixtures import FLOW, HOUR, assert_same, new_id, start
from flowstore_conformance.checks.queues import enqueue, new_queue
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Unsupported
from flowstore_conformance.history import Call, Outcome, Raised, Returned, comparable
from flowstore_conformance.model import State
from flowstore_conformance.network_faults import NetworkInjector
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    find_partial_effect,
    invoke,
    observe,
    observe_until,
    outcome_of,
)
from flowstore_conformance.write_scenarios import Scenario, ScenarioFactory, available, new_scenario
from flowstore_core import (
    ConfigurationError,
    FlowStore,
    OutcomeUnknownError,
    SchemaVersionError,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.backend import (
    FaultInjectable,
    FaultInjector,
    SchemaVersionAdjustable,
    VariantUrls,
    WriteFailable,
    WriteFailureInjector,
)

DID_NOT_HAPPEN = Raised(StoreUnavailableError.__name__)
UNKNOWN_OUTCOME = Raised(OutcomeUnknownError.__name__)


@dataclass(frozen=True, slots=True)
class _Faults:
    injector: FaultInjector
    store: FlowStore
    """Its requests pass through the injector; those of the context's own store do not."""


@asynccontextmanager
async def _faults(context: CheckContext, url: str | None = None) -> AsyncIterator[_Faults]:
    if not isinstance(context.backend, FaultInjectable):
        raise Unsupported("the backend does not implement FaultInjectable, so no request can be disturbed")
    try:
        async with (
            context.backend.inject_faults(url or context.url) as injector,
            open_store(injector.url, clock=context.clock) as store,
        ):
            yield _Faults(injector, store)
    except ConfigurationError as error:
        raise Unsupported(f"no fault can be injected: {error}") from error


async def _in_every_variant(
    context: CheckContext, work: Callable[[CheckContext, _Faults], Awaitable[None]]
) -> None:
    """Do the work with the options of the check and, concurrently, with each other variant.

    Some variants wait after each lost request, so several stores share their work.
    """
    urls = [context.url]
    if isinstance(context.backend, VariantUrls):
        others = context.backend.variants(context.url).values()
        urls += [url for url in others if url != context.url] * context.profile.of(1, 5, 5)

    async def run(url: str) -> None:
        async with _faults(context, url) as faults:
            await work(context, faults)

    tasks = [asyncio.ensure_future(run(url)) for url in urls]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _states(context: CheckContext, scenario: Scenario) -> tuple[ModelState, ModelState]:
    """The model's states before and after the call of a scenario."""
    before = ModelState(context.clock or (lambda: datetime.now(UTC)), State())
    for call in scenario.setup:
        before = before.apply(call, exact_times=context.exact_times)
    return before, before.apply(scenario.call, exact_times=context.exact_times)


class _Fault(Enum):
    """What happens to a request; the value completes a sentence."""

    LOSE_REPLY = "after the reply to its request {} was lost"
    HOLD_REQUEST = "whose request {} was delayed"
    REFUSE_REQUEST = "whose request {} was refused once, as after a deadlock,"


REVERSAL_SECONDS = 0.5
"""How long another client looks for the effect of a request."""
POLL_SECONDS = 0.01
MAX_REQUESTS = 5
"""The search for the last request of a call, which is often a commit, begins with this one."""


async def _disturbed_calls(
    context: CheckContext, faults: _Faults, fault: _Fault
) -> AsyncIterator[tuple[str, Scenario, Outcome]]:
    """Disturb the last request of every write, then the first one, the second, and so on, while time is left.

    Yields the title, the scenario and the call's outcome.
    """
    seconds = context.profile.of(1, 8, 180) / (3 if fault is _Fault.REFUSE_REQUEST else 1)
    until = time.monotonic() + seconds
    factories = available(context.capabilities)
    names = context.random.sample(list(factories), len(factories))
    injected = 0
    orders: list[Sequence[int]] = [range(MAX_REQUESTS - 1, -1, -1), *([skip] for skip in range(100))]
    for order in orders:
        for name in tuple(names):
            if injected and time.monotonic() >= until:
                return
            for skip in order:
                called = await _call_with_fault(context, faults, factories[name], fault, skip)
                if called is not None:
                    break
            else:
                names.remove(name)  # The call makes no further request.
                continue
            injected += 1
            what = f"{name}: {called[0].call.method} {fault.value.format(skip + 1)}"
            yield (what, *called)
        if not names:
            break
    if not injected:
        raise Inconclusive("the injector affected no request of any write", retryable=False)


async def _call_with_fault(
    context: CheckContext, faults: _Faults, factory: ScenarioFactory, fault: _Fault, skip: int
) -> tuple[Scenario, Outcome] | None:
    """Make the call of a new scenario with one fault; None if the call sends fewer requests."""
    scenario = new_scenario(context, factory)
    for call in scenario.setup:
        await invoke(context.store, call)
    # Idle connections are open and tested before the fault.
    await faults.store.ping()
    _arm(faults.injector, fault, skip)
    outcome = await outcome_of(faults.store, scenario.call, exact_times=context.exact_times)
    return (scenario, outcome) if faults.injector.disarm() else None


def _arm(injector: FaultInjector, fault: _Fault, skip: int) -> None:
    match fault:
        case _Fault.LOSE_REPLY:
            injector.lose_reply(skip=skip)
        case _Fault.HOLD_REQUEST:
            injector.hold_request(skip=skip)
        case _Fault.REFUSE_REQUEST:
            injector.refuse_request(skip=skip)


def _allowed_states(
    title: str, outcome: Outcome, before: ModelState, after: ModelState
) -> Sequence[ModelState]:
    """The states that fit the outcome of a call. Raises ContractViolation for an outcome that fits none."""
    if outcome == after.outcome:
        return [after]
    if outcome == DID_NOT_HAPPEN:
        return [before]
    if outcome == UNKNOWN_OUTCOME:
        return [before, after]
    assert after.outcome is not None
    raise ContractViolation(
        f"{title}: expected {describe_outcome(after.outcome)}, the result of the call that took effect once, "
        f"or {OutcomeUnknownError.__name__}; got {describe_outcome(outcome)}. Make each write carry a token "
        "and look for the token before the write is repeated"
    )


@check("CON-3", kind=Kind.FAULT, rotation="lost requests")
async def a_lost_reply_is_resolved(context: CheckContext) -> None:
    """A write whose reply is lost returns its true result or OutcomeUnknownError, and happens once or not."""
    await _in_every_variant(context, _lose_replies)


async def _lose_replies(context: CheckContext, faults: _Faults) -> None:
    async for title, scenario, outcome in _disturbed_calls(context, faults, _Fault.LOSE_REPLY):
        before, after = _states(context, scenario)
        partial = await find_partial_effect(
            context.store,
            scenario.probes,
            scenario.call,
            before=before,
            possible=_allowed_states(title, outcome, before, after),
            exact_times=context.exact_times,
        )
        context.assertions += 1
        if partial is not None:
            raise ContractViolation(f"{title} returned {describe_outcome(outcome)}, but {partial}")


@check("CON-2", kind=Kind.FAULT, isolated=False)
async def a_refused_request_is_repeated(context: CheckContext) -> None:
    """A write that the database refuses once, as after a deadlock, is repeated and succeeds."""
    async with _faults(context) as faults:
        async for title, scenario, outcome in _disturbed_calls(context, faults, _Fault.REFUSE_REQUEST):
            after = _states(context, scenario)[1]
            assert after.outcome is not None
            context.expect_that(
                outcome == after.outcome,
                f"{title}: expected {describe_outcome(after.outcome)}, got {describe_outcome(outcome)}",
            )


def _reversals(scenario: Scenario) -> Sequence[Call]:
    """Calls of other clients that undo or replace the effect of a scenario's call."""
    call, run_id = scenario.call, scenario.run_id

    def on(method: str, **arguments: object) -> Call:
        return Call(method=method, arguments={"run_id": run_id, **arguments})

    key = {"step_key": call.arguments.get("step_key")}
    match call.method:
        case "try_claim_step":
            release = on("release_step_claim", **key)
            return [release, on("try_claim_step", **key, owner="of another"), release]
        case "release_step_claim":
            claim = on("try_claim_step", **key, owner=call.arguments["owner"])
            return [claim, call, claim]
        case "renew_step_claim":
            return [
                on("release_step_claim", **key),
                on("try_claim_step", **key, owner=call.arguments["owner"]),
            ]
        case "try_record_dispatch":
            release = on("release_dispatch", **key)
            return [release, on("try_record_dispatch", **key), release]
        case "annotate_dispatch":
            return [on("annotate_dispatch", **key, job_id="of another")]
        case "release_dispatch":
            dispatch = on("try_record_dispatch", **key)
            return [dispatch, call, dispatch]
        case "save_output" | "save_outputs":
            return [on("save_output", key="k", value_json='"of another"')]
        case "record_step_start" if call.arguments.get("owner") is None:
            return [on("record_step_start", **key, step_type="of another")]
        case "record_step_start" | "try_start_step":
            failed = on("record_step_complete", **key, status="Failed", error_message="by another")
            return [on("release_step_claim", **key), failed]
        case "append_event":
            return [on("append_event", event_type="of another")]
        case "start_run":
            return [on("complete_run", status="Failed")]
        case _:
            return []


@check("CON-3", kind=Kind.FAULT, rotation="lost requests")
async def a_write_whose_effect_was_reversed_is_not_repeated(context: CheckContext) -> None:
    """A write whose reply is lost, and whose effect another client then reverses, does not happen again."""
    async with _faults(context) as faults:
        names = [
            name
            for name, one in available(context.capabilities).items()
            if _reversals(new_scenario(context, one))
        ]
        # The injector of a backend knows which request is a write.
        skips = deque(range(MAX_REQUESTS) if isinstance(faults.injector, NetworkInjector) else [0])
        for name in names * context.profile.of(1, 2, 20):
            for skip in tuple(skips):
                scenario = new_scenario(context, available(context.capabilities)[name])
                if await _reverse_effect(context, faults, scenario, skip):
                    # Most likely the number of the write in the next call, too.
                    skips.remove(skip)
                    skips.appendleft(skip)
                    break


async def _reverse_effect(context: CheckContext, faults: _Faults, scenario: Scenario, skip: int) -> bool:
    """Lose a reply, and reverse the effect of its request. False if the request had no effect."""
    exact_times = context.exact_times
    before, after = _states(context, scenario)
    # A read that shows the effect.
    probe, shown = next(
        (
            (one, result)
            for one, was, result in zip(
                scenario.probes,
                before.observe(scenario.probes, exact_times=exact_times),
                after.observe(scenario.probes, exact_times=exact_times),
                strict=True,
            )
            if was != result
        ),
        (None, None),
    )
    if probe is None:
        return False
    for call in scenario.setup:
        await invoke(context.store, call)
    await faults.store.ping()
    faults.injector.lose_reply(skip=skip, isolates=True)
    calling = asyncio.ensure_future(outcome_of(faults.store, scenario.call, exact_times=exact_times))
    until, seen = time.monotonic() + REVERSAL_SECONDS, None
    while not calling.done() and seen != shown and time.monotonic() < until:
        seen = comparable(await invoke(context.store, probe), exact_times=exact_times)
        await asyncio.sleep(POLL_SECONDS)
    if seen != shown:
        # A read, or a request inside a transaction.
        faults.injector.disarm()
        await calling
        return False
    state = after
    for reversal in _reversals(scenario):
        await invoke(context.store, reversal)
        state = state.apply(reversal, exact_times=exact_times)
    faults.injector.disarm()
    outcome = await calling
    title = f"{scenario.call.method} whose reply was lost, and whose effect another client then reversed"
    context.expect_that(
        outcome in (after.outcome, UNKNOWN_OUTCOME),
        f"{title}: expected {describe_outcome(after.outcome or outcome)}, got {describe_outcome(outcome)}",
    )
    wanted = [state.observe(scenario.probes, exact_times=exact_times)]
    found = await observe_until(context.store, scenario.probes, wanted, exact_times=exact_times)
    if found not in wanted:
        raise ContractViolation(
            f"{title}: {difference(scenario.probes, found, wanted)}. Let the token of a call outlive its "
            "effect, and look for it before the write is repeated"
        )
    return True


@check("CON-3", kind=Kind.FAULT, rotation="lost requests")
async def a_late_request_changes_nothing(context: CheckContext) -> None:
    """A request that reaches the database after the result of its call has no effect."""
    await _in_every_variant(context, _delay_requests)


async def _delay_requests(context: CheckContext, faults: _Faults) -> None:
    async for title, scenario, outcome in _disturbed_calls(context, faults, _Fault.HOLD_REQUEST):
        before, after = _states(context, scenario)
        allowed = _allowed_states(title, outcome, before, after)
        try:
            await _check_late_arrival(context, faults, scenario, title, outcome, allowed)
        except StoreUnavailableError:
            if not isinstance(faults.injector, NetworkInjector):
                raise
            # A proxy may hold a request inside a transaction, which then keeps its locks.
            await faults.injector.release_request()


async def _check_late_arrival(
    context: CheckContext,
    faults: _Faults,
    scenario: Scenario,
    title: str,
    outcome: Outcome,
    allowed: Sequence[ModelState],
) -> None:
    """Change the state after the call, let the request arrive, and expect the changed state."""
    exact_times = context.exact_times
    undo = _undo(scenario) if isinstance(outcome, Returned) else None
    if undo is not None:
        await invoke(context.store, undo)
        allowed = [one.apply(undo, exact_times=exact_times) for one in allowed]
    wanted = [one.observe(scenario.probes, exact_times=exact_times) for one in allowed]
    seen = await observe_until(context.store, scenario.probes, wanted, exact_times=exact_times)
    context.assertions += 1
    if seen in wanted:
        await faults.injector.release_request()
        wanted = [seen]
        seen = await observe_until(context.store, scenario.probes, wanted, exact_times=exact_times)
        title += ", and which arrived after the call had returned" + (f" and {undo.method}" if undo else "")
    else:
        await faults.injector.release_request()
    if seen not in wanted:
        raise ContractViolation(
            f"{title}: {difference(scenario.probes, seen, wanted)}. Send a deadline with each "
            "statement, after which it does nothing, and return no result before the deadline of a statement "
            "without a reply"
        )


def _undo(scenario: Scenario) -> Call | None:
    """A call that undoes the effect of a scenario's call, so that a repeated effect shows."""
    call, run_id = scenario.call, scenario.run_id
    inverse = {
        "try_claim_step": "release_step_claim",
        "try_start_step": "release_step_claim",
        "claim_next_steps": "release_step_claim",
        "try_record_dispatch": "release_dispatch",
    }
    if call.method in inverse:
        step = {"run_id": run_id, "step_key": call.arguments.get("step_key", "a")}
        return Call(method=inverse[call.method], arguments=step)
    return None


@check("CON-1", "CON-2", kind=Kind.FAULT)
async def a_failed_write_changes_nothing(context: CheckContext) -> None:
    """A write of which the database fails a request, and all later ones, raises and changes nothing."""
    if not isinstance(context.backend, WriteFailable):
        raise Unsupported("the backend does not implement WriteFailable, so no write can fail")
    async with (
        context.backend.inject_write_failures(context.url) as injector,
        open_store(injector.url, clock=context.clock) as store,
    ):
        for name, factory in available(context.capabilities).items():
            scenario = new_scenario(context, factory)
            if scenario.call.method == "annotate_dispatch":
                continue  # It is best effort and never raises (CLM-7).
            skip, is_prepared = 0, False
            while True:
                if not is_prepared:
                    for call in scenario.setup:
                        await invoke(context.store, call)
                    before, after = _states(context, scenario)
                outcome, has_failed = await _call_with_failures(
                    context, injector, store, scenario, name, skip, before, after
                )
                if not has_failed:
                    break
                skip += 1
                is_prepared = outcome == DID_NOT_HAPPEN
                if not is_prepared:
                    # It took effect, or may have, before a request failed.
                    scenario = new_scenario(context, factory)
            seen = [one.observe(scenario.probes, exact_times=context.exact_times) for one in (before, after)]
            # A call that changes nothing may only read.
            context.expect_that(
                skip or seen[0] == seen[1], f"{name}: a write sends at least one request that can fail"
            )


async def _call_with_failures(
    context: CheckContext,
    injector: WriteFailureInjector,
    store: FlowStore,
    scenario: Scenario,
    name: str,
    skip: int,
    before: ModelState,
    after: ModelState,
) -> tuple[Outcome, bool]:
    """Make the call of a scenario, whose first requests alone succeed.

    Returns the outcome, and whether a request has failed.
    """
    exact_times = context.exact_times
    injector.fail(skip=skip)
    outcome = await outcome_of(store, scenario.call, exact_times=exact_times)
    has_failed = injector.stop()
    title = f"{name}: {scenario.call.method} of which each request after the first {skip} failed"
    wanted = [
        one.observe(scenario.probes, exact_times=exact_times)
        for one in _allowed_states(title, outcome, before, after)
    ]
    seen = await observe(context.store, scenario.probes, exact_times=exact_times)
    context.assertions += 1
    if seen not in wanted:
        raise ContractViolation(
            f"{title} returned {describe_outcome(outcome)}, but has a partial effect: "
            f"{difference(scenario.probes, seen, wanted)}. Write all effects of a call in one transaction"
        )
    return outcome, has_failed


@check("QUE-3", kind=Kind.FAULT)
async def a_repeated_claim_claims_nothing_more(context: CheckContext) -> None:
    """claim_next_steps whose reply is lost returns the steps that it claimed, and claims no others."""
    store, skip, affected = context.store, 0, True
    async with _faults(context) as faults:
        while affected:
            queue, run_id = new_queue(context), await start(context)
            await enqueue(context, run_id, queue, *"abcdef")
            # Idle connections are open and tested before the fault.
            await faults.store.ping()
            faults.injector.lose_reply(skip=skip)
            outcome: object
            try:
                outcome = await faults.store.claim_next_steps([queue], lease=HOUR, limit=2)
            except (StoreUnavailableError, OutcomeUnknownError) as error:
                outcome = type(error)
            affected = faults.injector.disarm()
            skip += 1
            title = f"claim_next_steps with limit=2 after the reply to its request {skip} was lost"
            held = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
            if isinstance(outcome, tuple):
                returned = {step.step_key: step.owner for step in outcome}
                context.expect(len(returned), 2, f"{title}: the steps that it returned, of 6 ready ones")
                context.expect(sorted(held), sorted(returned), f"{title}: the steps that are claimed")
                context.expect_that(held == returned, f"{title}: each owner is that of the stored claim")
            else:
                most = 0 if outcome is StoreUnavailableError else 2
                context.expect_that(len(held) <= most, f"{title}: of 6 steps {len(held)} are claimed")
            rest = await store.claim_next_steps([queue], lease=HOUR, limit=1000)
            left = sorted([*held, *(step.step_key for step in rest)])
            context.expect(left, list("abcdef"), f"{title}: all steps, claimed or still ready")
    if skip == 1:
        raise Inconclusive("the injector affected no request of claim_next_steps", retryable=False)


@check("CON-6", kind=Kind.FAULT, isolated=False, rotation="schema versions")
async def another_schema_version_is_refused(context: CheckContext) -> None:
    """A newer schema, or an older one with migrate=False, raises SchemaVersionError and stays unchanged."""
    if not isinstance(context.backend, SchemaVersionAdjustable):
        raise Unsupported("the backend does not implement SchemaVersionAdjustable")
    async with context.backend.scratch(context.base_url) as url:
        run_id = new_id(context)
        async with open_store(url) as store:
            await store.start_run(FLOW, "orders", run_id, "manual")
            await store.record_step_start(run_id, "charge", "http")
            before = await fixtures.observe(context, run_id, store=store)
        for age, difference_, migrate in (("newer", 1, True), ("newer", 1, False), ("older", -1, False)):
            async with context.backend.adjust_schema_version(url, difference_):
                error = await _refusal(url, migrate=migrate)
            name = "a store" if error is None else type(error).__name__
            context.expect(name, SchemaVersionError.__name__, f"opening {age} schema with migrate={migrate}")
            assert isinstance(error, SchemaVersionError)
            ordered = error.found > error.needed if difference_ > 0 else error.found < error.needed
            context.expect_that(
                ordered,
                f"SchemaVersionError of {age} schema: found {error.found}, needed {error.needed}",
            )
            async with open_store(url, migrate=False) as store:
                after = await fixtures.observe(context, run_id, store=store)
                assert_same(context, after, before, f"the data after opening {age} schema was refused")


async def _refusal(url: str, *, migrate: bool) -> Exception | None:
    """The error that opening a store raises."""
    try:
        async with open_store(url, migrate=migrate):
            return None
    except Exception as error:  # noqa: BLE001 - the caller compares its class
        return error
