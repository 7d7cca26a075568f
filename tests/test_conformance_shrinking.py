"""Shrinking keeps the violation: the same clause, broken in the same way, by legal calls."""

from __future__ import annotations

import asyncio
import random
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from flowstore_conformance.call_validity import is_correctly_rejected, is_valid
from flowstore_conformance.context import Profile, new_context
from flowstore_conformance.differential import expected_outcome, optional_arguments, without_argument
from flowstore_conformance.history import Call, Raised, Returned
from flowstore_conformance.model import Model
from flowstore_conformance.operations import STRATEGIES, draw_call, draw_clock_advance
from flowstore_conformance.race_families import RACE_FAMILIES, RaceBuilder, RaceFamily
from flowstore_conformance.race_search import Budget, search, smaller_races
from flowstore_conformance.races import Race, StoreRunner
from flowstore_conformance.strategies import FLOWS, RandomChoices, Universe
from flowstore_conformance.violation_signature import Signature, WrongAnswer, wrong_answers
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstore_core import Capability, NotSupportedError
from flowstore_core.plugins import find_backend
from flowstore_memory.store import SharedStore
from tests.test_conformance_races import make_wrong, run
from tests.virtual_clock import VirtualClock

_, MEMORY = find_backend("memory")
NOW = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
RUN = UUID(int=1)


def claim(**given: Any) -> Call:
    return Call(method="try_claim_step", arguments={"run_id": RUN, "step_key": "a", **given})


class LeaseTakesOver(SharedStore):
    """Grants a claim with a lease to every caller."""

    async def try_claim_step(self, run_id: UUID, step_key: str, **given: Any) -> bool:
        won = await super().try_claim_step(run_id, step_key, **given)
        return won or given.get("lease") is not None


class WaiterChangesNumbers(SharedStore):
    """Numbers starts wrongly in a run with a waiter; afterwards, runs without one raise a foreign error."""

    met = False

    async def record_step_start(self, run_id: UUID, step_key: str, step_type: str, **given: Any) -> int:
        number = await super().record_step_start(run_id, step_key, step_type, **given)
        if self._runs[run_id.int].waiters:
            type(self).met = True
            return number + 1
        if self.met:
            raise ConnectionResetError("a fault of the driver")
        return number


class ThirdStartMiscounted(SharedStore):
    """Numbers the third start wrongly; afterwards, runs with fewer starts raise a foreign error."""

    met = False

    async def record_step_start(self, run_id: UUID, step_key: str, step_type: str, **given: Any) -> int:
        number = await super().record_step_start(run_id, step_key, step_type, **given)
        if number < 3:
            return number
        type(self).met = True
        return number + 1

    async def get_step_statuses(self, run_id: UUID) -> Any:
        run = await super().get_run_detail(run_id)
        if self.met and run is not None and sum(len(step.attempts) for step in run.steps) < 3:
            raise ConnectionResetError("a fault of the driver")
        return await super().get_step_statuses(run_id)


async def test_dropping_an_argument_drops_the_arguments_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, LeaseTakesOver)
    result = await run("call_sequences_agree_with_the_model")
    assert result.failure is not None
    assert result.failure.message == "try_claim_step: expected False, got True"
    program = result.failure.program
    assert program is not None
    assert "InvalidArgumentError" not in program
    last = [line for line in program.splitlines() if "try_claim_step(" in line][-1]
    # The fault needs a lease, and a lease needs an owner.
    assert ("lease=" in last, "owner=" in last) == (True, True)


class LacksDeliveries(SharedStore):
    starts = 0

    async def start_run(self, *args: Any, **given: Any) -> Any:
        type(self).starts += 1
        return await super().start_run(*args, **given)

    async def deliver_signal(self, *args: Any, **given: Any) -> Any:
        raise NotSupportedError("memory", "signals", "deliver_signal")


@pytest.mark.parametrize("name", ["hypothesis_calls_agree_with_the_model", "deliveries_by_tasks"])
async def test_calls_that_show_a_missing_method_are_not_shrunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wrong(monkeypatch, LacksDeliveries)
    monkeypatch.setattr(LacksDeliveries, "starts", 0)
    result = await run(name)
    assert result.failure is not None
    assert "NotSupportedError" in result.failure.message
    assert LacksDeliveries.starts < 60


@pytest.mark.parametrize(
    "name", ["call_sequences_agree_with_the_model", "hypothesis_calls_agree_with_the_model"]
)
async def test_a_shrunk_program_has_the_same_violation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, WaiterChangesNumbers)
    # The fault needs a run with a waiter, which an imported run may have.
    starts = (["start_run"], ["trigger_run"], ["import_run"])
    smallest = [["import_run"], *([*start, "register_waiter"] for start in starts)]
    # A program cannot be made smaller if a run without a waiter starts a step in it before the fault. On a
    # slow machine it may not become as small as possible, and Hypothesis may find no fault in its time.
    for seed in range(30):
        monkeypatch.setattr(WaiterChangesNumbers, "met", False)
        failure = (await run(name, seed=seed)).failure
        if failure is None:
            continue
        assert failure.clause == "STP-1"
        numbers = re.fullmatch(r"record_step_start: expected (\d), got (\d)", failure.message)
        assert numbers is not None
        assert int(numbers[2]) == int(numbers[1]) + 1
        assert failure.program is not None
        *setup, last = re.findall(r"store\.(\w+)\(", failure.program)
        assert last == "record_step_start"
        if setup in smallest:
            return
    pytest.fail("no program became as small as possible")


