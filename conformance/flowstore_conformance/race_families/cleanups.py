"""Races of cleanups and deletions with calls and reads of the run that they delete."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

from flowstore_conformance.history import Call
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.race_families.family import (
    CallMaker,
    RaceBuilder,
    RaceFamily,
    family,
    stuck_on_reads,
)
from flowstore_conformance.race_families.runs import find, register, trigger
from flowstore_conformance.race_families.steps import ended_run
from flowstore_conformance.races import Race
from flowstore_core import Capability

AGAIN = UUID(int=2)
"""The run that a second trigger starts."""


def _cleanup(d: RaceBuilder) -> Call:
    return Call(method="cleanup", arguments={"cutoff": d.now + timedelta(hours=12)})


def _cleanups(d: RaceBuilder) -> Race:
    clean = _cleanup(d)
    race = _used_again(d, clean)
    # The next race's cleanup would count the remaining runs.
    sweep = [
        Call(method="complete_run", arguments={"run_id": one, "status": "Failed"}) for one in (d.run, AGAIN)
    ]
    return replace(race, final=(*race.final, *sweep, clean, d.final_reads()[0]))


def _used_again(d: RaceBuilder, delete: Call) -> Race:
    """Clients that delete a run, reopen it, or start a run under its id or its key."""
    first = register(0) if not d.has(Capability.TRIGGER) else trigger(0)
    begin = ended_run(d)[1:] if first.method == "trigger_run" else [*ended_run(d)]
    makers: list[CallMaker] = [
        lambda client: delete,
        lambda client: delete,
        lambda client: d.step("retry_step", attempt=1, reset=["b"]),
        lambda client: d.on("get_run_detail"),
        lambda client: d.start_run(),
        lambda client: d.step("register_waiter", signal_name="go"),
        lambda client: d.on("request_cancel"),
        find,
    ]
    if d.has(Capability.TRIGGER):
        makers += [lambda client: trigger(1)] * 2
    if d.has(Capability.EVENTS):
        makers.append(lambda client: d.on("append_event", event_type="e"))
    if d.has(Capability.TAGS):
        makers.append(lambda client: d.on("set_tags", tags={"env": "test"}))
    return Race(
        setup=(first, *begin),
        clients=d.clients(*makers),
        final=(find(), *d.final_reads(), *d.final_reads(run_id=AGAIN), *d.lists_by_tag()),
    )


def _cleanups_seen(d: RaceBuilder) -> Race:
    return _seen(d, _cleanup(d))


def _seen(d: RaceBuilder, delete: Call) -> Race:
    """One client deletes the run while the others read all kinds of state."""
    d.count = min(d.count, 4)
    reads = ["get_run_detail", "get_run_detail", "get_step_statuses", "get_run_control", "get_step_claims"]
    before = ended_run(d)
    if d.has(Capability.OUTPUTS):
        reads.append("get_outputs")
        before.append(d.on("save_output", key="k", value_json="1"))
    if d.has(Capability.EVENTS):
        reads.append("get_run_events")
        before.append(d.on("append_event", event_type="e"))
    before += [d.on("request_cancel"), d.step("register_waiter", signal_name="go")]
    readers = [tuple(d.on(d.one_of(*reads)) for _ in range(4)) for _ in range(d.count)]
    return Race(
        setup=tuple(before),
        clients=((delete,), *readers),
        final=d.final_reads(d.on("get_step_statuses")),
    )


def _clause_of_cleanup(verdict: Verdict) -> str | None:
    methods = {one.call.method for one in verdict.unplaced}
    return "IDM-4" if methods == {"find_run_id_by_idempotency_key"} else stuck_on_reads("RET-3")(verdict)


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "cleanups",
        "RET-2 RET-3 IDM-4",
        "cleanups of a run that other clients use again",
        _cleanups,
        exclusive=True,
        clause_of=_clause_of_cleanup,
    ),
    family("cleanups_seen", "RET-3", "reads of a run during its cleanup", _cleanups_seen, exclusive=True),
    family(
        "deletions",
        "RET-5 IDM-4",
        "deletions of a run that other clients use again",
        lambda d: _used_again(d, d.on("delete_run")),
        Capability.DELETION,
    ),
    family(
        "deletions_seen",
        "RET-5",
        "reads of a run during its deletion",
        lambda d: _seen(d, d.on("delete_run")),
        Capability.DELETION,
    ),
)
