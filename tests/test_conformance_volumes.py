"""The helpers of the checks of volumes, of concurrent calls and of leases in real time."""

from __future__ import annotations

import time
from typing import Any, cast
from uuid import UUID

import pytest
from flowstore_conformance import Profile
from flowstore_conformance.checks import leases
from flowstore_conformance.checks.fixtures import call_at_once
from flowstore_conformance.checks.leases import Contest, Win
from flowstore_conformance.checks.volumes import expect_items
from flowstore_conformance.context import ContractViolation, Inconclusive, new_context

from flowstore_core import ConflictError, FlowStore, StoreUnavailableError
from flowstore_memory.plugin import MemoryBackend

LEASE = 0.1


async def test_refused_calls_are_repeated_and_keep_their_order() -> None:
    refusals = {1: 3, 2: 1}

    async def call(number: int) -> object:
        if refusals.get(number, 0):
            refusals[number] -= 1
            raise StoreUnavailableError("busy")
        if number == 3:
            raise ConflictError("taken", run_id=UUID(int=1))
        return number

    *numbers, error = await call_at_once(call, range(4))
    assert numbers == [0, 1, 2]
    assert type(error) is ConflictError


async def test_a_store_that_refuses_for_ever_is_inconclusive() -> None:
    async def refuse(number: int) -> object:
        raise StoreUnavailableError("busy")

    with pytest.raises(Inconclusive, match="refused 2 of 2 concurrent calls"):
        await call_at_once(refuse, range(2))


async def test_a_driver_exception_of_a_concurrent_call_is_a_violation() -> None:
    async def fail(number: int) -> object:
        raise ZeroDivisionError

    with pytest.raises(ContractViolation, match="ZeroDivisionError") as raised:
        await call_at_once(fail, range(2))
    assert raised.value.clause == "CON-2"


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([1, 2], "expected 3 items, got 2; 1 are missing, the first being 3 (item 3)"),
        ([1, 2, 3, 3], "expected 3 items, got 4; 1 are repeated, such as 3"),
        ([1, 2, 4], "1 are missing, the first being 3 (item 3); 1 are unexpected, such as 4"),
        ([1, 3, 2], "the order differs from item 2 on: expected 2, got 3"),
    ],
)
async def test_a_wrong_list_is_described(found: Any, message: str) -> None:
    async with new_context("memory://", MemoryBackend(), Profile.QUICK, 1) as context:
        with pytest.raises(ContractViolation) as raised:
            expect_items(context, found, [1, 2, 3], "a list", clause="QRY-1")
    assert message in raised.value.message
    assert raised.value.clause == "QRY-1"


@pytest.mark.parametrize(
    ("wins", "held_until", "possible"),
    [
        # One lease after another, and calls that a stall delayed.
        ([(0.0, 0.01), (0.02, 0.12)], 0.0, True),
        ([(0.0, 5.0), (0.0, 5.1)], 0.0, True),
        # Returned in the other order.
        ([(0.0, 0.3), (0.0, 0.01)], 0.0, True),
        ([(0.0, 0.01), (0.02, 0.05)], 0.0, False),
        # Three leases in the time of two.
        ([(0.0, 0.01), (0.0, 0.1), (0.0, 0.15)], 0.0, False),
        # The claim was taken until 0.9: the first lease cannot have begun before.
        ([(0.0, 1.0), (0.0, 1.0)], 0.8, True),
        ([(0.0, 0.96), (0.0, 0.95)], 0.9, False),
    ],
)
async def test_leases_that_cannot_follow_one_another_are_a_violation(
    wins: list[tuple[float, float]], held_until: float, possible: bool
) -> None:
    async with new_context("memory://", MemoryBackend(), Profile.QUICK, 1) as context:
        contest = Contest([context.store], UUID(int=1), LEASE)
        began = time.monotonic()
        contest.wins = [
            Win(str(number), began + called, began + returned)
            for number, (called, returned) in enumerate(wins)
        ]
        if possible:
            contest.check(context, not_before=began + held_until)
            return
        with pytest.raises(ContractViolation, match="a lease ended early"):
            contest.check(context, not_before=began + held_until)


class RefusingStore:
    """A store that grants one claim and remembers it for ever."""

    def __init__(self) -> None:
        self._is_claimed = False

    async def try_claim_step(self, run_id: UUID, step_key: str, **given: Any) -> bool:
        won, self._is_claimed = not self._is_claimed, True
        return won


async def test_claims_that_nobody_wins_end_the_contest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "FREE_SECONDS", 0.05)
    contest = Contest([cast(FlowStore, RefusingStore())], UUID(int=1), 0.01)
    with pytest.raises(ContractViolation, match="claims have lost since the last lease ended"):
        await contest.run(2)
    assert len(contest.wins) == 1
