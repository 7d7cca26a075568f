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
    """One event; ``sequence`` rises per run from 1 in commit order."""

    __repr__ = redacted_repr

    sequence: int
    run_id: UUID
    timestamp: datetime
    event_type: str
    step_key: str | None
    message: str | None


class Events(Protocol):
    """Capability EVENTS."""

    async def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        """Append an event and return its sequence. Raises RunNotFoundError.

        No event ever appears below one that was already read, so ``after`` of get_run_events never
        misses any.
        """
        ...

    async def get_run_events(
        self, run_id: UUID, *, after: int = 0, take: int = 200
    ) -> Sequence[FlowEventRecord]:
        """The events with sequence > after, by sequence, at most ``take``."""
        ...
