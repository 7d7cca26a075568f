"""run_suite: checks that pass, fail, hang or leak, and the guard of the user's data."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import flowstore_conformance
import pytest
from flowstore_conformance import CLAUSES, CheckResult, Profile, Report, Status, check_backend, run_suite
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.guard import GuardedBackend, NoNamespace, RecyclingBackend, Refused, guard
from flowstore_conformance.registry import Check, Run, all_checks, rotate
from flowstore_conformance.repro import replay_on_memory, write_programs
from flowstore_conformance.suite import run_check

from flowstore_core import Capability, ConfigurationError, FlowStoreError, StoreUnavailableError, open_store
from flowstore_core.plugins import find_backend
from flowstore_memory.plugin import MemoryBackend
from tests.conformance_reports import PROGRAM, breaks, example_check, exhausts_budget, passes
from tests.conformance_trap import install_trap

ROOT = Path(__file__).parents[1]


async def run(*checks: Check, url: str = "memory://", **options: Any) -> Report:
    return await run_suite(url, profile="quick", seed=7, checks=checks, **{"repeats": 0, **options})


async def run_one(
    function: Run, clause: str = "RUN-1", url: str = "memory://", **options: Any
) -> CheckResult:
    (result,) = (await run(example_check(clause, "the_check", function), url=url, **options)).results
    return result


# Outcomes


async def test_a_check_that_passes() -> None:
    result = await run_one(passes)
    assert (result.status, result.assertions) == (Status.PASS, 1)


async def test_a_check_that_finds_a_violation() -> None:
    result = await run_one(breaks, "CLM-1")
    assert result.status is Status.FAIL
    assert result.failure is not None
    assert result.failure.clause == "CLM-1"
    assert (result.failure.reproductions, result.failure.repetitions) == (1, 1)


async def test_a_check_that_exhausts_its_budget_is_inconclusive() -> None:
    report = await run(example_check("RUN-1", "one", exhausts_budget))
    assert report.results[0].status is Status.INCONCLUSIVE
    assert not report.conforms


async def test_a_check_without_assertions_does_not_pass() -> None:
    async def looks_away(context: CheckContext) -> None:
        return

    assert (await run_one(looks_away)).status is Status.INCONCLUSIVE


async def test_a_check_whose_capability_is_missing_is_unsupported() -> None:
    check = example_check("CON-5", "one", breaks, needs=[Capability.DURABLE])
    (result,) = (await run(check)).results
    assert (result.status, result.assertions) == (Status.UNSUPPORTED, 0)
    assert result.reason == "the backend does not declare DURABLE"


async def test_an_error_outside_the_contract_violates_con_2() -> None:
    async def leaks(context: CheckContext) -> None:
        raise KeyError("s3cret row")

    failure = (await run_one(leaks)).failure
    assert failure is not None
    assert failure.clause == "CON-2"
    assert failure.message == "the backend raised KeyError, which is not an error of the contract"
    assert failure.traceback is not None
    assert "leaks" in failure.traceback


async def test_an_unexpected_error_of_the_contract_violates_the_clause() -> None:
    async def refuses(context: CheckContext) -> None:
        raise StoreUnavailableError("too busy")

    failure = (await run_one(refuses)).failure
    assert failure is not None
    assert failure.clause == "RUN-1"
    assert "StoreUnavailableError: the store is unavailable: too busy" in failure.message


async def test_a_violation_inside_a_task_group_is_found() -> None:
    async def one(context: CheckContext) -> None:
        async def fail() -> None:
            raise ContractViolation("wrong", clause="RUN-3")

        async with asyncio.TaskGroup() as group:
            group.create_task(fail())

    failure = (await run_one(one)).failure
    assert failure is not None
    assert (failure.clause, failure.message) == ("RUN-3", "wrong")


async def test_a_check_that_hangs_is_a_failure() -> None:
    async def hangs(context: CheckContext) -> None:
        await asyncio.Event().wait()

    failure = (await run_one(hangs, check_timeout=2.0)).failure
    assert failure is not None
    assert "did not end" in failure.message


async def test_a_timeout_error_of_a_driver_is_not_a_hang() -> None:
    async def leaks(context: CheckContext) -> None:
        raise TimeoutError

    failure = (await run_one(leaks)).failure
    assert failure is not None
    assert failure.message.startswith("the backend raised TimeoutError")


async def test_a_failed_check_is_rerun_to_measure_how_often_it_fails() -> None:
    calls = 0

    async def sometimes(context: CheckContext) -> None:
        nonlocal calls
        calls += 1
        context.expect_that(calls % 2 == 0, "an answer is right every time")

    failure = (await run_one(sometimes, repeats=4)).failure
    assert failure is not None
    assert (failure.reproductions, failure.repetitions) == (3, 5)


async def test_the_seed_determines_the_draws_of_a_check_run_alone_or_with_others() -> None:
    drawn: list[float] = []

    async def draws(context: CheckContext) -> None:
        context.assertions += 1
        drawn.append(context.random.random())

    check = example_check("RUN-2", "draws", draws)
    await run(check)
    await run(example_check("RUN-1", "before", passes), check, clauses=["RUN-1", "RUN-2"])
    await run_suite("memory://", seed=8, checks=[check])
    assert drawn[0] == drawn[1] != drawn[2]


async def test_progress_is_reported_before_and_after_each_check() -> None:
    told: list[object] = []
    checks = [example_check("RUN-1", "one"), example_check("RUN-2", "two")]
    await run(
        *checks,
        starting=lambda check, number, count: told.append((check.name, number, count)),
        progress=lambda result, number, count: told.append((result.status, number, count)),
    )
    assert told == [("one", 1, 2), (Status.PASS, 1, 2), ("two", 2, 2), (Status.PASS, 2, 2)]


# The interface


async def test_only_the_selected_clauses_are_checked() -> None:
    checks = [example_check("RUN-1", "one", passes, "RUN-3"), example_check("RUN-2", "two")]
    report = await run(*checks, clauses=["RUN-3"])
    assert [one.check.name for one in report.results] == ["one"]
    assert report.selected == ("RUN-3",)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"clauses": ["XYZ-9"]}, "no clause XYZ-9"),
        ({"profile": "slow"}, "profile must be one of quick, standard, thorough"),
        ({"url": "nowhere://x"}, "nowhere"),
        ({"url": "memory"}, "scheme://"),
    ],
)
async def test_a_wrong_argument_is_a_configuration_error(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        await run_suite(**{"url": "memory://", "checks": [], **options})


def test_run_suite_has_a_synchronous_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flowstore_conformance.suite, "all_checks", lambda: (example_check("RUN-1", "one"),))
    report = check_backend("memory://", profile="quick", clauses=["RUN-1"])
    assert report.conforms


def test_the_suite_works_without_pytest() -> None:
    code = "import sys, flowstore_conformance; sys.exit('pytest' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_clause_has_a_check() -> None:
    checked = {clause for check in all_checks() for clause in check.clauses}
    assert checked == CLAUSES.keys()


# Programs


async def test_a_program_is_replayed_on_memory_for_the_correct_output() -> None:
    assert await replay_on_memory(PROGRAM) == "first True\nsecond False"
    assert (await replay_on_memory("import sys; sys.exit(3)")) == "(exit code 3)"


async def test_the_report_of_a_backend_has_the_correct_output(tmp_path: Path) -> None:
    result = await run_one(breaks, "CLM-1", url=f"sqlite:///{tmp_path}/x.db")
    assert result.failure is not None
    assert result.failure.right_answer == "first True\nsecond False"
    assert os.listdir(tmp_path) == []


def test_programs_are_written_as_files_that_run(tmp_path: Path) -> None:
    report = asyncio.run(run(example_check("CLM-1", "one", breaks)))
    report = write_programs(report, tmp_path / "programs")
    failure = report.results[0].failure
    assert failure is not None
    assert failure.program_file == str(tmp_path / "programs" / "clm_1_one.py")
    done = subprocess.run(
        [sys.executable, failure.program_file, "memory://"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "first True\nsecond False\n"


# The guard


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_trap(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


async def touches(context: CheckContext) -> None:
    raise AssertionError("a check ran in somebody's namespace")


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("trap://data", "returned the URL that it was given"),
        ("trap://redirect", "is not empty: get_runs returns data. Nothing was changed"),
    ],
)
async def test_a_namespace_with_data_is_refused_and_unchanged(url: str, said: str) -> None:
    async with open_store("trap://data") as store:
        before = await store.get_runs()
        assert len(before) == 1
        with pytest.raises(ConfigurationError, match=f"^refused: .*{said}"):
            await run(example_check("RUN-1", "one", touches), url=url)
        assert await store.get_runs() == before
        assert await store.get_run_detail(before[0].run_id) is not None


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("trap://broken", ConfigurationError, "makes no scratch namespace: the backend raised RuntimeError"),
        ("trap://down", StoreUnavailableError, "no route"),
        ("trap://hidden", Refused, "is empty: the backend raised RuntimeError"),
    ],
)
async def test_no_check_runs_without_an_empty_namespace(
    url: str, error: type[FlowStoreError], said: str
) -> None:
    with pytest.raises(error, match=said):
        await run(example_check("RUN-1", "one", touches), url=url)


class ScratchBackend:
    """A backend whose scratch() yields URLs given by the test."""

    name = "handing"
    schemes = frozenset({"handing"})
    capabilities = frozenset(Capability)
    options: frozenset[str] = frozenset()
    contract_version = 1

    def __init__(self, *urls: str) -> None:
        self.urls = list(urls)

    def open(self, config: Any) -> Any:
        raise NotImplementedError

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        if not self.urls:
            raise OSError("disk full")
        yield self.urls.pop(0)


async def test_a_scratch_namespace_used_twice_is_refused() -> None:
    backend = GuardedBackend(ScratchBackend("memory://a", "memory://a", "memory://a"), "handing://mine")
    async with backend.scratch("handing://mine") as first:
        assert first == "memory://a"
        with pytest.raises(Refused, match="one namespace twice"):
            async with backend.scratch("handing://mine"):
                pass
    async with backend.scratch("handing://mine") as again:
        assert again == first


async def test_a_refusal_during_the_run_ends_it() -> None:
    async def makes_another(context: CheckContext) -> None:
        async with context.new_namespace():
            pass

    backend = GuardedBackend(ScratchBackend("memory://one", "handing://mine"), "handing://mine")
    with pytest.raises(Refused):
        await run_check(
            example_check("RUN-1", "one", makes_another), "handing://mine", backend, Profile.QUICK, 7
        )


async def test_a_namespace_that_cannot_be_created_during_the_run_is_no_verdict() -> None:
    backend = GuardedBackend(ScratchBackend(), "handing://mine")
    with pytest.raises(NoNamespace):
        async with backend.scratch("handing://mine"):
            pass
    result = await run_check(example_check("RUN-1", "one"), "handing://mine", backend, Profile.QUICK, 7)
    assert result.status is Status.INCONCLUSIVE
    assert result.reason == "no scratch namespace: the backend raised OSError"


async def test_the_guard_accepts_an_empty_namespace_of_a_built_in_backend(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    await guard(find_backend("sqlite")[1], url)
    assert os.listdir(tmp_path) == []


async def test_tracebacks_and_the_url_show_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = GuardedBackend(ScratchBackend("memory://one"), "handing://me:s3cr%20et@host/db")

    async def leaks(context: CheckContext) -> None:
        raise OSError("cannot log in as me with s3cr et (s3cr%20et)")

    result = await run_check(example_check("RUN-1", "one", leaks), backend._url, backend, Profile.QUICK, 7)
    assert result.failure is not None
    assert result.failure.traceback is not None
    assert "cannot log in as me with *** (***)" in result.failure.traceback


# Recycled namespaces and rotations


class Clearable(MemoryBackend):
    """Counts the namespaces that it makes and empties."""

    def __init__(self) -> None:
        self.made = 0
        self.cleared: list[str] = []

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        self.made += 1
        async with super().scratch(url):
            yield f"memory://{self.made}"

    async def clear_scratch(self, url: str) -> None:
        self.cleared.append(url)


async def test_a_namespace_is_emptied_and_used_again() -> None:
    backend = Clearable()
    recycling = RecyclingBackend(GuardedBackend(backend, "memory://"))
    for _ in range(3):
        async with recycling.scratch("memory://") as url:
            assert url == "memory://1"
    assert backend.cleared == ["memory://1"] * 2
    async with recycling.scratch("memory://"), recycling.scratch("memory://") as second:
        assert second == "memory://2"
    with pytest.raises(ZeroDivisionError):
        async with recycling.scratch("memory://") as url:
            raise ZeroDivisionError
    async with recycling.scratch("memory://") as other:
        assert other != url


async def test_a_namespace_is_new_unless_the_backend_can_empty_it() -> None:
    recycling = RecyclingBackend(GuardedBackend(find_backend("memory")[1], "memory://"))
    urls = set()
    for _ in range(3):
        async with recycling.scratch("memory://") as url:
            urls.add(url)
    assert len(urls) == 3


async def test_discarded_namespaces_are_dropped() -> None:
    guarded = GuardedBackend(Clearable(), "memory://")
    recycling = RecyclingBackend(guarded)
    async with recycling.scratch("memory://"):
        pass
    assert len(guarded.in_use) == 1
    await recycling.discard()
    assert guarded.in_use == ()


def test_the_profile_quick_rotates_similar_checks() -> None:
    every = all_checks()
    rotations = {check.rotation for check in every} - {None}
    left_out = set(every)
    for seed in range(400):
        chosen = rotate(every, seed, Capability)
        assert chosen == rotate(every, seed, Capability)
        assert sorted(check.rotation for check in chosen if check.rotation) == sorted(map(str, rotations))
        assert {check for check in every if check.rotation is None} <= set(chosen)
        left_out -= set(chosen)
    assert left_out == set()


def test_a_rotation_leaves_out_checks_that_the_backend_lacks_the_capabilities_for() -> None:
    supported = frozenset(Capability) - {Capability.TRANSFER, Capability.WAITERS}
    every = [check for check in all_checks() if check.rotation is not None]
    possible = {check.rotation for check in every if check.needs <= supported}
    for seed in range(40):
        chosen = rotate(every, seed, supported)
        assert {check.rotation for check in chosen if check.needs <= supported} == possible


def test_every_clause_has_a_check_without_rotation() -> None:
    cited = {clause for check in all_checks() if check.rotation is None for clause in check.clauses}
    assert cited >= CLAUSES.keys()
