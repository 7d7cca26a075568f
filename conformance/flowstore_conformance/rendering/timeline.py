"""A history as a timeline: a row per client, a bar per operation, and the order found by the search.

The axis shows the order of starts and ends, because races are about overlaps. Longer gaps are drawn wider,
but not to scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from flowstore_conformance.history import UNKNOWN, History, Operation, Outcome
from flowstore_conformance.linearizability import Answer, Verdict
from flowstore_conformance.phrasing import (
    call_words,
    client_words,
    outcome_word,
    outcome_words,
    span,
)
from flowstore_conformance.races import AFTER

MAX_OPERATIONS = 60
"""Maximum number of operations in a timeline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One operation of a timeline. ``begin`` and ``end`` are indexes into the moments of the axis."""

    operation: Operation
    row: int
    begin: int
    end: int
    place: int | None
    """The position in the longest legal order, from 1."""
    misfit: bool
    """Whether it could come next by time but its outcome does not fit."""
    expected: Outcome | None
    """The outcome according to the model."""

    @property
    def is_open(self) -> bool:
        """Whether its outcome is unknown, so that it has no end."""
        return math.isinf(self.operation.returned)

    @property
    def mark(self) -> str:
        """Its position, a cross for a misfit, or a dot if the search did not place it."""
        return "✕" if self.misfit else str(self.place) if self.place else "·"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The layout of a timeline, independent of its format."""

    bars: tuple[Bar, ...]
    """Ordered by start."""
    rows: tuple[str, ...]
    """The client of each row; a client with an open operation beside others has several rows."""
    moments: tuple[float, ...]
    """Every start and end, in seconds from the first."""
    left_out: int
    """Number of operations that are not shown."""

    @property
    def legend(self) -> tuple[Bar, ...]:
        """The bars in the order of the legend: placed, misfits, others."""
        return tuple(sorted(self.bars, key=lambda bar: (not bar.place, not bar.misfit, bar.place or 0)))


def lay_out(history: History, verdict: Verdict | None = None, *, shown: int = MAX_OPERATIONS) -> Timeline:
    """Lay out a history; of a long one, only the operations around the misfits."""
    operations = history.operations
    order = verdict.prefix if verdict is not None else ()
    misfits = verdict.unplaced if verdict is not None and verdict.answer is Answer.VIOLATION else ()
    places = {_find(operations, one): number for number, one in enumerate(order, 1)}
    answers = verdict.expected if verdict is not None else ()
    expected = {_find(operations, one): answer for one, answer in zip(misfits, answers, strict=False)}
    chosen = _choose(operations, places, set(expected), shown)
    kept = [operations[index] for index in chosen]
    start = min((one.invoked for one in kept), default=0.0)
    moments = sorted({t for one in kept for t in (one.invoked, one.returned) if math.isfinite(t)})
    ranks = {moment: rank for rank, moment in enumerate(moments)}
    bars: list[Bar] = []
    rows: list[tuple[int, int]] = []  # client, last moment that is taken
    for index in sorted(chosen, key=lambda index: operations[index].invoked):
        one = operations[index]
        begin = ranks[one.invoked]
        # A bar without an end is drawn two moments long.
        end = ranks[one.returned] if math.isfinite(one.returned) else begin + 2
        row = next(
            (n for n, (client, taken) in enumerate(rows) if client == one.client and taken <= begin), None
        )
        if row is None:
            row = len(rows)
            rows.append((one.client, end))
        rows[row] = (one.client, max(end, begin + 1))
        bars.append(
            Bar(
                operation=one,
                row=row,
                begin=begin,
                end=max(end, begin + 1),
                place=places.get(index),
                misfit=index in expected,
                expected=expected.get(index),
            )
        )
    by_client = sorted(range(len(rows)), key=lambda row: _rank(rows[row][0]))
    renumbered = {row: place for place, row in enumerate(by_client)}
    last = max((bar.end for bar in bars), default=0)
    tail = [moments[-1] + (n + 1) * 1e-6 for n in range(last + 1 - len(moments))] if moments else []
    return Timeline(
        bars=tuple(_move(bar, renumbered[bar.row]) for bar in bars),
        rows=tuple(client_words(rows[row][0]) for row in by_client),
        moments=tuple(moment - start for moment in [*moments, *tail]),
        left_out=len(operations) - len(chosen),
    )


def _rank(client: int) -> float:
    return math.inf if client == AFTER else client


def _move(bar: Bar, row: int) -> Bar:
    return Bar(
        operation=bar.operation,
        row=row,
        begin=bar.begin,
        end=bar.end,
        place=bar.place,
        misfit=bar.misfit,
        expected=bar.expected,
    )


def _find(operations: Sequence[Operation], wanted: Operation) -> int:
    for index, one in enumerate(operations):
        if one is wanted:
            return index
    return operations.index(wanted)


def _choose(
    operations: Sequence[Operation], places: dict[int, int], misfits: set[int], shown: int
) -> list[int]:
    if len(operations) <= shown:
        return list(range(len(operations)))
    last_placed = sorted(places, key=lambda index: -places[index])
    rest = [index for index in range(len(operations)) if index not in places and index not in misfits]
    return sorted([*sorted(misfits), *last_placed, *rest][:shown])


# As text


