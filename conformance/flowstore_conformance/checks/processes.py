"""Races between operating-system processes, each with its own store on one namespace.

Starting a process costs more than a race, so each check races several families with one worker pool, and
checks in one namespace share the pool. A violation names the clause of its family.
"""

from __future__ import annotations

from collections.abc import Collection

from flowstore_conformance.context import CheckContext
from flowstore_conformance.race_families import PAIR_FAMILIES, RACE_FAMILIES
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.worker_pool import open_worker_pool
from flowstore_core import Capability

MULTI = [Capability.MULTI_PROCESS]


async def _race(context: CheckContext, names: Collection[str]) -> None:
    of = context.profile.of
    budget = Budget(rounds=of(1, 5, 200), races=of(6, 8, 10), seconds=of(1, 4, 60))
    async with open_worker_pool(context, of(2, 3, 4)) as pool:
        for family in RACE_FAMILIES:
            if family.name in names and family.needs <= context.capabilities:
                tally = await search(context, family, pool, budget)
                if family in PAIR_FAMILIES:
                    context.notes.append(
                        f"{len(+tally.overlaps)} pairs of writing operations ran concurrently"
                    )


@check("CLM-1", "CLM-2", "CLM-3", "CLM-5", "CLM-6", needs=MULTI, kind=Kind.RACE, isolated=False)
async def claims_by_processes(context: CheckContext) -> None:
    """Races for claims, expired leases and dispatches between processes have linearizable results."""
    await _race(context, ("claims", "releases", "claims_of_one_owner", "takeovers", "dispatches"))


@check(
    "STP-1", "STP-2", "STP-3", "STP-4", "STP-5", "STP-6", "STP-7", needs=MULTI, kind=Kind.RACE, isolated=False
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


@check("RUN-2", "RUN-1", "RUN-4", "CTL-2", needs=MULTI, kind=Kind.RACE, isolated=False)
async def runs_by_processes(context: CheckContext) -> None:
    """Races to complete, cancel and time out one run between processes have linearizable results."""
    await _race(context, ("starts_of_one_run", "late_starts", "ends", "expected_ends", "latches"))


@check("IDM-2", "IDM-3", needs=MULTI, kind=Kind.RACE, isolated=False)
async def keys_by_processes(context: CheckContext) -> None:
    """Races for one idempotency key between processes have linearizable results."""
    await _race(context, ("keys", "triggers"))


@check("SIG-2", "SIG-3", "SIG-4", "RUN-4", needs=MULTI, kind=Kind.RACE, isolated=False)
async def signals_by_processes(context: CheckContext) -> None:
    """Races to deliver to the same waiters between processes have linearizable results."""
    await _race(context, ("deliveries", "late_deliveries", "expiries"))


@check("QUE-1", "QUE-2", "QUE-4", "QUE-5", "QUE-6", needs=MULTI, kind=Kind.RACE, isolated=False)
async def queues_by_processes(context: CheckContext) -> None:
    """Races to claim queued steps and to advance one run between processes have linearizable results."""
    await _race(context, ("queue_claims", "ended_leases", "joins"))


@check("CON-1", "EVT-1", "EVT-2", needs=MULTI, kind=Kind.RACE, isolated=False)
async def pairs_by_processes(context: CheckContext) -> None:
    """Races of two writing operations on one run between processes have linearizable results."""
    await _race(context, ("pairs", "events", "outputs"))


@check("RET-3", "RET-2", "IDM-4", "CON-1", needs=MULTI, kind=Kind.RACE)
async def cleanups_by_processes(context: CheckContext) -> None:
    """Races of cleanups and other calls between processes have linearizable results."""
    await _race(context, ("cleanups", "cleanups_seen", "cleanup_pairs"))
