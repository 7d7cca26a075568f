"""Concurrent claims by tasks and processes: exactly one wins (CLM-1)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.worker_pool import WorkerPool, serve_pool
from flowstore_core import FlowStore, new_claim_token, new_run_id, open_store

CLAIMANTS = 8
PROCESSES = 4
LEASE = timedelta(minutes=5)
ROUNDS_PER_RUN = 50
"""Number of rounds in one run, and in one request to the processes."""


class CheckThenClaimMutant:
    """A store that checks for a claim and then claims without an atomic test."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def try_claim_step(self, run_id: UUID, step_key: str, **arguments: Any) -> bool:
        claimed = await self._store.get_claimed_step_keys(run_id)
        await asyncio.sleep(0)
        if step_key in claimed:
            return False
        await self._store.try_claim_step(run_id, step_key, **arguments)
        return True


async def run(context: RunContext) -> None:
    async with context.store_url() as url, open_store(url) as store:
        # A memory store is local to its process: all rounds use tasks.
        half = context.planned if context.backend == "memory" else context.planned // 2
        await _tasks(context, store, half)
        if context.backend != "memory":
            await _processes(context, store, url, context.planned - half)


async def _tasks(context: RunContext, store: FlowStore, rounds: int) -> None:
    claiming: Any = CheckThenClaimMutant(store) if context.is_mutant else store
    run_id = await _new_run(store)
    for number in range(rounds):
        key = f"task-{number}"
        tokens = [new_claim_token() for _ in range(CLAIMANTS)]
        won = await asyncio.gather(
            *(claiming.try_claim_step(run_id, key, owner=token, lease=LEASE) for token in tokens)
        )
        context.counts.operations += CLAIMANTS
        _verify(context, key, dict(zip(tokens, won, strict=True)), await _owner(store, run_id, key))
        if number % ROUNDS_PER_RUN == ROUNDS_PER_RUN - 1:
            run_id = await _new_run(store)


async def _processes(context: RunContext, store: FlowStore, url: str, rounds: int) -> None:
    async with WorkerPool(__name__, PROCESSES, url=url, mutant=context.is_mutant) as pool:
        for first in range(0, rounds, ROUNDS_PER_RUN):
            run_id = await _new_run(store)
            keys = [f"process-{number}" for number in range(first, min(rounds, first + ROUNDS_PER_RUN))]
            answers = await pool.request({"run_id": str(run_id), "keys": keys})
            claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
            for key in keys:
                won = {token: claimed for answer in answers for token, claimed in answer[key].items()}
                context.counts.operations += len(won)
                _verify(context, key, won, claims.get(key))


def _verify(context: RunContext, key: str, won: dict[str, bool], owner: str | None) -> None:
    winners = [token for token, claimed in won.items() if claimed]
    for _ in winners[1:]:
        context.counts.count_duplicate(
            f"step {key!r} was claimed by {len(winners)} of {len(won)} concurrent claimants"
        )
    if not winners:
        context.counts.count_wrong(f"step {key!r} was claimed by none of {len(won)} claimants")
    elif owner is None:
        context.counts.count_lost(f"the claim on step {key!r} was acknowledged and does not exist")
    elif owner not in winners:
        context.counts.count_wrong(
            f"the claim on step {key!r} is held by a claimant whose call returned False"
        )
    context.record_faults()


async def _new_run(store: FlowStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(run_id, "claim races", run_id, "manual")
    return run_id


async def _owner(store: FlowStore, run_id: UUID, key: str) -> str | None:
    return next((c.owner for c in await store.get_step_claims(run_id) if c.step_key == key), None)


async def _claim_all(store: Any, request: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """Handle one request: two claimants for each step, in the same order as the other processes."""
    run_id = UUID(request["run_id"])
    answer: dict[str, dict[str, bool]] = {}
    for key in request["keys"]:
        tokens = [new_claim_token() for _ in range(CLAIMANTS // PROCESSES)]
        won = await asyncio.gather(
            *(store.try_claim_step(run_id, key, owner=token, lease=LEASE) for token in tokens)
        )
        answer[key] = dict(zip(tokens, won, strict=True))
    return answer


SCENARIO = FaultScenario(
    number=8,
    name="claim-races",
    fault=f"{CLAIMANTS} concurrent claimants of one step: tasks, then {PROCESSES} processes",
    unit="rounds",
    planned=10_000,
    min_faults=100,
    backends=("memory", "sqlite", "postgresql"),
    pass_criterion="exactly one wins, and the store names it",
    mutant="the claim is checked first and then taken without an atomic test",
    minutes=5,
    run=run,
)

if __name__ == "__main__":
    serve_pool(_claim_all, CheckThenClaimMutant)
