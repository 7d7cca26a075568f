"""Scenarios of one run for every writing operation, in which the write changes as much as possible."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import with_known_owners
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call
from flowstore_conformance.model import Model
from flowstore_conformance.state_probe import probe_calls
from flowstore_core import Capability, StepRequest, StepStatus

LONG_AGO = datetime(2001, 2, 3, 4, 5, 6, 789, UTC)
LATER = datetime(2099, 1, 1, tzinfo=UTC)
LEASE = timedelta(hours=1)
TAGS = {"env": "test", "team": "ops"}
"""The tags of a run in the scenarios that have some."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Setup calls on one run, and the write to cancel after them."""

    run_id: UUID
    setup: tuple[Call, ...]
    call: Call
    must_compensate: bool
    """Whether a cancelled call must leave no effect: ownerless claims and dispatches (CON-4)."""
    compensation: tuple[Call, ...] = ()
    """The calls whose effect a compensation has, if it leaves more than no effect (QUE-3)."""
    probes: tuple[Call, ...]


ScenarioFactory = Callable[[UUID, UUID], tuple[list[Call], Call]]


def _run(run_id: UUID, flow_id: UUID) -> Call:
    arguments = {"flow_id": flow_id, "flow_name": "orders", "run_id": run_id, "trigger_key": "manual"}
    return Call(method="start_run", arguments=arguments)


def _on(run_id: UUID, method: str, *names: str, **arguments: object) -> Call:
    """A call on a run; the optional positional name is the step key."""
    keys = {"step_key": names[0]} if names else {}
    return Call(method=method, arguments={"run_id": run_id, **keys, **arguments})


def _queue_of(run_id: UUID) -> str:
    """A queue that only this run uses, so that claim_next_steps acts on it alone."""
    return f"queue/{run_id.hex}"


def _request(run_id: UUID, step_key: str, **given: Any) -> StepRequest:
    return StepRequest(step_key=step_key, step_type="http", queue=_queue_of(run_id), **given)


