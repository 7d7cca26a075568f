"""The event log of a run (EVT-1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.redaction import redacted_repr


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowEventRecord:
    """One event; ``sequence`` increases from 1 within a run, in commit order."""

    __repr__ = redacted_repr

    sequence: int
    run_id: UUID
    timestamp: datetime
    event_type: str
    step_key: str | None
    message: str | None


class Events(Protocol):
    """Capability EVENTS: an append-only log for each run."""

    async def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        """Append an event and return its sequence. Raises RunNotFoundError.

        An event never appears before one that was already read, so paging with ``after`` of
        get_run_events misses none.
        """
        ...

    async def get_run_events(
        self, run_id: UUID, *, after: int = 0, take: int = 200
    ) -> Sequence[FlowEventRecord]:
        """The events with sequence > ``after``, ordered by sequence, at most ``take``."""
        ...
