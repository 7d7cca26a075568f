"""Races between operating-system processes, each with a store of its own on one namespace.

Starting processes costs more than racing, so one check races several themes with one crew, and checks in
one namespace share it; a violation names the clause of its theme.
"""

from __future__ import annotations

from collections.abc import Collection

from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.context import CheckContext
from flowstore_conformance.race_families import RACE_FAMILIES
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.worker_pool import open_worker_pool
from flowstore_core import Capability

MULTI = [Capability.MULTI_PROCESS]


async def _race(context: CheckContext, names: Collection[str]) -> None:
    of = context.profile.of
    effort = Budget(rounds=of(1, 5, 200), races=of(6, 8, 10), seconds=of(1, 4, 60))
    async with open_worker_pool(context, of(2, 3, 4)) as crew:
        for family in RACE_FAMILIES:
            if family.name in names and family.needs <= context.capabilities:
                await search(context, family, crew, effort)


@check("CLM-1", "CLM-2", "CLM-3", "CLM-5", "CLM-6", needs=MULTI, kind=Kind.RACE, shares=True)
async def claims_by_processes(context: CheckContext) -> None:
    """Processes that race for claims, expired leases and dispatches get answers that some order explains."""
    await _race(context, ("claims", "releases", "claims_of_one_owner", "takeovers", "dispatches"))


@check(
    "STP-1", "STP-2", "STP-3", "STP-4", "STP-5", "STP-6", "STP-7", needs=MULTI, kind=Kind.RACE, shares=True
)
async def steps_by_processes(context: CheckContext) -> None:
    """Processes that start, complete, skip and retry one step get answers that some order explains."""
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


@check("RUN-2", "RUN-1", "RUN-4", "CTL-2", needs=MULTI, kind=Kind.RACE, shares=True)
async def runs_by_processes(context: CheckContext) -> None:
    """Processes that end, cancel and time out one run get answers that some order explains."""
    await _race(context, ("starts_of_one_run", "late_starts", "ends", "expected_ends", "latches"))


@check("IDM-2", "IDM-3", needs=MULTI, kind=Kind.RACE, shares=True)
async def keys_by_processes(context: CheckContext) -> None:
    """Processes that register and trigger with one idempotency key get answers that some order explains."""
    await _race(context, ("keys", "triggers"))


@check("SIG-2", "SIG-3", "SIG-4", "RUN-4", needs=MULTI, kind=Kind.RACE, shares=True)
async def signals_by_processes(context: CheckContext) -> None:
    """Processes that deliver to the same waiters get answers that some order explains."""
    await _race(context, ("deliveries", "late_deliveries", "expiries"))


@check("CON-1", "EVT-1", "EVT-2", "RET-2", "RET-3", "IDM-4", needs=MULTI, kind=Kind.RACE)
async def anything_by_processes(context: CheckContext) -> None:
    """Processes that do anything to one run, and clean it up, get answers that some order explains."""
    await _race(context, ("anything", "events", "outputs", "cleanups", "cleanups_seen"))
