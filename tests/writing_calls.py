"""One call of each writing operation, on runs whose steps are in each state that the calls need.

Virtual time makes the results and the states of two runs comparable.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import full_archive

from flowstore_core import EndedStep, FlowStore, StepRequest, StepStatus
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=1)
LEASE = timedelta(minutes=5)

RANDOM_OWNER = re.compile(r"'[0-9a-f]{32}-\d+'")

Call = Callable[[FlowStore, UUID], Awaitable[Any]]


async def prepare_run(store: FlowStore, run: UUID) -> None:
    """Create a run with a step in each state that the operations need."""
    await store.start_run(FLOW, "orders", run, "manual")
    await store.configure_run(run, FLOW, "manual", timeout_at=VirtualClock()() - timedelta(hours=1))
    for key in ("open", "claimed", "failed", "dispatched"):
        await store.try_record_dispatch(run, key)
        await store.try_claim_step(run, key, owner=f"{key}-owner", lease=LEASE)
    await store.release_step_claim(run, "dispatched")
    await store.record_step_start(run, "open", "http", owner="open-owner")
    await store.record_step_start(run, "failed", "http")
    await store.record_step_complete(run, "failed", StepStatus.FAILED, error_message="boom")
    await store.record_skipped_step(run, "skipped", "http", "not needed")
    await store.register_waiter(run, "waiting", "go", expires_at=VirtualClock()() - timedelta(hours=1))
    for key in ("queued", "queued too"):
        await store.try_record_dispatch(run, key, queue=f"queue {run}", step_type="http", input_json="{}")
    for payload in ("1", "2"):
        await store.deliver_signal(run, "early", payload, buffer=True)
    await store.save_output(run, "saved", "1")


async def _complete_and_delete(store: FlowStore, run: UUID) -> bool:
    return await store.complete_run(run, "Failed") and await store.delete_run(run)


def _request(step_key: str, after: tuple[str, ...] = ()) -> StepRequest:
    return StepRequest(step_key=step_key, step_type="http", queue="new", after=after)


CALLS: dict[str, Call] = {
    "start_run": lambda s, r: s.start_run(FLOW, "orders", UUID(int=r.int + 100), "manual"),
    "complete_run": lambda s, r: s.complete_run(r, "Failed"),
    "record_step_start": lambda s, r: s.record_step_start(r, "fresh", "http", input_json="{}"),
    "record_step_start again": lambda s, r: s.record_step_start(r, "failed", "http"),
    "record_step_start owned": lambda s, r: s.record_step_start(r, "claimed", "http", owner="claimed-owner"),
    "record_step_complete": lambda s, r: s.record_step_complete(r, "open", "Succeeded", output_json="1"),
    "record_step_complete pending": lambda s, r: s.record_step_complete(r, "open", "Pending", attempt=1),
    "record_skipped_step": lambda s, r: s.record_skipped_step(r, "open", "http", "why", owner="open-owner"),
    "retry_step": lambda s, r: s.retry_step(r, "failed", reset=["skipped"]),
    "reschedule_step": lambda s, r: s.reschedule_step(r, "open", attempt=1, output_json="1"),
    "try_record_dispatch": lambda s, r: s.try_record_dispatch(r, "fresh"),
    "annotate_dispatch": lambda s, r: s.annotate_dispatch(r, "dispatched", "job"),
    "release_dispatch": lambda s, r: s.release_dispatch(r, "dispatched"),
    "try_claim_step": lambda s, r: s.try_claim_step(r, "fresh"),
    "try_claim_step owned": lambda s, r: s.try_claim_step(r, "fresh", owner="me", lease=LEASE),
    "try_start_step": lambda s, r: s.try_start_step(r, "fresh", "http", owner="me", lease=LEASE),
    "try_start_step claimed": lambda s, r: s.try_start_step(
        r, "claimed", "http", owner="claimed-owner", lease=LEASE
    ),
    "renew_step_claim": lambda s, r: s.renew_step_claim(r, "open", "open-owner", 2 * LEASE),
    "release_step_claim": lambda s, r: s.release_step_claim(r, "claimed"),
    "configure_run": lambda s, r: s.configure_run(r, FLOW, "manual", idempotency_key="k"),
    "request_cancel": lambda s, r: s.request_cancel(r, "enough"),
    "mark_timed_out": lambda s, r: s.mark_timed_out(r, as_of=VirtualClock()()),
    "extend_deadline": lambda s, r: s.extend_deadline(r, VirtualClock()() + LEASE),
    "try_register_idempotency_key": lambda s, r: s.try_register_idempotency_key(FLOW, "t", f"k{r}", r),
    "trigger_run": lambda s, r: s.trigger_run(
        FLOW, "orders", UUID(int=r.int + 200), "t", idempotency_key=f"k{r}", timeout_at=VirtualClock()()
    ),
    "trigger_run with a dispatch": lambda s, r: s.trigger_run(
        FLOW, "orders", UUID(int=r.int + 200), "t", dispatch=[_request("first")]
    ),
    "try_record_dispatch to a queue": lambda s, r: s.try_record_dispatch(
        r, "fresh", queue="new", priority=3, step_type="http"
    ),
    "claim_next_steps": lambda s, r: s.claim_next_steps([f"queue {r}"], lease=LEASE, limit=3, worker="w"),
    "advance_run": lambda s, r: s.advance_run(
        r,
        "open",
        "Succeeded",
        attempt=1,
        owner="open-owner",
        output_json="1",
        dispatch=[_request("next", after=("open",)), _request("refused", after=("failed",))],
        complete_as="Succeeded",
    ),
    "advance_runs": lambda s, r: s.advance_runs(
        [
            EndedStep(run_id=r, step_key="open", status="Succeeded", attempt=1, owner="other-owner"),
            EndedStep(
                run_id=r,
                step_key="open",
                status="Failed",
                attempt=1,
                owner="open-owner",
                dispatch=[_request("next"), _request("refused", after=("failed",))],
                complete_as="Succeeded",
            ),
        ]
    ),
    "redispatch_step": lambda s, r: s.redispatch_step(r, "queued", queue="new", priority=9),
    "retry_step with a dispatch": lambda s, r: s.retry_step(r, "failed", dispatch=[_request("failed")]),
    "reschedule_step with an error": lambda s, r: s.reschedule_step(
        r, "open", attempt=1, error_message="boom"
    ),
    "register_waiter": lambda s, r: s.register_waiter(r, "other", "go"),
    "deliver_signal": lambda s, r: s.deliver_signal(r, "go", "{}"),
    "deliver_signal with id": lambda s, r: s.deliver_signal(r, "go", "{}", delivery_id="d"),
    "deliver_signal with buffer": lambda s, r: s.deliver_signal(r, "early", "3", buffer=True),
    "deliver_signal with buffer and id": lambda s, r: s.deliver_signal(
        r, "early", "3", delivery_id="d", buffer=True
    ),
    "register_waiter of a buffered signal": lambda s, r: s.register_waiter(r, "other", "early"),
    "register_waiter under another name": lambda s, r: s.register_waiter(r, "waiting", "early"),
    "remove_waiter": lambda s, r: s.remove_waiter(r, "waiting"),
    "expire_waiter": lambda s, r: s.expire_waiter(r, "waiting"),
    "append_event": lambda s, r: s.append_event(r, "started", message="m"),
    "save_output": lambda s, r: s.save_output(r, "k", "1"),
    "save_outputs": lambda s, r: s.save_outputs(r, {"k": "1", "saved": "2"}),
    "renew_step_claims": lambda s, r: s.renew_step_claims([(r, "open", "open-owner")], 2 * LEASE),
    "set_tags": lambda s, r: s.set_tags(r, {"customer": "acme"}),
    "delete_outputs": lambda s, r: s.delete_outputs(r, prefix="saved"),
    "delete_run": lambda s, r: _complete_and_delete(s, r),
    "import_run": lambda s, r: s.import_run(full_archive(UUID(int=r.int + 100))),
}


async def read_state(store: FlowStore, run: UUID) -> list[Any]:
    """The whole state of a run, and of the two runs that a call may create."""
    state: list[Any] = []
    for one in (run, UUID(int=run.int + 100), UUID(int=run.int + 200)):
        state += [
            await store.get_run_detail(one),
            await store.get_run_control(one),
            await store.get_dispatches(one),
            [(c.step_key, c.owner, c.claimed_at, c.expires_at) for c in await store.get_step_claims(one)],
            await store.get_waiters(one),
            await store.get_buffered_signals(one),
            await store.get_run_events(one),
            dict(await store.get_outputs(one)),
        ]
    state.append(await store.find_run_id_by_idempotency_key(FLOW, "t", f"k{run}"))
    return state


def without_run_id(value: Any, run: UUID) -> str:
    """The text of a state or a result, without the ids of the run and random owners."""
    text = repr(value)
    for offset in (0, 100, 200):
        text = text.replace(str(UUID(int=run.int + offset)), f"<run+{offset}>")
    return RANDOM_OWNER.sub("<owner>", text)
