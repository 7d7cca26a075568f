"""Races of deliveries, events and outputs."""

from __future__ import annotations

from dataclasses import replace

from flowstore_conformance.history import Call, Returned
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.race_families.family import LEASE, CallMaker, RaceBuilder, RaceFamily, family
from flowstore_conformance.races import Race
from flowstore_core import Capability, SignalDeliveryStatus


def _deliver(d: RaceBuilder) -> CallMaker:
    return lambda client: d.on(
        "deliver_signal",
        signal_name="go",
        payload_json=str(client),
        delivery_id=d.one_of(None, None, f"delivery {client}", "one delivery"),
    )


def _deliveries(d: RaceBuilder) -> Race:
    waiters = d.generator.sample(["a", "b", "c"], d.one_of(1, 2, 3))
    deliver = _deliver(d)
    others: list[CallMaker] = [
        lambda client: d.step("remove_waiter"),
        lambda client: d.step("register_waiter", step_key=d.one_of("a", "b"), signal_name="go"),
        lambda client: d.step("get_waiter"),
    ]
    # The oldest waiter is known only if the creation times are known.
    mixed = others if d.virtual and d.one_of(True, False) else []
    return Race(
        setup=(
            d.start_run(),
            *(d.step("register_waiter", step_key=key, signal_name="go") for key in sorted(waiters)),
        ),
        clients=d.clients(deliver, deliver, deliver, *mixed),
        final=d.final_reads(),
    )


def _clause_of_delivery(verdict: Verdict) -> str | None:
    """SIG-3 if an unexplained delivery returned NOT_FOUND."""
    nothing = ("status", SignalDeliveryStatus.NOT_FOUND.value)
    values = [one.outcome.value for one in verdict.unplaced if isinstance(one.outcome, Returned)]
    return (
        "SIG-3" if any(isinstance(one, tuple) and nothing in one[-1:][0] for one in values if one) else None
    )


def _late_deliveries(d: RaceBuilder) -> Race:
    """Deliveries to a run that ends and is reopened; one of its steps fails, so its waiters are kept."""
    deliver = _deliver(d)

    def end(client: int) -> Call:
        return d.on("complete_run", status=d.one_of("Succeeded", "Failed", "Cancelled"))

    waiters = d.generator.sample(["a", "b"], d.one_of(1, 2))
    clients = d.clients(
        deliver,
        deliver,
        end,
        lambda client: d.step("retry_step", step_key="failed"),
        lambda client: d.step("register_waiter", step_key="c", signal_name="go"),
        lambda client: d.on("get_run_status"),
    )
    if d.one_of(True, False):
        # A client that ended the run knows that every later delivery is too late.
        clients = ((end(0), deliver(0)), *clients[1:])
    ended = (end(0),) if d.one_of(False, False, True) else ()
    return Race(
        setup=(
            d.start_run(),
            d.step("record_step_start", step_key="failed", step_type="s"),
            d.step("record_step_complete", step_key="failed", status="Failed", attempt=1),
            *(d.step("register_waiter", step_key=key, signal_name="go") for key in sorted(waiters)),
            *ended,
        ),
        clients=clients,
        final=d.final_reads(),
    )


def _deliver_or_buffer(d: RaceBuilder) -> CallMaker:
    def deliver(client: int) -> Call:
        call = _deliver(d)(client)
        return replace(call, arguments={**call.arguments, "buffer": d.one_of(True, True, False)})

    return deliver


def _waiting(d: RaceBuilder) -> list[CallMaker]:
    """Calls after which a waiter may take a buffered payload, or another call must."""
    return [
        lambda client: d.step("register_waiter", step_key=d.one_of("a", "b"), signal_name="go"),
        lambda client: d.step("register_waiter", step_key="c", signal_name=d.one_of("go", "stop")),
        lambda client: d.step("remove_waiter", step_key=d.one_of("a", "b", "c")),
    ]


def _early_signals(d: RaceBuilder) -> Race:
    """Deliveries and waiters of one name: each payload is buffered or delivered, and goes to one waiter."""
    deliver = _deliver_or_buffer(d)
    buffered = [deliver(client) for client in (100, 101)[: d.one_of(0, 1, 2)]]
    return Race(
        setup=(
            d.start_run(),
            d.step("register_waiter", step_key="c", signal_name="stop"),
            *(replace(call, arguments={**call.arguments, "buffer": True}) for call in buffered),
        ),
        clients=d.clients(
            deliver,
            deliver,
            deliver,
            *_waiting(d),
            *_waiting(d),
            lambda client: d.on("get_buffered_signals"),
            lambda client: d.step("get_waiter", step_key=d.one_of("a", "c")),
        ),
        final=d.final_reads(),
    )


