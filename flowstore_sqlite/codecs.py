"""Storage formats: times as whole microseconds since 1970, ids as 16 bytes; and assembled statements."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_us(at: datetime) -> int:
    """Microseconds since 1970-01-01 UTC, negative before it. Exact: no float is involved."""
    span = at - _EPOCH
    return (span.days * 86_400 + span.seconds) * 1_000_000 + span.microseconds


def from_us(stored: int) -> datetime:
    return _EPOCH + timedelta(microseconds=stored)


def to_optional_us(at: datetime | None) -> int | None:
    return None if at is None else to_us(at)


def from_optional_us(stored: int | None) -> datetime | None:
    return None if stored is None else from_us(stored)


def to_optional_id(value: UUID | None) -> bytes | None:
    return None if value is None else value.bytes


def from_optional_id(stored: bytes | None) -> UUID | None:
    return None if stored is None else UUID(bytes=stored)


def join_sql(*parts: str) -> str:
    """Join constant parts to one statement. Values are always bound, never part of it."""
    return " ".join(part.strip() for part in parts)
