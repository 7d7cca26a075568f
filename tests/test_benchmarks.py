"""Each benchmark program at its minimum: it succeeds, writes JSON, and every variant does its work.

Figures are not compared with targets, which would fail on a busy machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report as reporting
from benchmarks.queue_claims import Drained
from benchmarks.results import Measure, Ratio, Report, Result, Sample, Target, load
from benchmarks.svg import draw
from benchmarks.tables import WIDTH, show

ROOT = Path(__file__).parents[1]
BACKENDS = ("PostgreSQL", "SQLite")
SMALLEST = ("--rounds", "1", "--seconds", "0.01", "--scale", "0.05")


def run(program: str, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Run a program and return its report and its output."""
    report_file = folder / "report.json"
    picture = folder / "report.svg"
    command = [sys.executable, "-m", f"benchmarks.{program}", *SMALLEST, *options]
    done = subprocess.run(
        [*command, "--json", str(report_file), "--svg", str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert picture.read_text(encoding="utf-8").startswith("<svg")
    for line in done.stdout.splitlines():
        assert len(line) <= WIDTH, line
    report: dict[str, Any] = json.loads(report_file.read_text(encoding="utf-8"))
    for measure in report["measures"]:
        for result in measure["results"]:
            assert result["samples"], (measure["name"], result["variant"])
            # A round raises unless all of its work was verified.
            assert all(sample["work"] > 0 for sample in result["samples"])
    return report, done.stdout


def measures(report: dict[str, Any]) -> dict[str, list[str]]:
    return {one["name"]: [result["variant"] for result in one["results"]] for one in report["measures"]}


@pytest.mark.xdist_group("benchmarks")
def test_postgres(tmp_path: Path) -> None:
    report, printed = run("postgres", tmp_path, "--callers", "1,16")
    variants = measures(report)
    assert len(variants["lifecycle, 1 caller"]) == 3
    assert len(variants["lifecycle, 16 callers"]) == 6
    assert len(variants["try_claim_step, 8 claimants per key, 16 callers"]) == 4
    assert {one["name"] for one in report["ratios"]} >= {"lifecycle, 1 caller", "latency of a single claim"}
    assert "fsync on" in printed


@pytest.mark.xdist_group("benchmarks")
def test_schedulers(tmp_path: Path) -> None:
    report, _ = run("schedulers", tmp_path, "--callers", "8")
    variants = measures(report)
    assert len(variants["claims beside whole runs, 8 callers each"]) == 3
    assert len(variants["reads beside completions, 8 callers each"]) == 3


@pytest.mark.xdist_group("benchmarks")
def test_sqlite(tmp_path: Path) -> None:
    report, printed = run("sqlite", tmp_path, "--callers", "1,32", "--claims", "2_000")
    variants = measures(report)
    assert len(variants["lifecycle, 32 callers"]) == 4
    assert len(variants["try_claim_step, 1 caller, alternating call by call"]) == 4
    assert len(variants["lifecycle, 4 processes on one file, together"]) == 3
    assert "synchronous FULL" in printed


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_growth(tmp_path: Path) -> None:
    report, _ = run("growth", tmp_path, "--callers", "8", "--scale", "0.001")
    variants = measures(report)
    for backend in BACKENDS:
        assert len(variants[f"{backend}, lifecycle"]) == 4
        for call in ("statistics", "first page", "search", "30-day timeseries", "cleanup"):
            assert len(variants[f"{backend}, {call}"]) == 3
        assert len(variants[f"{backend}, bytes per lifecycle: on disk"]) == 2


@pytest.mark.xdist_group("benchmarks")
def test_scaling(tmp_path: Path) -> None:
    report, _ = run("scaling", tmp_path, "--callers", "4", "--databases", "sqlite,postgresql")
    variants = measures(report)
    everywhere = ["SQLite", "PostgreSQL", "PostgreSQL, synchronous standby"]
    assert variants["durable steps, 4 at once: processor time of the client"] == everywhere
    assert variants["durable steps, 4 at once: written to the log"] == everywhere
    assert variants["durable steps, 4 at once: syncs of the log"] == everywhere[1:]


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_peers_share_work_among_processes(tmp_path: Path) -> None:
    report, printed = run("peers", tmp_path, "--callers", "4", "--processes", "2")
    assert "flowstore" in measures(report)["durable steps, 4 at once, 2 worker processes"]
    for engine in ("procrastinate", "DBOS", "absurd"):
        assert f"{engine} was skipped" in printed


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_peers(tmp_path: Path) -> None:
    report, printed = run("peers", tmp_path, "--callers", "4,8")
    variants = measures(report)
    for concurrency in (4, 8):
        assert "flowstore" in variants[f"durable steps, {concurrency} at once"]
    # Missing engines are named with the reason.
    for engine in ("pgqueuer", "procrastinate", "DBOS", "absurd"):
        assert f"A step of {engine}" in printed or f"{engine} was skipped" in printed


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_queues_and_waiting_workers(tmp_path: Path) -> None:
    variants, ratios = run_queues(tmp_path, "latency", "idle")
    for backend in BACKENDS:
        assert len(variants[f"{backend}, latency of an idle worker in another process"]) == 3
        assert len(variants[f"{backend}, processor time of a waiting worker"]) == 1
        assert f"{backend}, waiting worker, % of a core" in ratios
    assert "PostgreSQL, sessions with a query in 5 s of waiting" in variants
    assert len(variants) == 5


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_queues_and_claims(tmp_path: Path) -> None:
    variants, ratios = run_queues(tmp_path, "sleeping", "snapshot")
    for backend in BACKENDS:
        assert len(variants[f"{backend}, claim_next_steps(limit=64)"]) == 3
        assert len(variants[f"{backend}, claim_next_steps(limit=64) under load, with an old snapshot"]) == 6
        assert f"{backend}, claims, with old snapshot" in ratios
    assert len(variants) == 4


@pytest.mark.xdist_group("benchmarks")
@pytest.mark.timeout(300)
def test_queues_and_their_workers(tmp_path: Path) -> None:
    variants, ratios = run_queues(tmp_path, "competition", "throughput")
    for backend in BACKENDS:
        assert len(variants[f"{backend}, worker processes on one queue, limit 16"]) == 2
        assert len(variants[f"{backend}, claims with fewer steps than limit although more were free"]) == 2
        assert len(variants[f"{backend}, steps claimed and advanced"]) == 3
        assert f"{backend}, 4 workers, short claims, %" in ratios
    assert len(variants) == 6


def run_queues(folder: Path, *figures: str) -> tuple[dict[str, list[str]], set[str]]:
    """The measures with their variants, and the names of the ratios."""
    chosen = [option for figure in figures for option in ("--figure", figure)]
    tiny = ("--callers", "2,4", "--scale", "0.001", "--snapshot-minutes", "0")
    report, _ = run("queues", folder, *chosen, *tiny)
    return measures(report), {one["name"] for one in report["ratios"]}


@pytest.mark.parametrize(
    ("calls", "short"),
    [
        ([(0, 1, 4), (0, 2, 4), (3, 4, 2), (5, 6, 0)], 0),  # The last claims found the last steps.
        ([(0, 1, 4), (2, 3, 2), (4, 5, 4)], 100 / 3),  # Four steps were free.
        ([(0, 1, 4), (2, 3, 0), (4, 5, 4), (6, 7, 2)], 25),
        ([(0, 2, 4), (1, 3, 2), (1, 4, 4)], 0),  # Another claim may have held the other four.
    ],
)
def test_a_claim_is_short_if_more_steps_were_free(calls: list[tuple[int, int, int]], short: float) -> None:
    assert Drained(0.0, 10, [{"ended": 9.0, "calls": calls}]).short_claims(4) == short


def test_memory(tmp_path: Path) -> None:
    report, _ = run("memory", tmp_path, "--callers", "1,16")
    assert "lifecycle, callers: 16, each call timed" in measures(report)


def test_an_invalid_option_is_explained() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--callers", "many"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "whole numbers" in done.stderr


def example() -> Report:
    measure = Measure(
        "life <1>",
        "per second",
        [
            Result("flowstore", [Sample(10, rate=900.0, p50_ms=1.5), Sample(10, rate=1300.0, p50_ms=1.25)]),
            Result("the other", [Sample(10, rate=100.0), Sample(10, rate=100.0)]),
        ],
    )
    return Report("example", {"processor": "a fast one"}, {"rounds": "2"}, [measure])


@pytest.mark.parametrize(("minimum", "met"), [(10.0, True), (11.5, False), (None, None)])
def test_a_target_compares_the_medians(minimum: float | None, met: bool | None) -> None:
    ratio = Target("life", "life <1>", "flowstore", "the other", True, minimum).judge(example())
    assert ratio == Ratio("life", 11.0, 9.0, 13.0, minimum, None, True)
    assert ratio.met is met


def test_a_target_without_its_measure_has_no_ratio() -> None:
    assert Target("life", "unknown", "flowstore", None, True, 1.0).judge(example()) is None


def test_a_report_is_saved_and_loaded(tmp_path: Path) -> None:
    report = example()
    report.save(tmp_path / "report.json")
    assert load(tmp_path / "report.json") == report


def test_a_report_is_shown_and_drawn() -> None:
    assert "1,100" in show(example())
    assert "life &lt;1&gt;" in draw(example())


def test_the_pages_show_the_figures_of_their_files(tmp_path: Path) -> None:
    folder = tmp_path / reporting.FIGURES
    folder.mkdir()
    for path in (reporting.DOCS / reporting.FIGURES).iterdir():
        (folder / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    pages = {name: (reporting.DOCS / name).read_text(encoding="utf-8") for name in reporting.PAGES}
    for name, page in pages.items():
        (tmp_path / name).write_text(page, encoding="utf-8")
    reporting.write(tmp_path)
    for name, page in pages.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == page
    for path in (reporting.DOCS / reporting.FIGURES).iterdir():
        assert (folder / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")


def test_figures_replace_the_text_between_the_markers() -> None:
    old = f"before\n{reporting.BEGIN}\nold\n{reporting.END}\nafter\n"
    new = reporting.page(old, [example()], {})
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "old" not in new
    assert "| flowstore | 900 | 1,100 | 1,300 | 1.38 | - |" in new
    assert reporting.page(new, [example()], {}) == new
