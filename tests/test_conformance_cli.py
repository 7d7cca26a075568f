"""``flowstore conformance``: exit codes, progress, files and messages."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree as ET

import flowstore_conformance.suite
import pytest
from flowstore_conformance.registry import Check

from flowstore_cli.main import main
from flowstore_core import open_store
from tests.conformance_reports import breaks, example_check, exhausts_budget, passes
from tests.conformance_trap import install_trap

ROOT = Path(__file__).parents[1]

Checks = Callable[..., None]


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty directory, without the settings of the project."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Checks:
    """Replace the checks of the suite."""

    def replace(*made: Check) -> None:
        monkeypatch.setattr(flowstore_conformance.suite, "all_checks", lambda: made)

    replace(example_check("CLM-1", "one_wins", passes), example_check("CLM-2", "wins_are_seen", passes))
    return replace


def run(*arguments: str) -> int:
    return main(["conformance", *arguments])


@pytest.mark.usefixtures("checks")
def test_a_conforming_backend_exits_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("memory://", "--clause", "CLM-1", "--clause", "CLM-2", "--seed", "7") == 0
    shown = capsys.readouterr()
    assert "CONFORMS: CLM-1, CLM-2 kept; a partial run grants no level" in shown.out
    assert "seed 7" in shown.out
    first, *lines = shown.err.splitlines()
    assert first == "checking memory://, only in scratch namespaces beside it; its own data is not touched"
    assert [line.partition(", ")[0] for line in lines] == [
        "[1/2] CLM-1 one_wins: PASS",
        "[2/2] CLM-2 wins_are_seen: PASS",
    ]


@pytest.mark.parametrize("run_of", [breaks, exhausts_budget])
def test_a_failed_or_inconclusive_run_exits_with_1(checks: Checks, run_of: object) -> None:
    checks(example_check("CLM-1", "one_wins", run_of))  # type: ignore[arg-type]
    assert run("memory://", "--clause", "CLM-1") == 1


def test_a_failure_is_shown_with_its_reproduction(
    checks: Checks, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checks(example_check("CLM-1", "one_wins", breaks))
    assert run(f"sqlite:///{tmp_path}/flows.db", "--profile", "quick", "--seed", "7") == 1
    shown = capsys.readouterr().out
    for wanted in (
        "FAIL CLM-1: Of any number of claimants",
        "docs/contract.md#clm-1",
        "failed in 5 of 5 runs",
        "--profile quick --clause CLM-1 --seed 7",
        "cannot be placed here: the model returns False",
        "asyncio.run(main(sys.argv[1]))",
        "second False",
        "VIOLATES: 1 clause is broken: CLM-1",
    ):
        assert wanted in shown, wanted
    assert not (tmp_path / "flows.db").exists()


def test_every_format_is_written(checks: Checks, tmp_path: Path) -> None:
    checks(example_check("CLM-1", "one_wins", breaks))
    forms = {"json": "r.json", "junit": "r.xml", "markdown": "r.md", "html": "r.html", "badge": "b.json"}
    options = [word for name, file in forms.items() for word in (f"--{name}", file)]
    assert run("memory://", "--clause", "CLM-1", "--programs", "made/programs", *options) == 1
    told = json.loads((tmp_path / "r.json").read_text())
    assert told["checks"][0]["failure"]["program_file"] == "made/programs/clm_1_one_wins.py"
    assert (tmp_path / "made/programs/clm_1_one_wins.py").exists()
    assert ET.parse(tmp_path / "r.xml").getroot().get("failures") == "1"
    assert "❌" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert json.loads((tmp_path / "b.json").read_text())["message"] == "violates"


def test_waivers_set_the_exit_code(
    checks: Checks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks(example_check("CLM-1", "one_wins", breaks))
    waiver = '[[waiver]]\nclause = "CLM-1"\nreason = "known"\nlink = "https://example.org/7"\nexpires = {}\n'
    (tmp_path / "good.toml").write_text(waiver.format("2999-01-01"))
    (tmp_path / "old.toml").write_text(waiver.format("2020-01-01"))
    assert run("memory://", "--clause", "CLM-1", "--waivers", "good.toml") == 0
    assert "CLM-1   used, until 2999-01-01: known (https://example.org/7)" in capsys.readouterr().out
    assert run("memory://", "--clause", "CLM-1", "--waivers", "old.toml") == 1
    assert "the waiver of CLM-1 expired on 2020-01-01" in capsys.readouterr().out


@pytest.mark.usefixtures("checks")
def test_one_check_is_selected_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("memory://", "--check", "one_wins") == 0
    shown = capsys.readouterr()
    assert "1 checks in" in shown.out
    assert "CONFORMS: one_wins passed; a partial run grants no level" in shown.out


def test_one_example_of_a_grouped_check_is_selected_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "one_claimant_wins_until_the_claim_is_released"
    assert run("memory://", "--check", name) == 0
    shown = capsys.readouterr()
    assert f"[1/1] CLM-1 {name}: PASS" in shown.err
    assert f"CONFORMS: {name} passed" in shown.out


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Missing argument"),
        (["memory://", "--clause", "XYZ-9"], "there is no clause XYZ-9"),
        (["memory://", "--check", "one_win"], "there is no check 'one_win' (did you mean 'one_wins'?)"),
        (["memory://", "--profile", "slow"], "profile must be one of"),
        (["memory://", "--seed", "x"], "--seed"),
        (["nowhere://x"], "nowhere"),
        (["memory://", "--waivers", "none.toml"], "cannot be read"),
        (["memory://", "--html", "none/r.html"], "the folder of none/r.html does not exist"),
        (["postgresql://me:s3cret@127.0.0.1:1/db?connect_timeout=1"], "unavailable"),
    ],
)
def test_a_suite_that_cannot_run_exits_with_2_and_one_line(
    arguments: Sequence[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert line.startswith("flowstore: ")
    assert said in line
    assert "s3cret" not in shown.err + shown.out


@pytest.mark.usefixtures("checks")
@pytest.mark.parametrize("url", ["trap://data", "trap://redirect"])
def test_a_namespace_with_data_is_refused_and_unchanged(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    checks: Checks,
) -> None:
    install_trap(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    async def read_data() -> object:
        async with open_store("trap://data") as store:
            return await store.get_runs(), await store.get_statistics()

    before = asyncio.run(read_data())
    assert run(url) == 2
    assert "flowstore: refused: " in capsys.readouterr().err
    assert asyncio.run(read_data()) == before


@pytest.mark.parametrize("missing", ["hypothesis", "flowstore_conformance"])
def test_a_missing_extra_is_reported_with_the_package_to_install(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from flowstore_cli.main import main; "
        "sys.exit(main(['conformance', 'memory://']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line == f"flowstore: module {missing!r} is missing; pip install 'flowstore[conformance]'"


def test_progress_on_a_terminal_is_one_line_that_is_erased() -> None:
    code = (
        "import sys, flowstore_conformance.suite as suite; from tests.conformance_reports import *; "
        "suite.all_checks = lambda: (example_check('CLM-1', 'one_wins'),); "
        "from flowstore_cli.main import main; "
        "sys.exit(main(['conformance', 'memory://', '--clause', 'CLM-1']))"
    )
    controller, terminal = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=terminal,
        stdin=subprocess.DEVNULL,
    )
    os.close(terminal)
    printed, _ = child.communicate(timeout=60)
    shown = b""
    while chunk := _read(controller):
        shown += chunk
    os.close(controller)
    assert child.returncode == 0, shown
    lines = shown.decode().split("\r\x1b[2K")
    # A slow machine also shows what comes before the first check.
    assert any(line.startswith("[1/1] CLM-1 one_wins") for line in lines)
    assert all(line.startswith(("[1/1] CLM-1 one_wins", "inspecting the backend")) for line in lines[1:-1])
    assert lines[-1] == ""
    assert b"CONFORMS" in printed


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:
        # On Linux, reading raises OSError after the other end was closed.
        return b""
