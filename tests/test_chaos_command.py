"""``python -m flowstore_chaos`` as its users see it: exit codes, refusals, published rows."""

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

from flowstore_chaos.line import Line
from flowstore_chaos.lines import load_lines
from flowstore_chaos.outcome import Outcome, run_row
from flowstore_chaos.scorecard import BEGIN, END, publish, replace
from flowstore_chaos.tally import Tally
from flowstore_chaos.trial import Trial

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


def test_list_names_every_line() -> None:
    done = _chaos("--list")
    assert done.returncode == 0
    for line in load_lines():
        assert line.name in done.stdout


def test_a_green_row_ends_with_0_and_can_be_read_by_programs(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    done = _chaos(
        "claim-races", "--backend", "memory", "--planned", "20", "--seed", "5", "--json", str(written)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 rows are as they must be" in done.stdout
    row = json.loads(written.read_text())["rows"]["claim-races/memory"]
    assert row["tally"]["landed"] == 20
    assert row["verdict"] == "passed"
    assert row["seed"] == 5


def test_a_line_is_known_by_its_number_too() -> None:
    assert "claim-races" in _chaos("8", "--list").stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no-such-line"], "no line is called no-such-line; there are: "),
        (["--backend", "oracle"], "--backend oracle: there are memory, postgresql, sqlite"),
        (["--scale", "0"], "--scale"),
    ],
)
def test_what_makes_no_sense_is_refused_with_2(arguments: list[str], complaint: str) -> None:
    done = _chaos(*arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_publish_wants_the_page(tmp_path: Path) -> None:
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


def _line(run: Any, **changes: Any) -> Line:
    given = {
        "number": 99,
        "name": "made-up",
        "fault": "a fault",
        "unit": "faults",
        "planned": 10,
        "backends": ("memory",),
        "passes_when": "nothing happens",
        "broken": "it is",
        "minutes": 1.0,
        "run": run,
    }
    return Line(**{**given, **changes})


async def _nothing(trial: Trial) -> None:
    await asyncio.sleep(0)


def _outcome(line: Line, tally: Tally, **changes: Any) -> Outcome:
    given = {"line": line, "backend": "memory", "seed": 1, "planned": 10, "broken": False, "seconds": 1.0}
    return Outcome(**{**given, "tally": tally, **changes})


def test_a_row_is_red_unless_all_faults_landed_and_all_counts_are_zero() -> None:
    line = _line(_nothing)
    assert _outcome(line, Tally(landed=10)).good
    assert not _outcome(line, Tally(landed=9)).good
    for count in ("lost", "twice", "wrong", "leaks"):
        assert not _outcome(line, Tally(landed=10, **{count: 1})).good
    assert not _outcome(line, Tally(landed=10), failure="it broke down").good
    assert _outcome(line, Tally(), skipped="no gcc").good


def test_a_broken_variant_is_good_when_a_count_found_it_out() -> None:
    line = _line(_nothing)
    assert _outcome(line, Tally(landed=3, lost=1), broken=True).good
    assert not _outcome(line, Tally(landed=10), broken=True).good
    assert not _outcome(line, Tally(landed=3, lost=1), broken=True, failure="it broke down").good


async def test_a_row_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = next(line for line in load_lines() if line.name == "claim-races")
    monkeypatch.setattr(type(line), "seconds_at", lambda self, scale: 1.0)
    outcome = await run_row(
        line, "sqlite", seed=1, planned=100_000, broken=False, folder=tmp_path, say=lambda _: None
    )
    assert outcome.failure == "it did not end within 1 s"
    assert not outcome.good


def test_a_row_whose_parent_is_killed_leaves_nothing_behind() -> None:
    with tempfile.TemporaryDirectory(prefix="flowstore-lines-") as folder:
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
        until = time.monotonic() + 60
        while len(left := psutil.Process(parent.pid).children(recursive=True)) < 5:
            assert time.monotonic() < until, "its server did not start"
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        _, alive = psutil.wait_procs(left, 20)
        assert not alive
        while list(Path(folder).iterdir()):
            assert time.monotonic() < until, "its files stayed"
            time.sleep(0.05)


def test_published_rows_replace_their_like_and_leave_others(tmp_path: Path) -> None:
    lines = [_line(_nothing), _line(_nothing, name="other", number=100)]
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "reliability.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    first, second = (_outcome(line, Tally(landed=10)) for line in lines)
    proof = _outcome(lines[0], Tally(landed=2, twice=7), broken=True)
    publish([first, second], [proof], lines, tmp_path)
    publish([_outcome(lines[1], Tally(landed=11, details={"resets": 4}))], [], lines, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| 99 | [a fault](#made-up) | memory | 1 | 10 faults |" in text
    assert "| 100 | [a fault](#other) | memory | 1 | 11 faults |" in text
    assert "It went red: memory 7 twice after 2 faults." in text
    assert "resets: 4" in text


def test_a_page_without_its_marks_is_not_touched() -> None:
    with pytest.raises(ValueError, match="no place for the scorecard"):
        replace("no marks", [], {})
