"""The conformance suite finds every mutant, by a check of the clause that it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest
from flowstore_conformance import state_probe

from tests.mutants import all_mutants
from tests.mutants.run_mutants import DIST, find_kill

MUTANTS = all_mutants()


@pytest.fixture
def base_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL of the mutant's built-in backend."""
    base = MUTANTS[request.node.callspec.params["name"]].base
    if base == "memory":
        return "memory://"
    if base == "sqlite":
        return f"sqlite:///{tmp_path}/flows.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.mark.parametrize("name", MUTANTS)
async def test_the_suite_finds_the_mutant(name: str, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    # A mutant's wrong result is permanent: shorten the wait for a state to settle.
    monkeypatch.setattr(state_probe, "SETTLE_SECONDS", 0.5)
    kill = await find_kill(MUTANTS[name], base_url)
    assert kill is not None, f"no check of {MUTANTS[name].clause} finds: {MUTANTS[name].description}"


def test_the_set_of_mutants_is_large_enough() -> None:
    assert len(MUTANTS) >= 60
    assert sum(mutant.concurrent for mutant in MUTANTS.values()) >= 20
    for base in ("memory", "sqlite", "postgresql"):
        racing = [mutant for mutant in MUTANTS.values() if mutant.base == base and mutant.concurrent]
        assert len(racing) >= 5, base


def test_the_matrix_lists_every_mutant() -> None:
    matrix = Path(__file__).parents[1] / "docs" / "kill-matrix.md"
    text = matrix.read_text(encoding="utf-8")
    rows = [row.split(" | ")[0].strip("| ") for row in text.splitlines() if row.startswith("| ")]
    assert rows[1:] == list(MUTANTS)
