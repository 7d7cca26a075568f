"""The linearizability search, compared with a brute-force search over all orders."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Outcome, Raised, Returned
from flowstore_conformance.linearizability import Answer, apply_call, check_history, independent_parts
from flowstore_conformance.model import Model, State
from flowstore_conformance.operations import available_strategies, draw_call
from flowstore_conformance.strategies import RandomChoices, Universe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowstore_core import Capability
from flowstore_core.operations import OPERATIONS

NOW = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)
RUN, OTHER, FLOW = UUID(int=1), UUID(int=2), UUID(int=100)
START = Call(
    method="start_run", arguments={"flow_id": FLOW, "flow_name": "f", "run_id": RUN, "trigger_key": "t"}
)


def on(method: str, run_id: UUID = RUN, **arguments: object) -> Call:
    return Call(method=method, arguments={"run_id": run_id, **arguments})


def claim(owner: str, run_id: UUID = RUN) -> Call:
    return on("try_claim_step", run_id, step_key="a", owner=owner)


def release(owner: str) -> Call:
    return on("release_step_claim", step_key="a", owner=owner)


def begin(**arguments: object) -> Call:
    return on("record_step_start", step_key="a", step_type="s", **arguments)


def op(call: Call, invoked: float, returned: float, outcome: object, client: int = 0) -> Operation:
    recorded: Outcome = outcome if isinstance(outcome, (Raised, Returned)) else Returned(outcome)
    if outcome is UNKNOWN:
        recorded, returned = UNKNOWN, float("inf")
    return Operation(client=client, call=call, invoked=invoked, returned=returned, outcome=recorded, now=NOW)


def ends(unknown: Operation, end: float) -> Operation:
    """An operation of unknown outcome that takes no effect after a time."""
    return replace(unknown, returned=end)


def state_after(*calls: Call) -> State:
    state = State()
    for call in calls:
        _, state = apply_call(state, op(call, 0, 0, None))
    return state


def search_all_orders(operations: tuple[Operation, ...], start: State) -> bool:
    """Return whether any order of the known and any subset of the unknown operations is legal."""
    unknown = [index for index, one in enumerate(operations) if one.outcome is UNKNOWN]
    known = [index for index, one in enumerate(operations) if one.outcome is not UNKNOWN]
    for size in range(len(unknown) + 1):
        for happened in itertools.combinations(unknown, size):
            for order in itertools.permutations([*known, *happened]):
                if _is_legal([operations[index] for index in order], start):
                    return True
    return False


def _is_legal(order: list[Operation], start: State) -> bool:
    for index, one in enumerate(order):
        if any(later.returned < one.invoked for later in order[index + 1 :]):
            return False
    model = Model(lambda: NOW, start.copy())
    state = model.state
    for one in order:
        outcome, state = apply_call(state, one)
        if one.outcome is not UNKNOWN and outcome != one.outcome:
            return False
    return True


@st.composite
def histories(draw: st.DrawFn) -> tuple[State, tuple[Operation, ...]]:
    """Up to six calls with random times and the outcomes of one order, sometimes with one wrong outcome."""
    generator = random.Random(draw(st.integers(0, 2**32)))
    chooser, model = RandomChoices(generator), Model(lambda: NOW)
    capabilities = frozenset(Capability)
    universe = Universe(model=model, runs=[RUN, OTHER], flows=[FLOW], keys=["a"], capabilities=capabilities)
    names = [name for name in available_strategies(capabilities) if not OPERATIONS[name].spans_runs]
    methods = generator.sample(names, 6)

    def draw_one() -> Call:
        return draw_call(chooser, universe, generator.choice(methods))

    before = [START, *(draw_one() for _ in range(generator.randint(0, 4)))]
    start = state_after(*before)
    universe.model.state = start.copy()
    drawn: list[Operation] = []
    state = start
    for _ in range(generator.randint(2, 6)):
        # The outcomes follow the order in which calls take effect.
        time = len(drawn) * 10.0
        call = draw_one()
        outcome, state = apply_call(state, op(call, 0, 0, None))
        universe.model.state = state.copy()
        # Invocation and return are random times around the effect, so that calls overlap.
        invoked, returned = time - generator.randint(0, 25), time + generator.randint(0, 25)
        if generator.random() < 0.25:
            # Some unknown outcomes have a time after which they take no effect.
            outcome, returned = UNKNOWN, generator.choice((float("inf"), returned))
        drawn.append(replace(op(call, invoked, returned, None, client=len(drawn)), outcome=outcome))
    if generator.random() < 0.6:
        index = generator.randrange(len(drawn))
        drawn[index] = replace(drawn[index], outcome=_wrong_outcome(drawn, index, generator))
    return start, tuple(sorted(drawn, key=lambda one: one.invoked))


def _wrong_outcome(drawn: list[Operation], index: int, generator: random.Random) -> Outcome:
    """Return an outcome that may be wrong: that of a different call, or the opposite boolean."""
    outcome = drawn[index].outcome
    if isinstance(outcome, Returned) and isinstance(outcome.value, bool):
        return Returned(not outcome.value)
    if outcome == Returned(None):
        return Raised("StaleAttemptError")
    if isinstance(outcome, Returned) and isinstance(outcome.value, int):
        return Returned(outcome.value + generator.choice((-1, 1)))
    same = [one.outcome for one in drawn if one.call.method == drawn[index].call.method]
    return generator.choice([*same, Returned(None)])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories())
def test_the_search_agrees_with_trying_all_orders(drawn: tuple[State, tuple[Operation, ...]]) -> None:
    start, operations = drawn
    answer = check_history(History(operations), start=start).answer
    expected = Answer.LINEARIZABLE if search_all_orders(operations, start) else Answer.VIOLATION
    assert answer is expected


LINEARIZABLE: dict[str, tuple[Operation, ...]] = {
    "one winner": (op(claim("x"), 1, 4, True), op(claim("y"), 2, 5, False)),
    "the later call wins because both overlap": (op(claim("x"), 1, 4, False), op(claim("y"), 2, 5, True)),
    "a release between": (
        op(claim("x"), 1, 2, True),
        op(release("x"), 3, 6, None),
        op(claim("y"), 4, 7, True),
    ),
    "a release that overlaps its own claim": (
        op(claim("x"), 1, 5, True),
        op(release("x"), 2, 6, None),
        op(on("get_step_claims"), 7, 8, ()),
    ),
    "numbers in another order than the calls": (op(begin(), 1, 5, 2), op(begin(), 2, 6, 1)),
    "an unknown claim that won": (op(claim("x"), 1, 2, UNKNOWN), op(claim("y"), 3, 4, False)),
    "an unknown claim that did not happen": (op(claim("x"), 1, 2, UNKNOWN), op(claim("y"), 3, 4, True)),
    "an unknown claim that happens late": (
        op(claim("x"), 1, 2, UNKNOWN),
        op(on("get_step_claims"), 3, 4, ()),
        op(claim("y"), 5, 6, False),
    ),
    "the same calls in the other order leave another state": (
        op(on("save_output", key="k", value_json="1"), 1, 4, None),
        op(on("save_output", key="k", value_json="2"), 2, 5, None),
        op(on("get_output", key="k"), 6, 7, "1"),
    ),
    "an unknown claim that happened before its end": (
        ends(op(claim("x"), 1, 2, UNKNOWN), 4),
        op(on("get_dispatches"), 5, 6, ()),
        op(claim("y"), 7, 8, False),
    ),
    "no operation": (),
}

VIOLATIONS: dict[str, tuple[Operation, ...]] = {
    "an unknown claim that happened after its end": (
        ends(op(claim("x"), 1, 2, UNKNOWN), 4),
        op(on("get_step_claims"), 5, 6, ()),
        op(claim("y"), 7, 8, False),
    ),
    "two winners": (op(claim("x"), 1, 4, True), op(claim("y"), 2, 5, True)),
    "no winner": (op(claim("x"), 1, 4, False), op(claim("y"), 2, 5, False)),
    "a claim that fails without a competitor": (op(claim("x"), 1, 2, False), op(claim("y"), 3, 4, True)),
    "one number twice": (op(begin(), 1, 5, 1), op(begin(), 2, 6, 1)),
    "a gap in the numbers": (op(begin(), 1, 5, 1), op(begin(), 2, 6, 3)),
    "a claim that a later read misses": (op(claim("x"), 1, 2, True), op(on("get_step_claims"), 3, 4, ())),
    "a claim that is read and then missing": (
        op(claim("x"), 1, 9, True),
        op(on("get_claimed_step_keys"), 2, 3, frozenset({"a"})),
        op(on("get_claimed_step_keys"), 4, 5, frozenset()),
    ),
    "an unknown claim cannot be there before it was invoked": (
        op(claim("y"), 1, 2, False),
        op(claim("x"), 3, 4, UNKNOWN),
    ),
    "the output saved first is the last one": (
        op(on("save_output", key="k", value_json="1"), 1, 2, None),
        op(on("save_output", key="k", value_json="2"), 3, 4, None),
        op(on("get_output", key="k"), 5, 6, "1"),
    ),
    "a wrong error": (op(claim("x"), 1, 2, Raised("RunNotFoundError")),),
    "an error outside the contract": (op(begin(), 1, 2, Raised("IntegrityError")),),
}


@pytest.mark.parametrize("name", LINEARIZABLE)
def test_a_linearizable_history_is_accepted(name: str) -> None:
    verdict = check_history(History.of(LINEARIZABLE[name]), start=state_after(START))
    assert verdict.answer is Answer.LINEARIZABLE
    known = {id(one) for one in LINEARIZABLE[name] if one.outcome is not UNKNOWN}
    assert known <= {id(one) for one in verdict.prefix}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_is_refused(name: str) -> None:
    verdict = check_history(History.of(VIOLATIONS[name]), start=state_after(START))
    assert verdict.answer is Answer.VIOLATION
    assert verdict.unplaced
    assert len(verdict.expected) == len(verdict.unplaced)


def test_a_violation_names_the_correct_results() -> None:
    verdict = check_history(History.of(VIOLATIONS["two winners"]), start=state_after(START))
    assert [one.outcome for one in verdict.prefix] == [Returned(True)]
    assert verdict.expected == (Returned(False),)


def test_a_result_must_not_precede_its_call() -> None:
    """Calls that do not overlap keep their order in real time."""
    late = (op(on("get_claimed_step_keys"), 1, 2, frozenset({"a"})), op(claim("x"), 3, 4, True))
    overlapping = (op(on("get_claimed_step_keys"), 1, 4, frozenset({"a"})), op(claim("x"), 2, 3, True))
    assert check_history(History.of(late), start=state_after(START)).answer is Answer.VIOLATION
    assert check_history(History.of(overlapping), start=state_after(START)).answer is Answer.LINEARIZABLE


def test_an_exhausted_budget_is_undecided() -> None:
    calls = tuple(op(begin(), index, 100 + index, 12 - index) for index in range(12))
    assert check_history(History.of(calls), start=state_after(START), budget=5).answer is Answer.UNDECIDED
    assert check_history(History.of(calls), start=state_after(START)).answer is Answer.LINEARIZABLE


def test_many_failed_claims_need_few_states() -> None:
    """A call without an effect is placed as soon as its result is legal, without branching."""
    calls = [op(claim(str(index)), 1, 9, index == 7) for index in range(40)]
    verdict = check_history(History.of(calls), start=state_after(START))
    assert verdict.answer is Answer.LINEARIZABLE
    assert verdict.states < 5000


def test_independent_parts_share_no_run_or_key() -> None:
    key = {"flow_id": FLOW, "trigger_key": "t", "idempotency_key": "k"}
    register = Call(method="try_register_idempotency_key", arguments={**key, "run_id": OTHER})
    find = Call(method="find_run_id_by_idempotency_key", arguments=key)
    one, two = op(claim("x"), 1, 2, True), op(claim("y", OTHER), 3, 4, True)
    three, four = op(register, 5, 6, True), op(find, 7, 8, OTHER)
    assert independent_parts([one, two, four, three]) == [(one,), (two, three, four)]
    everything = op(Call(method="get_runs"), 9, 10, ())
    assert len(independent_parts([one, two, everything])) == 1


def test_independent_parts_are_searched_separately() -> None:
    """Twenty runs with four overlapping calls each have too many orders to search together."""
    runs = [UUID(int=50 + index) for index in range(20)]
    starts = [replace(START, arguments={**START.arguments, "run_id": run_id}) for run_id in runs]
    calls = [op(claim(owner, run_id), 1, 9, owner == "3") for run_id in runs for owner in "0123"]
    verdict = check_history(History.of(calls), start=state_after(*starts))
    assert verdict.answer is Answer.LINEARIZABLE
    assert len(verdict.prefix) == 80


def test_each_call_has_its_own_time() -> None:
    lease = {"step_key": "a", "lease": timedelta(seconds=30)}
    taken = op(on("try_claim_step", owner="x", **lease), 1, 2, True)
    second = op(on("try_claim_step", owner="y", **lease), 3, 4, True)
    late = replace(second, now=NOW + timedelta(seconds=30))
    early = replace(second, now=NOW + timedelta(seconds=29))
    assert check_history(History.of([taken, late]), start=state_after(START)).answer is Answer.LINEARIZABLE
    assert check_history(History.of([taken, early]), start=state_after(START)).answer is Answer.VIOLATION


def test_times_are_not_compared_without_a_common_clock() -> None:
    _, state = apply_call(State(), op(START, 0, 0, None))
    outcome, _ = apply_call(state, op(on("get_run_detail"), 0, 0, None), exact_times=False)
    at_another_time = replace(op(START, 0, 0, None), now=NOW + timedelta(days=3))
    _, later = apply_call(State(), at_another_time, exact_times=False)
    assert apply_call(later, op(on("get_run_detail"), 0, 0, None), exact_times=False)[0] == outcome
