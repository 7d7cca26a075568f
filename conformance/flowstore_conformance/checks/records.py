"""RUN-3: every result is a snapshot of exactly the contract's types."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import is_dataclass
from datetime import datetime, timedelta
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    advance,
    get_run,
    new_id,
    now,
    observe_all,
    run_step,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call
from flowstore_core import Capability, FlowStore, RunPage, RunStatus, StepStatus
from flowstore_core.redaction import full_repr


async def _start_populated_run(context: CheckContext) -> UUID:
    """Start a run that gives every read something to return."""
    store = context.store
    run_id = await start(context, trigger_data="{}", job_id="job", source_run_id=new_id(context))
    await store.configure_run(run_id, FLOW, "manual", idempotency_key="key", timeout_at=now(context))
    await store.try_register_idempotency_key(FLOW, "manual", "key", run_id)
    for key in ("b", "a", "c"):
        await store.try_record_dispatch(run_id, key, due_at=now(context))
        await store.try_claim_step(run_id, key, owner=key)
        await store.register_waiter(run_id, key, key, expires_at=now(context) + DAY)
    await run_step(context, run_id, "b", StepStatus.FAILED, output_json="{}", error_message="error")
    await store.record_step_start(run_id, "b", "http", input_json="{}", job_id="job", owner="b")
    await run_step(context, run_id, "a")
    await store.deliver_signal(run_id, "a", "{}")
    if Capability.MAILBOX in context.capabilities:
        await store.deliver_signal(run_id, "early", "{}", buffer=True)
    if Capability.OUTPUTS in context.capabilities:
        for key in ("y", "x"):
            await store.save_output(run_id, key, "1")
    if Capability.EVENTS in context.capabilities:
        await store.append_event(run_id, "begun", step_key="a", message="message")
    return run_id


@example("RUN-3")
async def returned_values_never_change(context: CheckContext) -> None:
    """Returned records, collections and mappings stay the same after later writes."""
    store, run_id = context.store, await _start_populated_run(context)
    taken = await observe_all(context, run_id)
    detail, statuses = await get_run(context, run_id), await store.get_step_statuses(run_id)
    outputs = {} if Capability.OUTPUTS not in context.capabilities else await store.get_outputs(run_id)
    shown = full_repr((taken, detail, dict(statuses), dict(outputs)))
    advance(context, HOUR)
    await store.deliver_signal(run_id, "b", "{}")
    await store.register_waiter(run_id, "early", "early")
    await store.request_cancel(run_id)
    await store.release_dispatch(run_id, "a")
    await store.release_step_claim(run_id, "a")
    await store.record_step_complete(run_id, "b", StepStatus.SUCCEEDED, output_json="done")
    await skip_steps(context, run_id, "d")
    if Capability.OUTPUTS in context.capabilities:
        await store.save_output(run_id, "x", "2")
        await store.save_output(run_id, "z", "2")
    if Capability.EVENTS in context.capabilities:
        await store.append_event(run_id, "more")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    still = full_repr((taken, detail, dict(statuses), dict(outputs)))
    context.expect(still, shown, "earlier results after later writes")


@example("RUN-3")
async def results_have_exactly_the_contract_types(context: CheckContext) -> None:
    """Collections are tuples, mappings are read-only and ordered by key, values have the plain types."""
    store, run_id = context.store, await _start_populated_run(context)
    moment = now(context)
    calls: tuple[tuple[str, dict[str, Any]], ...] = (
        ("start_run", {**_START, "run_id": new_id(context)}),
        ("trigger_run", {**_START, "run_id": new_id(context), "idempotency_key": "other"}),
        ("get_runs", {}),
        ("get_runs_page", {"search": "order"}),
        ("get_run", {"run_id": run_id}),
        ("get_run_detail", {"run_id": run_id}),
        ("get_step", {"run_id": run_id, "step_key": "a"}),
        ("get_run_status", {"run_id": run_id}),
        ("get_active_runs", {}),
        ("get_derived_runs", {"source_run_id": run_id}),
        ("get_step_statuses", {"run_id": run_id}),
        ("get_stalled_steps", {"as_of": moment + DAY}),
        ("get_claimed_step_keys", {"run_id": run_id}),
        ("get_step_claims", {"run_id": run_id}),
        ("get_dispatched_step_keys", {"run_id": run_id}),
        ("get_dispatches", {"run_id": run_id}),
        ("get_run_control", {"run_id": run_id}),
        ("get_run_controls", {"run_ids": [run_id]}),
        ("get_runs_to_stop", {"as_of": moment + DAY}),
        ("find_run_id_by_idempotency_key", {**_SCOPE, "idempotency_key": "key"}),
        ("get_waiter", {"run_id": run_id, "step_key": "a"}),
        ("get_waiters", {"run_id": run_id}),
        ("expire_waiter", {"run_id": run_id, "step_key": "b"}),
        ("get_output", {"run_id": run_id, "key": "x"}),
        ("get_outputs", {"run_id": run_id}),
        ("get_outputs", {"run_id": run_id, "prefix": "x", "take": 1}),
        ("save_outputs", {"run_id": run_id, "outputs": {"y": "1"}}),
        ("delete_outputs", {"run_id": run_id, "prefix": "y"}),
        ("get_run_events", {"run_id": run_id}),
        ("append_event", {"run_id": run_id, "event_type": "more"}),
        ("get_statistics", {}),
        ("get_run_timeseries", {"granularity": "hour", "since": moment - DAY, "until": moment + DAY}),
        ("record_step_start", {"run_id": run_id, "step_key": "n", "step_type": "http"}),
        ("record_step_complete", {"run_id": run_id, "step_key": "n", "status": StepStatus.FAILED}),
        ("retry_step", {"run_id": run_id, "step_key": "n"}),
        ("record_skipped_step", {"run_id": run_id, "step_key": "n", "step_type": "http"}),
        ("try_claim_step", {"run_id": run_id, "step_key": "m", "owner": "me"}),
        ("try_claim_step", {"run_id": run_id, "step_key": "m", "owner": "other"}),
        ("renew_step_claim", {"run_id": run_id, "step_key": "m", "owner": "me", "lease": MINUTE}),
        ("renew_step_claims", {"claims": [(run_id, "m", "me")], "lease": MINUTE}),
        ("try_record_dispatch", {"run_id": run_id, "step_key": "m"}),
        ("try_record_dispatch", {"run_id": run_id, "step_key": "m"}),
        ("annotate_dispatch", {"run_id": run_id, "step_key": "m", "job_id": "job"}),
        ("release_step_claim", {"run_id": run_id, "step_key": "m"}),
        ("release_dispatch", {"run_id": run_id, "step_key": "m"}),
        ("try_register_idempotency_key", {**_SCOPE, "idempotency_key": "key", "run_id": run_id}),
        ("try_register_idempotency_key", {**_SCOPE, "idempotency_key": "key", "run_id": new_id(context)}),
        ("configure_run", {"run_id": run_id, "flow_id": FLOW, "trigger_key": "manual"}),
        ("request_cancel", {"run_id": run_id}),
        ("request_cancel", {"run_id": run_id}),
        ("mark_timed_out", {"run_id": run_id}),
        ("mark_timed_out", {"run_id": run_id}),
        ("extend_deadline", {"run_id": run_id, "timeout_at": moment}),
        ("register_waiter", {"run_id": run_id, "step_key": "m", "signal_name": "m"}),
        ("deliver_signal", {"run_id": run_id, "signal_name": "m", "payload_json": "1"}),
        ("get_buffered_signals", {"run_id": run_id}),
        ("deliver_signal", {"run_id": run_id, "signal_name": "m", "payload_json": "1", "buffer": True}),
        ("remove_waiter", {"run_id": run_id, "step_key": "m"}),
        ("complete_run", {"run_id": run_id, "status": RunStatus.FAILED}),
        ("complete_run", {"run_id": run_id, "status": RunStatus.FAILED}),
        ("delete_run", {"run_id": run_id}),
        ("delete_run", {"run_id": run_id}),
        ("cleanup", {"cutoff": moment - DAY}),
    )
    for operation, arguments in calls:
        if Call(method=operation, arguments=arguments).is_offered(context.capabilities):
            answer = await getattr(store, operation)(**arguments)
            wanted = get_type_hints(getattr(FlowStore, operation))["return"]
            wrong = _type_error(answer, wanted)
            context.expect_that(wrong is None, f"the result of {operation} has the contract's types: {wrong}")


_SCOPE = {"flow_id": FLOW, "trigger_key": "manual"}
_START = {**_SCOPE, "flow_name": "orders", "trigger_data": "{}"}


def _type_error(value: Any, wanted: Any, path: str = "the result") -> str | None:
    """Why a value is not exactly of a contract type; None if it is."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is UnionType:
        possible = next(one for one in inner if one is not type(None))
        return None if value is None and type(None) in inner else _type_error(value, possible, path)
    got = f"{path} is {type(value).__module__}.{type(value).__qualname__}"
    if origin is not None and issubclass(origin, Mapping):
        return _mapping_error(value, inner, path, got)
    if origin is not None:
        exact = frozenset if origin is frozenset else tuple
        if type(value) is not exact:
            return f"{got}, expected {exact.__name__}"
        parts = ((_type_error(each, inner[0], f"{path}[{n}]")) for n, each in enumerate(value))
        return next((part for part in parts if part), None)
    if type(value) is not wanted:
        return f"{got}, expected {getattr(wanted, '__name__', wanted)}"
    if isinstance(value, datetime) and value.utcoffset() != timedelta(0):
        return f"{path} is not in UTC: {value!r}"
    if is_dataclass(value) or isinstance(value, RunPage):
        hints = get_type_hints(type(value))
        parts = (_type_error(getattr(value, name), hint, f"{path}.{name}") for name, hint in hints.items())
        return next((part for part in parts if part), None)
    return None


def _mapping_error(value: Any, inner: tuple[Any, ...], path: str, got: str) -> str | None:
    if not isinstance(value, Mapping):
        return f"{got}, expected a mapping"
    if isinstance(value, MutableMapping):
        return f"{got}, expected a read-only mapping"
    if list(value) != sorted(value):
        return f"{path} is not ordered by key: {list(value)}"
    parts = (_type_error(each, inner[1], f"{path}[{key!r}]") for key, each in value.items())
    return next((part for part in parts if part), None)
