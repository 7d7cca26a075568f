"""Parsers of durations and points in time on the command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from flowstore_cli.failures import USAGE, Failure

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def parse_duration(text: str, option: str) -> timedelta:
    """Parse ``30d``, ``12h`` or ``1h30m``: one or more numbers, each with a unit of s, m, h, d or w."""
    if not re.fullmatch(r"(\d{1,9}[smhdw])+", text.strip().lower()):
        raise Failure(f"{option} must be a duration such as 30d, 12h or 1h30m, not {text!r}", USAGE)
    parts = re.findall(r"(\d+)([smhdw])", text.strip().lower())
    try:
        return sum((timedelta(**{_UNITS[unit]: int(number)}) for number, unit in parts), timedelta())
    except OverflowError:
        raise Failure(f"{option}: {text!r} is too long", USAGE) from None


def parse_moment(text: str, option: str, now: datetime) -> datetime:
    """Parse a time in ISO 8601 (UTC without a zone), or a duration before now."""
    if re.fullmatch(r"(\d+[smhdw])+", text.strip().lower()):
        return before(now, parse_duration(text, option), option)
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise Failure(
            f"{option} must be a time such as 2025-06-01T12:00, or a duration such as 24h, not {text!r}",
            USAGE,
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def before(now: datetime, length: timedelta, option: str) -> datetime:
    try:
        return now - length
    except OverflowError:
        raise Failure(f"{option} reaches back before the year 1", USAGE) from None
