"""What the command writes: text that is safe to show, tables that fit, JSON for scripts."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from rich.console import Console
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

STATUS_STYLES = {
    "Succeeded": "green",
    "Failed": "red",
    "Cancelled": "yellow",
    "Skipped": "yellow",
    "Running": "cyan",
    "Pending": "dim",
}


def new_console() -> Console:
    """A console on stdout: colours only on a terminal, and none where NO_COLOR is set."""
    return Console(highlight=False, markup=False, emoji=False)


def complain(message: str, code: int) -> int:
    """One line on stderr; returns the code."""
    sys.stderr.write(f"flowstore: {clean(' '.join(message.split()))}\n")
    return code


def clean(text: str) -> str:
    """Text from a store, made safe for a terminal: control characters become visible escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def say(text: str) -> None:
    """A line for people on stdout."""
    sys.stdout.write(f"{clean(text)}\n")


def print_json(document: Any) -> None:
    """One JSON document on stdout, as is every answer to --json."""
    utf8 = (getattr(sys.stdout, "encoding", "") or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(plain(document), indent=2, ensure_ascii=not utf8) + "\n")


def plain(value: Any) -> Any:
    """Records as JSON: fields under their own names, times in ISO 8601, ids and enums as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
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


def new_table(*columns: str, right: Collection[str] = (), short: Collection[str] = ()) -> Table:
    """A table without lines; where it is too wide, the ``short`` columns give way (see ``shortened``)."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in short)
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table without the blanks at its lines' ends, for whoever reads it from a pipe."""
    for line in console.render_lines(table, pad=False):
        while line and not line[-1].text.strip():
            line.pop()
        if line:
            line[-1] = Segment(line[-1].text.rstrip(), line[-1].style)
        console.print(Segments([*line, Segment.line()]), end="")


def print_form(console: Console, facts: Iterable[tuple[str, Text]]) -> None:
    """Names with what belongs to them; long values go on below."""
    form = Table.grid(padding=(0, 2, 0, 0))
    form.add_column(no_wrap=True)
    form.add_column(overflow="fold")
    for name, value in facts:
        form.add_row(cell(name, "dim"), value)
    print_table(console, form)


def cell(value: object, style: str = "") -> Text:
    """A cell; what a store holds is shown as it is, never read as markup."""
    return Text(clean("-" if value is None else str(value)).replace("\n", " "), style=style)


def shortened(value: object, style: str = "") -> Text:
    """A cell that loses its end where the table is too wide."""
    text = cell(value, style)
    text.no_wrap, text.overflow = True, "ellipsis"
    return text


def count(number: int, noun: str) -> str:
    """``1 run``, ``2,000 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def status(value: str) -> Text:
    return Text(value, style=STATUS_STYLES.get(value, ""))


def moment(value: datetime | None) -> str:
    """A moment to the second, in UTC."""
    return "-" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def span(seconds: float | None) -> str:
    """A length of time in at most six characters."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 100:
        return f"{seconds:.1f}s"
    for size, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole}{unit}{rest // smaller:02}{part}" if whole < 100 else f"{whole}{unit}"
    return f"{seconds:.0f}s"


def between(start: datetime, end: datetime | None) -> str:
    """How long something took; "-" while it has not ended."""
    return "-" if end is None else span(max((end - start) / timedelta(seconds=1), 0.0))
