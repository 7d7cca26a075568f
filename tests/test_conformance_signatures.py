"""Methods that core cannot call are found before any check, and exceptions show the author's lines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from flowstore_conformance import Report, Status, run_suite, suite
from flowstore_conformance.causes import CauseKind
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.method_signatures import compare
from flowstore_conformance.rendering import (
    render_json,
    render_junit,
    render_markdown,
    render_page,
    render_text,
)
from flowstore_conformance.suite import select_checks

from flowstore_core import Capability
from tests.conformance_reports import example_check, passes
from tests.faulty import DIST

RENDERERS = (render_text, render_json, render_junit, render_markdown, render_page)


@pytest.fixture(autouse=True)
def _plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)


async def run(name: str, *clauses: str, place: str = "") -> Report:
    chosen = [one for one in select_checks(clauses) if one.name.startswith("examples_of_")]
    checks = [*chosen, example_check("RUN-1", "passes", passes)]
    return await run_suite(f"faulty-{name}://{place}", profile="quick", seed=7, checks=checks)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("lacks-parameter", "lacks the parameter `owner`"),
        ("renames-parameter", "calls the parameter `claim_owner` that the protocol calls `owner`"),
        (
            "takes-by-position",
            "takes the parameter `run_id` by position only, takes the parameter `step_key` by position only",
        ),
        ("requires-more", "requires the parameter `worker`, which the protocol does not have"),
        ("is-no-coroutine", "is not a coroutine function"),
    ],
)
async def test_a_wrong_signature_is_one_cause_and_its_checks_do_not_run(name: str, problem: str) -> None:
    report = await run(name, "CLM-1", "CLM-7")
    *apply_findings, fine = report.results
    assert len(apply_findings) == 2
    for result in apply_findings:
        assert (result.status, result.failure) == (Status.NOT_RUN, None)
        assert result.reason == f"claims.try_claim_step {problem}"
    assert fine.status is Status.PASS
    (cause,) = report.causes
    assert (cause.kind, cause.title) == (CauseKind.SIGNATURE, f"claims.try_claim_step {problem}")
    assert cause.finding is not None
    assert "async def try_claim_step" in cause.finding.remedy
    assert cause.finding.place is not None
    assert cause.finding.place.startswith("faulty/__init__.py:")
    assert (report.conforms, report.verdict) == (False, "VIOLATES")
    assert "core cannot call try_claim_step" in report.headline
    for render in RENDERERS:
        assert problem.partition("`")[0] in render(report)


async def test_a_missing_method_of_a_declared_capability_prevents_all_checks() -> None:
    report = await run("lacks-method", "CLM-1")
    assert {one.status for one in report.results} == {Status.NOT_RUN}
    (cause,) = report.causes
    assert cause.title == "claims.renew_step_claim is missing, which the declared capability leases needs"
    assert report.verdict == "VIOLATES"


async def test_a_missing_base_method_prevents_only_the_checks_that_need_it() -> None:
    report = await run("lacks-base-method", "CLM-1", "CLM-7")
    assert [one.status for one in report.results] == [Status.PASS, Status.NOT_RUN, Status.PASS]
    assert report.results[1].reason == "claims.release_dispatch is missing"


async def test_quick_runs_all_similar_checks_of_a_store_that_lacks_a_method_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whether a clause passes depends on no seed, and a missing method is no fault of other checks."""
    calls = 0

    async def releases(context: CheckContext) -> None:
        nonlocal calls
        calls += 1
        raise ContractViolation("release_dispatch raised NotSupportedError")

    similar = [example_check("CLM-7", f"similar {number}", passes) for number in range(2 * suite.LANES)]
    checks = [example_check("CLM-1", "releases", releases), *similar]
    checks = [dataclasses.replace(one, rotation="similar") for one in checks]
    monkeypatch.setattr(suite, "all_checks", lambda: checks)
    report = await run_suite("faulty-lacks-base-method://", profile="quick", seed=7, processes=1)
    assert calls == 1
    assert [one.check for one in report.results] == checks
    assert report.results[0].reason == "claims.release_dispatch is missing"


