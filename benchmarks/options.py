"""The options that all programs share, and how a program is run."""

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
    """How long one variant is measured in one round; already multiplied by the scale."""
    scale: float
    callers: tuple[int, ...]
    only: str
    json: Path | None
    svg: Path | None
    claims: int
    folder: Path | None

    def wants(self, measure: str) -> bool:
        return self.only in measure

    def wants_backend(self, backend: str) -> bool:
        """Whether any measure of it may be wanted: names begin with the backend's."""
        return self.only.startswith(backend) or not self.only.startswith(("PostgreSQL", "SQLite"))


def parser(description: str, callers: str) -> argparse.ArgumentParser:
    """The shared options; ``callers`` is the default of --callers."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--rounds", type=int, default=5, help="rounds of all variants; medians are shown (5)"
    )
    options.add_argument("--seconds", type=float, default=2.0, help="time for a variant in a round (2)")
    options.add_argument("--scale", type=float, default=1.0, help="multiplies times and amounts (1)")
    options.add_argument("--callers", default=callers, help=f"concurrent callers, by comma ({callers})")
    options.add_argument("--only", default="", metavar="TEXT", help="only measures whose name has TEXT")
    options.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    options.add_argument("--svg", type=Path, metavar="FILE", help="draw the medians there")
    options.add_argument(
        "--claims", type=_count, default=0, help="watch the memory of the process over so many claims"
    )
    options.add_argument("--note", help="said below the figures: what else the machine did")
    options.add_argument("--folder", type=Path, help="where databases go: on a real disk (found by itself)")
    return options


def _count(text: str) -> int:
    """A whole number that may be written as 10_000_000."""
    return int(text)


def run(options: argparse.ArgumentParser, program: Callable[[Options], Coroutine[Any, Any, Report]]) -> None:
    """Run a program to its end: figures to stdout, JSON and SVG to their files. Exits."""
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
    )
    # Ended either way, it stops its server and removes its files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = asyncio.run(program(chosen))
    except KeyboardInterrupt:
        say("stopped; nothing was written")
        sys.exit(130)
    if given.note:
        report.notes.insert(0, given.note)
    # The files first: standard output may be closed or full.
    if chosen.json is not None:
        report.save(chosen.json)
    if chosen.svg is not None:
        chosen.svg.write_text(draw(report), encoding="utf-8")
    sys.stdout.write(show(report))


def say(text: str) -> None:
    """Progress, to stderr: stdout is for the figures."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
