"""The figures as text tables, at most 100 columns wide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import wrap

from benchmarks.results import Measure, Ratio, Report, Result

WIDTH = 100


def number(value: float | None) -> str:
    """Format with at most four significant digits and thousands separators; a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def target(ratio: Ratio, value: float) -> str:
    return f"{'>=' if ratio.at_least else '<='} {number(value)}"


def rows(measure: Measure) -> list[tuple[str, ...]]:
    """A row for each variant: name, min, median, max, p50 and p99 of a call in milliseconds."""
    return [_row(result) for result in measure.results]


def _row(result: Result) -> tuple[str, ...]:
    values = result.values("rate") or result.values("value")
    middle = result.median("rate") if result.values("rate") else result.median("value")
    return (
        result.variant,
        number(min(values)) if values else "-",
        number(middle),
        number(max(values)) if values else "-",
        number(result.median("p50_ms")),
        number(result.median("p99_ms")),
    )


def ratio_rows(ratios: Sequence[Ratio]) -> list[tuple[str, ...]]:
    return [
        (
            ratio.name,
            number(ratio.value),
            f"{number(ratio.lowest)} to {number(ratio.highest)}",
            "limit" if ratio.target is None else target(ratio, ratio.target),
            "" if ratio.aim is None else target(ratio, ratio.aim),
            {True: "yes", False: "NO", None: "-"}[ratio.met],
        )
        for ratio in ratios
    ]


def show(report: Report) -> str:
    """The whole report for a terminal."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    yield f"flowstore benchmarks: {report.program}"
    for name, value in (*report.machine.items(), *report.settings.items()):
        yield from wrap(f"  {name}: {value}", WIDTH, subsequent_indent="      ")
    head = ("", "min", "median", "max", "p50 ms", "p99 ms")
    for measure in report.measures:
        yield ""
        yield from wrap(f"{measure.name} ({measure.unit})", WIDTH)
        if measure.note:
            yield from wrap(measure.note, WIDTH, initial_indent="  ", subsequent_indent="  ")
        for name, *figures in (head, *rows(measure)):
            # Four columns for what is counted, two for latencies.
            yield f"  {name:<46.46}" + "".join(f"{figure:>10}" for figure in figures)
    if report.ratios:
        yield ""
        for name, value, spread, least, aim, met in (
            ("ratio", "median", "single rounds", "target", "aim", "met"),
            *ratio_rows(report.ratios),
        ):
            yield f"  {name:<40.40}{value:>9}{spread:>22}{least:>11}{aim:>11}{met:>5}"
    for note in report.notes:
        yield ""
        yield from wrap(note, WIDTH)
