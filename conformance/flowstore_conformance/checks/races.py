"""Races within one process: over tasks that share a store under a drawn schedule, and over several stores.

For each theme (see themes.py) there are two checks: ``<theme>_by_tasks`` and ``<theme>_by_stores``.
"""

from __future__ import annotations

from flowstore_conformance.bench import Bench
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.hunting import Effort, hunt
from flowstore_conformance.racing import StoreRunner
from flowstore_conformance.themes import THEMES, Theme


def _by_tasks(theme: Theme) -> None:
    async def race(bench: Bench) -> None:
        of = bench.profile.of
        effort = Effort(volleys=of(2, 12, 400), races=3, seconds=of(1, 4, 120))
        await hunt(bench, theme, StoreRunner([bench.store], bench.clock), effort)

    race.__name__ = f"{theme.name}_by_tasks"
    race.__doc__ = f"Racing {theme.sentence}: tasks that share a store get answers that some order explains."
    check(*theme.clauses, needs=theme.needs, kind=Kind.RACE, shares=not theme.alone)(race)


def _by_stores(theme: Theme) -> None:
    async def race(bench: Bench) -> None:
        of = bench.profile.of
        effort = Effort(volleys=of(2, 10, 400), races=of(3, 6, 8), seconds=of(1, 5, 120))
        stores = [bench.store, *[await bench.open() for _ in range(of(1, 2, 3))]]
        for store in stores:
            # Connected before the race, so that nobody is late.
            await store.get_active_runs(take=1)
        await hunt(bench, theme, StoreRunner(stores, bench.clock), effort)

    race.__name__ = f"{theme.name}_by_stores"
    race.__doc__ = f"Racing {theme.sentence}: stores on one namespace give answers that some order explains."
    check(*theme.clauses, needs=theme.needs, kind=Kind.RACE, shares=not theme.alone)(race)


for _theme in THEMES:
    _by_tasks(_theme)
    _by_stores(_theme)
