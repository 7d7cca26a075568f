"""Every fault scenario, with its minimum of faults, passes on the stores and fails on its mutant.

``python -m flowstore_chaos --mutants`` runs the mutants on every backend.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from flowstore_chaos.result import ScenarioResult, Verdict, run_scenario
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios import load_scenarios

SEED = 20

# Longer than the time limit of a row with its minimum of faults, which is four minutes.
pytestmark = pytest.mark.timeout(300)

ROWS = [
    pytest.param(scenario, backend, id=f"{scenario.name}-{backend}")
    for scenario in load_scenarios()
    for backend in scenario.backends
]

BACKEND_SPECIFIC = {"clock-skew", "concurrent-migration", "disk-full", "histories", "soak"}
"""Scenarios that detect their mutant in another way on each backend.

The other mutants wrap a store, and the same counts detect them on every backend.
"""
MUTANT_ROWS = [
    pytest.param(scenario, backend, id=f"{scenario.name}-{backend}")
    for scenario in load_scenarios()
    for backend in scenario.backends
    if backend == "sqlite" or scenario.name in BACKEND_SPECIFIC or "sqlite" not in scenario.backends
]


async def _row(scenario: FaultScenario, backend: str, folder: Path, *, is_mutant: bool) -> ScenarioResult:
    result = await run_scenario(
        scenario,
        backend,
        seed=SEED,
        planned=scenario.min_faults,
        is_mutant=is_mutant,
        folder=folder,
        on_progress=lambda _: None,
    )
    if result.skipped is not None:
        pytest.skip(result.skipped)
    return result


@pytest.mark.parametrize(("scenario", "backend_name"), ROWS)
async def test_scenario_passes(scenario: FaultScenario, backend_name: str, memory_path: Path) -> None:
    result = await _row(scenario, backend_name, memory_path, is_mutant=False)
    assert result.failure is None, result.failure
    assert not result.counts.findings
    assert result.counts.injected >= scenario.min_faults
    assert result.verdict is Verdict.PASSED


@pytest.mark.parametrize(("scenario", "backend_name"), MUTANT_ROWS)
async def test_mutant_is_detected(scenario: FaultScenario, backend_name: str, memory_path: Path) -> None:
    result = await _row(scenario, backend_name, memory_path, is_mutant=True)
    # A count must detect the mutant; a scenario that cannot run does not.
    assert result.failure is None, result.failure
    assert result.counts.findings
    assert result.as_expected
