"""Output: text that is safe for a terminal, tables that fit its width, JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from flowstore_core import FlowRunRecord, RunPage
from flowstore_core.inspection.wording import span

STATUS_STYLES = {
    "Succeeded": "green",
    "Failed": "red",
    "Cancelled": "yellow",
    "Skipped": "yellow",
    "Running": "cyan",
    "Pending": "dim",
}

UNLIMITED = 2**31
"""Width of a console that is not a terminal."""
GAP = "  "
NARROWEST = 8
"""Minimum width of a table column that is cut."""
LONGEST_EXCERPT = 200
SHORT_ID = 8
"""Digits of a short run id."""


def on_terminal() -> bool:
    return sys.stdout.isatty()


def new_console() -> Console:
    """A console on stdout.

    Uses colours only on a terminal without NO_COLOR. Without a terminal no line is folded or cut.
    """
    width = None if on_terminal() else UNLIMITED
    return Console(highlight=False, markup=False, emoji=False, width=width)


def complain(message: str, code: int, details: Iterable[str] = ()) -> int:
    """Write one line to stderr and an indented line for each detail; return the code."""
    sys.stderr.write(f"flowstore: {clean(' '.join(message.split()))}\n")
    for line in details:
        sys.stderr.write(f"  {clean(line)}\n")
    return code


def clean(text: str) -> str:
    """Escape the control characters of a text, so that it is safe for a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(f"{clean(text)}\n")


def remark(text: str) -> None:
    """Write a remark about a list: on a terminal below the rows, else to stderr, apart from the rows."""
    (sys.stdout if on_terminal() else sys.stderr).write(f"{clean(text)}\n")


def print_json(document: Any) -> None:
    """Write one JSON document to stdout, for --json."""
    utf8 = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(plain(document), indent=2, ensure_ascii=not utf8) + "\n")


def plain(value: Any) -> Any:
    """Convert records for JSON: fields under their own names, times in ISO 8601, ids and enums as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {**fields, "tags": dict(value.tags)} if isinstance(value, FlowRunRecord) else fields
    if isinstance(value, RunPage):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, (frozenset, set)):
        return sorted(plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


class Listing:
    """A table without borders, one row per line.

    Without a terminal every cell is shown in full. On a narrow terminal the ``short`` columns are cut
    first; then ``spare`` columns are omitted in their order until the rest fits. Other columns, such as
    ids, are never cut.
    """

    def __init__(
        self, columns: Sequence[str], right: Collection[str], short: Collection[str], spare: Sequence[str]
    ) -> None:
        self._columns = columns
        self._right, self._short, self._spare = right, short, spare
        self._rows: list[Sequence[Text]] = [[Text(name, style="bold") for name in columns]]

    def add_row(self, *cells: Text) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def lines(self, width: int) -> Iterator[Text]:
        """The lines, of at most ``width`` characters if possible."""
        widths = self._fit(width)
        for row in self._rows:
            cells = []
            for place, size in widths.items():
                one = row[place].copy()
                one.truncate(size, overflow="ellipsis")
                one.align("right" if self._columns[place] in self._right else "left", size)
                cells.append(one)
            line = Text(GAP, no_wrap=True, overflow="ignore").join(cells)
            line.rstrip()
            yield line

    def _fit(self, width: int) -> dict[int, int]:
        """The indexes of the visible columns, and the width of each."""
        sizes = [max(row[place].cell_len for row in self._rows) for place in range(len(self._columns))]
        least = [
            min(size, NARROWEST) if name in self._short else size
            for name, size in zip(self._columns, sizes, strict=True)
        ]
        shown = {place for place, name in enumerate(self._columns) if name not in self._spare}
        for name in reversed(self._spare):
            place = self._columns.index(name)
            if sum(least[one] + len(GAP) for one in (*shown, place)) - len(GAP) <= width:
                shown.add(place)
        widths = {place: sizes[place] for place in sorted(shown)}
        short = [place for place in widths if sizes[place] > least[place]]
        while short and (over := sum(widths.values()) + len(GAP) * (len(widths) - 1) - width) > 0:
            widest = max(short, key=lambda place: widths[place])
            if widths[widest] <= NARROWEST:
                break
            # Cut to the width of the next widest column in one step, because a cell may hold a long text.
            following = max((widths[place] for place in short if place != widest), default=0)
            widths[widest] = max(widths[widest] - over, min(following, widths[widest] - 1), NARROWEST)
        return widths


def new_table(
    *columns: str, right: Collection[str] = (), short: Collection[str] = (), spare: Sequence[str] = ()
) -> Listing:
    return Listing(columns, right, short, spare)


def print_table(console: Console, table: Listing) -> None:
    for line in table.lines(console.width):
        console.print(line, soft_wrap=True)


def print_form(console: Console, facts: Iterable[tuple[str, Text]]) -> None:
    """Print names with their values. On a terminal values are folded, except ``no_wrap`` ones."""
    facts = list(facts)
    indent = max((len(name) for name, _ in facts), default=0) + len(GAP)
    for name, value in facts:
        title = cell(name.ljust(indent), "dim")
        width = UNLIMITED if value.no_wrap else max(console.width - indent, NARROWEST)
        for line in value.wrap(console, width, overflow="fold", no_wrap=False):
            line.rstrip()
            console.print(Text.assemble(title, line), soft_wrap=True)
            title = Text(" " * indent)


def cell(value: object, style: str = "") -> Text:
    """A table cell on one line. Text of a store is never interpreted as markup."""
    return Text(clean("-" if value is None else str(value)).replace("\n", " "), style=style)


def unfolded(value: object) -> Text:
    """A value that is never folded, so that it can be copied."""
    text = cell(value)
    text.no_wrap = True
    return text


def excerpt(text: str, *, full: bool, style: str = "") -> Text:
    """A text of a store: all its lines if ``full``, else one line, shortened on a terminal."""
    if full:
        return Text(clean(text), style=style)
    if len(text) > LONGEST_EXCERPT and on_terminal():
        return cell(f"{text[:LONGEST_EXCERPT]}... ({len(text):,} characters; --full)", style)
    return cell(text, style)


def short_ids(ids: Sequence[UUID]) -> dict[UUID, str]:
    """The ids for a list: on a terminal the last 8 digits if these are unique, else the whole ids.

    The first digits of a UUIDv7 are its time, and runs that start within a minute share them.
    """
    short = {one: one.hex[-SHORT_ID:] for one in ids}
    if on_terminal() and len(set(short.values())) == len(short):
        return short
    return {one: str(one) for one in ids}


def status(value: str) -> Text:
    return Text(value, style=STATUS_STYLES.get(value, ""))


def moment(value: datetime | None) -> str:
    """A time in UTC, to the second."""
    return "-" if value is None else value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "seconds")


def between(start: datetime, end: datetime | None) -> str:
    """The time from start to end; "-" without an end, "?" if the end is before the start."""
    return "-" if end is None else span((end - start) / timedelta(seconds=1))


def since(start: datetime, now: datetime) -> str:
    """A start time: its age on a terminal, else ISO 8601."""
    if not on_terminal():
        return f"{start.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
    seconds = (now - start) / timedelta(seconds=1)
    return f"{span(seconds)} ago" if seconds >= 0 else f"in {span(-seconds)}"
