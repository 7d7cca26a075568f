"""Publish measured figures in docs/performance.md: ``python -m benchmarks.report``.

Reads docs/performance/PROGRAM.json (written by ``python -m benchmarks.PROGRAM --json``), draws PROGRAM.svg
beside each, and replaces the part of the page between the two markers. JSON files given as arguments are
copied to that folder first.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.options import say
from benchmarks.results import Report, load
from benchmarks.svg import draw
from benchmarks.tables import ratio_rows, rows

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = "performance"
PAGE = "performance.md"
BEGIN = "<!-- figures: written by python -m benchmarks.report, not by hand -->"
END = "<!-- end of figures -->"
TITLES = {
    "postgres": "PostgreSQL",
    "sqlite": "SQLite",
    "memory": "Memory",
    "growth": "Growth",
    "queues": "Queues",
    "peers": "Other engines",
}


def page(text: str, reports: Sequence[Report]) -> str:
    """The page with these figures between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers for figures: {BEGIN} ... {END}")
    figures = "\n".join(line for report in reports for line in _section(report))
    return f"{before}{BEGIN}\n\n{figures}\n{END}{after}"


def _section(report: Report) -> Iterator[str]:
    yield f"### {TITLES.get(report.program, report.program)}"
    yield ""
    facts = (*report.machine.items(), *report.settings.items())
    yield "; ".join(f"{name}: {value}" for name, value in facts) + "."
    yield ""
    if report.ratios:
        heads = ("", "median", "single rounds", "target", "aim", "met")
        yield from _table(heads, ratio_rows(report.ratios))
    yield f"![{report.program}: medians]({FIGURES}/{report.program}.svg)"
    yield ""
    for measure in report.measures:
        yield f"**{measure.name}** ({measure.unit})" + (f". {measure.note}" if measure.note else "")
        yield ""
        yield from _table(("", "min", "median", "max", "p50 ms", "p99 ms"), rows(measure))
    for note in report.notes:
        yield note
        yield ""


def _table(heads: Sequence[str], body: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"|{'|'.join(['---', *['---:'] * (len(heads) - 1)])}|"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""


def write(docs: Path) -> list[str]:
    """Regenerate the page and the pictures from the JSON files below ``docs``. Returns the programs."""
    folder = docs / FIGURES
    found = [load(folder / f"{name}.json") for name in TITLES if (folder / f"{name}.json").exists()]
    for report in found:
        (folder / f"{report.program}.svg").write_text(draw(report), encoding="utf-8")
    target = docs / PAGE
    target.write_text(page(target.read_text(encoding="utf-8"), found), encoding="utf-8")
    return [report.program for report in found]


def main() -> None:
    folder = DOCS / FIGURES
    folder.mkdir(exist_ok=True)
    for name in sys.argv[1:]:
        program = load(Path(name)).program
        if Path(name).resolve() != (folder / f"{program}.json").resolve():
            shutil.copyfile(name, folder / f"{program}.json")
    say(f"{PAGE} shows: {', '.join(write(DOCS)) or 'nothing'}")


if __name__ == "__main__":
    main()
