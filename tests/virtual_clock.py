"""A clock that advances only when a test sets it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class VirtualClock:
    """A clock for ``open_store(clock=...)``."""

    def __init__(self, now: datetime = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> datetime:
        """Advance by the keyword arguments of timedelta and return the new time."""
        self.now += timedelta(**duration)
        return self.now
