"""Every read before and after every write, with the same arguments: no cache may hide a change.

The reads come from the operation table, the writes from the write scenarios, so a new operation is covered
without a change here.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import DAY, HOUR, TICK, new_store, require_clock, second_store
from flowstore_conformance.context import CheckContext, ContractViolation, Profile
from flowstore_conformance.differential import (
    TWO_HOURS,
    CallSequence,
    ModelMismatch,
    expected_outcome,
    shrink,
)
from flowstore_conformance.execution import execute
from flowstore_conformance.history import Call
from flowstore_conformance.model import Model
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.write_scenarios import TAGS, ScenarioFactory, available
from flowstore_core import Capability, FlowStore, RunPosition, RunStatus
from flowstore_core.operations import OPERATIONS
from flowstore_core.timeseries import day_start

SHRINK_SECONDS = 6.0
QUICK_WITH_END = ("trigger_run", "register_key")
"""The scenarios whose run the quick profile deletes and starts again between reads."""
REFUSED_AFTER_THE_END: Mapping[str, Mapping[str, Any]] = {
    "record_step_start": {"step_key": "a", "step_type": "http"},
    "try_claim_step": {"step_key": "a", "owner": "q"},
    "try_record_dispatch": {"step_key": "a"},
    "complete_run": {"status": "Cancelled"},
    "deliver_signal": {"signal_name": "go", "payload_json": "{}"},
}
"""Calls that fail, or are False, on a terminal run, and succeed when another store has reopened it."""
FIRST_REFUSAL = 1000
"""The number of the program of the first of these calls, behind those of the scenarios."""
OTHER_POSITIONS: Mapping[str, Any] = {"get_run_events": 1, "get_outputs": "k/1"}
"""The position of an event is its sequence, and that of an output its key."""
QUERY_CLAUSES = ("QRY-1", "QRY-2", "QRY-3", "QRY-4", "QRY-5", "QRY-6", "TAG-3")


def values_by_parameter(run_id: UUID, flow_id: UUID, position: RunPosition) -> Mapping[str, tuple[Any, ...]]:
    """The values of every parameter of a read, for the write scenarios of one run."""
    at = position.started_at
    today = day_start(at)
    return {
        "run_id": (run_id,),
        "run_ids": ((run_id,),),
        "source_run_id": (run_id,),
        "flow_id": (flow_id,),
        "step_key": ("a", "b"),
        "trigger_key": ("manual",),
        "idempotency_key": ("K",),
        "key": ("k",),
        "status": ("Running", "Failed", "Succeeded"),
        "search": ("failed", "no", "[1]", "upstream"),
        # Whole days first, because backends keep the results of these.
        "granularity": ("day", "hour"),
        "since": (today, at - HOUR),
        "until": (today + 2 * DAY, at + HOUR),
        "as_of": (at + HOUR, at + DAY),
        "after": (position,),
        "prefix": ("k/",),
        "tags": ({"env": "test"}, TAGS),
        "skip": (1,),
        "take": (1,),
    }


def reads_of(
    values: Mapping[str, tuple[Any, ...]], capabilities: Collection[Capability], chosen: slice = slice(None)
) -> list[Call]:
    """A call of every read with its required arguments, and one for each further value of each parameter.

    ``chosen`` limits the further calls of each read.
    """
    calls = []
    for operation in OPERATIONS.values():
        if not (operation.writes or operation.is_hint) and operation.is_offered(capabilities):
            required, *further = _variants(operation.name, values)
            calls += [Call(method=operation.name, arguments=given) for given in (required, *further[chosen])]
    return [call for call in calls if call.is_offered(capabilities)]


def _variants(read: str, values: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    parameters = [
        one for one in inspect.signature(getattr(FlowStore, read)).parameters.values() if one.name != "self"
    ]
    required = {one.name: values[one.name][0] for one in parameters if one.default is one.empty}
    yield required
    for one in parameters:
        # The first value of a required parameter is in every call.
        for value in values[one.name][one.name in required :]:
            yield {**required, one.name: OTHER_POSITIONS.get(read, value) if one.name == "after" else value}


@dataclass(frozen=True, slots=True)
class _Case:
    """A write scenario between reads."""

    factory: ScenarioFactory
    writer: int = 1
    """The index of the store that writes; store 0 reads."""
    is_ended: bool = False
    """Whether the run is terminal before the last write."""
    with_end: bool = False
    """Whether reads follow the end of the run, its deletion and the start of another with its id."""


def _cases(context: CheckContext) -> Iterator[_Case]:
    """One case of half of the write scenarios and two of the others, or three of all in the profile thorough.

    In the profile quick, one case of a fourth of the scenarios, and at most one of each operation.
    """
    scenarios = list(available(context.capabilities).items())
    of = context.profile.of
    some = dict(context.random.sample(scenarios, len(scenarios) // of(4, 2, 1)))
    if context.profile is Profile.QUICK:
        seen = set()
        for name, factory in some.items():
            write = factory(UUID(int=1), UUID(int=2))[1].method
            if write not in seen:
                seen.add(write)
                yield _Case(factory, with_end=name in QUICK_WITH_END)
        return
    for name, factory in scenarios:
        if name in some:
            yield _Case(factory, with_end=True)
        if name not in some or context.profile is Profile.THOROUGH:
            yield _Case(factory, writer=0)
            yield _Case(factory, is_ended=True)


@check("CLM-2", *QUERY_CLAUSES, needs=[Capability.VIRTUAL_CLOCK], kind=Kind.MODEL, isolated=False)
async def every_read_shows_every_write(context: CheckContext) -> None:
    """Every read shows every write of its own and of a second store, also if it was made before the write."""
    async with context.new_namespace() as namespace:
        second = await second_store(namespace)
        for number, case in enumerate(_cases(context), 1):
            program = CallSequence.on(namespace, number, second=second)
            if (calls := _calls_of(program, case)) is None:
                continue
            try:
                await _ask_around_writes(program, case, calls, number)
            except ModelMismatch as found:
                raise await _explain(context, namespace, found) from found.__cause__
        for number, method in enumerate(REFUSED_AFTER_THE_END, FIRST_REFUSAL):
            program = CallSequence.on(namespace, number, second=second)
            try:
                await _repeat_refused_call(program, method)
            except ModelMismatch as found:
                raise await _explain(context, namespace, found) from found.__cause__


async def _repeat_refused_call(program: CallSequence, method: str) -> None:
    """Make a call that a terminal run refuses, reopen the run through the other store, and repeat it."""
    run_id, flow_id = program.universe.runs[0], program.universe.flows[0]
    setup, retry = available(program.context.capabilities)["retry_step"](run_id, flow_id)
    call = Call(method=method, arguments={"run_id": run_id, **REFUSED_AFTER_THE_END[method]})
    if not call.operation.is_offered(program.context.capabilities):
        return
    writer = len(program.stores) - 1
    for one in setup:
        await program.call(one, store=writer)
    await program.call(call)
    await program.call(retry, store=writer)
    await program.call(call)
    await _complete_all(program, writer)
    await program.call(call)
    await _delete_all(program, writer)


def _calls_of(program: CallSequence, case: _Case) -> list[Call] | None:
    """The calls of a scenario; None if the last of them would change nothing on a terminal run."""
    run_id, flow_id = program.universe.runs[0], program.universe.flows[0]
    setup, write = case.factory(run_id, flow_id)
    if not case.is_ended:
        return [*setup, write]
    model = Model(require_clock(program.context))
    for call in setup:
        getattr(model, call.method)(**call.arguments)
    if model.get_run_status(run_id) is not RunStatus.RUNNING:
        return None
    model.complete_run(run_id, RunStatus.FAILED)
    before = model.state.frozen()
    expected_outcome(model, write)
    return None if model.state.frozen() == before else [*setup, _complete(run_id), write]


def _complete(run_id: UUID) -> Call:
    return Call(method="complete_run", arguments={"run_id": run_id, "status": RunStatus.FAILED})


async def _ask_around_writes(program: CallSequence, case: _Case, calls: Sequence[Call], number: int) -> None:
    """Make the calls of a case, and reads before and after the last of them; then delete the run.

    The profile thorough makes every read. The others make those whose results change, and a part of the rest,
    which the ``number`` of the case selects.
    """
    model, runs, flows = program.universe.model, program.universe.runs, program.universe.flows
    writer = min(case.writer, len(program.stores) - 1)
    bystander: dict[str, Any] = {"flow_id": flows[1], "flow_name": "bystander", "run_id": runs[1]}
    bystander |= {"trigger_key": "manual", "source_run_id": runs[0]}
    *setup, write = calls
    await program.call(Call(method="start_run", arguments=bystander), store=writer)
    program.advance_clock(TICK)
    position = RunPosition(started_at=model.now, run_id=runs[1])
    values = values_by_parameter(runs[0], flows[0], position)
    reads = reads_of(values, program.context.capabilities)
    for call in setup:
        await program.call(call, store=writer)
    of = program.context.profile.of
    # One of so many reads that the write does not change is made.
    interval = of(2, 4, 1) if case.with_end else of(8, 8, 1)
    if interval > 1:
        changed = _changed_reads(model, reads, write)
        reads = [one for turn, one in enumerate(reads, number) if one in changed or turn % interval == 0]
    await program.call_concurrently(reads)
    # A run that changes on another day than that of its start changes the results of both days.
    program.advance_clock(DAY)
    await program.call(write, store=writer)
    await program.call_concurrently(reads)
    await _complete_all(program, writer)
    if case.with_end:
        await program.call_concurrently(reads)
    await _delete_all(program, writer)
    if case.with_end:
        await program.call_concurrently(reads)
        again = {**bystander, "flow_id": flows[0], "flow_name": "again", "run_id": runs[0]}
        await program.call(Call(method="start_run", arguments=again), store=writer)
        await program.call_concurrently(reads)
        await _complete_all(program, writer)
        await _delete_all(program, writer)


def _changed_reads(model: Model, reads: Sequence[Call], write: Call) -> list[Call]:
    """The reads whose results are others a day later, after the write."""
    later = Model(lambda: model.now + DAY, model.state.copy())
    expected_outcome(later, write)
    return [one for one in reads if expected_outcome(model, one) != expected_outcome(later, one)]


async def _complete_all(program: CallSequence, writer: int) -> None:
    for record in program.universe.model.get_active_runs():
        await program.call(_complete(record.run_id), store=writer)


async def _delete_all(program: CallSequence, writer: int) -> None:
    """Delete every run, and the control records and keys without one (RET-4)."""
    program.advance_clock(TWO_HOURS)
    cleanup = Call(method="cleanup", arguments={"cutoff": program.universe.model.now})
    await program.call(cleanup, store=writer)


async def _explain(context: CheckContext, namespace: CheckContext, found: ModelMismatch) -> ContractViolation:
    """Shrink a violation, and tell a stale result from a write that did not happen: ask a new store."""
    last = found.entries[-1]
    fresh = await new_store(namespace)
    is_stale = (
        not last.call.operation.writes
        and fresh is not namespace.store
        and await execute(fresh, last.call) == last.expected
    )
    shrunk = await shrink(context, found, SHRINK_SECONDS)
    if not is_stale:
        return shrunk
    note = "a newly opened store returns the expected result, so this store keeps an old one in memory"
    return ContractViolation(
        f"{shrunk.message}; {note}",
        clause="CLM-2" if last.call.operation.shows_state else shrunk.clause,
        program=shrunk.program,
    )
