"""The placeholders in SQL constants: ``{schema}``, ``{latest}`` and ``{microsecond}``."""

from __future__ import annotations

from datetime import timedelta

from flowstore_core.timeseries import LATEST

# As in INP-3: no lease ends later.
LATEST_SQL = f"'{LATEST.isoformat()}'::timestamptz"
# Durations are sent as a number of microseconds. The driver would send a timedelta as an interval of days,
# and the server adds days in the session's time zone, where a day may have 23 or 25 hours.
MICROSECOND_SQL = "interval '1 microsecond'"
MICROSECOND = timedelta(microseconds=1)


def fill_in(statement: str, quoted_schema: str) -> str:
    """Replace the placeholders of a statement."""
    replaced = statement.replace("{latest}", LATEST_SQL).replace("{microsecond}", MICROSECOND_SQL)
    # Last, because the name of the schema may contain braces.
    return replaced.replace("{schema}", quoted_schema)


def in_microseconds(duration: timedelta) -> int:
    """A duration as a factor of ``{microsecond}``."""
    return duration // MICROSECOND
