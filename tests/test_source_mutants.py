"""Every source mutant is a valid change of the source, and one proof per backend is executed."""

from __future__ import annotations

from pathlib import Path

import pytest
from flowstore_conformance.clauses import CLAUSES

from tests.source_mutants import BACKENDS, SourceMutant, all_source_mutants, changed_files, copy_with_changes
from tests.source_mutants.__main__ import prove
from tests.source_mutants.matrix import render

MUTANTS = all_source_mutants()
WITH_MUTANTS = [backend for backend in BACKENDS if any(one.backend == backend for one in MUTANTS)]


def _name(mutant: SourceMutant) -> str:
    return f"{mutant.backend}-{mutant.name}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=_name)
def test_a_mutant_applies_once_and_has_a_description(mutant: SourceMutant) -> None:
    texts = changed_files(mutant)
    assert texts, "a mutant without a change"
    for file, text in texts.items():
        if file.endswith(".py"):
            compile(text, file, "exec")
    assert mutant.description
    assert mutant.clauses
    assert set(mutant.clauses) <= CLAUSES.keys()


def test_no_two_mutants_have_the_same_change() -> None:
    changes = [(one.backend, one.changes) for one in MUTANTS]
    assert len(changes) == len(set(changes))


def test_copying_a_mutant_does_not_change_the_source(tmp_path: Path) -> None:
    mutant = MUTANTS[0]
    before = changed_files(mutant)
    copy_with_changes(mutant, tmp_path)
    assert changed_files(mutant) == before
    for file, text in before.items():
        assert (tmp_path / file).read_text(encoding="utf-8") == text


@pytest.mark.timeout(400)
@pytest.mark.parametrize("backend_name", WITH_MUTANTS)
def test_a_proof_passes_on_the_correct_code_and_fails_on_the_mutant(
    backend_name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    mutant = next(one for one in MUTANTS if one.backend == backend_name and one.kind == "sql")
    postgresql = backend_name == "postgresql"
    url = request.getfixturevalue("postgresql_url") if postgresql else f"sqlite:///{tmp_path}/mutants.db"
    proven, why = prove(mutant, url)
    assert proven, why


def test_the_matrix_shows_each_verdict_and_the_rates() -> None:
    killed, survived = MUTANTS[0], MUTANTS[-1]
    common = {"profile": "quick", "seed": 1, "failures": [], "seconds": 1.5}
    page = render(
        [killed, survived],
        [
            {
                "backend": killed.backend,
                "name": killed.name,
                "verdict": "killed",
                "check": "some_check",
                "clause": "RUN-1",
                **common,
            },
            {"backend": survived.backend, "name": survived.name, "verdict": "survived", **common},
        ],
    )
    assert "`some_check` (RUN-1, 1.5 s) | as quick |" in page
    assert "**survived** | not run |" in page
    assert "| all | 2 | 1 of 2 killed (50%) | 1 of 1 killed (100%) |" in page
