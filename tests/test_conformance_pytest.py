"""The pytest plugin of the suite: one test per check, loaded only on request."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BARE = ("-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:timeout", "-q")


def run(folder: Path, *arguments: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment.pop("FLOWSTORE_URL", None)
    if url is not None:
        environment["FLOWSTORE_URL"] = url
    return subprocess.run(
        [sys.executable, "-m", "pytest", *BARE, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


PLUGIN = ("-p", "flowstore_conformance.pytest_plugin", "--pyargs", "flowstore_conformance")


def test_each_check_is_a_test_named_after_its_clause(tmp_path: Path) -> None:
    options = ("--flowstore-url=memory://", "--flowstore-clause=INP-3", "--flowstore-profile=quick")
    done = run(tmp_path, *PLUGIN, *options, "-n", "2", "-vv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"PASSED .*test_conformance\.py::test_clause\[INP-3-\w+\]", done.stdout)


def test_one_example_is_selected_by_its_name(tmp_path: Path) -> None:
    name = "one_claimant_wins_until_the_claim_is_released"
    options = ("--flowstore-url=memory://", f"--flowstore-check={name}", "--flowstore-profile=quick")
    done = run(tmp_path, *PLUGIN, *options, "-vv")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"test_clause[CLM-1-{name}] PASSED" in done.stdout
    assert "1 passed" in done.stdout


def test_a_failed_check_prints_the_command_that_reproduces_it(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text(
        "import flowstore_conformance.suite as suite\n"
        "from tests.conformance_reports import breaks, example_check, passes, exhausts_budget\n"
        "from flowstore_core import Capability\n"
        "suite.all_checks = lambda: (\n"
        "    example_check('CLM-1', 'fails', breaks), example_check('CLM-2', 'passes', passes),\n"
        "    example_check('CLM-3', 'exhausts_budget', exhausts_budget),\n"
        "    example_check('CON-5', 'lacks', passes, needs=[Capability.DURABLE]),\n"
        ")\n"
    )
    paths = ("-o", f"pythonpath={tmp_path} {ROOT}", "-p", "made")
    done = run(tmp_path, *paths, *PLUGIN, "--flowstore-url=memory://", "--flowstore-seed=7", "-rs")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 1 passed, 1 skipped" in done.stdout
    assert "flowstore conformance memory:// --profile standard --clause CLM-1 --seed 7" in done.stdout
    assert "inconclusive, which does not count as passed: the search ran out" in done.stdout
    assert "does not declare DURABLE" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        (PLUGIN, "the conformance suite needs to know which store to check", 4),
        (PLUGIN[2:], "the conformance suite needs to know which store to check", 2),
        ((*PLUGIN, "--flowstore-url=memory://", "--flowstore-clause=X-1"), "there is no clause X-1", 4),
    ],
)
def test_invalid_usage_is_reported_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], said: str, code: int
) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == code
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_environment_variable_works_without_the_options(tmp_path: Path) -> None:
    done = run(tmp_path, *PLUGIN[2:], "-k", "INP-3", url="memory://")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_plugin_is_not_loaded_into_other_pytest_sessions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "pytest11" not in project["entry-points"]
