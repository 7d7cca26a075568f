"""The document toolkit conforms to every check of the suite, on spaces with and without snapshots."""

from __future__ import annotations

import os

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from flowstore_documents import ready_steps
from tests.documents_backend import DIST
from tests.test_conformance_builtins import SEED, hook_of

PROFILE = Profile(os.environ.get("FLOWSTORE_TEST_PROFILE", "quick"))


@pytest.mark.parametrize("name", ["documents", "documents-without-snapshots"])
@pytest.mark.parametrize("check", select_checks(), ids=lambda check: f"{check.clauses[0]}-{check.name}")
async def test_conforms(check: Check, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    backend = find_backend(name)[1]
    missing = check.needs - backend.capabilities
    if missing:
        pytest.skip(f"{name} does not declare {', '.join(sorted(missing))}")
    result = await run_check(check, f"{name}://", backend, PROFILE, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    if check.kind is Kind.FAULT and not isinstance(backend, hook_of(check)):
        assert result.status is Status.UNSUPPORTED, said
        pytest.skip(said)
    assert result.status is Status.PASS, said


@pytest.mark.parametrize("name", ["documents", "documents-without-snapshots"])
@pytest.mark.parametrize(
    "check",
    [one for one in select_checks(["QUE-1", "QUE-2", "QUE-6"]) if one.kind is not Kind.FAULT],
    ids=lambda check: f"{check.clauses[0]}-{check.name}",
)
async def test_queues_conform_with_short_windows(
    check: Check, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DIST)
    monkeypatch.setattr(ready_steps, "SHORT_QUEUE", 0)
    monkeypatch.setattr(ready_steps, "LONG_QUEUE", 1)
    monkeypatch.setattr(ready_steps, "WINDOW", 2)
    monkeypatch.setattr(ready_steps, "COUNTED", 3)
    backend = find_backend(name)[1]
    if not check.needs <= backend.capabilities:
        pytest.skip(f"{name} does not declare {', '.join(sorted(check.needs - backend.capabilities))}")
    result = await run_check(check, f"{name}://", backend, PROFILE, SEED)
    assert result.status is Status.PASS, result.failure.message if result.failure else result.reason