async def test_a_plain_function_may_return_an_awaitable() -> None:
    report = await run("returns-an-awaitable", "CLM-1", "CLM-7")
    assert {one.status for one in report.results} == {Status.PASS}
    assert report.causes == ()


async def test_the_examples_without_virtual_clock_need_no_extension() -> None:
    names = ["examples_hold_on_the_clock_of_the_store"]
    report = await run_suite("faulty-only-the-base://", profile="standard", seed=7, check_names=names)
    (result,) = report.results
    assert (result.status, result.failure) == (Status.PASS, None)
    assert {one.status for one in report.clauses if one.clause.id == "STP-7"} == {Status.UNSUPPORTED}


@pytest.mark.parametrize("name", ["memory", "sqlite"])
async def test_the_built_in_stores_have_the_signatures_of_the_protocol(name: str, tmp_path: Any) -> None:
    from flowstore_core.open import resolve_store

    url = "memory://" if name == "memory" else f"sqlite:///{tmp_path}/x.db"
    _, backend, config = resolve_store(url)
    async with backend.open(config) as store:
        assert compare(store, backend.capabilities) == ()


class Anything:
    """A store that accepts any call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        async def call(**arguments: Any) -> None:
            return None

        return call


def test_a_store_may_accept_any_keyword() -> None:
    assert compare(Anything(), frozenset(Capability)) == ()


class Several(Anything):
    async def start_run(self, flow: UUID, name: str, run_id: UUID) -> None: ...

    ping = "pong"


def test_every_problem_of_a_method_is_reported() -> None:
    told = [one.title for one in compare(Several(), frozenset())]
    assert told[0] == "store.ping is not a method but of type str"
    (start_run,) = [one for one in told if "start_run" in one]
    assert "calls the parameter `flow` that the protocol calls `flow_id`" in start_run
    assert "lacks the parameter `trigger_key`" in start_run


# Exceptions of the author's code


async def test_an_exception_shows_only_frames_of_the_author() -> None:
    report = await run("raises", "CLM-1")
    failure = report.results[0].failure
    assert failure is not None
    assert (failure.error, failure.operation) == ("KeyError", "try_claim_step")
    assert failure.place is not None
    assert failure.place.endswith("in _row")
    assert failure.traceback is not None
    assert "in try_claim_step" in failure.traceback
    assert 'return rows["claim"]' in failure.traceback
    for ours in ("flowstore_conformance/", "flowstore_core/"):
        assert ours not in failure.traceback
    for render in RENDERERS:
        shown = render(report).replace("&quot;", '"').replace("\\", "")
        assert 'return rows["claim"]' in shown, render


async def test_an_exception_in_a_worker_process_shows_frames_of_the_author(tmp_path: Any) -> None:
    checks = [
        one
        for one in select_checks()
        if one.name in ("claims_by_processes", "acknowledged_writes_survive_a_kill")
    ]
    url = f"faulty-raises-sqlite:///{tmp_path}/x.db"
    report = await run_suite(url, profile="quick", seed=7, checks=checks, repeats=0)
    for result in report.results:
        assert result.failure is not None
        assert "try_claim_step" in result.failure.message
        assert result.failure.traceback is not None
        assert 'return rows["claim"]' in result.failure.traceback
        assert result.failure.operation == "try_claim_step"
    (cause,) = report.causes
    assert cause.kind is CauseKind.EXCEPTION


async def test_no_format_shows_a_password_of_the_url() -> None:
    report = await run("leaks-url", "CLM-1", place="me:s3cr%20et@host")
    failure = report.results[0].failure
    assert failure is not None
    assert failure.traceback is not None
    assert "cannot connect to faulty-leaks-url://me:***@" in failure.traceback
    for render in RENDERERS:
        assert "s3cr" not in render(report)
    assert json.loads(render_json(report))["causes"][0]["kind"] == "exception"
