"""Numbers and durations as text, for people."""

from __future__ import annotations


def count(number: int, noun: str) -> str:
    """``1 run``, ``2,000 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def span(seconds: float | None) -> str:
    """A duration in at most six characters; "?" for a negative one, from clocks that differ."""
    if seconds is None:
        return "-"
    if seconds < 0:
        return "?"
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 100:
        return f"{seconds:.1f}s"
    for size, unit, smaller, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            whole, rest = divmod(int(seconds), size)
            return f"{whole}{unit}{rest // smaller:02}{part}" if whole < 100 else f"{whole}{unit}"
    return f"{seconds:.0f}s"
