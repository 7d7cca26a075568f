"""Strategies that draw the arguments of every operation from small domains.

The draws depend on the model's state, so that most calls have an effect: they complete open attempts, release
held claims, and use timestamps at the edges of leases, deadlines, days and hours. The source of choices is
Hypothesis or a seeded random generator.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from flowstore_conformance.archives import new_archive, under_another_id, with_known_owners
from flowstore_conformance.history import Call
from flowstore_conformance.model.state import Run, Step
from flowstore_conformance.strategies import (
    ENDINGS,
    FINAL_OUTCOMES,
    IDEMPOTENCY_KEYS,
    LEASES,
    OUTCOMES,
    PRIORITIES,
    QUEUES,
    SEARCHES,
    SIGNALS,
    SPANS,
    TAG_KEYS,
    TAG_VALUES,
    TICK,
    CallStrategy,
    ChoiceSource,
    Universe,
)
from flowstore_core import Capability, EndedStep, StepRequest
from flowstore_core.operations import OPERATIONS
from flowstore_core.tags import MAX_TAGS

Arguments = dict[str, Any]


def _start_run(d: CallStrategy) -> Arguments:
    return {
        "flow_id": d.flow(),
        "flow_name": d.one_of("Flow", "flow_x"),
        "run_id": d.run(lambda run: run.record is None),
        "trigger_key": d.one_of("t", "T"),
        "trigger_data": d.text(),
        "job_id": d.one_of(None, "J1"),
        "source_run_id": d.sampled_from((None, *d.universe.runs)),
        **d.tags(),
    }


def _trigger_run(d: CallStrategy) -> Arguments:
    key = d.sampled_from((*IDEMPOTENCY_KEYS, None))
    drawn = {**_start_run(d), "idempotency_key": key, "timeout_at": d.maybe_timestamp()}
    return {**drawn, **_dispatch(d.requests(after=False))}


def _dispatch(requests: tuple[StepRequest, ...]) -> Arguments:
    return {"dispatch": requests} if requests else {}


def _complete_run(d: CallStrategy) -> Arguments:
    run_id = d.run(lambda run: run.record is not None and not run.record.status.is_terminal)
    drawn: Arguments = {"run_id": run_id, "status": d.sampled_from(ENDINGS)}
    if d.one_of(True, False):
        expected = {key: status.value for key, status in d.universe.model.get_step_statuses(run_id).items()}
        omits_a_step = d.one_of(False, False, True)
        if expected and omits_a_step:
            del expected[d.sampled_from(sorted(expected))]
        drawn["expected"] = expected
    return drawn


def _record_step_start(d: CallStrategy) -> Arguments:
    finished = ("Succeeded", "Skipped")
    run_id, key, step = d.step(lambda step: step.status not in finished, running=True)
    is_held = step.claim is not None and step.claim.owner is not None and step.held(d.now)
    return {
        "run_id": run_id,
        "step_key": key,
        "step_type": d.one_of("http", "other"),
        "input_json": d.text(),
        "job_id": d.one_of(None, "J2"),
        "owner": d.owner(step) if is_held or d.one_of(False, False, True) else None,
    }


def _record_step_complete(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.is_open)
    if not step.is_open and step.attempts and d.one_of(True, False):
        last = step.attempts[-1]
        outcome = {"output_json": last.output_json, "error_message": last.error_message}
        # The recorded outcome again, unchanged: a no-op if the attempt is still the last.
        status = last.status.value if last.status.value in OUTCOMES else "Succeeded"
        same = {"run_id": run_id, "step_key": key, "status": status, **outcome, "attempt": last.attempt}
        return {**same, "owner": d.starter(step)}
    return {
        "run_id": run_id,
        "step_key": key,
        "status": d.sampled_from(OUTCOMES),
        "output_json": d.text(),
        "error_message": d.text(),
        "attempt": d.attempt(step),
        "owner": d.starter(step),
    }


def _record_skipped_step(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: not step.is_terminal)
    return {
        "run_id": run_id,
        "step_key": key,
        "step_type": d.one_of("http", "other"),
        "reason": d.text(),
        "owner": d.owner(step),
    }


def _retry_step(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.status is not None)
    steps = d.universe.model.get(run_id).steps
    reset = [each for each in d.universe.keys if steps.get(each, Step()).status == "Skipped"]
    if d.one_of(False, False, True):
        reset = [each for each in d.universe.keys if d.one_of(True, False)]
    drawn = {"run_id": run_id, "step_key": key, "attempt": d.attempt(step), "reset": reset}
    return {**drawn, **_dispatch(d.requests())}


def _reschedule_step(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.is_open or (step.attempts and step.status == "Pending"))
    fails = d.has(Capability.QUEUES) and d.one_of(False, True)
    return {
        "run_id": run_id,
        "step_key": key,
        "attempt": d.attempt(step) or 1,
        "output_json": d.text(),
        "due_at": d.maybe_timestamp(),
        "owner": d.starter(step),
        **({"error_message": d.one_of("x%_", "")} if fails else {}),
    }


def _try_claim_step(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: not step.is_terminal and step.claim is None, running=True)
    owner = d.owner(step)
    return {"run_id": run_id, "step_key": key, "owner": owner, **d.lease(owner)}


def _try_start_step(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(
        lambda step: not step.is_terminal and (step.claim is None or step.is_open), running=True
    )
    return {
        "run_id": run_id,
        "step_key": key,
        "step_type": d.one_of("http", "other"),
        "owner": d.owner(step) or "one",
        "lease": d.sampled_from(LEASES),
        "input_json": d.text(),
        "job_id": d.one_of(None, "J2"),
    }


def _release_step_claim(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.claim is not None)
    return {"run_id": run_id, "step_key": key, "owner": d.owner(step)}


def _renew_step_claim(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.claim and step.claim.expires_at and step.held(d.now))
    return {
        "run_id": run_id,
        "step_key": key,
        "owner": d.owner(step) or "one",
        "lease": d.sampled_from(LEASES),
    }


def _renew_step_claims(d: CallStrategy) -> Arguments:
    drawn = [_renew_step_claim(d) for _ in range(d.one_of(2, 1, 0, 3))]
    claims = [(one["run_id"], one["step_key"], one["owner"]) for one in drawn]
    return {"claims": claims, "lease": d.sampled_from(LEASES)}


def _try_record_dispatch(d: CallStrategy) -> Arguments:
    run_id, key, _ = d.step(lambda step: not step.is_terminal and step.dispatch is None, running=True)
    drawn = {"run_id": run_id, "step_key": key, "due_at": d.maybe_timestamp()}
    if not d.has(Capability.QUEUES) or d.one_of(False, False, True):
        return drawn
    queued = {"queue": d.sampled_from(QUEUES), "priority": d.sampled_from(PRIORITIES)}
    return {**drawn, **queued, "step_type": d.one_of("http", "other"), "input_json": d.text()}


def _dispatched(d: CallStrategy) -> Arguments:
    run_id, key, _ = d.step(lambda step: step.dispatch is not None)
    return {"run_id": run_id, "step_key": key}


def _claim_next_steps(d: CallStrategy) -> Arguments:
    return {
        "queues": d.queues(),
        "lease": d.sampled_from(LEASES),
        "limit": d.one_of(1, 2, 1000),
        "worker": d.one_of(None, "W"),
    }


def _advance_run(d: CallStrategy) -> Arguments:
    run_id, key, step = d.step(lambda step: step.is_open)
    outcome = {"output_json": d.text(), "error_message": d.text()}
    status = d.sampled_from(FINAL_OUTCOMES)
    if not step.is_open and step.attempts and step.attempts[-1].status in FINAL_OUTCOMES and d.often():
        last = step.attempts[-1]
        # The recorded outcome again: only the requests are settled.
        status = last.status.value
        outcome = {"output_json": last.output_json, "error_message": last.error_message}
    return {
        "run_id": run_id,
        "step_key": key,
        "status": status,
        "attempt": d.attempt(step) or 1,
        "owner": d.owner(step) if step.claim is not None and d.one_of(True, False) else None,
        **outcome,
        **_dispatch(d.requests(key)),
        "complete_as": d.one_of(None, "Succeeded", "Cancelled"),
        "failed_as": d.one_of("Failed", None, "Cancelled"),
    }


def _advance_runs(d: CallStrategy) -> Arguments:
    return {"steps": [EndedStep(**_advance_run(d)) for _ in range(d.one_of(2, 1, 0, 3))]}


def _redispatch_step(d: CallStrategy) -> Arguments:
    run_id, key, _ = d.step(lambda step: step.dispatch and step.dispatch.queue, running=True)
    return {
        "run_id": run_id,
        "step_key": key,
        "queue": d.sampled_from((None, *QUEUES)),
        "priority": d.sampled_from((None, *PRIORITIES)),
        "due_at": d.maybe_timestamp(),
    }


def _configure_run(d: CallStrategy) -> Arguments:
    key = d.sampled_from((None, *IDEMPOTENCY_KEYS))
    of = {"run_id": d.run(), "flow_id": d.flow(), "trigger_key": d.one_of("t", "T")}
    return {**of, "idempotency_key": key, "timeout_at": d.maybe_timestamp()}


def _scope(d: CallStrategy) -> Arguments:
    return {
        "flow_id": d.flow(),
        "trigger_key": d.one_of("t", "T"),
        "idempotency_key": d.sampled_from(IDEMPOTENCY_KEYS),
    }


def _register_waiter(d: CallStrategy) -> Arguments:
    run_id, key, _ = d.step()
    return {
        "run_id": run_id,
        "step_key": key,
        "signal_name": d.sampled_from(SIGNALS),
        "expires_at": d.maybe_timestamp(),
    }


def _deliver_signal(d: CallStrategy) -> Arguments:
    buffers = d.has(Capability.MAILBOX) and d.one_of(False, True)
    run_id = d.run(lambda run: run.record is not None if buffers else run.waiters)
    return {
        "run_id": run_id,
        "signal_name": d.sampled_from(SIGNALS),
        "payload_json": d.one_of("{}", ""),
        "delivery_id": d.one_of(None, "d", "D"),
        **({"buffer": True} if buffers else {}),
    }


def _started(d: CallStrategy) -> Arguments:
    run_id, key, _ = d.step(lambda step: step.status is not None)
    return {"run_id": run_id, "step_key": key}


def _waiting(d: CallStrategy) -> Arguments:
    run_id, key = d.waiting()
    return {"run_id": run_id, "step_key": key}


def _get_outputs(d: CallStrategy) -> Arguments:
    return {
        "run_id": d.run(lambda run: run.outputs),
        "prefix": d.output_prefix(),
        "after": d.one_of(None, d.output_key()),
        "take": d.one_of(None, 1, 2, 0),
    }


def _get_runs_page(d: CallStrategy) -> Arguments:
    return {
        "flow_id": d.sampled_from((None, *d.universe.flows)),
        "status": d.one_of(None, "Running", "Failed", "Succeeded"),
        "after": d.position(),
        "skip": d.one_of(0, 1, 2),
        "take": d.one_of(50, 0, 1, 2),
        "search": d.sampled_from(SEARCHES),
        **d.tags(2),
    }


def _set_tags(d: CallStrategy) -> Arguments:
    changes = {key: d.sampled_from((*TAG_VALUES, None)) for key in TAG_KEYS if d.one_of(True, False)}
    reaches_limit = d.one_of(False, False, False, True)
    if reaches_limit:
        # With any tag that the run has already, these are too many.
        changes = {f"n{number}": "v" for number in range(d.one_of(MAX_TAGS, MAX_TAGS - 1))}
    return {"run_id": d.run(), "tags": changes}


def _get_run_timeseries(d: CallStrategy) -> Arguments:
    since = d.timestamp() - d.one_of(timedelta(0), timedelta(hours=5), timedelta(days=2))
    length = d.one_of(timedelta(0), TICK, timedelta(hours=1), timedelta(hours=7), timedelta(days=3))
    of = {"granularity": d.one_of("hour", "day"), "flow_id": d.sampled_from((None, *d.universe.flows))}
    return {**of, "since": since, "until": since + length}


def _as_of(d: CallStrategy) -> Arguments:
    return {"as_of": d.maybe_timestamp(), "take": d.one_of(100, 2, 1)}


def _cleanup(d: CallStrategy) -> Arguments:
    records = [d.universe.model.get(run_id).record for run_id in d.universe.runs]
    ends = [
        record.completed_at for record in records if record is not None and record.completed_at is not None
    ]
    if ends and d.often():
        return {"cutoff": d.sampled_from(ends) + d.one_of(timedelta(0), TICK, -TICK)}
    return {"cutoff": d.timestamp()}


def _import_run(d: CallStrategy) -> Arguments:
    """Mostly the archive of a stored run, under an id that is free."""
    archive = d.universe.model.export_run(d.run())
    if archive is None:
        archive = new_archive(d.sampled_from(d.universe.runs), d.flow(), d.now)
    archive = with_known_owners(archive, "one")
    target = d.run(lambda run: run.record is None)
    if d.often():
        archive = under_another_id(archive, target)
    if d.one_of(True, False):
        # Most keys are registered to the exported run.
        archive = replace(archive, idempotency_keys=())
    return {"archive": archive}


def _is_ended(run: Run) -> bool:
    return run.record is not None and run.record.status.is_terminal


def _of_run(d: CallStrategy) -> Arguments:
    return {"run_id": d.run()}


@dataclass(frozen=True, slots=True)
class OperationStrategy:
    """How often an operation is called, relative to the others, and how its arguments are drawn."""

    weight: int
    draw: Callable[[CallStrategy], Arguments]


STRATEGIES: Mapping[str, OperationStrategy] = {
    "start_run": OperationStrategy(2, _start_run),
    "record_step_start": OperationStrategy(8, _record_step_start),
    "record_step_complete": OperationStrategy(6, _record_step_complete),
    "try_claim_step": OperationStrategy(4, _try_claim_step),
    "try_record_dispatch": OperationStrategy(3, _try_record_dispatch),
    "retry_step": OperationStrategy(3, _retry_step),
    "record_skipped_step": OperationStrategy(3, _record_skipped_step),
    "complete_run": OperationStrategy(2, _complete_run),
    "reschedule_step": OperationStrategy(3, _reschedule_step),
    "release_step_claim": OperationStrategy(2, _release_step_claim),
    "try_start_step": OperationStrategy(3, _try_start_step),
    "renew_step_claim": OperationStrategy(2, _renew_step_claim),
    "renew_step_claims": OperationStrategy(1, _renew_step_claims),
    "annotate_dispatch": OperationStrategy(1, lambda d: {**_dispatched(d), "job_id": d.one_of("J3", "J4")}),
    "release_dispatch": OperationStrategy(1, _dispatched),
    "claim_next_steps": OperationStrategy(4, _claim_next_steps),
    "advance_run": OperationStrategy(6, _advance_run),
    "advance_runs": OperationStrategy(2, _advance_runs),
    "redispatch_step": OperationStrategy(2, _redispatch_step),
    "get_queues": OperationStrategy(2, lambda d: {}),
    "trigger_run": OperationStrategy(2, _trigger_run),
    "configure_run": OperationStrategy(1, _configure_run),
    "request_cancel": OperationStrategy(1, lambda d: {**_of_run(d), "reason": d.text()}),
    "mark_timed_out": OperationStrategy(
        1, lambda d: {**_of_run(d), "reason": d.text(), "as_of": d.maybe_timestamp()}
    ),
    "extend_deadline": OperationStrategy(1, lambda d: {**_of_run(d), "timeout_at": d.timestamp()}),
    "try_register_idempotency_key": OperationStrategy(1, lambda d: {**_scope(d), "run_id": d.run()}),
    "find_run_id_by_idempotency_key": OperationStrategy(1, _scope),
    "register_waiter": OperationStrategy(3, _register_waiter),
    "deliver_signal": OperationStrategy(3, _deliver_signal),
    "get_waiter": OperationStrategy(1, _waiting),
    "remove_waiter": OperationStrategy(1, _waiting),
    "expire_waiter": OperationStrategy(1, _waiting),
    "get_waiters": OperationStrategy(1, _of_run),
    "get_buffered_signals": OperationStrategy(1, _of_run),
    "append_event": OperationStrategy(
        1,
        lambda d: {
            **_of_run(d),
            "event_type": d.one_of("e", "E"),
            "step_key": d.sampled_from((None, *d.universe.keys)),
            "message": d.text(),
        },
    ),
    "get_run_events": OperationStrategy(
        1, lambda d: {**_of_run(d), "after": d.one_of(0, 1, 2), "take": d.one_of(200, 1)}
    ),
    "save_output": OperationStrategy(
        1,
        lambda d: {**_of_run(d), "key": d.output_key(), "value_json": d.one_of("1", "")},
    ),
    "save_outputs": OperationStrategy(
        1,
        lambda d: {
            **_of_run(d),
            "outputs": {d.output_key(): d.one_of("1", "") for _ in range(d.one_of(2, 0, 1))},
        },
    ),
    "get_output": OperationStrategy(1, lambda d: {**_of_run(d), "key": d.output_key()}),
    "get_outputs": OperationStrategy(1, _get_outputs),
    "delete_outputs": OperationStrategy(
        1, lambda d: {"run_id": d.run(lambda run: run.outputs), "prefix": d.output_prefix()}
    ),
    "get_run": OperationStrategy(1, _of_run),
    "get_run_detail": OperationStrategy(1, _of_run),
    "get_run_status": OperationStrategy(1, _of_run),
    "set_tags": OperationStrategy(2, _set_tags),
    "get_run_control": OperationStrategy(1, _of_run),
    "get_run_controls": OperationStrategy(
        1, lambda d: {"run_ids": [d.run() for _ in range(d.one_of(2, 1, 0))]}
    ),
    "get_step": OperationStrategy(2, _started),
    "get_step_statuses": OperationStrategy(1, _of_run),
    "get_claimed_step_keys": OperationStrategy(1, _of_run),
    "get_step_claims": OperationStrategy(1, _of_run),
    "get_dispatched_step_keys": OperationStrategy(1, _of_run),
    "get_dispatches": OperationStrategy(1, _of_run),
    "get_runs": OperationStrategy(
        1,
        lambda d: {
            "flow_id": d.sampled_from((None, *d.universe.flows)),
            "after": d.position(),
            "skip": d.one_of(0, 1, 2),
            "take": d.one_of(50, 2, 0),
            **d.tags(2),
        },
    ),
    "get_active_runs": OperationStrategy(1, lambda d: {"take": d.one_of(None, 1, 0)}),
    "get_derived_runs": OperationStrategy(
        1, lambda d: {"source_run_id": d.sampled_from(d.universe.runs), "take": d.one_of(None, 1)}
    ),
    "get_runs_page": OperationStrategy(2, _get_runs_page),
    "get_statistics": OperationStrategy(1, lambda d: {"as_of": d.maybe_timestamp()}),
    "get_run_timeseries": OperationStrategy(1, _get_run_timeseries),
    "get_stalled_steps": OperationStrategy(2, _as_of),
    "get_runs_to_stop": OperationStrategy(1, _as_of),
    "export_run": OperationStrategy(2, _of_run),
    "import_run": OperationStrategy(3, _import_run),
    "cleanup": OperationStrategy(2, _cleanup),
    "delete_run": OperationStrategy(1, lambda d: {"run_id": d.run(_is_ended)}),
}
"""The strategies of all operations except ping and aclose, by name."""


def available_strategies(capabilities: Collection[Capability]) -> dict[str, OperationStrategy]:
    """The strategies of the operations that a store with these capabilities has."""
    return {name: one for name, one in STRATEGIES.items() if OPERATIONS[name].is_offered(capabilities)}


def draw_call(chooser: ChoiceSource, universe: Universe, method: str) -> Call:
    """Draw one call of a method. Does not change the model's state."""
    return Call(method=method, arguments=STRATEGIES[method].draw(CallStrategy(chooser, universe)))


def draw_clock_advance(chooser: ChoiceSource, universe: Universe) -> timedelta:
    """Draw a clock advance: a short one, or one to an edge of the state or one tick after it."""
    draw = CallStrategy(chooser, universe)
    now = universe.model.now
    hour = now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
    midnight = hour.replace(hour=0) + timedelta(days=1)
    edges = [edge for edge in (*universe.edges(), hour, midnight) if edge > now]
    if draw.one_of(False, False, True):
        return draw.sampled_from([edge - now for edge in edges]) + draw.one_of(timedelta(0), TICK)
    return draw.one_of(TICK, TICK, timedelta(seconds=1), timedelta(seconds=1), *SPANS[1:])
