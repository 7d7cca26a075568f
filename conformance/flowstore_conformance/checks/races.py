"""Races within one process: over tasks that share a store under a drawn schedule, and over several stores.

For each theme (see themes.py) there are two checks: ``<theme>_by_tasks`` and ``<theme>_by_stores``.
"""

from __future__ import annotations

from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.context import CheckContext
from flowstore_conformance.race_families import RACE_FAMILIES, RaceFamily
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.races import StoreRunner


def _by_tasks(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        effort = Budget(rounds=of(2, 12, 400), races=3, seconds=of(1, 4, 120))
        await search(context, family, StoreRunner([context.store], context.clock), effort)

    race.__name__ = f"{family.name}_by_tasks"
    race.__doc__ = f"Racing {family.sentence}: tasks that share a store get answers that some order explains."
    check(*family.clauses, needs=family.needs, kind=Kind.RACE, shares=not family.exclusive)(race)


def _by_stores(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        effort = Budget(rounds=of(2, 10, 400), races=of(3, 6, 8), seconds=of(1, 5, 120))
        stores = [context.store, *[await context.open() for _ in range(of(1, 2, 3))]]
        for store in stores:
            # Connected before the race, so that nobody is late.
            await store.get_active_runs(take=1)
        await search(context, family, StoreRunner(stores, context.clock), effort)

    race.__name__ = f"{family.name}_by_stores"
    race.__doc__ = f"Racing {family.sentence}: stores on one namespace give answers that some order explains."
    check(*family.clauses, needs=family.needs, kind=Kind.RACE, shares=not family.exclusive)(race)


for _family in RACE_FAMILIES:
    _by_tasks(_family)
    _by_stores(_family)
