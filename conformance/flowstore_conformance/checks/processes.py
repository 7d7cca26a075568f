"""Races and alternating calls of operating-system processes, each with its own store on one namespace.

Starting a process costs more than a race, so each check races several families with one worker pool, and
checks in one namespace share the pool. A violation names the clause of its family.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from uuid import UUID

from flowstore_conformance.checks.fixtures import HOUR, new_id, require_clock
from flowstore_conformance.context import (
    CheckContext,
    ContractViolation,
    Inconclusive,
    Profile,
    VirtualClock,
)
from flowstore_conformance.differential import describe_mismatch, expected_outcome, guess_clause
from flowstore_conformance.history import Call
from flowstore_conformance.model import Model
from flowstore_conformance.race_families import PAIR_FAMILIES, RACE_FAMILIES
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.races import Race, RaceRun
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import probe_calls
from flowstore_conformance.worker_pool import open_worker_pool
from flowstore_conformance.write_scenarios import ScenarioFactory, available
from flowstore_core import Capability, RunStatus
from flowstore_core.operations import OPERATIONS

MULTI = [Capability.MULTI_PROCESS]


async def _race(context: CheckContext, names: Collection[str]) -> None:
    of = context.profile.of
    budget = Budget(rounds=of(1, 3, 200), races=of(6, 8, 10), seconds=of(1, 4, 60))
    async with open_worker_pool(context, of(2, 3, 4)) as pool:
        for family in RACE_FAMILIES:
            if family.name in names and family.needs <= context.capabilities:
                tally = await search(context, family, pool, budget)
                if family in PAIR_FAMILIES:
                    context.notes.append(
                        f"{len(+tally.overlaps)} pairs of writing operations ran concurrently"
                    )


@check(
    "CLM-1",
    "CLM-2",
    "CLM-3",
    "CLM-5",
    "CLM-6",
    "CLM-8",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def claims_by_processes(context: CheckContext) -> None:
    """Races for claims, starts, expired leases and dispatches between processes have linearizable results."""
    await _race(
        context,
        (
            "claims",
            "releases",
            "claims_of_one_owner",
            "takeovers",
            "claimed_starts",
            "restarts",
            "dispatches",
        ),
    )


@check(
    "STP-1",
    "STP-2",
    "STP-3",
    "STP-4",
    "STP-5",
    "STP-6",
    "STP-7",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def steps_by_processes(context: CheckContext) -> None:
    """Races to start, complete, skip and retry one step between processes have linearizable results."""
    await _race(
        context,
        (
            "attempts",
            "starts_under_claims",
            "starts_of_ended_steps",
            "completions",
            "skips",
            "retries",
            "reschedules",
        ),
    )


@check(
    "RUN-2",
    "RUN-1",
    "RUN-4",
    "CTL-2",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def runs_by_processes(context: CheckContext) -> None:
    """Races to complete, cancel and time out one run between processes have linearizable results."""
    await _race(context, ("starts_of_one_run", "late_starts", "ends", "expected_ends", "latches"))


@check("IDM-2", "IDM-3", needs=MULTI, kind=Kind.RACE, rotation="processes", isolated=False)
async def keys_by_processes(context: CheckContext) -> None:
    """Races for one idempotency key between processes have linearizable results."""
    await _race(context, ("keys", "triggers"))


@check(
    "SIG-2",
    "SIG-3",
    "SIG-4",
    "RUN-4",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def signals_by_processes(context: CheckContext) -> None:
    """Races to deliver to the same waiters between processes have linearizable results."""
    await _race(context, ("deliveries", "late_deliveries", "expiries"))


@check(
    "MBX-1",
    "MBX-2",
    needs=[*MULTI, Capability.MAILBOX],
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def early_signals_by_processes(context: CheckContext) -> None:
    """Races of early signals and waiters between processes have linearizable results."""
    await _race(context, ("early_signals", "early_signals_at_the_end"))


@check(
    "QUE-1",
    "QUE-2",
    "QUE-4",
    "QUE-5",
    "QUE-6",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def queues_by_processes(context: CheckContext) -> None:
    """Races to claim queued steps and to advance one run between processes have linearizable results."""
    await _race(context, ("queue_claims", "ended_leases", "joins"))


@check(
    "CON-1",
    "CON-2",
    "EVT-1",
    "EVT-2",
    needs=MULTI,
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def pairs_by_processes(context: CheckContext) -> None:
    """Races of two writing operations on one run between processes have linearizable results."""
    await _race(context, ("pairs", "events", "outputs", "deleted_outputs"))


@check("RET-3", "RET-2", "IDM-4", "CON-1", needs=MULTI, kind=Kind.RACE, rotation="processes")
async def cleanups_by_processes(context: CheckContext) -> None:
    """Races of cleanups and other calls between processes have linearizable results."""
    await _race(context, ("cleanups", "cleanups_seen", "cleanup_pairs"))


@check(
    "RET-5",
    "IDM-4",
    needs=[*MULTI, Capability.DELETION],
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def deletions_by_processes(context: CheckContext) -> None:
    """Races of deletions and other calls between processes have linearizable results."""
    await _race(context, ("deletions", "deletions_seen"))


@check(
    "XFR-3",
    "XFR-2",
    needs=[*MULTI, Capability.TRANSFER],
    kind=Kind.RACE,
    rotation="processes",
    isolated=False,
)
async def transfers_by_processes(context: CheckContext) -> None:
    """Races of exports and imports with other calls between processes have linearizable results."""
    await _race(context, ("imports", "imports_seen", "exports"))


_WRITE_CLAUSES = dict.fromkeys(
    one.clauses[0] for one in OPERATIONS.values() if one.writes and not one.spans_runs
)


@check(
    "CLM-2",
    "UNK",
    *_WRITE_CLAUSES,
    needs=[*MULTI, Capability.VIRTUAL_CLOCK],
    kind=Kind.MODEL,
    isolated=False,
    rotation="processes",
)
async def processes_see_the_writes_of_others(context: CheckContext) -> None:
    """Two processes read and write a run in turn, also after it ended and after another deleted it."""
    clock = require_clock(context)
    scenarios = list(_scenarios(context))
    async with open_worker_pool(context, context.profile.of(2, 3, 4)) as pool:
        rounds = [await pool.run(races) for races in zip(*map(_alternating_races, scenarios), strict=True)]
        for runs in zip(*rounds, strict=True):
            _compare(context, runs, "")
        clock.advance(2 * HOUR)
        await context.store.cleanup(clock.now)
        late = [
            Race(setup=(*reads, write), clients=((write, *reads),), final=())
            for _, _, write, reads in scenarios
        ]
        for run in await pool.run(late):
            _compare(context, [run], "after its cleanup by a third process, ")


_Scenario = tuple[UUID, Sequence[Call], Call, Sequence[Call]]
"""A run, the setup of a write, the write, and reads of the run."""


def _scenarios(context: CheckContext) -> Iterator[_Scenario]:
    """Every write scenario; in the profile quick one of each operation, and a part of the reads."""
    chosen: dict[object, ScenarioFactory] = {}
    for name, factory in available(context.capabilities).items():
        write = factory(UUID(int=1), UUID(int=2))[1]
        chosen.setdefault(write.method if context.profile is Profile.QUICK else name, factory)
    for factory in chosen.values():
        run_id, flow_id = new_id(context), new_id(context)
        setup, write = factory(run_id, flow_id)
        keys = [(flow_id, "manual", "K")]
        reads = probe_calls(run_id, context.capabilities, step_keys=("a", "b"), keys=keys)
        if context.profile is Profile.QUICK:
            reads = tuple(context.random.sample(reads, 2))
        yield run_id, setup, write, reads


def _alternating_races(scenario: _Scenario) -> list[Race]:
    """Races of one client each: one process makes the setup, and then another one the client's calls."""
    run_id, setup, write, reads = scenario
    end = Call(method="complete_run", arguments={"run_id": run_id, "status": RunStatus.FAILED})
    # A store that counts for itself may still return the right number after one write of another, if it
    # repeats a write that was refused.
    several = [write] * 3
    return [
        Race(setup=(*setup, write, *reads), clients=((*several, *reads),), final=()),
        Race(setup=(*reads, write, *reads), clients=((end,),), final=()),
        # A retry makes the run Running again.
        Race(setup=(write, *reads), clients=((end,),), final=()),
    ]


def _compare(context: CheckContext, runs: Sequence[RaceRun], when: str) -> None:
    """Compare the outcomes of calls on one run, made one after another, with the model."""
    clock = VirtualClock()
    model = Model(clock)
    if any(run.unavailable for run in runs):
        raise Inconclusive("a call was unavailable although no other call on its run was running")
    for operation in chain.from_iterable(run.history.operations for run in runs):
        clock.now = operation.now
        call, found = operation.call, operation.outcome
        wanted = expected_outcome(model, call)
        context.assertions += 1
        if found != wanted:
            clause = "CLM-2" if call.operation.shows_state else guess_clause(call, wanted, found)
            mismatch = describe_mismatch(call.method, wanted, found)
            raise ContractViolation(
                f"a run that two processes read and write in turn: {when}{mismatch}",
                clause=clause,
                history=runs[-1].history,
            )
