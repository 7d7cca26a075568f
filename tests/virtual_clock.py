"""A clock that stands still until a test moves it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


class VirtualClock:
    """Give it to ``open_store(clock=...)``; every timestamp of the store is then the test's."""

    def __init__(self, now: datetime = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **duration: float) -> datetime:
        """Move by a timedelta's keywords (seconds=..., days=...) and return the new now."""
        self.now += timedelta(**duration)
        return self.now
