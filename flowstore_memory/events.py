"""The event log of a run (EVT-1)."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from flowstore_core import FlowEventRecord
from flowstore_memory.state import OpenNamespace


class Events(OpenNamespace):
    async def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        run = self._runs[run_id.int]
        event = FlowEventRecord(
            sequence=len(run.events) + 1,
            run_id=run_id,
            timestamp=self._now(),
            event_type=event_type,
            step_key=step_key,
            message=message,
        )
        run.events.append(event)
        return event.sequence

    async def get_run_events(
        self, run_id: UUID, *, after: int = 0, take: int = 200
    ) -> Sequence[FlowEventRecord]:
        run = self._runs.get(run_id.int)
        # Sequences start at 1 without gaps, so ``after`` is the index of the next event.
        return () if run is None else tuple(run.events[after : after + take])