async def test_a_shrunk_race_has_the_same_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThirdStartMiscounted, "met", False)
    make_wrong(monkeypatch, ThirdStartMiscounted)
    result = await run("attempts_by_tasks")
    failure = result.failure
    assert failure is not None
    assert failure.clause == "STP-1"
    assert failure.history is not None
    operations = failure.history.operations
    assert not any(isinstance(one.outcome, Raised) for one in operations)
    assert sum(one.call.method == "record_step_start" for one in operations) == 3


def test_a_signature_omits_details_that_differ_between_programs() -> None:
    read = Call(method="get_run_detail", arguments={"run_id": RUN})

    def wrong(key: str, **actual: Any) -> frozenset[WrongAnswer]:
        expected = {"step_key": key, "status": "Pending", "output_json": None}
        steps = [("FlowStepRecord", tuple({**expected, **each}.items())) for each in ({}, actual)]
        outcomes = [Returned(("FlowRunDetail", (("steps", (step,)),))) for step in steps]
        return frozenset(wrong_answers(read, *outcomes))

    status = Signature("STP-6", wrong("a", status="Running"))
    assert status.covers(Signature("STP-6", wrong("b", status="Running")))
    assert not status.covers(Signature("STP-4", wrong("a", status="Running")))
    assert not status.covers(Signature("STP-6", wrong("a", status="Failed")))
    assert not status.covers(Signature("STP-6", wrong("a", output_json="1")))
    assert not status.covers(Signature("STP-6", wrong("a", status="Running", output_json="1")))
    assert not status.covers(Signature("STP-6", frozenset()))
    refused = Signature("CLM-1", frozenset(wrong_answers(claim(), Returned(False), Raised("ConflictError"))))
    won = Signature("CLM-1", frozenset(wrong_answers(claim(), Returned(False), Returned(True))))
    assert not refused.covers(won)
    assert won.covers(won)


# Every call that is tried is one that the contract allows


async def test_legal_calls_are_recognised() -> None:
    lease = timedelta(minutes=1)
    assert is_valid(claim(owner="one", lease=lease))
    assert is_valid(Call(method="ping"))
    for illegal in (
        claim(lease=lease),
        claim(owner="one", lease=timedelta(0)),
        claim(owner=""),
        claim(nobody="one"),
        Call(method="try_claim_step", arguments={"run_id": RUN}),
    ):
        assert not is_valid(illegal), illegal.source()
    refused = Raised("InvalidArgumentError")
    assert is_correctly_rejected(claim(lease=lease), refused)
    assert not is_correctly_rejected(claim(lease=lease), Returned(False))
    assert not is_correctly_rejected(claim(owner="one", lease=lease), refused)


async def test_dropping_the_owner_drops_the_lease() -> None:
    held = claim(owner="one", lease=timedelta(minutes=1))
    assert without_argument(held, "owner") == claim()
    assert without_argument(held, "lease") == claim(owner="one")
    assert without_argument(claim(owner="one"), "owner") == claim()
    assert without_argument(claim(), "owner") is None


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64), length=st.integers(1, 40))
def test_every_simplified_call_is_legal(seed: int, length: int) -> None:
    async def try_all() -> None:
        generator, clock = random.Random(seed), VirtualClock(NOW)
        chooser = RandomChoices(generator)
        universe = Universe(model=Model(clock), runs=[RUN, UUID(int=2)], flows=FLOWS)
        for number in range(length):
            clock.now += draw_clock_advance(chooser, universe)
            call = draw_call(chooser, universe, generator.choice(list(STRATEGIES)) if number else "start_run")
            assert is_valid(call), call.source()
            expected_outcome(universe.model, call)
            while optional := optional_arguments(call):
                simpler = without_argument(call, generator.choice(optional))
                assert simpler is not None, call.source()
                assert is_valid(simpler), simpler.source()
                assert simpler.arguments.items() < call.arguments.items()
                call = simpler

    asyncio.run(try_all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64), family=st.sampled_from(RACE_FAMILIES))
def test_every_shrunk_race_is_legal(seed: int, family: RaceFamily) -> None:
    def calls(race: Race) -> list[Call]:
        return [*race.setup, *(call for client in race.clients for call in client), *race.final]

    async def try_all() -> None:
        generator = random.Random(seed)
        drawing = RaceBuilder(generator=generator, capabilities=frozenset(Capability), now=NOW)
        race = family.draw(drawing).scheduled(generator)
        while smaller := list(smaller_races(race)):
            for each in (race, *smaller):
                assert all(map(is_valid, calls(each)))
            race = generator.choice(smaller)

    asyncio.run(try_all())


async def test_a_refused_illegal_call_is_no_violation() -> None:
    """Every correct store raises InvalidArgumentError for an illegal call."""
    start = RaceBuilder(generator=random.Random(1), capabilities=frozenset(Capability), now=NOW).start_run()
    exclusive = claim(lease=timedelta(minutes=1))
    race = Race(setup=(start,), clients=((exclusive,), (claim(owner="one"),)), final=())
    family = RaceFamily(name="refusals", clauses=("CLM-1",), sentence="refusals", draw=lambda drawing: race)
    async with new_context("memory://", MEMORY, Profile.QUICK, 3) as context:
        await search(
            context, family, StoreRunner([context.store], context.clock), Budget(rounds=2, races=2, seconds=5)
        )
        assert context.assertions == 4
