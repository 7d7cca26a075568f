"""Races within one process: between tasks that share a store under a drawn schedule, and between stores.

Each race family has two checks: ``<family>_by_tasks`` and ``<family>_by_stores``. Those of the pair families
race every pair of writing operations, or in the profile quick a share of the pairs that the seed selects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle

from flowstore_conformance.context import CheckContext, Inconclusive
from flowstore_conformance.race_families import PAIR_FAMILIES, RACE_FAMILIES, RaceBuilder, RaceFamily
from flowstore_conformance.race_families.pairs import Pair, cleanup_pairs, draw_pair, run_pairs
from flowstore_conformance.race_search import Budget, search
from flowstore_conformance.races import Race, Runner, StoreRunner
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, FlowStore

SIMILAR_FAMILIES = (
    ("claims", "claims_of_one_owner", "dispatches"),
    ("releases", "takeovers"),
    ("claimed_starts", "restarts"),
    ("attempts", "starts_under_claims", "starts_of_ended_steps"),
    ("completions", "skips"),
    ("retries", "reschedules"),
    ("starts_of_one_run", "keys", "triggers"),
    ("ends", "expected_ends", "late_starts"),
    ("latches", "tags"),
    ("deliveries", "late_deliveries", "expiries"),
    ("early_signals", "early_signals_at_the_end"),
    ("events", "outputs", "deleted_outputs"),
    ("queue_claims", "ended_leases", "redispatches"),
    ("joins", "last_advances"),
    ("cleanups", "cleanups_seen", "cleanup_pairs"),
    ("deletions", "deletions_seen"),
    ("imports", "imports_seen", "exports"),
    ("pairs",),
)
"""Families of which the profile quick races one, in one of its two checks."""
ROTATIONS = {name: f"races of {similar[0]}" for similar in SIMILAR_FAMILIES for name in similar}

MORE_PASSES = 8
"""How often pairs that did not overlap race again before the check is inconclusive."""
MAX_NAMED_PAIRS = 4


async def _stores(context: CheckContext) -> list[FlowStore]:
    stores = [context.store, *await context.other_stores(context.profile.of(1, 2, 3))]
    for store in stores:
        # Connect before the race, so that every store starts at the same time.
        await store.get_active_runs(take=1)
    return stores


def _by_tasks(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        budget = Budget(rounds=of(2, 8, 400), races=3, seconds=of(1, 4, 120))
        await search(context, family, StoreRunner([context.store], context.clock), budget)

    _register(family, "tasks", "between tasks of one store", race)


def _by_stores(family: RaceFamily) -> None:
    async def race(context: CheckContext) -> None:
        of = context.profile.of
        budget = Budget(rounds=of(2, 7, 400), races=of(3, 6, 8), seconds=of(1, 5, 120))
        await search(context, family, StoreRunner(await _stores(context), context.clock), budget)

    _register(family, "stores", "between stores of one namespace", race)


def _register(
    family: RaceFamily, name: str, where: str, race: Callable[[CheckContext], Awaitable[None]]
) -> None:
    race.__name__ = f"{family.name}_by_{name}"
    race.__doc__ = f"Races of {family.sentence} {where} have linearizable results."
    check(
        *family.clauses,
        needs=family.needs,
        kind=Kind.RACE,
        isolated=family.exclusive,
        rotation=ROTATIONS[family.name],
    )(race)


for _family in RACE_FAMILIES:
    if _family not in PAIR_FAMILIES:
        _by_tasks(_family)
        _by_stores(_family)


# Pairs


def _pairs_by_tasks(family: RaceFamily, pairs_of: Callable[[Collection[Capability]], Sequence[Pair]]) -> None:
    async def race(context: CheckContext) -> None:
        await _race_pairs(context, family, pairs_of, StoreRunner([context.store], context.clock))

    _register(family, "tasks", "between tasks of one store", race)


def _pairs_by_stores(
    family: RaceFamily, pairs_of: Callable[[Collection[Capability]], Sequence[Pair]]
) -> None:
    async def race(context: CheckContext) -> None:
        runner = StoreRunner(await _stores(context), context.clock)
        await _race_pairs(context, family, pairs_of, runner)

    _register(family, "stores", "between stores of one namespace", race)


async def _race_pairs(
    context: CheckContext,
    family: RaceFamily,
    pairs_of: Callable[[Collection[Capability]], Sequence[Pair]],
    runner: Runner,
) -> None:
    """Race pairs of operations until the calls of each have overlapped often enough."""
    of = context.profile.of
    every = pairs_of(context.capabilities)
    pairs = context.random.sample(every, len(every) // of(16, 1, 1))
    # A cleanup is in few pairs. It writes several times, and a fault shows only beside one of its writes.
    times = of(1, 2 if family.exclusive else 1, 20)
    overlaps, left = Counter[frozenset[str]](), pairs
    for _ in range(times + MORE_PASSES):
        racing = replace(family, draw=partial(_draw_next, cycle(left)))
        # The calls of the races of one round share the batches of a store that batches.
        races = 1 if family.exclusive else of(6, 8, 8)
        rounds = math.ceil(len(left) / races / (2 if family.exclusive else 1))
        tally = await search(context, racing, runner, Budget(rounds=rounds, races=races, seconds=math.inf))
        overlaps.update(tally.overlaps)
        left = [pair for pair in pairs if overlaps[frozenset(pair)] < times]
        if not left:
            break
    if missed := [pair for pair in pairs if not overlaps[frozenset(pair)]]:
        names = ", ".join(" and ".join(pair) for pair in missed[:MAX_NAMED_PAIRS])
        more = f" and {len(missed) - MAX_NAMED_PAIRS} more" if len(missed) > MAX_NAMED_PAIRS else ""
        raise Inconclusive(
            f"of {len(pairs)} pairs of writing operations {len(missed)} never ran concurrently: {names}{more}"
        )
    fewest = min(overlaps[frozenset(pair)] for pair in pairs)
    context.notes.append(
        f"{len(pairs)} of {len(every)} pairs of writing operations ran concurrently, "
        f"each at least {fewest} time{'s' if fewest > 1 else ''}"
    )


def _draw_next(pairs: Iterator[Pair], drawing: RaceBuilder) -> Race:
    return draw_pair(drawing, next(pairs))


for _family, _pairs_of in zip(PAIR_FAMILIES, (run_pairs, cleanup_pairs), strict=True):
    _pairs_by_tasks(_family, _pairs_of)
    _pairs_by_stores(_family, _pairs_of)
