"""Lengths of time and moments, the way people type them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from flowstore_cli.failures import USAGE, Failure

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str, option: str) -> timedelta:
    """``30d``, ``12h``, ``1h30m``: a number and one of s, m, h, d, w, once or more."""
    if not re.fullmatch(r"(\d{1,9}[smhdw])+", text.strip().lower()):
        raise Failure(f"{option} must be a length of time such as 30d, 12h or 1h30m, not {text!r}", USAGE)
    parts = re.findall(r"(\d+)([smhdw])", text.strip().lower())
    try:
        return sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
    except OverflowError:
        raise Failure(f"{option}: {text!r} is too long", USAGE) from None


def parse_moment(text: str, option: str, now: datetime) -> datetime:
    """A moment in ISO 8601 (UTC where it names no zone), or a length of time before now."""
    if re.fullmatch(r"(\d+[smhdw])+", text.strip().lower()):
        return before(now, parse_duration(text, option), option)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise Failure(
            f"{option} must be a moment such as 2025-06-01T12:00, or a length of time such as 24h, "
            f"not {text!r}",
            USAGE,
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def before(now: datetime, length: timedelta, option: str) -> datetime:
    try:
        return now - length
    except OverflowError:
        raise Failure(f"{option} reaches back before the year 1", USAGE) from None
