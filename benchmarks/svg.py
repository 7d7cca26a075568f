"""A bar chart of the medians as SVG, one group per measure."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape

from benchmarks.results import Measure, Report
from benchmarks.tables import number

WIDTH = 860
LABELS = 330
BARS = 400
LINE = 22
OURS = "#1f6f8b"
THEIRS = "#a9b4c0"


def draw(report: Report) -> str:
    """A self-contained SVG of the report."""
    shapes: list[str] = []
    y = 34
    shapes.append(_text(12, 20, f"flowstore, {report.program}", weight="bold"))
    for measure in report.measures:
        shapes.append(_text(12, y + 16, f"{measure.name}: {measure.unit}", weight="bold"))
        y += LINE + 2
        shapes.extend(_bars(measure, y))
        y += LINE * len(measure.results) + 12
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'font-family="sans-serif" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{y}" fill="white"/>\n{body}\n</svg>\n'
    )


def _bars(measure: Measure, top: int) -> Iterator[str]:
    medians = [one.median("rate") or one.median("value") or 0.0 for one in measure.results]
    longest = max(medians, default=0.0) or 1.0
    for index, (result, middle) in enumerate(zip(measure.results, medians, strict=True)):
        y = top + index * LINE
        length = max(1.0, BARS * middle / longest)
        colour = OURS if result.variant.startswith("flowstore") else THEIRS
        yield _text(LABELS - 8, y + 15, result.variant, anchor="end")
        yield f'<rect x="{LABELS}" y="{y + 2}" width="{length:.1f}" height="{LINE - 5}" fill="{colour}"/>'
        yield _text(LABELS + length + 6, y + 15, number(middle))


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
    )
