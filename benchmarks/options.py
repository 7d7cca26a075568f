"""The options shared by all programs, and their main function."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import Report
from benchmarks.svg import draw
from benchmarks.tables import show


@dataclass(frozen=True, slots=True)
class Options:
    rounds: int
    seconds: float
    """Duration of one variant in one round, scaled."""
    scale: float
    callers: tuple[int, ...]
    only: str
    json: Path | None
    svg: Path | None
    claims: int
    folder: Path | None
    given: argparse.Namespace
    """All options, those of one program included."""

    def wants(self, measure: str) -> bool:
        return self.only in measure

    def wants_backend(self, backend: str) -> bool:
        """Whether a measure of the backend may be selected; their names begin with the backend's name."""
        return self.only.startswith(backend) or not self.only.startswith(("PostgreSQL", "SQLite"))


def parser(description: str, callers: str) -> argparse.ArgumentParser:
    """A parser with the shared options; ``callers`` is the default of --callers."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--rounds", type=int, default=5, help="rounds of all variants; medians are shown (5)"
    )
    options.add_argument("--seconds", type=float, default=2.0, help="seconds per variant and round (2)")
    options.add_argument("--scale", type=float, default=1.0, help="factor for times and amounts (1)")
    options.add_argument(
        "--callers", default=callers, help=f"numbers of concurrent callers, comma-separated ({callers})"
    )
    options.add_argument("--only", default="", metavar="TEXT", help="only measures whose name contains TEXT")
    options.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    options.add_argument("--svg", type=Path, metavar="FILE", help="draw the medians to FILE")
    options.add_argument("--claims", type=_count, default=0, help="measure process memory over N claims")
    options.add_argument("--note", help="a remark below the figures, for example on other load")
    options.add_argument(
        "--folder", type=Path, help="folder for databases, on a real disk (default: detected)"
    )
    return options


def _count(text: str) -> int:
    """An integer, which may contain underscores."""
    return int(text)


def run(options: argparse.ArgumentParser, program: Callable[[Options], Coroutine[Any, Any, Report]]) -> None:
    """Run a program: print the figures, and write the JSON and SVG files."""
    given = options.parse_args()
    try:
        callers = tuple(int(number) for number in given.callers.split(","))
    except ValueError:
        options.error("--callers takes whole numbers, separated by commas")
    if given.rounds < 1 or given.seconds <= 0 or given.scale <= 0 or min(callers) < 1:
        options.error("--rounds, --seconds, --scale and --callers must be positive")
    chosen = Options(
        rounds=given.rounds,
        seconds=given.seconds * given.scale,
        scale=given.scale,
        callers=callers,
        only=given.only,
        json=given.json,
        svg=given.svg,
        claims=given.claims,
        folder=given.folder,
        given=given,
    )
    # SIGTERM ends like Ctrl-C, so that servers are stopped and files removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = asyncio.run(program(chosen))
    except KeyboardInterrupt:
        say("interrupted; no files were written")
        sys.exit(130)
    if given.note:
        report.notes.insert(0, given.note)
    # Write the files first: standard output may be closed or full.
    if chosen.json is not None:
        report.save(chosen.json)
    if chosen.svg is not None:
        chosen.svg.write_text(draw(report), encoding="utf-8")
    sys.stdout.write(show(report))


def say(text: str) -> None:
    """Print progress to stderr; stdout is for the figures."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
