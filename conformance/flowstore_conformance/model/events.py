"""The event log of a run."""

from __future__ import annotations

from uuid import UUID

from flowstore_conformance.model.state import Base
from flowstore_core import FlowEventRecord


class Events(Base):
    """Appending and reading events."""

    def append_event(
        self, run_id: UUID, event_type: str, *, step_key: str | None = None, message: str | None = None
    ) -> int:
        """Append an event and return its sequence, which rises from 1 per run (EVT-1, UNK)."""
        run, _ = self.require(run_id)
        sequence = len(run.events) + 1
        event = FlowEventRecord(
            sequence=sequence,
            run_id=run_id,
            timestamp=self.now,
            event_type=event_type,
            step_key=step_key,
            message=message,
        )
        run.events = (*run.events, event)
        return sequence

    def get_run_events(self, run_id: UUID, *, after: int = 0, take: int = 200) -> tuple[FlowEventRecord, ...]:
        """List the events with a sequence above ``after``, ordered by sequence (EVT-1, QRY-1)."""
        return tuple(event for event in self.get(run_id).events if event.sequence > after)[:take]
