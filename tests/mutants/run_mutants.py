"""Running the conformance suite on mutants."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowstore_conformance.context import Profile
from flowstore_conformance.registry import Check, Kind
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status
from flowstore_conformance.suite import run_check, select_checks

from flowstore_core.plugins import find_backend
from tests.mutants import Mutant, all_mutants

DIST = Path(__file__).parent / "dist"
"""Contains a dist-info folder, so that the plugin is found like an installed one."""
SEED = 20260314
RACE_SEEDS = 5
"""Seeds with which a known check tries to find a race: whether calls overlap depends on the machine too."""

# Cheap checks first.
_ORDER = (
    Kind.EXAMPLE,
    Kind.CAPABILITY,
    Kind.HOSTILE,
    Kind.SNAPSHOT,
    Kind.VOLUME,
    Kind.RACE,
    Kind.CANCELLATION,
    Kind.CRASH,
    Kind.FAULT,
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
    """Make the plugin of the mutants visible to this process."""
    if str(DIST) not in sys.path:
        sys.path.insert(0, str(DIST))


async def kills_of(
    mutant: Mutant,
    base_url: str,
    *,
    profile: Profile,
    clauses: Collection[str] = (),
    names: Collection[str] = (),
    seed: int = SEED,
) -> AsyncIterator[Kill]:
    """Yield every failure of a mutant in the checks of some clauses, or with some names, or in all."""
    for check in ordered(select_checks(clauses)):
        if names and check.name not in names:
            continue
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


async def find_kill(
    mutant: Mutant, base_url: str, *, known: tuple[str, Profile] | None = None
) -> Kill | None:
    """Return the first failure that reports the mutant's clause: quick profile first, then standard.

    ``known``: a check that found the mutant before and its profile, which are tried first; a race is tried
    with several seeds.
    """
    clauses = [mutant.clause, *mutant.more_clauses]
    if known is not None:
        name, profile = known
        for seed in range(SEED, SEED + (RACE_SEEDS if mutant.concurrent else 1)):
            async for kill in kills_of(
                mutant, base_url, profile=profile, clauses=clauses, names=[name], seed=seed
            ):
                if kill.clause == mutant.clause:
                    return kill
    for profile in (Profile.QUICK, Profile.STANDARD):
        async for kill in kills_of(mutant, base_url, profile=profile, clauses=clauses):
            if kill.clause == mutant.clause:
                return kill
    return None


async def _run(check: Check, mutant: Mutant, base_url: str, profile: Profile, seed: int) -> CheckResult:
    scheme = f"mutant-{mutant.name}"
    url = f"{scheme}://{base_url.partition('://')[2]}"
    _, backend = find_backend(scheme)
    before = asyncio.all_tasks()
    result = await run_check(check, url, backend, profile, seed)
    # Tasks that the mutant leaked must not run during the next check.
    for task in asyncio.all_tasks() - before:
        task.cancel()
    return result


def ordered(checks: Sequence[Check]) -> Sequence[Check]:
    """The cheapest kinds of check first."""
    return sorted(checks, key=lambda check: (_ORDER.index(check.kind), check.name))


def run_mutant(name: str, base_url: str, profile: str, *, own: bool) -> list[Kill]:
    """Return all kills of one mutant; run in a worker process. ``own`` runs only the checks of its clause."""
    load_plugin()
    mutant = all_mutants()[name]

    async def collect() -> list[Kill]:
        if own:
            kill = await find_kill(mutant, base_url)
            return [] if kill is None else [kill]
        return [kill async for kill in kills_of(mutant, base_url, profile=Profile(profile))]

    return asyncio.run(collect())
