"""``python -m flowstore_chaos`` exit codes, usage errors, published rows."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowstore_chaos.context import RunContext
from flowstore_chaos.counts import Counts
from flowstore_chaos.result import ScenarioResult, run_scenario
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios import load_scenarios
from flowstore_chaos.scorecard import BEGIN, END, publish, replace

ROOT = Path(__file__).parents[1]


def _chaos(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flowstore_chaos", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_list_names_every_scenario() -> None:
    done = _chaos("--list")
    assert done.returncode == 0
    for scenario in load_scenarios():
        assert scenario.name in done.stdout


def test_a_passed_row_exits_with_0_and_writes_json(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    done = _chaos(
        "claim-races", "--backend", "memory", "--planned", "20", "--seed", "5", "--json", str(written)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 rows are as expected" in done.stdout
    row = json.loads(written.read_text())["rows"]["claim-races/memory"]
    assert row["counts"]["injected"] == 20
    assert row["verdict"] == "passed"
    assert row["seed"] == 5


def test_a_scenario_is_selected_by_number() -> None:
    assert "claim-races" in _chaos("8", "--list").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-scenario"], "unknown scenario no-such-scenario; scenarios: "),
        (["--backend", "oracle"], "--backend oracle: backends are memory, postgresql, sqlite"),
        (["--scale", "0"], "--scale"),
    ],
)
def test_an_invalid_command_line_exits_with_2(arguments: list[str], message: str) -> None:
    done = _chaos(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_publish_requires_the_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flowstore_chaos", "--publish"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'conformance'}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2
    assert "run it in the project's root" in done.stderr


def _scenario(run: Any, **changes: Any) -> FaultScenario:
    arguments = {
        "number": 99,
        "name": "example",
        "fault": "a fault",
        "unit": "faults",
        "planned": 10,
        "backends": ("memory",),
        "pass_criterion": "nothing happens",
        "mutant": "it happens",
        "minutes": 1.0,
        "run": run,
    }
    return FaultScenario(**{**arguments, **changes})


async def _do_nothing(context: RunContext) -> None:
    await asyncio.sleep(0)


def _result(scenario: FaultScenario, counts: Counts, **changes: Any) -> ScenarioResult:
    arguments = {
        "scenario": scenario,
        "backend": "memory",
        "seed": 1,
        "planned": 10,
        "is_mutant": False,
        "seconds": 1.0,
    }
    return ScenarioResult(**{**arguments, "counts": counts, **changes})


def test_a_row_passes_if_all_faults_were_injected_and_all_counts_are_zero() -> None:
    scenario = _scenario(_do_nothing)
    assert _result(scenario, Counts(injected=10)).as_expected
    assert not _result(scenario, Counts(injected=9)).as_expected
    for count in ("lost", "duplicates", "wrong", "leaks"):
        assert not _result(scenario, Counts(injected=10, **{count: 1})).as_expected
    assert not _result(scenario, Counts(injected=10), failure="it broke down").as_expected
    assert _result(scenario, Counts(), skipped="no gcc").as_expected


def test_a_mutant_must_be_detected_by_a_count() -> None:
    scenario = _scenario(_do_nothing)
    assert _result(scenario, Counts(injected=3, lost=1), is_mutant=True).as_expected
    assert not _result(scenario, Counts(injected=10), is_mutant=True).as_expected
    assert not _result(
        scenario, Counts(injected=3, lost=1), is_mutant=True, failure="it broke down"
    ).as_expected


async def test_a_hung_row_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = next(scenario for scenario in load_scenarios() if scenario.name == "claim-races")
    monkeypatch.setattr(type(scenario), "seconds_at", lambda self, scale: 1.0)
    result = await run_scenario(
        scenario,
        "sqlite",
        seed=1,
        planned=100_000,
        is_mutant=False,
        folder=tmp_path,
        on_progress=lambda _: None,
    )
    assert result.failure == "timeout after 1 s"
    assert not result.as_expected


def test_a_row_cleans_up_when_its_parent_is_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="flowstore-rows-") as folder:
        parent = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flowstore_chaos",
                "claim-races",
                "--backend",
                "postgresql",
                "--folder",
                folder,
            ],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 60
        while len(children := psutil.Process(parent.pid).children(recursive=True)) < 5:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(children, 60)
        assert not alive
        deadline = time.monotonic() + 60
        while list(Path(folder).iterdir()):
            assert time.monotonic() < deadline, "files were not deleted"
            time.sleep(0.05)


def test_publishing_replaces_rows_and_keeps_others(tmp_path: Path) -> None:
    scenarios = [_scenario(_do_nothing), _scenario(_do_nothing, name="other", number=100)]
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    first, second = (_result(scenario, Counts(injected=10)) for scenario in scenarios)
    mutant_result = _result(scenarios[0], Counts(injected=2, duplicates=7), is_mutant=True)
    publish([first, second], [mutant_result], scenarios, tmp_path)
    publish([_result(scenarios[1], Counts(injected=11, details={"resets": 4}))], [], scenarios, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 99 | [a fault](#example) | memory | 1 | 10 faults |" in text
    assert "| 100 | [a fault](#other) | memory | 1 | 11 faults |" in text
    assert "Detected: memory 7 duplicates after 2 faults." in text
    assert "resets: 4" in text


def test_a_page_without_markers_is_rejected() -> None:
    with pytest.raises(ValueError, match="no markers for the scorecard"):
        replace("no markers", [], {"machine": {}, "rows": {}})
