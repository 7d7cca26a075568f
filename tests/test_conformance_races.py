"""Model-based and concurrent checks: what they find on wrong stores, and how they work."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from flowstore_conformance import race_search, suite
from flowstore_conformance.checks.snapshots import torn
from flowstore_conformance.context import CheckContext, Inconclusive, Profile, new_context
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Raised, Returned
from flowstore_conformance.race_families import RACE_FAMILIES, RaceBuilder, RaceFamily
from flowstore_conformance.race_families.pairs import Pair, cleanup_pairs, draw_pair, run_pairs
from flowstore_conformance.race_search import Budget, judge, search
from flowstore_conformance.races import ClientResult, ClientTask, Race, RaceRun, StoreRunner
from flowstore_conformance.registry import Kind, all_checks
from flowstore_conformance.repro import replay_on_memory
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check
from flowstore_conformance.wire import (
    pack_result,
    pack_task,
    read_line,
    unpack_result,
    unpack_task,
    write_line,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flowstore_core import (
    Capability,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepStatus,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.operations import OPERATIONS
from flowstore_core.plugins import find_backend
from flowstore_memory.store import SharedStore

_, MEMORY = find_backend("memory")
CHECKS = {one.name: one for one in all_checks()}
MINE = [one for one in CHECKS.values() if one.kind in (Kind.MODEL, Kind.RACE, Kind.SNAPSHOT)]


async def run(name: str, profile: Profile = Profile.STANDARD, seed: int = 1) -> CheckResult:
    return await run_check(CHECKS[name], "memory://", MEMORY, profile, seed)


@pytest.mark.parametrize(
    "name", [one.name for one in MINE if one.kind is Kind.MODEL and one.needs <= MEMORY.capabilities]
)
async def test_a_stalled_machine_does_not_make_a_model_check_inconclusive(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(monotonic=itertools.count(0, 60).__next__)
    monkeypatch.setattr("flowstore_conformance.checks.model.time", clock)
    monkeypatch.setattr("flowstore_conformance.hypothesis_search.time", clock)
    assert (await run(name, Profile.QUICK)).status is Status.PASS


# Wrong stores: each reads, yields to other tasks, and then writes on the basis of its read.


class CheckThenClaim(SharedStore):
    async def try_claim_step(self, run_id: UUID, step_key: str, **given: Any) -> bool:
        if step_key in await self.get_claimed_step_keys(run_id):
            return await super().try_claim_step(run_id, step_key, **given)
        await asyncio.sleep(0)
        await self.release_step_claim(run_id, step_key)
        return await super().try_claim_step(run_id, step_key, **given)


class DoubleTakeover(SharedStore):
    async def try_claim_step(self, run_id: UUID, step_key: str, **given: Any) -> bool:
        now = self._now()
        claims = [one for one in await self.get_step_claims(run_id) if one.step_key == step_key]
        await asyncio.sleep(0)
        if claims and claims[0].expires_at is not None and claims[0].expires_at <= now:
            await self.release_step_claim(run_id, step_key)
        return await super().try_claim_step(run_id, step_key, **given)


class AttemptFromMaximum(SharedStore):
    async def record_step_start(self, run_id: UUID, step_key: str, step_type: str, **given: Any) -> int:
        detail = await self.get_run_detail(run_id)
        steps = [] if detail is None else [one for one in detail.steps if one.step_key == step_key]
        await asyncio.sleep(0)
        started = await super().record_step_start(run_id, step_key, step_type, **given)
        return started if given.get("owner") else len(steps[0].attempts) + 1 if steps else 1


class ReadModifyWriteLatch(SharedStore):
    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        control = await self.get_run_control(run_id)
        await asyncio.sleep(0)
        await super().request_cancel(run_id, reason)
        return control is None or not control.cancel_requested


class SkipLocked(SharedStore):
    async def deliver_signal(self, run_id: UUID, signal_name: str, payload_json: str, **given: Any) -> Any:
        before = [one for one in await self.get_waiters(run_id) if one.delivered_at is None]
        await asyncio.sleep(0)
        result = await super().deliver_signal(run_id, signal_name, payload_json, **given)
        if before and result.status is SignalDeliveryStatus.ALREADY_DELIVERED:
            nothing = SignalDeliveryStatus.NOT_FOUND
            return SignalDeliveryResult(status=nothing, step_key=None, delivered_at=None)
        return result


class TornRetry(SharedStore):
    async def retry_step(self, run_id: UUID, step_key: str, **given: Any) -> None:
        await super().retry_step(run_id, step_key, **given)
        await asyncio.sleep(0)
        await self.release_dispatch(run_id, step_key)


class TornDetail(SharedStore):
    async def get_run_detail(self, run_id: UUID) -> Any:
        run = await super().get_run_detail(run_id)
        await asyncio.sleep(0)
        steps = await super().get_run_detail(run_id)
        return run if run is None or steps is None else dataclasses.replace(run, steps=steps.steps)


class TornPage(SharedStore):
    async def get_runs_page(self, *given: Any, **named: Any) -> Any:
        page = await super().get_runs_page(*given, **named)
        await asyncio.sleep(0)
        later = await super().get_runs_page(*given, **named)
        return page._replace(total_count=later.total_count)


class RenewingShortens(SharedStore):
    async def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        renewed = await super().renew_step_claim(run_id, step_key, owner, lease)
        if renewed:
            self._runs[run_id.int].steps[step_key].expires_at = self._now() + lease
        return renewed


class DriverErrorSurfaces(SharedStore):
    async def record_step_start(self, run_id: UUID, step_key: str, step_type: str, **given: Any) -> int:
        raise ConnectionResetError("a secret of the driver")


def make_wrong(monkeypatch: pytest.MonkeyPatch, wrong: type[SharedStore]) -> None:
    for name in ("MemoryStore", "SharedStore"):
        monkeypatch.setattr(f"flowstore_memory.plugin.{name}", wrong)


@pytest.mark.parametrize("mode", ["tasks", "stores"])
@pytest.mark.parametrize(
    ("wrong", "family", "clause", "words"),
    [
        (CheckThenClaim, "claims", "CLM-1", "a race that one call can win"),
        (DoubleTakeover, "takeovers", "CLM-6", ""),
        (AttemptFromMaximum, "attempts", "STP-1", "of step 'a' was returned to"),
        (ReadModifyWriteLatch, "latches", "CTL-2", "no order of these calls"),
        (SkipLocked, "deliveries", "SIG-3", "no order of these calls"),
        (TornRetry, "retries", "STP-6", "no order of these calls"),
    ],
)
async def test_a_race_is_detected(
    monkeypatch: pytest.MonkeyPatch, wrong: type[SharedStore], family: str, clause: str, words: str, mode: str
) -> None:
    make_wrong(monkeypatch, wrong)
    result = await run(f"{family}_by_{mode}")
    failure = result.failure
    assert failure is not None
    assert (result.status, failure.clause) == (Status.FAIL, clause)
    assert words in failure.message
    assert "seen in" in failure.message
    assert failure.history is not None
    assert failure.verdict is not None
    # The race is shrunk: at most three clients remain.
    assert len({one.client for one in failure.history.operations if one.client >= 0}) <= 3
    assert failure.program is not None
    compile(failure.program, "program", "exec")


async def test_the_program_of_a_race_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, CheckThenClaim)
    result = await run("claims_by_tasks")
    assert result.failure is not None
    assert result.failure.program is not None
    printed = await replay_on_memory(result.failure.program)
    # In a new process with the correct store, one claim wins.
    assert "200 of 200 rounds" in printed
    assert printed.count("try_claim_step: True") == 1


@pytest.mark.parametrize(
    ("wrong", "name", "clause"),
    [
        (TornDetail, "details_are_never_torn", "QRY-3"),
        (TornPage, "pages_agree_with_their_counts", "QRY-3"),
        (RenewingShortens, "call_sequences_agree_with_the_model", "CLM-6"),
        (DriverErrorSurfaces, "call_sequences_agree_with_the_model", "CON-2"),
        (DriverErrorSurfaces, "hypothesis_calls_agree_with_the_model", "CON-2"),
    ],
)
async def test_every_wrong_store_is_detected(
    monkeypatch: pytest.MonkeyPatch, wrong: type[SharedStore], name: str, clause: str
) -> None:
    make_wrong(monkeypatch, wrong)
    result = await run(name, seed=3)
    assert result.failure is not None
    assert (result.status, result.failure.clause) == (Status.FAIL, clause)
    assert "secret" not in result.failure.message


async def test_programs_are_shrunk_and_run(monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, RenewingShortens)
    result = await run("call_sequences_agree_with_the_model", seed=3)
    assert result.failure is not None
    program = result.failure.program
    assert program is not None
    assert program.count("await outcome(") == 4, program
    printed = await replay_on_memory(program)
    start, claim, renew, _ = [line.partition(":")[0] for line in printed.splitlines()]
    assert start in ("start_run", "trigger_run", "import_run")
    assert claim in ("try_claim_step", "try_start_step", "claim_next_steps")
    assert renew == "renew_step_claim"


async def test_the_same_seed_draws_the_same_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (RenewingShortens, CheckThenClaim):
        make_wrong(monkeypatch, wrong)
        name = "claims_by_tasks" if wrong is CheckThenClaim else "call_sequences_agree_with_the_model"
        first, second = await run(name, seed=5), await run(name, seed=5)
        assert first.assertions > 0
        assert first.failure is not None
        assert second.failure is not None
        assert first.failure.clause == second.failure.clause


# Looking closely enough


class _SequentialRunner:
    """A runner that makes calls one after the other."""

    def __init__(self, context: CheckContext) -> None:
        self._runner = StoreRunner([context.store], context.clock)
        self.topology = self._runner.topology

    async def run(self, races: Sequence[Race]) -> list[RaceRun]:
        return [dataclasses.replace(one, overlaps=()) for one in await self._runner.run(races)]


async def test_too_little_overlap_is_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_search, "MAX_OVERLAP_SECONDS", 0.1)
    async with new_context("memory://", MEMORY, Profile.QUICK, 3) as context:
        with pytest.raises(Inconclusive, match="calls overlapped in only 0 of"):
            await search(
                context, RACE_FAMILIES[0], _SequentialRunner(context), Budget(rounds=2, races=2, seconds=5)
            )


async def test_an_undecided_search_is_inconclusive() -> None:
    start = Call(
        method="start_run", arguments={"flow_id": UUID(int=9), "flow_name": "f", "run_id": UUID(int=1)}
    )
    start = dataclasses.replace(start, arguments={**start.arguments, "trigger_key": "t"})
    now = datetime(2026, 1, 1, tzinfo=UTC)
    same = Operation(client=0, call=start, invoked=1, returned=9, outcome=UNKNOWN, now=now)
    wrong = dataclasses.replace(same, outcome=Returned(None))
    history = History.of([same, same, same, wrong])
    race = Race(setup=(), clients=(), final=())
    async with new_context("memory://", MEMORY, Profile.QUICK, 3) as context:
        with pytest.raises(Inconclusive, match="no verdict"):
            judge(context, RaceRun(race=race, history=history, overlaps=(), unavailable=0), budget=0)


async def test_calls_that_suspend_overlap_according_to_their_times() -> None:
    """For a store that never suspends, calls that waited at the barrier count as overlapping."""

    def claims(owner: str) -> Call:
        return Call(
            method="try_claim_step", arguments={"run_id": UUID(int=1), "step_key": "a", "owner": owner}
        )

    given = {"flow_id": UUID(int=9), "flow_name": "f", "run_id": UUID(int=1), "trigger_key": "t"}
    race = Race(
        setup=(Call(method="start_run", arguments=given),), clients=((claims("x"),), (claims("y"),)), final=()
    )

    class Suspending(SharedStore):
        async def try_claim_step(self, *given: Any, **named: Any) -> bool:
            await asyncio.sleep(0)
            return await super().try_claim_step(*given, **named)

    async with open_store("memory://") as store:
        [atomic] = await StoreRunner([store], None).run([race])
    assert len(atomic.overlaps) == 1
    assert not atomic.history.overlaps()
    with pytest.MonkeyPatch.context() as patch:
        make_wrong(patch, Suspending)
        async with open_store("memory://") as store:
            [suspended] = await StoreRunner([store], None).run([race])
            late = dataclasses.replace(race, yields=((0,), (9,)))
        async with open_store("memory://") as store:
            [apart] = await StoreRunner([store], None).run([late])
    assert len(suspended.overlaps) == 1
    assert not apart.overlaps


# Torn reads, and messages between processes


async def test_torn_reads_are_explained() -> None:
    async with open_store("memory://") as store:
        run_id = UUID(int=1)
        await store.start_run(UUID(int=9), "f", run_id, "t")
        await store.record_step_start(run_id, "a", "s")
        running = await store.get_run_detail(run_id)
        await store.record_step_complete(run_id, "a", StepStatus.FAILED, error_message="no")
        await store.record_step_start(run_id, "a", "s")
        second = await store.get_run_detail(run_id)
    assert running is not None
    assert second is not None
    assert torn(running) is None
    assert torn(second) is None
    [step], [later] = running.steps, second.steps
    for wrong, words in (
        (dataclasses.replace(running, status=RunStatus.FAILED), "with completed_at None"),
        (
            dataclasses.replace(running, steps=(dataclasses.replace(step, status=StepStatus.FAILED),)),
            "newest",
        ),
        (dataclasses.replace(running, steps=(dataclasses.replace(step, attempts=()),)), "numbered []"),
        (
            dataclasses.replace(second, steps=(dataclasses.replace(later, attempt_count=1),)),
            "attempt_count 1",
        ),
        (
            dataclasses.replace(
                second,
                steps=(dataclasses.replace(later, attempts=(step.attempts[0], later.attempts[1])),),
            ),
            "open attempt 1",
        ),
    ):
        assert words in str(torn(wrong))


def test_tasks_and_histories_round_trip_between_processes() -> None:
    now = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
    arguments = {
        "run_id": UUID(int=1 << 100),
        "due_at": now,
        "lease": timedelta(days=3, microseconds=1),
        "expected": {"é": "Failed"},
        "reset": ["a", "b"],
        "text": 'A "\u2028\U0001f600\n',
        "nothing": None,
        "number": 3,
        "status": StepStatus.FAILED,
    }
    call = Call(method="retry_step", arguments=arguments)
    job = ClientTask(race=3, client=1, calls=(call, call), yields=(0, 2))
    assert unpack_task(read_line(write_line(pack_task(job)))) == job
    outcomes = (
        Returned((("a", frozenset({"x"})), (UUID(int=2), now, 1.5, True))),
        Raised("StaleAttemptError"),
        UNKNOWN,
    )
    operations = tuple(
        Operation(
            client=1,
            call=call,
            invoked=1.25,
            returned=math.inf if outcome is UNKNOWN else 2.5,
            outcome=outcome,
            now=now,
        )
        for outcome in outcomes
    )
    done = ClientResult(race=3, operations=operations, suspended=True, unavailable=2)
    assert unpack_result(read_line(write_line(pack_result(done))), 1, now) == done


async def test_processes_race(tmp_path: Any) -> None:
    """Worker processes exit with their check, and their results are checked."""
    url = f"sqlite:///{tmp_path}/x.db"
    result = await run_check(CHECKS["keys_by_processes"], url, find_backend("sqlite")[1], Profile.QUICK, 4)
    assert (result.status, result.failure, result.reason) == (Status.PASS, None, None)


@pytest.mark.parametrize(
    "family",
    [one for one in RACE_FAMILIES if one.name not in ("keys", "triggers")],
    ids=lambda one: one.name,
)
@pytest.mark.parametrize("capabilities", [frozenset(Capability), frozenset()], ids=["full", "base"])
def test_a_race_ends_with_reads_of_the_whole_state_of_its_run(
    family: RaceFamily, capabilities: frozenset[Capability]
) -> None:
    if not family.needs <= capabilities:
        pytest.skip("the family needs more")
    drawing = RaceBuilder(random.Random(7), capabilities, datetime(2026, 1, 1, tzinfo=UTC))
    looks = {call.method for call in family.draw(drawing).final}
    wanted = {"get_run_detail", "get_run_control", "get_step_claims", "get_dispatches"}
    extensions = {"get_waiters", "get_outputs", "get_run_events"}
    assert looks >= wanted | (extensions if capabilities else {"get_waiter"})


async def test_a_store_that_refuses_calls_without_retrying_them_is_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    claim, calls = SharedStore.try_claim_step, itertools.count()

    async def refuse_often(self: SharedStore, *arguments: Any, **named: Any) -> bool:
        if next(calls) % 3 == 0:
            raise StoreUnavailableError("busy")
        return await claim(self, *arguments, **named)

    monkeypatch.setattr(SharedStore, "try_claim_step", refuse_often)
    result = await run("claims_by_tasks", Profile.QUICK)
    assert result.failure is not None
    assert result.failure.clause == "CON-2"
    assert "it must retry calls that certainly had no effect" in result.failure.message


# Pairs of writing operations


def test_the_pairs_are_all_pairs_of_the_writing_operations_of_the_table() -> None:
    names = [name for name, one in OPERATIONS.items() if one.writes]
    pairs = {frozenset(pair) for pair in (*run_pairs(Capability), *cleanup_pairs(Capability))}
    assert pairs == {frozenset((one, other)) for one in names for other in names}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64), pair=st.sampled_from([*run_pairs(Capability), *cleanup_pairs(Capability)]))
def test_a_race_of_a_pair_calls_both_operations_from_two_clients(seed: int, pair: Pair) -> None:
    drawing = RaceBuilder(random.Random(seed), frozenset(Capability), datetime(2026, 1, 1, tzinfo=UTC))
    first, second, *_ = draw_pair(drawing, pair).clients
    assert (first[0].method, second[0].method) == pair


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64), pair=st.sampled_from(cleanup_pairs(Capability)))
def test_no_run_starts_and_ends_beside_a_cleanup(seed: int, pair: Pair) -> None:
    drawing = RaceBuilder(random.Random(seed), frozenset(Capability), datetime(2026, 1, 1, tzinfo=UTC))
    calls = [call for client in draw_pair(drawing, pair).clients for call in client]
    starts = any(call.method in ("start_run", "trigger_run", "import_run") for call in calls)
    ends = [call.method == "complete_run" or call.arguments.get("complete_as") for call in calls]
    ends += [step.complete_as for call in calls for step in call.arguments.get("steps", ())]
    assert not (starts and any(ends))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**64), pair=st.sampled_from([*run_pairs(Capability), *cleanup_pairs(Capability)]))
def test_a_race_has_no_call_on_several_runs_that_is_not_atomic(seed: int, pair: Pair) -> None:
    drawing = RaceBuilder(random.Random(seed), frozenset(Capability), datetime(2026, 1, 1, tzinfo=UTC))
    race = draw_pair(drawing, pair)
    calls = [call for client in (race.setup, *race.clients) for call in client]
    assert all(len(call.arguments.get(name, ())) <= 1 for call in calls for name in ("claims", "steps"))
    if "cleanup" in pair:
        archives = [call.arguments["archive"].run_id for call in calls if call.method == "import_run"]
        named = [call.arguments["run_id"] for call in calls if "run_id" in call.arguments]
        assert len({*archives, *named}) <= 1


async def test_a_run_reports_how_many_pairs_ran_concurrently() -> None:
    result = await run("pairs_by_tasks", Profile.QUICK)
    pairs = len(run_pairs(Capability))
    assert result.notes == (
        f"{pairs // 16} of {pairs} pairs of writing operations ran concurrently, each at least 1 time",
    )


async def test_a_pair_that_never_ran_concurrently_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_cancels(run: RaceRun) -> list[frozenset[str]]:
        return [names for names in operations_of(run) if "request_cancel" not in names]

    operations_of = race_search._names
    monkeypatch.setattr(race_search, "_names", without_cancels)
    monkeypatch.setattr(suite, "INCONCLUSIVE_RETRIES", 0)
    result = await run("cleanup_pairs_by_tasks")
    assert result.status is Status.INCONCLUSIVE
    # Others may have missed each other by chance.
    assert result.reason is not None
    assert f"of {len(cleanup_pairs(Capability))} pairs of writing operations " in result.reason
    assert "request_cancel and cleanup" in result.reason
    assert result.notes == ()


class CancelUndoesConfiguration(SharedStore):
    async def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        state = self._namespace.controls.get(run_id)
        timeout_at = None if state is None else state.timeout_at
        await asyncio.sleep(0)
        cancelled = await super().request_cancel(run_id, reason)
        if state is not None:
            state.timeout_at = timeout_at
        return cancelled


async def test_a_lost_effect_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, CancelUndoesConfiguration)
    result = await run("pairs_by_stores")
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert result.failure.clause == "CON-1"
