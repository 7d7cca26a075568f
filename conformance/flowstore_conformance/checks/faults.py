"""CON-3, CON-6 and QUE-3 under injected faults: lost replies, late requests, other versions of the schema.

A backend offers the faults through FaultInjectable and SchemaVersionAdjustable of flowstore_core.backend;
without them these checks are UNSUPPORTED.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from flowstore_conformance.checks.fixtures import FLOW, HOUR, assert_same, new_id, observe, start
from flowstore_conformance.checks.queues import enqueue, new_queue
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Unsupported
from flowstore_conformance.history import Call, Outcome, Raised, Returned
from flowstore_conformance.model import State
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    find_partial_effect,
    invoke,
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
from flowstore_core.backend import FaultInjectable, FaultInjector, SchemaVersionAdjustable

DID_NOT_HAPPEN = Raised(StoreUnavailableError.__name__)
UNKNOWN_OUTCOME = Raised(OutcomeUnknownError.__name__)


@dataclass(frozen=True, slots=True)
class _Faults:
    injector: FaultInjector
    store: FlowStore
    """Its requests pass through the injector; those of the context's own store do not."""


@asynccontextmanager
async def _faults(context: CheckContext) -> AsyncIterator[_Faults]:
    if not isinstance(context.backend, FaultInjectable):
        raise Unsupported("the backend does not implement FaultInjectable, so no request can be disturbed")
    try:
        async with (
            context.backend.inject_faults(context.url) as injector,
            open_store(injector.url, clock=context.clock) as store,
        ):
            yield _Faults(injector, store)
    except ConfigurationError as error:
        raise Unsupported(f"no fault can be injected: {error}") from error


def _states(context: CheckContext, scenario: Scenario) -> tuple[ModelState, ModelState]:
    """The model's states before and after the call of a scenario."""
    before = ModelState(context.clock or (lambda: datetime.now(UTC)), State())
    for call in scenario.setup:
        before = before.apply(call, exact_times=context.exact_times)
    return before, before.apply(scenario.call, exact_times=context.exact_times)


async def _disturbed_calls(
    context: CheckContext, faults: _Faults, *, loses_reply: bool
) -> AsyncIterator[tuple[str, int, Scenario, Outcome]]:
    """Disturb the first request of every write, then the second one, and so on, until the time is up.

    Yields the scenario's name, the number of undisturbed requests, the scenario and the call's outcome.
    """
    until = time.monotonic() + context.profile.of(2, 20, 120)
    names = list(factories := available(context.capabilities))
    context.random.shuffle(names)
    injected = skip = 0
    while names and (not injected or time.monotonic() < until):
        for name in tuple(names):
            if injected and time.monotonic() >= until:
                break
            called = await _call_with_fault(
                context, faults, factories[name], skip=skip, loses_reply=loses_reply
            )
            if called is None:
                names.remove(name)  # The call makes no further request.
            else:
                injected += 1
                yield (name, skip, *called)
        skip += 1
    if not injected:
        raise Inconclusive("the injector affected no request of any write", retryable=False)


async def _call_with_fault(
    context: CheckContext, faults: _Faults, factory: ScenarioFactory, *, skip: int, loses_reply: bool
) -> tuple[Scenario, Outcome] | None:
    """Make the call of a new scenario with one fault; None if the call sends fewer requests."""
    scenario = new_scenario(context, factory)
    for call in scenario.setup:
        await invoke(context.store, call)
    # Idle connections are open and tested before the fault.
    await faults.store.ping()
    arm = faults.injector.lose_reply if loses_reply else faults.injector.hold_request
    arm(skip=skip)
    outcome = await outcome_of(faults.store, scenario.call, exact_times=context.exact_times)
    return (scenario, outcome) if faults.injector.disarm() else None


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


@check("CON-3", kind=Kind.FAULT)
async def a_lost_reply_is_resolved(context: CheckContext) -> None:
    """A write whose reply is lost returns its true result or OutcomeUnknownError, and happens once or not."""
    async with _faults(context) as faults:
        async for name, skip, scenario, outcome in _disturbed_calls(context, faults, loses_reply=True):
            before, after = _states(context, scenario)
            title = f"{name}: {scenario.call.method} after the reply to its request {skip + 1} was lost"
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


@check("CON-3", kind=Kind.FAULT)
async def a_late_request_changes_nothing(context: CheckContext) -> None:
    """A request that reaches the database after the result of its call has no effect."""
    async with _faults(context) as faults:
        async for name, skip, scenario, outcome in _disturbed_calls(context, faults, loses_reply=False):
            before, after = _states(context, scenario)
            title = f"{name}: {scenario.call.method} whose request {skip + 1} was delayed"
            allowed = _allowed_states(title, outcome, before, after)
            await _check_late_arrival(context, faults, scenario, title, outcome, allowed)


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
        "claim_next_steps": "release_step_claim",
        "try_record_dispatch": "release_dispatch",
    }
    if call.method in inverse:
        step = {"run_id": run_id, "step_key": call.arguments.get("step_key", "a")}
        return Call(method=inverse[call.method], arguments=step)
    return None


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


@check("CON-6", kind=Kind.FAULT)
async def another_schema_version_is_refused(context: CheckContext) -> None:
    """A newer schema, or an older one with migrate=False, raises SchemaVersionError and stays unchanged."""
    if not isinstance(context.backend, SchemaVersionAdjustable):
        raise Unsupported("the backend does not implement SchemaVersionAdjustable")
    async with context.backend.scratch(context.base_url) as url:
        run_id = new_id(context)
        async with open_store(url) as store:
            await store.start_run(FLOW, "orders", run_id, "manual")
            await store.record_step_start(run_id, "charge", "http")
            before = await observe(context, run_id, store=store)
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
                after = await observe(context, run_id, store=store)
                assert_same(context, after, before, f"the data after opening {age} schema was refused")


async def _refusal(url: str, *, migrate: bool) -> Exception | None:
    """The error that opening a store raises."""
    try:
        async with open_store(url, migrate=migrate):
            return None
    except Exception as error:  # noqa: BLE001 - the caller compares its class
        return error
