"""UNK: the result of every operation on an unknown run or step."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    MINUTE,
    NOT_FOUND,
    assert_same,
    expect_fields,
    new_id,
    now,
    observe_all,
    run_step,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call
from flowstore_core import (
    Capability,
    RunNotFoundError,
    RunStatus,
    StepNotFoundError,
    StepStatus,
)

_MOMENT = datetime(2026, 3, 14, tzinfo=UTC)

# An operation and its arguments beside run_id.
_WRITES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("record_step_start", {"step_key": "a", "step_type": "http"}),
    ("record_step_start", {"step_key": "a", "step_type": "http", "owner": "me"}),
    ("record_step_complete", {"step_key": "a", "status": StepStatus.FAILED}),
    ("record_step_complete", {"step_key": "a", "status": StepStatus.FAILED, "attempt": 1}),
    ("record_skipped_step", {"step_key": "a", "step_type": "http"}),
    ("record_skipped_step", {"step_key": "a", "step_type": "http", "owner": "me"}),
    ("complete_run", {"status": RunStatus.SUCCEEDED}),
    ("complete_run", {"status": RunStatus.SUCCEEDED, "expected": {}}),
    ("retry_step", {"step_key": "a"}),
    ("retry_step", {"step_key": "a", "attempt": 1, "reset": ["b"]}),
    ("try_record_dispatch", {"step_key": "a"}),
    ("try_claim_step", {"step_key": "a"}),
    ("try_claim_step", {"step_key": "a", "owner": "me"}),
    ("try_start_step", {"step_key": "a", "step_type": "http", "owner": "me", "lease": MINUTE}),
    ("register_waiter", {"step_key": "a", "signal_name": "go"}),
    ("reschedule_step", {"step_key": "a", "attempt": 1}),
    ("advance_run", {"step_key": "a", "status": StepStatus.FAILED, "attempt": 1}),
    ("advance_run", {"step_key": "a", "status": StepStatus.FAILED, "attempt": 1, "owner": "me"}),
    ("append_event", {"event_type": "event"}),
    ("save_output", {"key": "a", "value_json": "1"}),
    ("set_tags", {"tags": {"env": "test"}}),
    ("set_tags", {"tags": {}}),
    ("save_outputs", {"outputs": {"a": "1"}}),
    ("save_outputs", {"outputs": {}}),
)
_READS: tuple[tuple[str, dict[str, Any], Any], ...] = (
    ("get_run", {}, None),
    ("get_run_detail", {}, None),
    ("get_step", {"step_key": "a"}, None),
    ("get_run_status", {}, None),
    ("get_run_control", {}, None),
    ("get_waiter", {"step_key": "a"}, None),
    ("get_output", {"key": "a"}, None),
    ("get_outputs", {}, {}),
    ("get_outputs", {"prefix": "a", "after": "a", "take": 1}, {}),
    ("get_step_statuses", {}, {}),
    ("get_claimed_step_keys", {}, frozenset()),
    ("get_dispatched_step_keys", {}, frozenset()),
    ("get_step_claims", {}, ()),
    ("get_dispatches", {}, ()),
    ("get_waiters", {}, ()),
    ("get_buffered_signals", {}, ()),
    ("get_run_events", {}, ()),
)
_NO_OPS: tuple[tuple[str, dict[str, Any], Any], ...] = (
    ("release_step_claim", {"step_key": "a"}, None),
    ("release_step_claim", {"step_key": "a", "owner": "me"}, None),
    ("release_dispatch", {"step_key": "a"}, None),
    ("annotate_dispatch", {"step_key": "a", "job_id": "job"}, None),
    ("remove_waiter", {"step_key": "a"}, None),
    ("delete_outputs", {"prefix": ""}, 0),
    ("expire_waiter", {"step_key": "a"}, None),
    ("deliver_signal", {"signal_name": "go", "payload_json": "{}"}, NOT_FOUND),
    ("deliver_signal", {"signal_name": "go", "payload_json": "{}", "delivery_id": "id"}, NOT_FOUND),
    ("deliver_signal", {"signal_name": "go", "payload_json": "{}", "buffer": True}, NOT_FOUND),
    ("request_cancel", {"reason": "enough"}, False),
    ("mark_timed_out", {}, False),
    ("mark_timed_out", {"as_of": _MOMENT}, False),
    ("renew_step_claim", {"step_key": "a", "owner": "me", "lease": MINUTE}, False),
    ("extend_deadline", {"timeout_at": _MOMENT}, False),
    ("delete_run", {}, False),
    ("redispatch_step", {"step_key": "a"}, False),
    ("redispatch_step", {"step_key": "a", "queue": "mail", "priority": 1, "due_at": _MOMENT}, False),
)


def _is_supported(context: CheckContext, operation: str, arguments: dict[str, Any]) -> bool:
    return Call(method=operation, arguments=arguments).is_offered(context.capabilities)


@example("UNK")
async def writing_to_an_unknown_run_raises(context: CheckContext) -> None:
    """Every operation that writes run state raises RunNotFoundError and changes nothing."""
    other, unknown = await start(context), new_id(context)
    await run_step(context, other, "a", StepStatus.FAILED)
    before = await observe_all(context, unknown, other)
    for operation, arguments in _WRITES:
        if _is_supported(context, operation, arguments):
            call = getattr(context.store, operation)(run_id=unknown, **arguments)
            error = await context.expect_error(call, RunNotFoundError, f"{operation} on an unknown run")
            expect_fields(context, error, f"the error of {operation} names the run", run_id=unknown)
    after = await observe_all(context, unknown, other)
    assert_same(context, after, before, "writing to an unknown run changes nothing")


@example("UNK")
async def reading_an_unknown_run_is_empty(context: CheckContext) -> None:
    """Reads return None or empty, releases are no-ops, latches and renewals return False; nothing changes."""
    store = context.store
    other, unknown = await start(context), new_id(context)
    # Another run has the same keys and names.
    await run_step(context, other, "a", StepStatus.FAILED)
    await store.register_waiter(other, "a", "go")
    before = await observe_all(context, unknown, other)
    for operation, arguments, wanted in (*_READS, *_NO_OPS):
        if _is_supported(context, operation, arguments):
            result = await getattr(store, operation)(run_id=unknown, **arguments)
            context.expect(result, wanted, f"{operation} of an unknown run")
    context.expect(await store.get_derived_runs(unknown), (), "get_derived_runs of an unknown run")
    context.expect(await store.get_runs(new_id(context)), (), "get_runs of an unknown flow")
    after = await observe_all(context, unknown, other)
    assert_same(context, after, before, "reading an unknown run changes nothing")


@example("UNK")
async def a_control_record_and_a_key_make_no_run(context: CheckContext) -> None:
    """A run that was configured and registered but never started is unknown."""
    store, run_id, flow_id = context.store, new_id(context), new_id(context)
    await store.configure_run(run_id, flow_id, "manual", timeout_at=now(context))
    await store.try_register_idempotency_key(flow_id, "manual", "key", run_id)
    for operation, arguments in _WRITES:
        if _is_supported(context, operation, arguments):
            call = getattr(store, operation)(run_id=run_id, **arguments)
            await context.expect_error(call, RunNotFoundError, f"{operation} on a run that never started")
    context.expect(await store.get_run_status(run_id), None, "the run of a lone control record")
    context.expect(await store.get_runs(flow_id), (), "the runs of the flow of a lone control record")
    if Capability.DEADLINES in context.capabilities:
        to_stop = [run.run_id for run in await store.get_runs_to_stop() if run.run_id == run_id]
        context.expect(to_stop, [], "get_runs_to_stop with a run that never started")


@example("UNK")
async def a_step_that_never_started_is_not_found(context: CheckContext) -> None:
    """Completing, retrying, rescheduling and advancing an unstarted key raise StepNotFoundError."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "other", StepStatus.FAILED)
    await store.try_record_dispatch(run_id, "dispatched")
    await store.try_claim_step(run_id, "claimed", owner="me")
    await store.register_waiter(run_id, "waiting", "go")
    before = await observe_all(context, run_id)
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("record_step_complete", {"status": StepStatus.FAILED}),
        ("record_step_complete", {"status": StepStatus.FAILED, "attempt": 1}),
        ("retry_step", {}),
        ("retry_step", {"attempt": 1, "reset": ["other"]}),
        ("reschedule_step", {"attempt": 1}),
        ("advance_run", {"status": StepStatus.FAILED, "attempt": 1}),
    )
    for key in ("unknown", "dispatched", "claimed", "waiting"):
        for operation, arguments in calls:
            if _is_supported(context, operation, arguments):
                sentence = f"{operation} on a key that never started ({key})"
                call = getattr(store, operation)(run_id=run_id, step_key=key, **arguments)
                error = await context.expect_error(call, StepNotFoundError, sentence)
                expect_fields(context, error, f"the error of {sentence}", run_id=run_id, step_key=key)
    assert_same(context, await observe_all(context, run_id), before, "a StepNotFoundError changes nothing")
