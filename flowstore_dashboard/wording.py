"""Times, durations and application texts in the form that pages show."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from flowstore_core.inspection.wording import span

MAX_TEXT = 20_000
"""Maximum number of characters of one application text on a page."""
MAX_PAGE_TEXT = 1_000_000
"""Maximum number of characters of all application texts on a page."""
MIN_TEXT = 200
"""Number of characters that every text gets when the page is full."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The beginning of an application text, pretty-printed if it is JSON and fits as a whole."""

    text: str
    length: int
    """The length of the whole text, in characters."""
    is_cut: bool


class TextBudget:
    """Bounds the application texts of one page, so that its size does not grow with the data."""

    def __init__(self) -> None:
        self._left = MAX_PAGE_TEXT

    def excerpt(self, text: str) -> Excerpt:
        limit = min(MAX_TEXT, max(self._left, MIN_TEXT))
        shown = _pretty(text) if len(text) <= limit else text
        # Indentation may make a text longer than it was.
        if len(shown) > limit:
            shown = text[:limit]
        self._left -= len(shown)
        return Excerpt(shown, len(text), len(text) > limit)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:"]+')


def _pretty(text: str) -> str:
    """A JSON object or array with indentation; every token stays as it is written. Other text unchanged."""
    try:
        if not isinstance(json.loads(text), (dict, list)):
            return text
    except (ValueError, RecursionError):
        return text
    parts: list[str] = []
    depth = 0
    previous = ""
    for token in _TOKEN.findall(text):
        if token in "}]":
            depth -= 1
            if previous not in ("{", "["):
                parts.append("\n" + "  " * depth)
        elif previous in ("{", "[", ","):
            parts.append("\n" + "  " * depth)
        parts.append(": " if token == ":" else token)
        if token in "{[":
            depth += 1
        previous = token
    return "".join(parts)


def moment(value: datetime) -> str:
    """A time in UTC, to the second."""
    return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def clock(value: datetime, day: datetime) -> str:
    """A time in UTC, to the millisecond; with the date unless it is on the UTC day of ``day``."""
    value = value.astimezone(UTC)
    text = f"{value:%H:%M:%S}.{value.microsecond // 1000:03}"
    return text if value.date() == day.astimezone(UTC).date() else f"{value:%Y-%m-%d} {text}"


def iso(value: datetime) -> str:
    return value.astimezone(UTC).isoformat()


def seconds_between(start: datetime, end: datetime) -> float:
    return (end - start) / timedelta(seconds=1)


def length(start: datetime, end: datetime) -> str:
    return span(seconds_between(start, end))


def age(value: datetime, now: datetime) -> str:
    """``5m ago``, or ``in 5m`` for a time in the future, to one unit."""
    seconds = seconds_between(value, now)
    distance = abs(seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if distance >= size:
            text = f"{int(distance // size)} {unit}"
            return f"{text} ago" if seconds >= 0 else f"in {text}"
    return "just now"