def _scenarios() -> dict[str, ScenarioFactory]:
    """The scenarios by name; each function takes a run id and a flow id."""

    def start_run(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [], _run(run, flow)

    def trigger_run(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        arguments = {**_run(run, flow).arguments, "idempotency_key": "K", "timeout_at": LONG_AGO}
        return [], Call(method="trigger_run", arguments=arguments)

    def trigger_registered(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        key = {"flow_id": flow, "trigger_key": "manual", "idempotency_key": "K", "run_id": run}
        return [Call(method="try_register_idempotency_key", arguments=key)], trigger_run(run, flow)[1]

    def register_key(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [], trigger_registered(run, flow)[0][0]

    def start_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "try_claim_step", "a", owner="o")]
        return setup, _on(run, "record_step_start", "a", step_type="http", input_json="{ }", owner="o")

    def start_again(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "record_step_start", "a", step_type="http")]
        setup.append(_on(run, "record_step_complete", "a", status="Failed", error_message="no"))
        return setup, _on(run, "record_step_start", "a", step_type="http")

    def complete_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, start = start_again(run, flow)
        return [*setup, start], _on(run, "record_step_complete", "a", status="Succeeded", output_json="[1]")

    def skip_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        skip = _on(run, "record_skipped_step", "a", step_type="http", reason="not needed", owner="o")
        return start_again(run, flow)[0][:1], skip

    def retry_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        configure = {"flow_id": flow, "trigger_key": "manual", "timeout_at": LONG_AGO}
        setup = [
            _run(run, flow),
            _on(run, "try_record_dispatch", "a"),
            _on(run, "try_claim_step", "a", owner="o"),
            _on(run, "record_step_start", "a", step_type="http", owner="o"),
            _on(run, "record_step_complete", "a", status="Failed", error_message="no"),
            _on(run, "register_waiter", "a", signal_name="go"),
            _on(run, "record_skipped_step", "b", step_type="http", reason="upstream failed", owner="p"),
            _on(run, "configure_run", **configure),
            _on(run, "request_cancel", reason="enough"),
            _on(run, "mark_timed_out", reason="late"),
            _on(run, "complete_run", status="Failed"),
        ]
        return setup, _on(run, "retry_step", "a", attempt=1, reset=["b"])

    def reschedule_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = retry_step(run, flow)[0][:4]
        return setup, _on(run, "reschedule_step", "a", attempt=1, output_json="{}", due_at=LONG_AGO)

    def claim_step(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "try_claim_step", "a", owner="o")

    def claim_leased(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "try_claim_step", "a", owner="o", lease=LEASE)

    def claim_without_owner(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "try_claim_step", "a")

    def claim_queued(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        queue = _queue_of(run)
        setup = [
            _run(run, flow),
            _on(run, "try_record_dispatch", "a", queue=queue, priority=3, step_type="http", input_json="{ }"),
            _on(run, "try_record_dispatch", "b", queue=queue, step_type="http"),
            _on(run, "request_cancel", reason="enough"),
        ]
        # A repeated call that claimed again would claim "b".
        claim = {"queues": [queue], "lease": LEASE, "limit": 1, "worker": "worker 1"}
        return setup, Call(method="claim_next_steps", arguments=claim)

    def claim_again(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, claim = claim_queued(run, flow)
        # An open attempt without a claim protects nothing.
        return [*setup, _on(run, "record_step_start", "a", step_type="by hand")], claim

    def advance(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [
            _run(run, flow),
            _on(run, "try_record_dispatch", "a", queue=_queue_of(run), step_type="http"),
            _on(run, "try_claim_step", "a", owner="o"),
            _on(run, "record_step_start", "a", step_type="http", owner="o"),
            _on(run, "record_skipped_step", "c", step_type="http", reason="not needed"),
        ]
        ended = {"status": "Succeeded", "attempt": 1, "owner": "o", "output_json": "[1]"}
        requests = (
            _request(
                run, "b", after=("a", "c"), accept=frozenset({StepStatus.SUCCEEDED, StepStatus.SKIPPED})
            ),
            _request(run, "d", after=("a", "c")),
            _request(run, "e", after=("d",), accept=frozenset({StepStatus.SKIPPED})),
        )
        return setup, _on(run, "advance_run", "a", **ended, dispatch=requests, complete_as="Succeeded")

    def advance_to_the_end(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, last = advance(run, flow)
        requests = (_request(run, "d", after=("a", "c")),)
        return setup, Call(method="advance_run", arguments={**last.arguments, "dispatch": requests})

    def dispatch_to_queue(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        queued = {"queue": _queue_of(run), "priority": 9, "step_type": "http", "input_json": "{ }"}
        return [_run(run, flow)], _on(run, "try_record_dispatch", "a", due_at=LONG_AGO, **queued)

    def redispatch(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, dispatch = dispatch_to_queue(run, flow)
        annotate = _on(run, "annotate_dispatch", "a", job_id="job 1")
        more = {"queue": f"{_queue_of(run)} later", "priority": 0, "due_at": LATER}
        return [*setup, dispatch, annotate], _on(run, "redispatch_step", "a", **more)

    def fail_and_reschedule(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = advance(run, flow)[0][:4]
        failed = {"attempt": 1, "error_message": "no", "due_at": LATER}
        return setup, _on(run, "reschedule_step", "a", **failed)

    def retry_and_dispatch(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, retry = retry_step(run, flow)
        requests = (_request(run, "a"), _request(run, "b", after=("a",)), _request(run, "c", priority=2))
        return setup, Call(method=retry.method, arguments={**retry.arguments, "dispatch": requests})

    def trigger_and_dispatch(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, trigger = trigger_run(run, flow)
        requests = (_request(run, "a"), _request(run, "b", due_at=LATER))
        return setup, Call(method=trigger.method, arguments={**trigger.arguments, "dispatch": requests})

    def trigger_without_key(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, trigger = trigger_and_dispatch(run, flow)
        return setup, Call(method=trigger.method, arguments={**trigger.arguments, "idempotency_key": None})

    def claim_dispatched(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [
            _run(run, flow),
            _on(run, "try_record_dispatch", "a", due_at=LONG_AGO),
            _on(run, "annotate_dispatch", "a", job_id="job 1"),
            _on(run, "record_step_start", "a", step_type="http"),
            _on(run, "record_step_complete", "a", status="Pending", output_json="[1]"),
        ]
        return setup, _on(run, "try_claim_step", "a")

    def claim_taken(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, claim = claim_without_owner(run, flow)
        return [*setup, claim], claim

    def claim_and_start(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        start = {"step_type": "http", "owner": "o", "lease": LEASE, "input_json": "{ }", "job_id": "job 1"}
        return [_run(run, flow)], _on(run, "try_start_step", "a", **start)

    def claim_and_start_again(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [
            *dispatch_to_queue(run, flow)[0],
            dispatch_to_queue(run, flow)[1],
            # An open attempt without a claim protects nothing.
            _on(run, "record_step_start", "a", step_type="by hand", input_json="[1]"),
        ]
        return setup, claim_and_start(run, flow)[1]

    def release_claim(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "try_claim_step", "a", owner="o")]
        return setup, _on(run, "release_step_claim", "a", owner="o")

    def renew_claim(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "try_claim_step", "a", owner="o", lease=LEASE)]
        return setup, _on(run, "renew_step_claim", "a", owner="o", lease=3 * LEASE)

    def dispatch(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "try_record_dispatch", "a", due_at=LONG_AGO)

    def dispatch_claimed(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, claim = claim_step(run, flow)
        return [*setup, claim], dispatch(run, flow)[1]

    def dispatch_taken(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, record = dispatch(run, flow)
        return [*setup, record], _on(run, "try_record_dispatch", "a")

    def annotate(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "try_record_dispatch", "a")]
        return setup, _on(run, "annotate_dispatch", "a", job_id="job 1")

    def release_dispatch(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return annotate(run, flow)[0], _on(run, "release_dispatch", "a")

    def complete_run(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "record_skipped_step", "a", step_type="http")]
        return setup, _on(run, "complete_run", status="Succeeded", expected={"a": "Skipped"})

    def configure(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        first = {"flow_id": flow, "trigger_key": "manual", "idempotency_key": "K"}
        second = {"flow_id": flow, "trigger_key": "cron", "timeout_at": LONG_AGO}
        return [_on(run, "configure_run", **first)], _on(run, "configure_run", **second)

    def cancel(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "request_cancel", reason="enough")

    def time_out(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [_run(run, flow), _on(run, "configure_run", flow_id=flow, trigger_key="manual")]
        return setup, _on(run, "mark_timed_out", reason="late")

    def extend(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, latch = time_out(run, flow)
        return [*setup, latch], _on(run, "extend_deadline", timeout_at=LONG_AGO)

    def register_waiter(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow)], _on(run, "register_waiter", "a", signal_name="go", expires_at=LONG_AGO)

    def deliver(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, register = register_waiter(run, flow)
        more = _on(run, "register_waiter", "b", signal_name="go")
        signal = {"signal_name": "go", "payload_json": "{ }", "delivery_id": "d"}
        return [*setup, register, more], _on(run, "deliver_signal", **signal)

    def buffer_signal(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, signal = deliver(run, flow)
        early = {"signal_name": "go", "payload_json": "{ }", "buffer": True}
        closed = [_on(run, "expire_waiter", "a"), signal]
        return [*setup, *closed], _on(run, "deliver_signal", **early, delivery_id="e")

    def take_buffered(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        early = [
            _on(run, "deliver_signal", signal_name=name, payload_json=payload, buffer=True)
            for name, payload in (("other", "0"), ("go", "1"), ("go", "2"))
        ]
        setup, register = register_waiter(run, flow)
        return [*setup, *early], register

    def take_under_another_name(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, register = take_buffered(run, flow)
        waits = _on(run, "register_waiter", "a", signal_name="stop")
        queued = _on(run, "try_record_dispatch", "a", queue=_queue_of(run), step_type="http")
        return [*setup, waits, queued], register

    def remove_waiter(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, signal = deliver(run, flow)
        return [*setup, signal], _on(run, "remove_waiter", "a")

    def expire_waiter(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, register = register_waiter(run, flow)
        return [*setup, register], _on(run, "expire_waiter", "a")

    def append_event(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        first = _on(run, "append_event", event_type="one")
        return [_run(run, flow), first], _on(run, "append_event", event_type="two", message="m")

    def save_output(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        first = _on(run, "save_output", key="k", value_json="1")
        return [_run(run, flow), first], _on(run, "save_output", key="k", value_json="2")

    def save_outputs(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        first = _on(run, "save_output", key="k", value_json="1")
        return [_run(run, flow), first], _on(run, "save_outputs", outputs={"k": "2", "l": '"\\u0000\\"'})

    def delete_outputs(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        saved = [_on(run, "save_output", key=key, value_json="1") for key in ("k", "k/1", "k/2", "other")]
        return [_run(run, flow), *saved], _on(run, "delete_outputs", prefix="k")

    def delete_run(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [*trigger_registered(run, flow)[0], *retry_step(run, flow)[0]]
        return setup, _on(run, "delete_run")

    def delete_queued(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup = [
            *advance(run, flow)[0],
            _on(run, "try_record_dispatch", "b", queue=_queue_of(run), step_type="http", input_json="{ }"),
            _on(run, "save_output", key="k", value_json="1"),
            _on(run, "append_event", event_type="one"),
            _on(run, "complete_run", status="Cancelled"),
        ]
        return setup, _on(run, "delete_run")

    def import_run(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, retry = retry_and_dispatch(run, flow)
        calls = [
            *trigger_registered(run, flow)[0],
            *setup,
            retry,
            *(_on(run, "try_claim_step", key, owner="o") for key in ("a", "c")),
            *deliver(run, flow)[0][1:],
            deliver(run, flow)[1],
            _on(run, "remove_waiter", "a"),
            *save_output(run, flow)[0][1:],
            *append_event(run, flow)[0][1:],
        ]
        model = Model(lambda: LONG_AGO)
        for call in calls:
            getattr(model, call.method)(**call.arguments)
        archive = model.export_run(run)
        assert archive is not None
        return [], Call(method="import_run", arguments={"archive": with_known_owners(archive, "o")})

    def import_over_orphans(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        orphans = [*trigger_registered(run, flow)[0], *configure(run, flow)[0]]
        return orphans, import_run(run, flow)[1]

    def start_tagged(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [], Call(method="start_run", arguments={**_run(run, flow).arguments, "tags": TAGS})

    def trigger_tagged(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, trigger = trigger_registered(run, flow)
        return setup, Call(method="trigger_run", arguments={**trigger.arguments, "tags": TAGS})

    def set_tags(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, start = start_tagged(run, flow)
        changed = {"env": "live", "team": None, "zone": "eu"}
        return [*setup, start], _on(run, "set_tags", tags=changed)

    def tag_first(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        return [_run(run, flow), _on(run, "complete_run", status="Failed")], _on(run, "set_tags", tags=TAGS)

    def delete_tagged(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, start = start_tagged(run, flow)
        return [*setup, start, _on(run, "complete_run", status="Failed")], _on(run, "delete_run")

    def delete_buffered(run: UUID, flow: UUID) -> tuple[list[Call], Call]:
        setup, register = take_buffered(run, flow)
        return [*setup, register, _on(run, "complete_run", status="Failed")], _on(run, "delete_run")

    return {name: factory for name, factory in locals().items() if callable(factory)}


SCENARIOS = _scenarios()


def available(capabilities: Collection[Capability]) -> dict[str, ScenarioFactory]:
    """The scenarios whose calls are all offered with these capabilities."""

    found = {}
    for name, factory in SCENARIOS.items():
        setup, call = factory(UUID(int=1), UUID(int=2))
        if all(one.is_offered(capabilities) for one in (*setup, call)):
            found[name] = factory
    return found


def probes_of(run_id: UUID, flow_id: UUID, capabilities: Collection[Capability]) -> tuple[Call, ...]:
    """Every read that shows state of the run of a scenario; the flow has no other run."""
    keys = [(flow_id, "manual", "K")]
    tags = {"env": "test"}
    tagged = [Call(method="get_runs", arguments={"flow_id": flow_id, "tags": tags})]
    return (
        *probe_calls(run_id, capabilities, step_keys=("a", "b", "c", "d", "e"), keys=keys),
        *(tagged if Capability.TAGS in capabilities else ()),
    )


def new_scenario(context: CheckContext, factory: ScenarioFactory) -> Scenario:
    run_id, flow_id = (UUID(int=context.random.getrandbits(128)) for _ in range(2))
    setup, call = factory(run_id, flow_id)
    ownerless = call.method == "try_claim_step" and call.arguments.get("owner") is None
    compensation = []
    if call.method == "claim_next_steps":
        compensation.append(_on(run_id, "release_step_claim", "a"))
        compensation.append(_on(run_id, "record_step_complete", "a", status="Pending"))
    return Scenario(
        run_id=run_id,
        setup=tuple(setup),
        call=call,
        must_compensate=ownerless or call.method in ("try_record_dispatch", "claim_next_steps"),
        compensation=tuple(compensation),
        probes=probes_of(run_id, flow_id, context.capabilities),
    )