def _early_signals_at_the_end(d: RaceBuilder) -> Race:
    """Early signals of a run that ends and is reopened: buffered payloads stay, and none is added between."""
    deliver = _deliver_or_buffer(d)
    ended = (d.on("complete_run", status="Failed"),) if d.one_of(True, False) else ()
    return Race(
        setup=(
            d.start_run(),
            d.step("record_step_start", step_key="failed", step_type="s"),
            d.step("record_step_complete", step_key="failed", status="Failed", attempt=1),
            d.on("deliver_signal", signal_name="go", payload_json="early", buffer=True),
            *ended,
        ),
        clients=d.clients(
            deliver,
            deliver,
            *_waiting(d),
            lambda client: d.on("complete_run", status=d.one_of("Succeeded", "Failed", "Cancelled")),
            lambda client: d.step("retry_step", step_key="failed"),
            lambda client: d.on("get_buffered_signals"),
        ),
        final=d.final_reads(),
    )


def _expiries(d: RaceBuilder) -> Race:
    return Race(
        setup=(
            d.start_run(),
            d.step("register_waiter", signal_name="go", expires_at=d.now + LEASE),
            d.step("register_waiter", step_key="b", signal_name="go"),
        ),
        clients=d.clients(
            _deliver(d),
            _deliver(d),
            lambda client: d.step("expire_waiter"),
            lambda client: d.step("expire_waiter"),
            lambda client: d.step("remove_waiter"),
            lambda client: d.step("register_waiter", signal_name="go", expires_at=d.now + 3 * LEASE),
        ),
        final=d.final_reads(),
        clock_advance=LEASE,
    )


def _events(d: RaceBuilder) -> Race:
    def read(client: int) -> Call:
        return d.on("get_run_events", after=d.one_of(0, 0, 1))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(*[lambda client: d.on("append_event", event_type=f"by {client}")] * 3, read),
        final=d.final_reads(),
    )


def _outputs(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.on("save_output", key=d.one_of("k", "k", "K"), value_json=str(client)),
            lambda client: d.on("save_output", key="k", value_json=str(client)),
            lambda client: d.on("save_outputs", outputs={"k": str(client), "K": str(client)}),
            lambda client: d.on("get_output", key="k"),
            lambda client: d.on("get_outputs"),
        ),
        final=d.final_reads(),
    )


def _deleted_outputs(d: RaceBuilder) -> Race:
    """Outputs that clients save in turn while others delete them: the first of two never goes alone."""
    keys = ("k", "k/1", "k/2", "other")
    saved = [d.on("save_output", key=key, value_json="0") for key in keys if d.one_of(True, False)]
    return Race(
        setup=(d.start_run(), *saved),
        clients=d.clients(
            lambda client: d.on("save_output", key=d.one_of(*keys), value_json=str(client)),
            lambda client: d.on("save_output", key=d.one_of(*keys), value_json=str(client)),
            lambda client: d.on("delete_outputs", prefix=d.one_of("k", "k/", "")),
            lambda client: d.on("get_outputs", prefix=d.one_of("k", "")),
        ),
        final=d.final_reads(),
    )


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "deliveries", "SIG-2 SIG-3", "deliveries of one signal", _deliveries, clause_of=_clause_of_delivery
    ),
    family("late_deliveries", "RUN-4 SIG-2 SIG-3", "deliveries to a run that ends", _late_deliveries),
    family(
        "early_signals",
        "MBX-1 MBX-2",
        "deliveries that may be buffered, and waiters that take them",
        _early_signals,
        Capability.MAILBOX,
    ),
    family(
        "early_signals_at_the_end",
        "MBX-2 MBX-1 RUN-4",
        "buffered signals of a run that ends",
        _early_signals_at_the_end,
        Capability.MAILBOX,
    ),
    family(
        "expiries",
        "SIG-4",
        "deliveries to a waiter that expires",
        _expiries,
        Capability.WAITERS,
        Capability.VIRTUAL_CLOCK,
    ),
    family("events", "EVT-1", "events of one run", _events, Capability.EVENTS),
    family("outputs", "EVT-2", "outputs under one key", _outputs, Capability.OUTPUTS),
    family(
        "deleted_outputs",
        "EVT-2",
        "outputs that are saved and deleted by prefix",
        _deleted_outputs,
        Capability.OUTPUTS,
    ),
)
