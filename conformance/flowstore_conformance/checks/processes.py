"""Races between operating-system processes, each with a store of its own on one namespace.

Starting processes costs more than racing, so one check races several themes with one crew, and checks in
one namespace share it; a violation names the clause of its theme.
"""

from __future__ import annotations

from collections.abc import Collection

from flowstore_conformance.bench import Bench
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.crew import open_crew
from flowstore_conformance.hunting import Effort, hunt
from flowstore_conformance.themes import THEMES
from flowstore_core import Capability

MULTI = [Capability.MULTI_PROCESS]


async def _race(bench: Bench, names: Collection[str]) -> None:
    of = bench.profile.of
    effort = Effort(volleys=of(1, 5, 200), races=of(6, 8, 10), seconds=of(1, 4, 60))
    async with open_crew(bench, of(2, 3, 4)) as crew:
        for theme in THEMES:
            if theme.name in names and theme.needs <= bench.capabilities:
                await hunt(bench, theme, crew, effort)


@check("CLM-1", "CLM-2", "CLM-3", "CLM-5", "CLM-6", needs=MULTI, kind=Kind.RACE, shares=True)
async def claims_by_processes(bench: Bench) -> None:
    """Processes that race for claims, expired leases and dispatches get answers that some order explains."""
    await _race(bench, ("claims", "releases", "claims_of_one_owner", "takeovers", "dispatches"))


@check(
    "STP-1", "STP-2", "STP-3", "STP-4", "STP-5", "STP-6", "STP-7", needs=MULTI, kind=Kind.RACE, shares=True
)
async def steps_by_processes(bench: Bench) -> None:
    """Processes that start, complete, skip and retry one step get answers that some order explains."""
    await _race(
        bench,
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
async def runs_by_processes(bench: Bench) -> None:
    """Processes that end, cancel and time out one run get answers that some order explains."""
    await _race(bench, ("starts_of_one_run", "late_starts", "ends", "expected_ends", "latches"))


@check("IDM-2", "IDM-3", needs=MULTI, kind=Kind.RACE, shares=True)
async def keys_by_processes(bench: Bench) -> None:
    """Processes that register and trigger with one idempotency key get answers that some order explains."""
    await _race(bench, ("keys", "triggers"))


@check("SIG-2", "SIG-3", "SIG-4", "RUN-4", needs=MULTI, kind=Kind.RACE, shares=True)
async def signals_by_processes(bench: Bench) -> None:
    """Processes that deliver to the same waiters get answers that some order explains."""
    await _race(bench, ("deliveries", "late_deliveries", "expiries"))


@check("CON-1", "EVT-1", "EVT-2", "RET-2", "RET-3", "IDM-4", needs=MULTI, kind=Kind.RACE)
async def anything_by_processes(bench: Bench) -> None:
    """Processes that do anything to one run, and clean it up, get answers that some order explains."""
    await _race(bench, ("anything", "events", "outputs", "cleanups", "cleanups_seen"))
