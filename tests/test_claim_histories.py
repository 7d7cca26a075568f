"""Concurrent claims of the next steps are judged step by step, and a missed step is noticed."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from flowstore_conformance.claim_histories import by_run
from flowstore_conformance.claim_tokens import ClaimToken
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Outcome, Returned, comparable
from flowstore_conformance.linearizability import Answer, check_history
from flowstore_conformance.model import Model, State
from flowstore_conformance.repro_script import ReproCall, sequential_script

from flowstore_core import EndedStep, StepRequest
from tests.test_conformance_races import replay_on_memory

NOW = datetime(2026, 3, 14, tzinfo=UTC)
RUNS = [UUID(int=number) for number in (1, 2)]
LEASE = timedelta(minutes=1)


def claim(limit: int = 1) -> Call:
    return Call(method="claim_next_steps", arguments={"queues": ["q"], "lease": LEASE, "limit": limit})


def operation(client: int, call: Call, invoked: float, returned: float, outcome: Outcome) -> Operation:
    return Operation(client=client, call=call, invoked=invoked, returned=returned, outcome=outcome, now=NOW)


def dispatched() -> tuple[Model, list[Operation]]:
    """A model with one queued step in each of two runs, and the calls that put them there."""
    model, done = Model(lambda: NOW, State()), []
    for run_id in RUNS:
        started = {"flow_id": RUNS[0], "flow_name": "f", "run_id": run_id, "trigger_key": "t"}
        queued = {"run_id": run_id, "step_key": "a", "queue": "q", "step_type": "s"}
        for method, arguments in (("start_run", started), ("try_record_dispatch", queued)):
            call = Call(method=method, arguments=arguments)
            value = getattr(model, call.method)(**call.arguments)
            at = float(len(done))
            done.append(operation(-1, call, at, at + 0.5, Returned(comparable(value))))
    return model, done


def answer(history: list[Operation]) -> Answer:
    return check_history(by_run(History.of(history))).answer


def steps(model: Model, limit: int = 1) -> Returned:
    return Returned(comparable(model.claim_next_steps(["q"], lease=LEASE, limit=limit)))


def test_a_claim_is_judged_for_each_of_its_steps() -> None:
    model, before = dispatched()
    both = operation(0, claim(2), 10, 11, steps(model, 2))
    assert answer([*before, both]) is Answer.LINEARIZABLE
    split = [one for one in by_run(History.of([*before, both])).operations if one.client == 0]
    assert [one.call.arguments["run_id"] for one in split] == RUNS
    again = replace(both, client=1, invoked=12.0, returned=13.0)
    assert answer([*before, both, again]) is Answer.VIOLATION


@pytest.mark.parametrize("limit", [1, 2, 1000])
def test_a_step_that_was_ready_throughout_must_be_found(limit: int) -> None:
    _, before = dispatched()
    assert answer([*before, operation(0, claim(limit), 10, 11, Returned(()))]) is Answer.VIOLATION


def test_fewer_steps_than_the_limit_mean_that_no_other_was_ready() -> None:
    model, before = dispatched()
    first = steps(model)
    assert answer([*before, operation(0, claim(1), 10, 11, first)]) is Answer.LINEARIZABLE
    assert answer([*before, operation(0, claim(2), 10, 11, first)]) is Answer.VIOLATION


def test_a_step_of_a_run_that_another_call_touches_may_be_passed_over() -> None:
    _, before = dispatched()
    empty = operation(0, claim(), 10, 12, Returned(()))
    cancels = [
        operation(number, Call(method="request_cancel", arguments={"run_id": run_id}), 11, 13, Returned(True))
        for number, run_id in enumerate(RUNS, 1)
    ]
    assert answer([*before, empty, *cancels]) is Answer.LINEARIZABLE
    assert answer([*before, empty, cancels[0]]) is Answer.VIOLATION
    later = [replace(one, invoked=12.5) for one in cancels]
    assert answer([*before, empty, *later]) is Answer.VIOLATION


def test_a_step_may_be_passed_over_beside_a_call_on_several_runs() -> None:
    _, before = dispatched()
    empty = operation(0, claim(), 10, 12, Returned(()))
    ended = [EndedStep(run_id=run_id, step_key="b", status="Succeeded", attempt=1) for run_id in RUNS]
    for call in (
        Call(method="cleanup", arguments={"cutoff": NOW}),
        Call(method="advance_runs", arguments={"steps": ended}),
        Call(method="renew_step_claims", arguments={"claims": [(one, "b", "o") for one in RUNS]}),
    ):
        beside = operation(1, call, 11, 13, UNKNOWN)
        [only] = [one for one in by_run(History.of([*before, empty, beside])).operations if one.client == 1]
        assert only == beside
        assert [
            one for one in by_run(History.of([*before, empty, beside])).operations if one.client == 0
        ] == []


def test_a_step_that_advance_runs_queues_may_have_been_claimed() -> None:
    request = StepRequest(step_key="next", step_type="s", queue="q")
    ended = [EndedStep(run_id=RUNS[0], step_key="b", status="Succeeded", attempt=1, dispatch=(request,))]
    advance = operation(0, Call(method="advance_runs", arguments={"steps": ended}), 10, 11, UNKNOWN)
    lost = operation(1, claim(), 12, float("inf"), UNKNOWN)
    split = [one.call.arguments for one in by_run(History.of([advance, lost])).operations if one.client == 1]
    assert [(one["run_id"], one["step_key"]) for one in split] == [(RUNS[0], "next")]


def test_a_step_that_a_concurrent_claim_gets_may_be_passed_over() -> None:
    model, before = dispatched()
    both = operation(0, claim(2), 10, 12, steps(model, 2))
    empty = operation(1, claim(), 11, 13, Returned(()))
    assert answer([*before, both, empty]) is Answer.LINEARIZABLE
    assert answer([*before, both, replace(empty, invoked=8.0, returned=9.0)]) is Answer.VIOLATION


def test_a_claim_without_answer_may_have_claimed_or_not() -> None:
    model, before = dispatched()
    lost = operation(0, claim(2), 10, float("inf"), UNKNOWN)
    detail: Any = Call(method="get_step_claims", arguments={"run_id": RUNS[0]})
    reads = [Returned(comparable(model.get_step_claims(RUNS[0])))]
    steps(model, 1)
    reads.append(Returned(comparable(model.get_step_claims(RUNS[0]))))
    for read in reads:
        assert answer([*before, lost, operation(-2, detail, 20, 21, read)]) is Answer.LINEARIZABLE


async def test_a_program_knows_the_owners_of_claims() -> None:
    """The generated program uses the owner that its own store returned."""
    request = StepRequest(step_key="a", step_type="s", queue="q")
    trigger = {"flow_id": RUNS[0], "flow_name": "f", "run_id": RUNS[0], "trigger_key": "t"}
    renew = {"run_id": RUNS[0], "step_key": "a", "owner": ClaimToken.of(RUNS[0], "a"), "lease": LEASE}
    calls = [
        Call(method="trigger_run", arguments={**trigger, "dispatch": [request]}),
        claim(),
        Call(method="renew_step_claim", arguments=renew),
    ]
    entries = [ReproCall(timedelta(0), call, Returned(None), Returned(None)) for call in calls]
    printed = await replay_on_memory(sequential_script("owners", NOW, entries))
    assert "owner='<token>'" in printed
    assert printed.splitlines()[-1] == "renew_step_claim: True"
