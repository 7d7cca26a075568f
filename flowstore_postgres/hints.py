"""The hints that wake waiting calls: after each call that made a step ready, or ended a run (WAT-1).

A hint without topics wakes every waiting call. It follows the calls that do not know the queue of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import (
    Capability,
    EndedStep,
    FlowSignalWaiter,
    FlowStoreError,
    RunAdvance,
    RunArchive,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepRequest,
    TriggerResult,
)
from flowstore_postgres.database import Database
from flowstore_postgres.store import PostgresStore
from flowstore_postgres.watching import Listener, Notifier, Watch, queue_topic, run_topic


class HintingStore(PostgresStore):
    """A store that sends a hint after each call that other stores may wait for."""

    capabilities = frozenset(Capability) - {Capability.WATCH}

    def __init__(self, database: Database, notifier: Notifier) -> None:
        super().__init__(database)
        self._notifier = notifier

    async def release(self) -> None:
        """Send the last hints and close all connections, in bounded time."""
        await self._notifier.aclose()
        await self._database.aclose()

    async def trigger_run(self, *, dispatch: Sequence[StepRequest] = (), **arguments: Any) -> TriggerResult:
        result = await super().trigger_run(dispatch=dispatch, **arguments)
        if result.created and dispatch:
            self._notifier.publish(*(queue_topic(request.queue) for request in dispatch))
        return result

    async def try_record_dispatch(self, *, queue: str | None = None, **arguments: Any) -> bool:
        won = await super().try_record_dispatch(queue=queue, **arguments)
        if won and queue is not None:
            self._notifier.publish(queue_topic(queue))
        return won

    async def redispatch_step(self, *, queue: str | None = None, **arguments: Any) -> bool:
        replaced = await super().redispatch_step(queue=queue, **arguments)
        if replaced:
            self._notifier.publish(*([] if queue is None else [queue_topic(queue)]))
        return replaced

    async def advance_run(self, **arguments: Any) -> RunAdvance:
        advance = await super().advance_run(**arguments)
        self._publish_advances([(EndedStep(**arguments), advance)])
        return advance

    async def advance_runs(self, *, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        results = await super().advance_runs(steps=steps)
        self._publish_advances(zip(steps, results, strict=True))
        return results

    def _publish_advances(self, advances: Iterable[tuple[EndedStep, RunAdvance | FlowStoreError]]) -> None:
        queues, completed = set(), []
        for step, advance in advances:
            if not isinstance(advance, RunAdvance):
                continue
            if advance.dispatched:
                queues.update([one.queue for one in step.dispatch if one.step_key in advance.dispatched])
            if advance.run_completed:
                completed.append(run_topic(step.run_id))
        if queues or completed:
            self._notifier.publish(*map(queue_topic, queues), *completed)

    async def import_run(self, *, archive: RunArchive) -> bool:
        imported = await super().import_run(archive=archive)
        dispatches = [step.dispatch for step in archive.steps if step.dispatch is not None]
        topics = [queue_topic(one.queue) for one in dispatches if one.queue is not None]
        if imported and topics:
            self._notifier.publish(*topics)
        return imported

    async def retry_step(self, **arguments: Any) -> None:
        await super().retry_step(**arguments)
        self._notifier.publish()

    async def reschedule_step(self, **arguments: Any) -> None:
        await super().reschedule_step(**arguments)
        self._notifier.publish()

    async def release_step_claim(self, **arguments: Any) -> None:
        await super().release_step_claim(**arguments)
        self._notifier.publish()

    async def register_waiter(
        self, *, run_id: UUID, step_key: str, signal_name: str, expires_at: datetime | None
    ) -> None:
        took = await self._register_waiter(run_id, step_key, signal_name, expires_at)
        # A renamed waiter that takes a buffered payload makes its step ready; expires_at may be earlier than
        # before.
        if took or expires_at is not None:
            self._notifier.publish()

    async def deliver_signal(self, **arguments: Any) -> SignalDeliveryResult:
        result = await super().deliver_signal(**arguments)
        if result.status is SignalDeliveryStatus.DELIVERED:
            self._notifier.publish()
        return result

    async def remove_waiter(self, **arguments: Any) -> FlowSignalWaiter | None:
        removed = await super().remove_waiter(**arguments)
        if removed is not None:
            self._notifier.publish()
        return removed

    async def complete_run(self, *, run_id: UUID, status: RunStatus, **arguments: Any) -> bool:
        completed = await super().complete_run(run_id=run_id, status=status, **arguments)
        if completed:
            self._notifier.publish(run_topic(run_id))
        return completed

    async def delete_run(self, *, run_id: UUID) -> bool:
        deleted = await super().delete_run(run_id=run_id)
        if deleted:
            self._notifier.publish(run_topic(run_id))
        return deleted

    async def cleanup(self, *, cutoff: datetime) -> int:
        deleted = await super().cleanup(cutoff=cutoff)
        if deleted:
            self._notifier.publish()
        return deleted


class WatchingStore(Watch, HintingStore):
    """A store that also waits for the hints of others; PgBouncer cannot pass them on in transaction mode."""

    capabilities = frozenset(Capability)

    def __init__(self, database: Database, notifier: Notifier, listener: Listener) -> None:
        super().__init__(database, notifier)
        self._listener = listener

    async def release(self) -> None:
        await self._listener.aclose()
        await super().release()
