"""A check of the broken clause finds every mutant."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from flowstore_conformance import race_search, state_probe
from flowstore_conformance.checks import model, watching
from flowstore_conformance.context import Profile

from tests.mutants import all_mutants
from tests.mutants.run_mutants import DIST, find_kill

# If the check in the matrix finds nothing, all checks of the clause run.
pytestmark = pytest.mark.timeout(600)

PROFILE = Profile(os.environ.get("FLOWSTORE_TEST_PROFILE", "quick"))
MUTANTS = all_mutants()
MATRIX = Path(__file__).parents[1] / "docs" / "kill-matrix.md"


def rows_of_matrix() -> dict[str, str]:
    """Return the check that found each mutant according to the matrix, by the name of the mutant."""
    rows = [row.strip("| ").split(" | ") for row in MATRIX.read_text(encoding="utf-8").splitlines()]
    return {row[0]: row[4] for row in rows if len(row) >= 5 and row[0] != "mutant"}


ROWS = rows_of_matrix()


def known_check(name: str) -> tuple[str, Profile] | None:
    found = re.fullmatch(r"`(\w+)`(?: \((\w+)\))?", ROWS.get(name, ""))
    return (found[1], Profile(found[2] or "quick")) if found else None


@pytest.fixture
def base_url(request: pytest.FixtureRequest, memory_path: Path) -> str:
    """A URL of the mutant's built-in backend."""
    base = MUTANTS[request.node.callspec.params["name"]].base
    if base == "memory":
        return "memory://"
    if base == "sqlite":
        return f"sqlite:///{memory_path}/flows.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_suite_finds_the_mutant(name: str, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = known_check(name)
    needed = Profile.QUICK if known is None else known[1]
    if needed is not PROFILE:
        pytest.skip(f"found by the profile {needed}: set FLOWSTORE_TEST_PROFILE={needed}")
    monkeypatch.syspath_prepend(DIST)
    # A mutant's wrong result is permanent: shorten the wait for a state to settle.
    monkeypatch.setattr(state_probe, "SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(watching, "WOKEN_SECONDS", 2.0)
    # Failures need no shrinking here.
    monkeypatch.setattr(race_search, "SHRINK_SECONDS", 0.0)
    monkeypatch.setattr(model, "SHRINK_SECONDS", 0.0)
    # Try the check in the matrix first; otherwise all checks of the clause run until one fails.
    kill = await find_kill(MUTANTS[name], base_url, known=known)
    assert kill is not None, f"no check of {MUTANTS[name].clause} finds: {MUTANTS[name].description}"


def test_the_set_of_mutants_is_large_enough() -> None:
    assert len(MUTANTS) >= 60
    assert sum(mutant.concurrent for mutant in MUTANTS.values()) >= 20
    for base in ("memory", "sqlite", "postgresql"):
        racing = [mutant for mutant in MUTANTS.values() if mutant.base == base and mutant.concurrent]
        assert len(racing) >= 5, base


def test_the_matrix_lists_every_mutant() -> None:
    assert list(ROWS) == list(MUTANTS)
    assert all(map(known_check, MUTANTS))