def text_timeline(timeline: Timeline, *, width: int = 100, unicode: bool = True) -> list[str]:
    """The timeline as lines of at most ``width`` columns; a longer one continues below."""
    left, right, fill, double, dots = "├┤─═…" if unicode else "[]-=~"
    cross, dot = ("✕", "·") if unicode else ("x", ".")
    name_width = max((len(name) for name in timeline.rows), default=0) + 2
    columns = max(width - name_width, 24)
    cell = 4 if len(timeline.moments) * 4 <= columns else 3
    length = max(len(timeline.moments) * cell, 1)
    rows = [[" "] * length for _ in timeline.rows]
    for bar in timeline.bars:
        begin, end = bar.begin * cell, min(bar.end * cell, length) - 1
        room = end - begin - 1
        mark = cross if bar.misfit else dot if bar.mark == "·" else bar.mark
        label = f"{mark} {outcome_word(bar.operation.outcome)}"
        line = double if bar.misfit else fill
        inside = (label if len(label) <= room else mark[:room]).ljust(room, line)
        closing = dots if bar.is_open else right
        rows[bar.row][begin : end + 1] = [left, *inside, closing]
    lines = []
    for start in range(0, length, columns):
        if start:
            lines.append(f"{'':{name_width}}{dots}")
        for name, row in zip(timeline.rows, rows, strict=True):
            lines.append(f"{name:{name_width}}{''.join(row[start : start + columns])}".rstrip())
    return lines


def text_legend(timeline: Timeline, *, unicode: bool = True) -> list[str]:
    """The legend of a timeline: the call of each mark and, for misfits, the expected outcome."""
    arrow = "→" if unicode else "->"
    cross, dot = ("✕", "·") if unicode else ("x", ".")
    lines = []
    for bar in timeline.legend:
        one = bar.operation
        mark = cross if bar.misfit else dot if bar.mark == "·" else bar.mark
        text = f"{call_words(one.call)} {arrow} {outcome_words(one.outcome)}"
        lines.append(f"{mark:>3}  {timeline.rows[bar.row]}  {text}")
        if bar.misfit and bar.expected is not None:
            lines.append(f"     cannot be placed here: the model returns {outcome_words(bar.expected)}")
    if timeline.left_out:
        lines.append(f"     {timeline.left_out} further operations are not shown")
    return lines


# As SVG

ROW = 44
BAR = 28
TOP = 12
NAME = 76
WIDE = 900


def svg_timeline(timeline: Timeline, *, label: str) -> str:
    """The timeline as an SVG element; the page defines its colour classes."""
    positions = _positions(timeline.moments)
    width, height = NAME + positions[-1] + 24, TOP + ROW * len(timeline.rows) + 26
    parts = [
        f'<svg class="timeline" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{escape(label)}">'
    ]
    for number, name in enumerate(timeline.rows):
        middle = TOP + ROW * number + ROW / 2
        parts.append(f'<text class="lane-name" x="0" y="{middle + 4:.1f}">{escape(name)}</text>')
        parts.append(f'<line class="lane" x1="{NAME}" x2="{width}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
    parts += [_svg_bar(bar, positions) for bar in timeline.bars]
    parts.append(_svg_axis(timeline, positions, height))
    return "".join([*parts, "</svg>"])


def _positions(moments: Sequence[float]) -> list[float]:
    """The x coordinate of each moment: evenly spaced, longer gaps somewhat wider, stretched to the page."""
    gaps = [after - before for before, after in pairwise(moments)]
    shortest = min((gap for gap in gaps if gap > 0), default=1.0)
    places = [0.0]
    for gap in gaps:
        places.append(places[-1] + 30 + 12 * min(math.log2(max(gap, shortest) / shortest), 5))
    stretch = max(WIDE / places[-1], 1.0) if places[-1] else 1.0
    return [place * min(stretch, 3.0) for place in places]


def _svg_bar(bar: Bar, positions: Sequence[float]) -> str:
    one = bar.operation
    begin, end = NAME + positions[bar.begin], NAME + positions[bar.end]
    top = TOP + ROW * bar.row + (ROW - BAR) / 2
    width, middle = end - begin - 3, top + BAR / 2
    kind = "misfit" if bar.misfit else "placed" if bar.place else "later"
    if bar.is_open:
        kind += " open"
    title = f"{call_words(one.call)} → {outcome_words(one.outcome)}"
    if bar.misfit and bar.expected is not None:
        title += f" (the model returns {outcome_words(bar.expected)})"
    word = outcome_word(one.outcome) if one.outcome is not UNKNOWN else "no answer"
    room = int((width - 34) / 7.4)
    shown = word if len(word) <= room else f"{word[: room - 1]}…" if room >= 4 else ""
    return (
        f'<g class="bar {kind}"><title>{escape(title)}</title>'
        f'<rect x="{begin:.1f}" y="{top:.1f}" width="{width:.1f}" height="{BAR}" rx="7"/>'
        f'<circle cx="{begin + 14:.1f}" cy="{middle:.1f}" r="9.5"/>'
        f'<text class="mark" x="{begin + 14:.1f}" y="{middle + 4:.1f}">{bar.mark}</text>'
        f'<text class="answer" x="{begin + 29:.1f}" y="{middle + 4:.1f}">{escape(shown)}</text></g>'
    )


def _svg_axis(timeline: Timeline, positions: Sequence[float], height: float) -> str:
    y = height - 8
    last = max((bar.end for bar in timeline.bars if not bar.is_open), default=0)
    first = f'<text class="axis" x="{NAME}" y="{y:.1f}">{span(0)}</text>'
    if not last:
        return first
    x, took = NAME + positions[last], span(timeline.moments[last])
    return f'{first}<text class="axis" text-anchor="end" x="{x:.1f}" y="{y:.1f}">{took}</text>'
