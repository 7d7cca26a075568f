"""The suite adapts to declared limits: it passes on a backend with the smallest ones."""

from __future__ import annotations

import os

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from tests.limited_backend import DIST
from tests.test_conformance_builtins import SEED

PROFILE = Profile(os.environ.get("FLOWSTORE_TEST_PROFILE", "quick"))


@pytest.mark.parametrize("check", select_checks(), ids=lambda check: f"{check.clauses[0]}-{check.name}")
async def test_conforms(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    result = await run_check(check, "limited://", find_backend("limited")[1], PROFILE, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    if result.status is Status.UNSUPPORTED:
        pytest.skip(said)
    assert result.status is Status.PASS, said
