"""CON-1: concurrent calls on one store, which the store may batch without visible effect.

Each batched call must behave as if it ran alone: in its caller's order, with its own error, and with a true
result when the store is closed in the meantime.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import product
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import FLOW, call_at_once, get_run, new_id, new_store, start
from flowstore_conformance.context import CheckContext, ContractViolation, Profile
from flowstore_conformance.history import Call, Outcome
from flowstore_conformance.model import State
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import (
    ModelState,
    describe_outcome,
    difference,
    invoke,
    observe,
    outcome_of,
    probe_calls,
)
from flowstore_conformance.write_scenarios import Scenario, available, new_scenario
from flowstore_core import (
    Capability,
    FlowRunDetail,
    FlowRunRecord,
    FlowStepRecord,
    FlowStore,
    FlowStoreError,
    OutcomeUnknownError,
    RunStatus,
    StepStatus,
    StoreClosedError,
    StoreUnavailableError,
    new_claim_token,
)


async def _gather_outcomes(calls: Sequence[Awaitable[object]]) -> list[object]:
    """Run calls concurrently and return each result or raised error."""
    found = await asyncio.gather(*calls, return_exceptions=True)
    for one in found:
        if isinstance(one, BaseException) and not isinstance(one, FlowStoreError):
            raise ContractViolation(
                f"a concurrent call: expected a contract error, got {type(one).__name__}", clause="CON-2"
            ) from one
    return list(found)


def _brief(outcome: object) -> object:
    return type(outcome).__name__ if isinstance(outcome, Exception) else outcome


@check("CON-1", kind=Kind.RACE, isolated=False, rotation="concurrent calls of a store")
async def each_concurrent_caller_reads_its_own_writes(context: CheckContext) -> None:
    """Each of 64 concurrent callers sees its own calls applied in order."""
    run_id = await start(context)
    store = context.store

    async def caller(number: int) -> None:
        for round_number in range(context.profile.of(1, 3, 12)):
            key, owner = f"caller {number} round {round_number}", new_claim_token()
            context.expect(await store.try_record_dispatch(run_id, key), True, "a dispatch of a new key")
            context.expect(
                await store.try_claim_step(run_id, key, owner=owner), True, "a claim of a free key"
            )
            context.expect(
                await store.try_claim_step(run_id, key), False, "a second claim by the same caller"
            )
            for attempt, status in ((1, StepStatus.FAILED), (2, StepStatus.PENDING)):
                started = await store.record_step_start(run_id, key, "http", owner=owner)
                context.expect(started, attempt, "a start after the last attempt was closed")
                await store.record_step_complete(run_id, key, status, attempt=attempt)
            await store.release_step_claim(run_id, key, owner=owner)
            context.expect(await store.try_claim_step(run_id, key), True, "a claim after its release")
            await store.release_dispatch(run_id, key)
            if round_number == 0 and number % 8 == 0:
                statuses = await store.get_step_statuses(run_id)
                context.expect(statuses.get(key), StepStatus.PENDING, "the status that the caller wrote")
                dispatched = await store.get_dispatched_step_keys(run_id)
                context.expect_that(
                    key not in dispatched, "a released dispatch is not in get_dispatched_step_keys"
                )

    await asyncio.gather(*(caller(number) for number in range(64)))


@check("CON-1", "CON-2", "STP-4", kind=Kind.RACE, isolated=False, rotation="concurrent calls of a store")
async def one_failing_call_does_not_fail_its_batch(context: CheckContext) -> None:
    """Of many concurrent calls the invalid ones raise their own errors, and all others are applied."""
    run_id, unknown, ended = await start(context), new_id(context), await start(context)
    store = context.store
    count = context.profile.of(48, 96, 192)
    keys = [f"step {number}" for number in range(count)]
    calls: list[Awaitable[object]] = [store.record_step_start(run_id, key, "http") for key in keys]
    context.expect(await _gather_outcomes(calls), [1] * count, "the first attempts of many steps")
    await store.complete_run(ended, RunStatus.FAILED)

    calls, wanted = [], []
    for number, key in enumerate(keys):
        call, answer = _call_and_outcome(store, run_id, unknown, ended, key, number % 8)
        calls.append(call)
        wanted.append(answer)
    found = await _gather_outcomes(calls)
    context.expect([_brief(one) for one in found], wanted, "concurrent calls of which many must fail")
    statuses = await store.get_step_statuses(run_id)
    for number, key in enumerate(keys):
        status = StepStatus.FAILED if number % 8 == 0 else StepStatus.RUNNING
        context.expect(statuses[key], status, "a step after concurrent calls of which many must fail")


def _call_and_outcome(
    store: FlowStore, run_id: UUID, unknown: UUID, ended: UUID, key: str, kind: int
) -> tuple[Awaitable[object], object]:
    """A call of one of eight kinds, and its expected outcome."""
    failed = StepStatus.FAILED
    match kind:
        case 0:
            return store.record_step_complete(run_id, key, failed, attempt=1), None
        case 1:
            return store.record_step_complete(unknown, key, failed), "RunNotFoundError"
        case 2:
            return store.record_step_complete(run_id, key, failed, attempt=2), "StaleAttemptError"
        case 3:
            return store.record_step_complete(run_id, f"no {key}", failed), "StepNotFoundError"
        case 4:
            return store.try_claim_step(unknown, key), "RunNotFoundError"
        case 5:
            return store.try_claim_step(ended, key), False
        case 6:
            return store.record_step_start(ended, key, "http"), "RunCompletedError"
        case _:
            return store.record_step_start(run_id, key, "http", owner="nobody"), "ClaimLostError"


@check("CON-1", "CON-2", kind=Kind.VOLUME, isolated=False)
async def thousands_of_concurrent_calls_get_their_own_answers(context: CheckContext) -> None:
    """Of many calls at once on one store all, some or none fail; each gets its own result or error."""
    store, count = context.store, context.profile.of(60, 2_000, 5_000)
    # Beyond the usual limits of a batch, in the rounds that repeat what another one shows.
    fewer = context.profile.of(60, 300, 5_000)
    runs, more, unknown = ([new_id(context) for _ in range(count)] for _ in range(3))
    key = "step of run {}".format
    rounds: list[tuple[str, int, Callable[[int], tuple[Awaitable[object], object]]]] = [
        (
            "start_run with new ids",
            count,
            lambda n: (_start(store, runs[n], n), ("run", runs[n], f"flow {n}")),
        ),
        (
            "start_run, half of them with an id that is stored",
            fewer,
            lambda n: (
                (_start(store, more[n], n), ("run", more[n], f"flow {n}"))
                if n % 2
                else (_start(store, runs[n], n), ("RunAlreadyExistsError", runs[n], None))
            ),
        ),
        (
            "record_step_start, half of them on unknown runs",
            count,
            lambda n: (
                store.record_step_start(runs[n] if n % 2 else unknown[n], key(n), "http", input_json=f"{n}"),
                1 if n % 2 else ("RunNotFoundError", unknown[n], None),
            ),
        ),
        (
            "record_step_complete, three of four invalid",
            count,
            lambda n: _completion(store, runs[n], key(n), n),
        ),
        (
            "record_step_complete with another result, all invalid",
            count,
            lambda n: (
                store.record_step_complete(
                    runs[n // 4 * 4 + 1], key(n // 4 * 4 + 1), StepStatus.FAILED, error_message=f"other {n}"
                ),
                ("StepAlreadyCompletedError", runs[n // 4 * 4 + 1], key(n // 4 * 4 + 1)),
            ),
        ),
        (
            "try_claim_step, one of four on a terminal step",
            fewer,
            lambda n: (store.try_claim_step(runs[n], key(n), owner=f"owner {n}"), n % 4 != 1),
        ),
        (
            "try_record_dispatch, half of them on unknown runs",
            fewer,
            lambda n: (
                store.try_record_dispatch(runs[n] if n % 2 else unknown[n], f"dispatch {n}"),
                True if n % 2 else ("RunNotFoundError", unknown[n], None),
            ),
        ),
        (
            "complete_run, half of them of unknown runs",
            fewer,
            lambda n: (
                store.complete_run(runs[n] if n % 2 else unknown[n], RunStatus.FAILED),
                True if n % 2 else ("RunNotFoundError", unknown[n], None),
            ),
        ),
        (
            "record_step_start on completed runs, all invalid",
            fewer,
            lambda n: (
                store.record_step_start(runs[n // 2 * 2 + 1], key(n), "http"),
                ("RunCompletedError", runs[n // 2 * 2 + 1], key(n)),
            ),
        ),
        (
            "get_run_status of different runs",
            fewer,
            lambda n: (store.get_run_status(runs[n]), RunStatus.FAILED if n % 2 else RunStatus.RUNNING),
        ),
        (
            "get_run, half of them of unknown runs",
            fewer,
            lambda n: (
                store.get_run(runs[n] if n % 2 else unknown[n]),
                ("run", runs[n], f"flow {n}") if n % 2 else None,
            ),
        ),
        (
            "get_step, half of them of steps that never started",
            fewer,
            lambda n: (
                store.get_step(runs[n], key(n)),
                ("step", runs[n], key(n), f"{n}") if n % 2 else None,
            ),
        ),
    ]
    if Capability.OUTPUTS in context.capabilities:
        rounds += [
            (
                "save_output, half of them on unknown runs",
                fewer,
                lambda n: (
                    store.save_output(runs[n] if n % 2 else unknown[n], key(n), f"output {n}"),
                    None if n % 2 else ("RunNotFoundError", unknown[n], None),
                ),
            ),
            (
                "get_output, half of them of outputs that were not saved",
                fewer,
                lambda n: (store.get_output(runs[n], key(n)), f"output {n}" if n % 2 else None),
            ),
        ]
    for what, width, of_number in rounds:
        await _expect_own_answers(context, what, of_number, width)
    details = await call_at_once(lambda n: store.get_run_detail(runs[n]), range(count))
    for number, detail in enumerate(details):
        # The steps that valid calls changed, and only these, have the texts of their calls.
        context.expect(
            _own_answer(detail), ("run", runs[number], f"flow {number}"), "a concurrent read of a run"
        )
        steps = [(one.input_json, one.output_json) for one in getattr(detail, "steps", ())]
        output = f"output {number}" if number % 4 == 1 else None
        wanted = [(f"{number}", output)] if number % 2 else []
        context.expect(steps, wanted, f"input and output of the steps after {count:,} concurrent calls")


async def _expect_own_answers(
    context: CheckContext, what: str, of_number: Callable[[int], tuple[Awaitable[object], object]], count: int
) -> None:
    """Make ``count`` calls concurrently in random order, and compare each answer with its own."""
    wanted: dict[int, object] = {}

    def call(number: int) -> Awaitable[object]:
        made, wanted[number] = of_number(number)
        return made

    numbers = context.random.sample(range(count), count)
    context.assertions += count
    for number, outcome in zip(numbers, await call_at_once(call, numbers), strict=True):
        answer, want = _own_answer(outcome), wanted[number]
        if answer != want:
            others = isinstance(answer, tuple) and answer in wanted.values()
            raise ContractViolation(
                f"{count:,} concurrent calls of {what}: a call expected {want!r}, got {answer!r}"
                f"{', which is the answer of another call' if others else ''}"
            ) from (outcome if isinstance(outcome, FlowStoreError) else None)


def _start(store: FlowStore, run_id: UUID, number: int) -> Awaitable[object]:
    return store.start_run(FLOW, f"flow {number}", run_id, "manual")


def _completion(store: FlowStore, run_id: UUID, key: str, number: int) -> tuple[Awaitable[object], object]:
    """A completion that one of four times is valid, and its expected answer."""
    failed, output = StepStatus.FAILED, f"output {number}"
    match number % 4:
        case 1:
            return store.record_step_complete(run_id, key, failed, output_json=output, attempt=1), None
        case 3:
            call = store.record_step_complete(run_id, key, failed, output_json=output, attempt=2)
            return call, ("StaleAttemptError", run_id, key)
        case _:
            call = store.record_step_complete(run_id, key, failed, output_json=output)
            return call, ("StepNotFoundError", run_id, key)


def _own_answer(outcome: object) -> object:
    """The part of a result or error that identifies the call."""
    match outcome:
        case FlowStoreError():
            named = (getattr(outcome, "run_id", None), getattr(outcome, "step_key", None))
            return (type(outcome).__name__, *named)
        case FlowRunRecord() | FlowRunDetail():
            return ("run", outcome.run_id, outcome.flow_name)
        case FlowStepRecord():
            return ("step", outcome.run_id, outcome.step_key, outcome.input_json)
        case _:
            return outcome


@check("CON-1", "CON-2", "CLM-2", "EVT-1", "IDM-3", kind=Kind.RACE, isolated=False)
async def concurrent_writes_of_every_kind_happen_once(context: CheckContext) -> None:
    """Writes of every kind at once, some of which fail or take long, each return and happen as if alone."""
    for _ in range(context.profile.of(1, 2, 40)):
        scenarios = [
            new_scenario(context, factory)
            for factory in available(context.capabilities).values()
            for _ in range(context.profile.of(1, 2, 4))
        ]

        async def prepare(scenario: Scenario) -> None:
            for call in scenario.setup:
                await invoke(context.store, call)

        await asyncio.gather(*map(prepare, scenarios))
        if context.profile is Profile.QUICK:
            scenarios = [
                replace(one, probes=tuple(context.random.sample(one.probes, 4))) for one in scenarios
            ]
        writes = [_SingleWrite(scenario.call, scenario) for scenario in scenarios]
        writes += await _failing_and_long_writes(context)
        context.random.shuffle(writes)
        exact_times = context.exact_times
        outcomes = await asyncio.gather(
            *(outcome_of(context.store, write.call, exact_times=exact_times) for write in writes)
        )
        await _expect_single_effects(context, writes, outcomes)


@dataclass(frozen=True, slots=True)
class _SingleWrite:
    """One of many concurrent writes; no two of them depend on each other."""

    call: Call
    scenario: Scenario


async def _failing_and_long_writes(context: CheckContext) -> list[_SingleWrite]:
    """Triggers that fail after they have registered their key, and events with large messages."""
    writes = []
    message = "x" * context.text_size(2**20)
    for number in range(context.profile.of(12, 24, 40)):
        run_id, flow_id = new_id(context), new_id(context)
        given = {"flow_id": flow_id, "flow_name": "orders", "run_id": run_id, "trigger_key": "manual"}
        setup = Call(method="start_run", arguments=given)
        await invoke(context.store, setup)
        call = Call(
            method="append_event", arguments={"run_id": run_id, "event_type": "e", "message": message}
        )
        keys: list[tuple[UUID, str, str]] = []
        if number % 3 == 0 and Capability.TRIGGER in context.capabilities:
            call = Call(method="trigger_run", arguments={**given, "idempotency_key": "K"})
            keys = [(flow_id, "manual", "K")]
        elif Capability.EVENTS not in context.capabilities:
            continue
        probes = probe_calls(run_id, context.capabilities, keys=keys)
        scenario = Scenario(run_id=run_id, setup=(setup,), call=call, must_compensate=False, probes=probes)
        writes.append(_SingleWrite(call, scenario))
    return writes


async def _expect_single_effects(
    context: CheckContext, writes: Sequence[_SingleWrite], outcomes: Sequence[Outcome]
) -> None:
    exact_times = context.exact_times
    states = []
    for write, outcome in zip(writes, outcomes, strict=True):
        state = ModelState(context.clock or (lambda: datetime.now(UTC)), State())
        for call in (*write.scenario.setup, write.call):
            state = state.apply(call, exact_times=exact_times)
        states.append(state)
        assert state.outcome is not None
        context.expect_that(
            outcome == state.outcome,
            f"{write.call.method}, one of {len(writes)} concurrent writes of different kinds: expected "
            f"{describe_outcome(state.outcome)}, got {describe_outcome(outcome)}",
        )
    seen = await asyncio.gather(
        *(observe(context.store, write.scenario.probes, exact_times=exact_times) for write in writes)
    )
    for write, state, found in zip(writes, states, seen, strict=True):
        probes = write.scenario.probes
        wanted = state.observe(probes, exact_times=exact_times)
        context.assertions += 1
        if found != wanted:
            raise ContractViolation(
                f"after {len(writes)} concurrent writes of different kinds, each on its own run, "
                f"{write.call.method} has not happened exactly once: {difference(probes, found, [wanted])}"
            )


# Includes the characters that a store might use as separators between texts.
ODD_TEXTS = (
    None,
    "",
    *(chr(number) for number in range(1, 32)),
    "\x1f\x1f",
    "a\x1e",
    "\x1fb",
    "'",
    ",",
    "{}",
    "\\N",
)


SEPARATORS = ("\x1e", "\x1f", "\x1c", "\x1d")
"""The control characters for separators between records, units, files and groups."""
BATCH = 12
"""Number of concurrent calls, of which the first may be sent alone and the others as one batch."""
MISSING = (lambda number: False, lambda number: number < 3, lambda number: number % 2 == 1)
"""Which calls of a batch have no text: none, the first ones, every second one."""


@check("INP-2", "CON-1", kind=Kind.RACE, isolated=False, rotation="texts of concurrent calls")
async def equal_and_missing_texts_of_concurrent_calls_round_trip(context: CheckContext) -> None:
    """Concurrent calls keep their texts if all are one separator, and if some of them have none."""
    store, run_id = context.store, await start(context)
    wanted: dict[str, object] = {}
    columns = (*SEPARATORS, "", "text")
    for number, (text, is_missing) in enumerate(product(columns, MISSING)):
        texts = {
            f"{number} {place}": None if is_missing(place) else f"{place}" if text == "text" else text
            for place in range(BATCH)
        }
        # The output is missing where the input is given.
        outputs = {key: one if number % 2 else (text if one is None else None) for key, one in texts.items()}
        await _gather_outcomes(
            [
                store.record_step_start(run_id, key, "http", input_json=one, job_id=one or None)
                for key, one in texts.items()
            ]
        )
        closed = StepStatus.FAILED
        await _gather_outcomes(
            [
                store.record_step_complete(
                    run_id, key, closed, output_json=outputs[key], error_message=one, attempt=1
                )
                for key, one in texts.items()
            ]
        )
        wanted |= {key: (one, one or None, outputs[key], one) for key, one in texts.items()}
    steps = (await get_run(context, run_id)).steps
    found = {one.step_key: (one.input_json, one.job_id, one.output_json, one.error_message) for one in steps}
    context.expect(found, wanted, "input, job id, output and error of concurrently written steps")


@check("INP-2", "CON-1", kind=Kind.RACE, isolated=False, rotation="texts of concurrent calls")
async def concurrently_written_texts_round_trip_unchanged(context: CheckContext) -> None:
    """Keys, inputs, outputs and job ids that 64 callers write concurrently round-trip unchanged."""
    store = context.store
    for round_number in range(context.profile.of(2, 6, 20)):
        run_id = await start(context)
        odd = context.random.choice([0.02, 0.5])

        def text(odd: float = odd) -> str | None:
            return context.random.choice(ODD_TEXTS) if context.random.random() < odd else "plain"

        keys = [f"{text() or ''} {number}" for number in range(64)]
        inputs, outputs, job_ids = ([text() for _ in keys] for _ in range(3))
        starts = await _gather_outcomes(
            [
                store.record_step_start(run_id, key, "http", input_json=one, job_id=job_id or None)
                for key, one, job_id in zip(keys, inputs, job_ids, strict=True)
            ]
        )
        context.expect(
            starts, [1] * 64, f"the attempts of 64 concurrently started steps, round {round_number}"
        )
        await _gather_outcomes(
            [
                store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, output_json=one, attempt=1)
                for key, one in zip(keys, outputs, strict=True)
            ]
        )
        detail = await get_run(context, run_id)
        found = {step.step_key: (step.input_json, step.output_json, step.job_id) for step in detail.steps}
        wanted = {
            key: (one, other, job_id or None)
            for key, one, other, job_id in zip(keys, inputs, outputs, job_ids, strict=True)
        }
        context.expect(found, wanted, "the texts of 64 concurrently written steps")


@check("CLM-1", "CLM-5", "CTL-1", kind=Kind.RACE, isolated=False)
async def concurrent_claims_of_one_store_have_one_winner(context: CheckContext) -> None:
    """Of 200 concurrent callers of one store, one caller or one owner wins each key."""
    store = context.store
    for round_number in range(context.profile.of(1, 3, 10)):
        run_id = await start(context)
        keys = [f"step {number % 5}" for number in range(200)]
        # Two of the five keys have owners that claim repeatedly.
        owners = [f"owner {n % 7}" if n % 5 in (1, 3) and n % 2 else None for n in range(200)]
        claims = await _gather_outcomes(
            [store.try_claim_step(run_id, key, owner=o) for key, o in zip(keys, owners, strict=True)]
        )
        dispatches = await _gather_outcomes([store.try_record_dispatch(run_id, key) for key in keys])
        held = {one.step_key: one.owner for one in await store.get_step_claims(run_id)}
        for key in sorted(set(keys)):
            won = [n for n in range(200) if keys[n] == key and claims[n] is True]
            winners = {owners[n] for n in won}
            what = f"the winners of {key!r}, claimed by 40 concurrent callers, round {round_number}"
            context.expect(winners, {held.get(key)}, what)
            owner = held.get(key)
            if owner is None:
                context.expect(len(won), 1, f"the number of {what[4:]}")
            else:
                callers = [n for n in range(200) if keys[n] == key and owners[n] == owner]
                sentence = f"the number of calls of its owner that won {key!r}, round {round_number}"
                context.expect(len(won), len(callers), sentence, clause="CLM-5")
            results = [dispatches[n] for n in range(200) if keys[n] == key]
            context.expect(results.count(True), 1, f"the winners of 40 concurrent dispatches of {key!r}")
            context.expect(results.count(False), 39, f"the losers of 40 concurrent dispatches of {key!r}")


@check("CON-1", "CON-2", kind=Kind.RACE, rotation="concurrent calls of a store")
async def calls_in_flight_at_aclose_report_their_outcome(context: CheckContext) -> None:
    """Each call in flight when the store closes either takes effect and says so, or has no effect."""
    for round_number in range(context.profile.of(3, 6, 20)):
        run_id = await start(context)
        closing = await new_store(context)
        if closing is context.store:
            context.expect_that(True, "the backend allows one store at a time")
            return
        count = 100
        keys = [f"step {number}" for number in range(count)]
        calls: list[Coroutine[Any, Any, object]] = [
            *(closing.try_claim_step(run_id, key, owner="me") for key in keys),
            *(closing.record_step_start(run_id, f"{key} too", "t") for key in keys),
        ]
        tasks = [asyncio.ensure_future(call) for call in calls]
        for _ in range(round_number * 3):
            await asyncio.sleep(0)
        await closing.aclose()
        found = await _gather_outcomes(tasks)
        claimed = {one.step_key for one in await context.store.get_step_claims(run_id)}
        started = await context.store.get_step_statuses(run_id)
        for number, (outcome, key) in enumerate(zip(found, [*keys, *keys], strict=True)):
            happened = key in claimed if number < count else f"{key} too" in started
            what = f"a call in flight at aclose with the outcome {_brief(outcome)!r}"
            if type(outcome) in (StoreClosedError, StoreUnavailableError):
                context.expect(happened, False, f"whether {what} took effect")
            elif type(outcome) is not OutcomeUnknownError:
                context.expect(_brief(outcome), True if number < count else 1, "a call in flight at aclose")
                context.expect(happened, True, f"whether {what} took effect")
