"""Watching: wait until a step is ready or a run has ended (WAT)."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from flowstore_core import RunStatus
from flowstore_core.queues import MAX_PRIORITY
from flowstore_memory.state import OpenNamespace


class Watch(OpenNamespace):
    async def wait_for_steps(self, queues: Sequence[str], *, timeout: timedelta) -> bool:
        async def look() -> tuple[bool | None, float | None]:
            with self._namespace.lock:
                seconds = self._seconds_until_ready(queues)
            return (True, None) if seconds is not None and seconds <= 0 else (None, seconds)

        return await self._waiting.wait(look, timeout) or False

    def _seconds_until_ready(self, queues: Sequence[str]) -> float | None:
        """The time until the next step is ready, by the index of the queues; None: no step will be.

        An outdated entry of the index makes it too early, which is a spurious wake-up.
        """
        heaps = (
            self._namespace.queue_index.get((queue, priority))
            for queue in queues
            for priority in range(MAX_PRIORITY + 1)
        )
        moments = [heap[0].ready_at for heap in heaps if heap]
        return (min(moments) - self._now()).total_seconds() if moments else None

    async def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        async def look() -> tuple[tuple[RunStatus | None] | None, float | None]:
            run = self._runs.get(run_id.int)
            if run is None:
                return (None,), None
            return (None, None) if run.status is RunStatus.RUNNING else ((run.status,), None)

        found = await self._waiting.wait(look, timeout)
        return None if found is None else found[0]
