"""The memory space, the clock register, keys and documents; test_space_checks.py has what spaces promise."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowstore_documents import (
    Change,
    MaybeApplied,
    NotApplied,
    SnapshotGone,
    SpaceLimits,
    TooLarge,
    Version,
    clock_register,
    keys,
)
from flowstore_documents.clock_register import ClockRegister
from flowstore_documents.memory_space import HISTORY, Fault, MemoryData, MemorySpace
from flowstore_documents.space_checks import names, put
from flowstore_documents.texts import StagedTexts, same_text
from tests.documents_backend.stores import CountingSpace

RUN = UUID(int=7)
NOW = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=5)


@pytest.fixture
def space() -> MemorySpace:
    return MemorySpace(MemoryData())


# Limits and snapshots


async def test_all_changes_of_a_commit_are_decided_against_the_state_before_it(space: MemorySpace) -> None:
    with pytest.raises(ValueError, match="occurs in another change"):
        await space.commit([Change(puts={b"a": b""}), Change({b"a": None}, {b"b": b""})])
    assert await names(space) == []


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (Change(puts={b"a": bytes(65_537)}), "65536 bytes in one value"),
        (Change(puts={bytes([n]): b"" for n in range(25)}), "24 writes"),
        (Change({bytes([n]): None for n in range(17)}, {b"\xff": b""}), "16 expectations"),
    ],
)
async def test_a_change_beyond_a_limit_is_refused(space: MemorySpace, change: Change, limit: str) -> None:
    with pytest.raises(TooLarge, match=limit):
        await space.commit([change])
    assert await names(space) == []


async def test_an_old_snapshot_is_gone(space: MemorySpace) -> None:
    await put(space, a="1")
    at = (await space.read([b"a"])).at
    for _ in range(HISTORY + 1):
        space.data.commit([Change(puts={b"b": b""})])
    with pytest.raises(SnapshotGone):
        await space.read([b"a"], at=at)


# Faults


@pytest.mark.parametrize("fault", [Fault.LOST_REQUEST, Fault.LOST_REPLY, Fault.DELAYED])
async def test_a_lost_commit_may_have_happened(space: MemorySpace, fault: Fault) -> None:
    space.arm(fault)
    with pytest.raises(MaybeApplied):
        await put(space, a="1")
    assert await names(space) == ([b"a"] if fault is Fault.LOST_REPLY else [])
    space.release()
    assert await names(space) == ([] if fault is Fault.LOST_REQUEST else [b"a"])
    assert space.disarm()


async def test_no_request_of_an_isolated_space_arrives(space: MemorySpace) -> None:
    space.arm(Fault.LOST_REPLY, skip=1, isolates=True)
    await put(space, a="1")
    with pytest.raises(MaybeApplied):
        await put(space, b="1")
    with pytest.raises(NotApplied):
        await put(space, c="1")
    with pytest.raises(NotApplied):
        await space.read([b"a"])
    space.disarm()
    assert await names(space) == [b"a", b"b"]


# The clock


async def test_clocks_that_differ_never_disagree_about_a_time() -> None:
    """Machines with skewed clocks ask in turn; no answer is before an earlier one."""
    space = MemorySpace(MemoryData())
    rng = random.Random(5)
    true_time = NOW
    skews = [timedelta(seconds=seconds) for seconds in (-2, 0, 1.5)]

    def machine(skew: timedelta) -> ClockRegister:
        return ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: true_time + skew)

    machines = [machine(skew) for skew in skews]
    answers = []
    for _ in range(200):
        true_time += timedelta(milliseconds=rng.randrange(300))
        answers.append(await rng.choice(machines).now())
        assert true_time - timedelta(seconds=2.5) < answers[-1] < true_time + timedelta(seconds=2)
    assert answers == sorted(answers)
    together = await asyncio.gather(*(one.now() for one in machines * 5))
    assert min(together) >= answers[-1]


async def test_a_clock_far_ahead_of_clocks_in_use_is_refused() -> None:
    space = MemorySpace(MemoryData())
    moment = NOW

    def tick() -> datetime:
        nonlocal moment
        moment += timedelta(seconds=1)
        return moment

    good = ClockRegister(space, timedelta(seconds=5), machine_clock=tick)
    wrong = ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: NOW + timedelta(hours=1))
    await good.now()

    async def use() -> None:
        while True:
            await good.now()
            await asyncio.sleep(0.05)

    using = asyncio.create_task(use())
    with pytest.raises(NotApplied, match="ahead") as refused:
        await wrong.now()
    using.cancel()
    assert not refused.value.retry
    assert await good.now() < NOW + timedelta(minutes=30)


class RegisterSpace(MemorySpace):
    """Its clock is the register."""

    async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
        found = (await self.read([clock_register.KEY])).found.get(clock_register.KEY)
        register = b"" if found is None else found.value
        return await super().commit(
            [
                replace(change, before=None)
                for change in changes
                if change.before is None or register < keys.time_bytes(change.before)
            ]
        )


async def test_a_time_of_a_view_is_told_by_the_change_that_depends_on_it() -> None:
    """Machines with skewed clocks decide on views; no later time of anyone is before a decision."""
    space, rng, true_time = RegisterSpace(MemoryData()), random.Random(7), NOW

    def machine(skew: timedelta) -> ClockRegister:
        return ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: true_time + skew)

    machines = [machine(timedelta(seconds=seconds)) for seconds in (-2, 0, 1.5)]
    assert machines[0].time_of(None) is None
    latest = await machines[0].now()
    for _ in range(200):
        true_time += timedelta(milliseconds=rng.randrange(300))
        register = rng.choice(machines)
        moment = register.time_of((await space.read([clock_register.KEY])).found[clock_register.KEY])
        assert moment is not None
        assert moment >= latest
        if rng.random() < 0.5:
            continue  # A call that does not answer need not tell it.
        change = Change(puts={b"a": b""}, time=moment)
        told = register.change_for([change])
        assert (await space.commit([change, *told]))[0] is not None
        register.told(told)
        assert register.change_for([change]) == ()
        latest = moment
        assert await rng.choice(machines).now() >= latest
    wrong = machine(timedelta(hours=1))
    assert wrong.time_of((await space.read([clock_register.KEY])).found[clock_register.KEY]) is None


async def test_concurrent_calls_share_an_answer_that_is_not_older_than_they_are() -> None:
    data, moment = MemoryData(), NOW
    space = CountingSpace(data)
    register = ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: moment)
    other = ClockRegister(MemorySpace(data), timedelta(seconds=5), machine_clock=lambda: moment)
    early = [asyncio.create_task(register.now()) for _ in range(100)]
    await asyncio.sleep(0)
    moment += timedelta(seconds=1)
    latest = await other.now()
    late = [asyncio.create_task(register.now()) for _ in range(100)]
    assert min(await asyncio.gather(*late)) >= latest
    await asyncio.gather(*early)
    assert space.reads + len(space.commits) <= 6
    early[0] = asyncio.create_task(register.now())
    await asyncio.sleep(0)
    early[0].cancel()
    assert await register.now() == moment


async def test_a_clock_that_nobody_asked_for_long_catches_up() -> None:
    space = MemorySpace(MemoryData())
    await ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: NOW).now()
    later = NOW + timedelta(hours=1)
    assert await ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: later).now() == later


async def test_a_clock_that_has_not_jumped_need_not_wait_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    space, moment, passed = MemorySpace(MemoryData()), NOW, 0.0
    register = ClockRegister(
        space, timedelta(seconds=5), machine_clock=lambda: moment, monotonic=lambda: passed
    )
    await register.now()
    moment, passed = moment + timedelta(hours=1), 3600.0
    with monkeypatch.context() as patch:
        patch.setattr(clock_register, "TICK_SECONDS", 1e6)
        assert await asyncio.wait_for(register.now(), 30) == moment
    # The monotonic clock does not show a jump.
    moment += timedelta(minutes=1)
    others = NOW + timedelta(hours=1)
    other = ClockRegister(space, timedelta(seconds=5), machine_clock=lambda: others)

    async def tick() -> None:
        nonlocal others
        while True:
            others += timedelta(milliseconds=20)
            await other.now()
            await asyncio.sleep(0.05)

    ticking = asyncio.create_task(tick())
    with pytest.raises(NotApplied, match="ahead"):
        await register.now()
    ticking.cancel()


# Keys and documents


@given(st.lists(st.tuples(NAMES, NAMES), min_size=2, max_size=2, unique=True))
def test_different_names_have_different_keys(pairs: list[tuple[str, str]]) -> None:
    (one, other), (third, fourth) = pairs
    assert keys.key_scope(RUN, one, other) != keys.key_scope(RUN, third, fourth)


@given(st.lists(NAMES, min_size=2, max_size=2, unique=True))
def test_keys_of_names_are_in_the_order_of_the_names(pair: list[str]) -> None:
    one, other = pair
    assert (keys.step(RUN, one) < keys.step(RUN, other)) == (one < other)
    # No key is among those with another name.
    prefix = keys.attempts(RUN, one)
    assert not prefix <= keys.attempt(RUN, other, 1) < keys.end_of(prefix)


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)))
def test_times_in_keys_are_in_order(one: datetime, other: datetime) -> None:
    assert (keys.time_bytes(one) < keys.time_bytes(other)) == (one < other)
    assert keys.parse_time(keys.time_bytes(one)) == one
    assert keys.time_bytes(one) < keys.after_time(one) < keys.NEVER
    assert (keys.position(one, RUN) > keys.position(other, RUN)) == (one < other)


def test_entries_of_queues_are_parsed() -> None:
    for name, priority, moment, step_key in [("", 0, NOW, "a"), ("q\x01", 9, None, "ü"), ("p", 5, NOW, "p")]:
        key = keys.queued_step(name, priority, moment, RUN, step_key)
        level, time, run_id, found = keys.parse_queued_step(key)
        assert (level, run_id, found) == (keys.queue_level(name, priority), RUN, step_key)
        assert keys.parse_time(time) == moment


def test_long_texts_are_compared_without_their_pieces() -> None:
    one, other = StagedTexts(SpaceLimits()), StagedTexts(SpaceLimits())
    assert same_text(one.put("x" * 100_000), other.put("x" * 100_000))
    assert not same_text(one.put("x" * 100_000), other.put("y" + "x" * 99_999))
    assert not same_text(one.put("x" * 100_000), other.put("x"))
