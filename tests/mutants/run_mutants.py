"""Running the conformance suite on mutants."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowstore_conformance.checks.registry import Check, Kind
from flowstore_conformance.context import Profile
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from tests.mutants import Broken, all_mutants

DIST = Path(__file__).parent / "dist"
"""Holds the dist-info folder by which the plugin is found, as an installed one is."""
SEED = 20260314

# The cheapest look first.
_ORDER = (
    Kind.EXAMPLE,
    Kind.CAPABILITY,
    Kind.HOSTILE,
    Kind.SNAPSHOT,
    Kind.RACE,
    Kind.CANCELLATION,
    Kind.CRASH,
    Kind.MODEL,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """A check that found a mutant's bug."""

    mutant: str
    clause: str
    check: str
    kind: Kind
    profile: str
    message: str
    seconds: float


def load_plugin() -> None:
    """Let this process find the mutants's plugin."""
    if str(DIST) not in sys.path:
        sys.path.insert(0, str(DIST))


async def kills_of(
    mutant: Broken,
    base_url: str,
    *,
    profile: Profile,
    clauses: Collection[str] = (),
    seed: int = SEED,
) -> AsyncIterator[Kill]:
    """Every check of some clauses, or of all, that a mutant fails, as it fails it."""
    for check in _ordered(select_checks(clauses)):
        result = await _run(check, mutant, base_url, profile, seed)
        failure = result.failure
        if result.status is Status.FAIL and failure is not None:
            yield Kill(
                mutant=mutant.name,
                clause=failure.clause,
                check=check.name,
                kind=check.kind,
                profile=profile.value,
                message=failure.message,
                seconds=result.seconds,
            )


async def find_kill(mutant: Broken, base_url: str) -> Kill | None:
    """The first check that names the mutant's own clause: a quick look, then the standard one."""
    where = [mutant.clause, *mutant.look_at]
    for profile in (Profile.QUICK, Profile.STANDARD):
        async for kill in kills_of(mutant, base_url, profile=profile, clauses=where):
            if kill.clause == mutant.clause:
                return kill
    return None


async def _run(check: Check, mutant: Broken, base_url: str, profile: Profile, seed: int) -> CheckResult:
    scheme = f"broken-{mutant.name}"
    url = f"{scheme}://{base_url.partition('://')[2]}"
    _, backend = find_backend(scheme)
    before = asyncio.all_tasks()
    result = await run_check(check, url, backend, profile, seed)
    # What a mutant left running must not run into the next check.
    for task in asyncio.all_tasks() - before:
        task.cancel()
    return result


def _ordered(checks: Sequence[Check]) -> Sequence[Check]:
    return sorted(checks, key=lambda check: (_ORDER.index(check.kind), check.name))


def run_mutant(name: str, base_url: str, profile: str, *, own: bool) -> list[Kill]:
    """All kills of one mutant, for a process of its own; ``own`` runs the checks of its clause alone."""
    load_plugin()
    mutant = all_mutants()[name]

    async def every() -> list[Kill]:
        if own:
            kill = await find_kill(mutant, base_url)
            return [] if kill is None else [kill]
        return [kill async for kill in kills_of(mutant, base_url, profile=Profile(profile))]

    return asyncio.run(every())
