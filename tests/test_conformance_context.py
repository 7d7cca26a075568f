"""The CheckContext: additional stores, shared namespaces, reruns, cancellation points and differences."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from flowstore_conformance import Profile, Report, Status, run_suite, suite
from flowstore_conformance.cancellation_points import (
    CallProfile,
    CancelPoint,
    cancel_at,
    profile,
    program,
    sweep,
)
from flowstore_conformance.checks.fixtures import start
from flowstore_conformance.context import (
    CheckContext,
    ContractViolation,
    Inconclusive,
    SharedNamespace,
    Unsupported,
    new_context,
)
from flowstore_conformance.diffing import expected_and_got
from flowstore_conformance.history import Call, Raised, Returned, comparable
from flowstore_conformance.model import State
from flowstore_conformance.registry import Check, Kind, Run
from flowstore_conformance.repro import replay_on_memory
from flowstore_conformance.state_probe import ModelState, sample_probes
from flowstore_conformance.watchdog import Limits
from flowstore_conformance.write_scenarios import SCENARIOS, Scenario, new_scenario

from flowstore_core import (
    Capability,
    FlowRunRecord,
    FlowStepRecord,
    RunStatus,
    StepStatus,
    StoreClosedError,
)
from flowstore_core.plugins import find_backend
from flowstore_memory.plugin import MemoryBackend
from tests.conformance_reports import FLOW, NOW, RUN, example_check

MEMORY = MemoryBackend()


# Additional stores


async def test_a_backend_that_refuses_a_second_store_has_one_worker() -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        context.url = "sqlite:////no/such/folder/x.db"
        assert await context.workers(3) == [context.store]
        with pytest.raises(Unsupported, match="a second store on the namespace is refused"):
            await context.open()


async def test_a_multi_process_backend_must_open_a_second_store() -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        context.url = "sqlite:////no/such/folder/x.db"
        context.capabilities |= {Capability.MULTI_PROCESS}
        with pytest.raises(ContractViolation, match="although MULTI_PROCESS is declared") as raised:
            await context.open()
    assert raised.value.clause == "CON-6"


async def test_checks_that_share_a_namespace_share_its_stores() -> None:
    shared = SharedNamespace("memory://", MEMORY, Profile.QUICK)
    async with shared.context(1) as context:
        first, second, third = await context.workers(3)
        assert first is context.store
        opened = await context.open()
        assert opened not in (first, second, third)
    async with shared.context(2) as context:
        assert await context.workers(2) == [first, second]
        assert not await second.get_runs()
        with pytest.raises(StoreClosedError):
            await opened.get_runs()
    await shared.discard()
    with pytest.raises(StoreClosedError):
        await second.get_runs()
    async with shared.context(3) as context:
        assert second not in await context.workers(3)
    await shared.discard()


async def test_a_shared_namespace_is_emptied_under_its_open_stores(tmp_path: Path) -> None:
    shared = SharedNamespace(f"sqlite:///{tmp_path}/x.db", find_backend("sqlite")[1], Profile.QUICK)
    async with shared.context(1, empty=True) as context:
        first, second = await context.workers(2)
        await start(context)
    async with shared.context(2) as context:
        assert len(await second.get_runs()) == 1
    async with shared.context(3, empty=True) as context:
        assert await context.workers(2) == [first, second]
        assert not await first.get_runs()
        assert not await second.get_runs()
    await shared.discard()


async def test_stores_of_a_namespace_of_one_check_end_with_it() -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        second = (await context.workers(2))[1]
        assert await context.workers(2) == [context.store, second]
    with pytest.raises(StoreClosedError):
        await second.get_runs()


async def test_a_check_that_raises_unsupported_is_unsupported() -> None:
    async def needs_two(context: CheckContext) -> None:
        raise Unsupported("a second store on the namespace is refused")

    report = await run_suite("memory://", profile="quick", checks=[example_check("CLM-1", "two", needs_two)])
    assert report.results[0].status is Status.UNSUPPORTED
    assert report.results[0].reason == "a second store on the namespace is refused"


# Checks that run at the same time


async def run_all(monkeypatch: pytest.MonkeyPatch, *checks: Check, url: str = "memory://") -> Report:
    """Run checks as if they were the checks of the suite."""
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    return await run_suite(url, profile="quick", seed=7, processes=1)


async def passes(context: CheckContext) -> None:
    context.assertions += 1


def many(*checks: Check) -> tuple[Check, ...]:
    """Enough checks for lanes; without the given ones all of them pass."""
    return (*checks, *(example_check("RUN-1", f"passes {number}", passes) for number in range(suite.LANES)))


async def test_examples_run_at_the_same_time_and_are_reported_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = [asyncio.Event(), asyncio.Event()]

    def meets(number: int) -> Run:
        async def run(context: CheckContext) -> None:
            begun[number].set()
            await begun[1 - number].wait()
            context.assertions += 1

        return run

    checks = many(*(example_check("CLM-1", f"meets {number}", meets(number)) for number in range(2)))
    report = await run_all(monkeypatch, *checks)
    assert [one.check for one in report.results] == list(checks)
    assert {one.status for one in report.results} == {Status.PASS}


async def test_a_check_that_asks_for_it_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    running: set[str] = set()

    async def joins(context: CheckContext) -> None:
        running.add("another")
        await asyncio.sleep(0.01)
        running.discard("another")
        context.assertions += 1

    async def changes(context: CheckContext) -> None:
        await asyncio.sleep(0)
        context.expect_that(not running, "no other check runs")

    alone = replace(example_check("CLM-1", "changes", changes), alone=True)
    others = [example_check("CLM-1", f"joins {number}", joins) for number in range(suite.LANES)]
    report = await run_all(monkeypatch, alone, *others)
    assert {one.status for one in report.results} == {Status.PASS}


@pytest.mark.parametrize("kind", [Kind.EXAMPLE, Kind.FAULT])
async def test_further_namespaces_are_used_again_except_after_faults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: Kind
) -> None:
    urls: list[str] = []

    async def makes_one(context: CheckContext) -> None:
        async with context.new_namespace() as other:
            # Without the options of its variant.
            urls.append(other.url.partition("?")[0])
            context.expect(await other.store.get_runs(), (), "the runs of a further namespace")
            await other.store.start_run(FLOW, "orders", RUN, "manual")

    count = 2 * suite.LANES
    shared = [
        replace(example_check("CLM-1", f"makes one {n}", makes_one), kind=kind, isolated=False)
        for n in range(count)
    ]
    report = await run_all(monkeypatch, *shared, url=f"sqlite:///{tmp_path}/flows.db")
    assert {one.status for one in report.results} == {Status.PASS}
    assert len(urls) == count
    assert len(set(urls)) == count if kind is Kind.FAULT else len(set(urls)) <= suite.LANES


async def test_checks_that_inject_faults_run_first(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def begins(name: str) -> Check:
        async def run(context: CheckContext) -> None:
            begun.append(name)
            context.assertions += 1

        return example_check("CLM-1", name, run)

    shared = [replace(begins(f"shared {number}"), isolated=False) for number in range(suite.LANES)]
    await run_all(monkeypatch, *shared, replace(begins("faulty"), kind=Kind.FAULT))
    assert begun[0] == "faulty"


# Reruns


async def test_a_randomly_inconclusive_check_is_rerun_longer_with_new_draws() -> None:
    executions: list[tuple[int, float]] = []

    async def unlucky(context: CheckContext) -> None:
        executions.append((context.seed, context.timeout_factor))
        context.assertions += 1
        if len(executions) < 3:
            raise Inconclusive("nothing overlapped")

    report = await run_suite("memory://", profile="quick", checks=[example_check("CLM-1", "one", unlucky)])
    assert report.results[0].status is Status.PASS
    assert [timeout_factor for _, timeout_factor in executions] == [1, 4, 16]
    assert len({seed for seed, _ in executions}) == 3


async def test_a_check_that_is_too_slow_without_a_hanging_call_gets_more_time() -> None:
    executions = 0

    async def slow_once(context: CheckContext) -> None:
        nonlocal executions
        executions += 1
        context.assertions += 1
        if executions == 1:
            await asyncio.Event().wait()

    checks = [example_check("CLM-1", "slow once", slow_once)]
    report = await run_suite("memory://", profile="quick", checks=checks, check_timeout=2.0)
    assert (executions, report.results[0].status) == (2, Status.PASS)


async def test_retries_of_inconclusive_checks_share_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    executions = 0

    async def hopeless(context: CheckContext) -> None:
        nonlocal executions
        executions += 1
        await asyncio.sleep(0.01)
        raise Inconclusive("nothing overlapped")

    monkeypatch.setattr(Limits, "retries", 0.001)
    checks = [example_check("CLM-1", name, hopeless) for name in ("one", "two")]
    report = await run_suite("memory://", profile="quick", checks=checks)
    assert [one.status for one in report.results] == [Status.INCONCLUSIVE] * 2
    # One retry, of the first check.
    assert executions == 3


async def test_a_run_ends_when_failing_checks_have_taken_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "of", lambda profile, check_timeout: Limits(failures=0.05))

    async def passes_slowly(context: CheckContext) -> None:
        context.assertions += 1
        await asyncio.sleep(0.06)

    async def fails_slowly(context: CheckContext) -> None:
        await asyncio.sleep(0.06)
        context.expect_that(False, "a promise is kept")

    runs = {"one": passes_slowly, "two": fails_slowly, "three": passes_slowly}
    checks = [example_check("CLM-1", name, run) for name, run in runs.items()]
    report = await run_suite("memory://", profile="quick", checks=checks, repeats=0)
    assert [one.status for one in report.results] == [Status.PASS, Status.FAIL, Status.NOT_RUN]
    assert report.results[-1].reason == (
        "the checks that did not pass had taken longer than 0.05 s (--check-timeout raises the limit)"
    )


async def test_a_deterministically_inconclusive_check_is_not_rerun() -> None:
    executions = 0

    async def hopeless(context: CheckContext) -> None:
        nonlocal executions
        executions += 1
        raise Inconclusive("no clock", retryable=False)

    report = await run_suite("memory://", profile="quick", checks=[example_check("CLM-1", "one", hopeless)])
    assert report.results[0].status is Status.INCONCLUSIVE
    assert executions == 1


# Sharing


async def test_checks_that_share_a_namespace_start_in_the_same_state() -> None:
    states: list[tuple[str, object, int]] = []

    async def record_state(context: CheckContext) -> None:
        assert context.clock is not None
        states.append((context.url, context.clock.now, context.random.getrandbits(64)))
        context.clock.now = NOW
        context.assertions += 1

    checks = [replace(example_check("CLM-1", name, record_state), isolated=False) for name in ("one", "two")]
    exclusive = example_check("CLM-1", "three", record_state)
    report = await run_suite("memory://", profile="quick", seed=3, checks=[*checks, exclusive])
    assert [one.assertions for one in report.results] == [1, 1, 1]
    assert states[0][0] == states[1][0] != states[2][0]
    assert states[0][1] == states[1][1] == states[2][1]
    assert len({drawn for _, _, drawn in states}) == 3


async def test_a_failure_in_a_shared_namespace_must_recur_in_isolation() -> None:
    urls: list[str] = []

    async def disturbed(context: CheckContext) -> None:
        urls.append(context.url)
        context.expect(await context.store.get_runs(), (), "all runs")
        await context.store.start_run(FLOW, "orders", RUN, "manual")

    checks = [
        replace(example_check("CLM-1", name, disturbed), isolated=False) for name in ("one", "two", "three")
    ]
    report = await run_suite("memory://", profile="quick", checks=checks)
    assert [one.status for one in report.results] == [Status.PASS] * 3
    # The second check was disturbed and rerun in isolation; the third got a new shared namespace.
    assert len(urls) == 4
    assert len(set(urls)) == 3


# Cancellation points


class WaitingStore:
    """A store whose only call waits three times and records its progress."""

    def __init__(self) -> None:
        self.reached: list[int] = []

    async def request_cancel(self, **given: Any) -> bool:
        self.reached.append(0)
        for number in (1, 2, 3):
            await asyncio.sleep(0)
            self.reached[-1] = number
        return True


SCENARIO = Scenario(
    run_id=RUN,
    setup=(),
    call=Call(method="request_cancel", arguments={"run_id": RUN}),
    must_compensate=False,
    probes=(),
)


async def test_a_sweep_cancels_a_call_at_every_wait() -> None:
    store: Any = WaitingStore()
    assert (await profile(store, SCENARIO)).waits == 3
    store.reached.clear()

    async def make(count: int) -> Sequence[Scenario]:
        return [SCENARIO] * count

    # The profile expects one wait; the sweep continues until the call is no longer cancelled.
    swept = sweep(store, make, CallProfile(1, 0.0), random.Random(1), moments=0, exact_times=True)
    cuts = [made async for made in swept]
    assert [made.point.wait for made in cuts] == [0, 1, 2, 3, 4]
    assert [made.outcome for made in cuts] == [None, None, None, None, Returned(True)]
    # A call cancelled before its start records nothing.
    assert store.reached == [0, 1, 2, 3]


async def test_an_error_of_a_cancelled_call_is_its_outcome() -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        scenario = new_scenario(context, SCENARIOS["dispatch"])
        made = await cancel_at(context.store, scenario, CancelPoint(9), exact_times=True)
        assert made.outcome == Raised("RunNotFoundError")
        assert not made.reached


async def test_the_program_of_a_cancellation_runs() -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        scenario = new_scenario(context, SCENARIOS["dispatch"])
        for call in scenario.setup:
            await getattr(context.store, call.method)(**call.arguments)
        made = await cancel_at(context.store, scenario, CancelPoint(0), exact_times=True)
    printed = await replay_on_memory(program(made))
    assert printed.startswith("try_record_dispatch: cancelled\n")
    assert "get_dispatches: " in printed


# Samples of reads


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_sample_has_all_reads_if_the_run_is_created_or_deleted(name: str) -> None:
    async with new_context("memory://", MEMORY, Profile.QUICK, 1) as context:
        scenario = new_scenario(context, SCENARIOS[name])
        before = ModelState(lambda: NOW, State())
        for call in scenario.setup:
            before = before.apply(call, exact_times=True)
        after = before.apply(scenario.call, exact_times=True)
        probes = sample_probes(scenario.probes, (before, after), context.random)
    runs = [state.state.runs.get(scenario.run_id) for state in (before, after)]
    is_stored = all(run is not None and run.record is not None for run in runs)
    assert (len(probes) == len(scenario.probes)) is not is_stored


# Differences


def _run(**given: Any) -> FlowRunRecord:
    fields: dict[str, Any] = dict.fromkeys(FlowRunRecord.__dataclass_fields__)
    return FlowRunRecord(**{**fields, "run_id": RUN, "flow_id": FLOW, "status": RunStatus.RUNNING, **given})


@pytest.mark.parametrize(
    ("wanted", "got", "said"),
    [
        (1, 2, "expected 1, got 2"),
        (True, 1, "expected True, got 1"),
        (
            "a" * 300 + "b",
            "a" * 300 + "c",
            "expected 'b' at character 300 of 301, got 'c' at",
        ),
        ({"a": 1}, {"a": 1, "b": 2}, "expected (('a', 1),), got (('a', 1), ('b', 2))"),
        ([UUID(int=n) for n in range(40)], [UUID(int=n) for n in range(1, 40)], "without UUID(int=0)"),
        (
            _run(flow_name="x" * 300, job_id="j"),
            _run(flow_name="x" * 300, job_id="k", status=RunStatus.FAILED),
            "status: expected 'Running', got 'Failed'; job_id: expected 'j', got 'k'",
        ),
    ],
)
def test_a_difference_names_its_location(wanted: object, got: object, said: str) -> None:
    assert said in expected_and_got(comparable(wanted), comparable(got))


def test_a_difference_deep_in_a_long_record_is_shown() -> None:
    steps = [comparable(("step", _step(number))) for number in range(30)]
    other = [*steps[:20], comparable(("step", _step(20, status=StepStatus.FAILED))), *steps[21:]]
    told = expected_and_got(tuple(steps), tuple(other))
    assert told == "[20][1].status: expected 'Running', got 'Failed'"


def _step(number: int, **given: Any) -> FlowStepRecord:
    fields: dict[str, Any] = dict.fromkeys(FlowStepRecord.__dataclass_fields__)
    return FlowStepRecord(**{**fields, "step_key": str(number), "status": StepStatus.RUNNING, **given})
