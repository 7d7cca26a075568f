"""Races of exports and imports with calls that use the same run, or the same idempotency key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from uuid import UUID

from flowstore_conformance.archives import under_another_id
from flowstore_conformance.history import Call
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.model import Model
from flowstore_conformance.race_families.family import (
    FLOW,
    CallMaker,
    RaceBuilder,
    RaceFamily,
    family,
    stuck_on_reads,
)
from flowstore_conformance.race_families.runs import find, register, trigger
from flowstore_conformance.race_families.steps import ended_run
from flowstore_conformance.races import Race
from flowstore_core import Capability, RunArchive

OTHER = UUID(int=2)
"""A second run, whose archive has the key of the first."""


def _archive(d: RaceBuilder, calls: Sequence[Call]) -> RunArchive:
    model = Model(lambda: d.now)
    for call in calls:
        getattr(model, call.method)(**call.arguments)
    archive = model.export_run(d.run)
    assert archive is not None
    return archive


def _populated(d: RaceBuilder) -> list[Call]:
    """A completed run with a key, steps, a waiter, a cancel, outputs and events."""
    return [
        trigger(0),
        *ended_run(d)[1:],
        d.on("save_output", key="k", value_json="1"),
        d.on("append_event", event_type="e"),
        d.on("request_cancel"),
        d.step("register_waiter", signal_name="go"),
    ]


def _import(archive: RunArchive) -> Call:
    return Call(method="import_run", arguments={"archive": archive})


def _imports(d: RaceBuilder) -> Race:
    """Imports of one run, of another version of it, and of a run with its key, beside other uses of both."""
    archive = _archive(d, _populated(d))
    changed = replace(archive, outputs=(("k", "2"),))
    other = under_another_id(archive, OTHER)
    makers: list[CallMaker] = [
        lambda client: _import(archive),
        lambda client: _import(archive),
        lambda client: _import(changed),
        lambda client: _import(other),
        register,
        trigger,
        find,
        lambda client: d.start_run(),
        lambda client: d.on("configure_run", flow_id=FLOW, trigger_key="t"),
        lambda client: d.on("save_output", key="k", value_json="3"),
        lambda client: d.on("append_event", event_type="late"),
        lambda client: d.step("retry_step", attempt=1, reset=["b"]),
        lambda client: d.on("export_run"),
    ]
    if d.has(Capability.DELETION):
        makers.append(lambda client: d.on("delete_run"))
    setup = d.one_of(
        [], [], [register(0)], [register(1)], [d.on("configure_run", flow_id=FLOW, trigger_key="o")]
    )
    exports = [Call(method="export_run", arguments={"run_id": one}) for one in (d.run, OTHER)]
    return Race(
        setup=tuple(setup),
        clients=d.clients(*makers, first=lambda client: _import(d.one_of(archive, archive, changed, other))),
        final=(find(), *exports, *d.final_reads(), *d.final_reads(run_id=OTHER)),
    )


def _imports_seen(d: RaceBuilder) -> Race:
    """One client imports the run while the others read all kinds of state."""
    d.count = min(d.count, 4)
    reads = ["get_run_detail", "export_run", "get_step_statuses", "get_run_control", "get_outputs"]
    readers = [tuple(d.on(d.one_of(*reads, "get_run_events")) for _ in range(4)) for _ in range(d.count)]
    archive = _archive(d, _populated(d))
    return Race(setup=(), clients=((_import(archive),), *readers), final=d.final_reads(d.on("export_run")))


def _exports(d: RaceBuilder) -> Race:
    """One client exports the run while the others change all kinds of its state."""
    d.count = min(d.count, 4)
    makers: list[CallMaker] = [
        lambda client: d.step("retry_step", attempt=1, reset=["b"]),
        lambda client: d.step("record_step_start", step_type="s"),
        lambda client: d.on("save_output", key="k", value_json=f"{client}"),
        lambda client: d.on("append_event", event_type="e"),
        lambda client: d.on("deliver_signal", signal_name="go", payload_json="1", delivery_id=f"{client}"),
        lambda client: d.on("complete_run", status="Failed"),
        register,
    ]
    exports = tuple(d.on("export_run") for _ in range(4))
    return Race(
        setup=tuple(_populated(d)),
        clients=(exports, *d.clients(*makers)),
        final=d.final_reads(d.on("export_run")),
    )


def _clause_of_import(verdict: Verdict) -> str | None:
    methods = {one.call.method for one in verdict.unplaced}
    return "IDM-2" if methods == {"find_run_id_by_idempotency_key"} else stuck_on_reads("XFR-3")(verdict)


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "imports",
        "XFR-3 IDM-2",
        "imports of a run whose id or key other clients use",
        _imports,
        Capability.TRANSFER,
        Capability.TRIGGER,
        clause_of=_clause_of_import,
    ),
    family("imports_seen", "XFR-3", "reads of a run during its import", _imports_seen, Capability.TRANSFER),
    family("exports", "XFR-2", "exports of a run that other clients change", _exports, Capability.TRANSFER),
)
