"""What a person's retry of a step dispatches."""

from __future__ import annotations

from uuid import UUID

from flowstore_core.claims import DispatchLedger
from flowstore_core.queues import StepRequest


async def queue_request(store: DispatchLedger, run_id: UUID, step_key: str) -> tuple[StepRequest, ...]:
    """The ``dispatch`` with which retry_step puts a step back into its queue; empty for any other step.

    retry_step deletes the dispatch of the step, and the engine dispatches again only what has no queue.
    """
    return tuple(
        StepRequest(
            step_key=step_key,
            step_type=one.step_type or "",
            input_json=one.input_json,
            queue=one.queue,
            priority=one.priority,
        )
        for one in await store.get_dispatches(run_id)
        if one.step_key == step_key and one.queue is not None
    )
