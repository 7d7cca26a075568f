"""Races within one process: between tasks that share a store under a drawn schedule, and between stores.

Each race family has two checks: ``<family>_by_tasks`` and ``<family>_by_stores``.
"""

from __future__ import annotations

from flowstore_conformance.context import CheckContext
from flowstore_conformance.race_families import RACE_FAMILIES, RaceFamily
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.races import StoreRunner
from flowstore_conformance.registry import Kind, check


def _by_tasks(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        budget = Budget(rounds=of(2, 12, 400), races=3, seconds=of(1, 4, 120))
        await search(context, family, StoreRunner([context.store], context.clock), budget)

    race.__name__ = f"{family.name}_by_tasks"
    race.__doc__ = f"Races of {family.sentence} between tasks of one store have linearizable results."
    check(*family.clauses, needs=family.needs, kind=Kind.RACE, isolated=family.exclusive)(race)


def _by_stores(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        budget = Budget(rounds=of(2, 10, 400), races=of(3, 6, 8), seconds=of(1, 5, 120))
        stores = [context.store, *[await context.open() for _ in range(of(1, 2, 3))]]
        for store in stores:
            # Connect before the race, so that every store starts at the same time.
            await store.get_active_runs(take=1)
        await search(context, family, StoreRunner(stores, context.clock), budget)

    race.__name__ = f"{family.name}_by_stores"
    race.__doc__ = f"Races of {family.sentence} between stores of one namespace have linearizable results."
    check(*family.clauses, needs=family.needs, kind=Kind.RACE, isolated=family.exclusive)(race)


for _family in RACE_FAMILIES:
    _by_tasks(_family)
    _by_stores(_family)
