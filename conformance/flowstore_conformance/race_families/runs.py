"""Races for the end of a run, its latches, and idempotency keys."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from flowstore_conformance.history import Call
from flowstore_conformance.race_families.claims import claim
from flowstore_conformance.race_families.family import (
    FLOW,
    LEASE,
    CallMaker,
    RaceBuilder,
    RaceFamily,
    family,
    winners,
)
from flowstore_conformance.race_families.steps import start
from flowstore_conformance.races import Race
from flowstore_core import Capability


def _ends(d: RaceBuilder) -> Race:
    def end(client: int) -> Call:
        return d.on("complete_run", status=d.one_of("Succeeded", "Failed", "Cancelled"))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(end, end, end, start(d), claim(d), lambda client: d.on("get_run_detail")),
        final=d.final_reads(),
    )


def _starts_of_one_run(d: RaceBuilder) -> Race:
    def begin(client: int) -> Call:
        given = {**d.start_run().arguments, "trigger_data": str(client), "job_id": f"job {client}"}
        return Call(method="start_run", arguments=given)

    makers: list[CallMaker] = [
        begin,
        lambda client: d.on("get_run_detail"),
        lambda client: d.on("get_run_status"),
    ]
    if d.has(Capability.TRIGGER):
        makers.append(lambda client: Call(method="trigger_run", arguments=begin(client).arguments))
    return Race(setup=(), clients=d.clients(*makers, first=begin), final=d.final_reads())


def _late_starts(d: RaceBuilder) -> Race:
    def end(client: int) -> Call:
        return d.on("complete_run", status="Cancelled")

    def read_statuses(client: int) -> Call:
        return d.on("get_step_statuses")

    clients = d.clients(
        end,
        end,
        read_statuses,
        start(d),
        start(d),
        claim(d),
        lambda client: d.step("try_record_dispatch"),
        lambda client: d.step("record_skipped_step", step_type="s", reason=str(client)),
    )
    if d.one_of(True, False):
        # A client that ended the run and then reads no step proves that any later start is too late.
        clients = ((end(0), read_statuses(0)), *clients[1:])
    return Race(setup=(d.start_run(),), clients=clients, final=d.final_reads())


def _expected_ends(d: RaceBuilder) -> Race:
    def end(client: int) -> Call:
        return d.on("complete_run", status="Succeeded", expected={"a": "Succeeded"})

    def other(method: str, **arguments: Any) -> CallMaker:
        return lambda client: d.step(method, **{"step_key": d.one_of("a", "b"), **arguments})

    return Race(
        setup=(
            d.start_run(),
            d.step("record_step_start", step_type="s"),
            d.step("record_step_complete", status="Succeeded", attempt=1),
        ),
        clients=d.clients(
            end,
            end,
            other("record_step_start", step_type="s"),
            other("try_claim_step", owner="somebody"),
            other("try_record_dispatch"),
            lambda client: d.step("retry_step", attempt=1),
            lambda client: d.on("get_run_detail"),
        ),
        final=d.final_reads(),
    )


def _latches(d: RaceBuilder) -> Race:
    def configure(client: int) -> Call:
        return d.on("configure_run", flow_id=FLOW, trigger_key="t", timeout_at=d.one_of(None, d.now + LEASE))

    makers: list[CallMaker] = [
        lambda client: d.on("request_cancel", reason=f"client {client}"),
        lambda client: d.on("request_cancel", reason=f"client {client}"),
        lambda client: d.on("mark_timed_out", reason=f"late {client}"),
        lambda client: d.on("mark_timed_out", reason=f"late {client}"),
        lambda client: d.on("get_run_control"),
        configure,
    ]
    if d.has(Capability.DEADLINES):
        makers.append(lambda client: d.on("extend_deadline", timeout_at=d.now + 2 * LEASE))
    return Race(
        setup=(d.start_run(), *((configure(0),) * d.one_of(0, 1))),
        clients=d.clients(*makers),
        final=d.final_reads(),
    )


KEY = {"flow_id": FLOW, "trigger_key": "t", "idempotency_key": "k"}


def register(client: int) -> Call:
    return Call(method="try_register_idempotency_key", arguments={**KEY, "run_id": UUID(int=1 + client)})


def find(client: int = 0) -> Call:
    return Call(method="find_run_id_by_idempotency_key", arguments=KEY)


def _keys(d: RaceBuilder) -> Race:
    return Race(
        setup=(),
        clients=d.clients(register, register, find, first=register),
        final=(find(),),
    )


def trigger(client: int) -> Call:
    given = {**KEY, "flow_name": "races", "run_id": UUID(int=1 + client), "job_id": f"job {client}"}
    return Call(method="trigger_run", arguments=given)


def _triggers(d: RaceBuilder) -> Race:
    ids = [UUID(int=1 + client) for client in range(d.count)]
    makers: list[CallMaker] = [
        trigger,
        trigger,
        trigger,
        find,
        lambda client: Call(method="get_run_control", arguments={"run_id": d.one_of(*ids)}),
    ]
    if d.one_of(True, False):
        makers += [register, lambda client: d.start_run(d.one_of(*ids))]
    if d.has(Capability.TAGS):
        makers += [_tagged_trigger] * 2
    reads = [Call(method=name, arguments={"run_id": one}) for one in ids for name in READS_OF_TRIGGERED]
    return Race(setup=(), clients=d.clients(*makers), final=(find(), *reads, *d.lists_by_tag()))


def _tagged_trigger(client: int) -> Call:
    tags = {"env": "test", "client": str(client)}
    return Call(method="trigger_run", arguments={**trigger(client).arguments, "tags": tags})


def _tags(d: RaceBuilder) -> Race:
    def change(client: int) -> Call:
        return d.on("set_tags", tags={d.one_of("env", "zone"): d.one_of("test", f"client {client}", None)})

    def change_both(client: int) -> Call:
        return d.on("set_tags", tags={"env": d.one_of("test", "live"), "zone": f"client {client}"})

    def add_many(client: int) -> Call:
        # Two of these calls are within the limit, three are not (TAG-2).
        return d.on("set_tags", tags={f"{client} {number}": "v" for number in range(14)})

    tagged = {**d.start_run().arguments, "tags": {"env": "test", "team": "ops"}}
    begin = d.one_of(d.start_run(), Call(method="start_run", arguments=tagged))
    makers: list[CallMaker] = [
        change,
        change,
        change_both,
        change_both,
        add_many,
        lambda client: d.on("complete_run", status="Failed"),
        lambda client: d.on("get_run"),
        lambda client: d.lists_by_tag()[0],
    ]
    if d.has(Capability.DELETION):
        makers.append(lambda client: d.on("delete_run"))
    return Race(setup=(begin,), clients=d.clients(*makers), final=d.final_reads(*d.lists_by_tag()))


READS_OF_TRIGGERED = ("get_run_detail", "get_run_control")


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family("starts_of_one_run", "RUN-1", "starts of one run", _starts_of_one_run),
    family("late_starts", "RUN-4", "starts, claims and dispatches in a run that ends", _late_starts),
    family("ends", "RUN-2", "ends of one run", _ends, explain=winners("complete_run", ("retry_step",))),
    family(
        "expected_ends", "RUN-2", "ends that expect the steps as they are, while these move", _expected_ends
    ),
    family("latches", "CTL-2", "cancels and time-outs of one run", _latches),
    family("keys", "IDM-2", "registrations of one idempotency key", _keys),
    family("tags", "TAG-2 TAG-3", "changes of the tags of one run, and lists by tag", _tags, Capability.TAGS),
    family("triggers", "IDM-3", "triggers with one idempotency key", _triggers, Capability.TRIGGER),
)
