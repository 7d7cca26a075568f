"""The built-in backends conform to every check of the suite.

The profile is quick unless FLOWSTORE_TEST_PROFILE names a more thorough one, as it does in CI.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core import PROPERTIES
from flowstore_core.backend import (
    FaultInjectable,
    OutageInjectable,
    SchemaVersionAdjustable,
    WriteFailable,
)
from flowstore_core.plugins import find_backend

SEED = 20_260_314
PROFILE = Profile(os.environ.get("FLOWSTORE_TEST_PROFILE", "quick"))

# A check of a thorough profile takes minutes on a loaded machine.
pytestmark = pytest.mark.timeout(300 if PROFILE is Profile.QUICK else 900)


def hook_of(check: Check) -> type[Any]:
    """The protocol that a check of injected faults needs; see tests/test_conformance_faults.py."""
    if check.run.__module__.endswith(".outages"):
        return OutageInjectable
    if check.clauses[0] == "CON-1":
        return WriteFailable
    return SchemaVersionAdjustable if check.clauses[0] == "CON-6" else FaultInjectable


@pytest.mark.parametrize("name", ["memory", "sqlite", "postgresql"])
@pytest.mark.parametrize("check", select_checks(), ids=lambda check: f"{check.clauses[0]}-{check.name}")
async def test_conforms(check: Check, name: str, request: pytest.FixtureRequest, memory_path: Path) -> None:
    backend = find_backend(name)[1]
    missing = check.needs - backend.capabilities
    if missing:
        assert missing <= PROPERTIES
        pytest.skip(f"{name} does not declare {', '.join(sorted(missing))}")
    url = {"memory": "memory://", "sqlite": f"sqlite:///{memory_path}/flows.db"}.get(name)
    result = await run_check(check, url or request.getfixturevalue("postgresql_url"), backend, PROFILE, SEED)
    said = result.failure.message if result.failure is not None else result.reason
    if check.kind is Kind.FAULT and not isinstance(backend, hook_of(check)):
        assert result.status is Status.UNSUPPORTED, said
        pytest.skip(said)
    assert result.status is Status.PASS, said
