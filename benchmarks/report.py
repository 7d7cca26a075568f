"""Publish measured figures in docs/performance.md and docs/scaling.md: ``python -m benchmarks.report``.

Reads docs/performance/PROGRAM.json (written by ``python -m benchmarks.PROGRAM --json``), draws PROGRAM.svg
beside each, and replaces the part of each page between the two markers. JSON files given as arguments are
copied to that folder first.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.options import say
from benchmarks.results import Report, load
from benchmarks.svg import draw
from benchmarks.tables import ratio_rows, rows

DOCS = Path(__file__).parents[1] / "docs"
FIGURES = "performance"
BEGIN = "<!-- figures: written by python -m benchmarks.report, not by hand -->"
END = "<!-- end of figures -->"
PAGES = {
    "performance.md": {
        "postgres": "PostgreSQL",
        "sqlite": "SQLite",
        "memory": "Memory",
        "growth": "Growth",
        "queues": "Queues",
        "peers": "Other engines",
    },
    "scaling.md": {"scaling": "Costs of a step"},
}
"""The pages, the programs whose figures each shows, and their titles."""


def page(text: str, reports: Sequence[Report], titles: Mapping[str, str]) -> str:
    """The page with these figures between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page has no markers for figures: {BEGIN} ... {END}")
    figures = "\n".join(line for report in reports for line in _section(report, titles))
    return f"{before}{BEGIN}\n\n{figures}\n{END}{after}"


def _section(report: Report, titles: Mapping[str, str]) -> Iterator[str]:
    yield f"### {titles.get(report.program, report.program)}"
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


def write(docs: Path) -> dict[str, list[str]]:
    """Regenerate the pages and the pictures from the JSON files below ``docs``.

    Returns the programs that each page shows.
    """
    folder = docs / FIGURES
    shown = {}
    for name, titles in PAGES.items():
        target = docs / name
        found = [load(folder / f"{one}.json") for one in titles if (folder / f"{one}.json").exists()]
        for report in found:
            (folder / f"{report.program}.svg").write_text(draw(report), encoding="utf-8")
        target.write_text(page(target.read_text(encoding="utf-8"), found, titles), encoding="utf-8")
        shown[name] = [report.program for report in found]
    return shown


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("files", nargs="*", type=Path, metavar="JSON", help="figures to publish")
    folder = DOCS / FIGURES
    folder.mkdir(exist_ok=True)
    for file in options.parse_args().files:
        if not file.is_file():
            options.error(f"there is no file {file}")
        program = load(file).program
        if file.resolve() != (folder / f"{program}.json").resolve():
            shutil.copyfile(file, folder / f"{program}.json")
    for page_name, programs in write(DOCS).items():
        say(f"{page_name} shows: {', '.join(programs) or 'nothing'}")


if __name__ == "__main__":
    main()
