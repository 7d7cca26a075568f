"""Many claimants at once, tasks and processes: exactly one of them wins (CLM-1)."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_chaos.line import Line
from flowstore_chaos.processes import Crew, serve_crew
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStore, new_claim_token, new_run_id, open_store

CLAIMANTS = 8
PROCESSES = 4
LEASE = timedelta(minutes=5)
BATCH = 50
"""Rounds that one message tells the processes of."""


class LooksFirst:
    """A store that looks whether a step is claimed, and then takes it without asking again."""

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


async def run(trial: Trial) -> None:
    async with trial.store_url() as url, open_store(url) as store:
        # In memory there are no other processes: all rounds are tasks'.
        half = trial.planned if trial.backend == "memory" else trial.planned // 2
        await _tasks(trial, store, half)
        if trial.backend != "memory":
            await _processes(trial, store, url, trial.planned - half)


async def _tasks(trial: Trial, store: FlowStore, rounds: int) -> None:
    claiming: Any = LooksFirst(store) if trial.broken else store
    run_id = await _new_run(store)
    for number in range(rounds):
        key = f"task-{number}"
        tokens = [new_claim_token() for _ in range(CLAIMANTS)]
        won = await asyncio.gather(
            *(claiming.try_claim_step(run_id, key, owner=token, lease=LEASE) for token in tokens)
        )
        trial.tally.operations += CLAIMANTS
        _judge(trial, key, dict(zip(tokens, won, strict=True)), await _owner(store, run_id, key))
        if number % BATCH == BATCH - 1:
            run_id = await _new_run(store)


async def _processes(trial: Trial, store: FlowStore, url: str, rounds: int) -> None:
    async with Crew(__name__, PROCESSES, url=url, broken=trial.broken) as crew:
        for first in range(0, rounds, BATCH):
            run_id = await _new_run(store)
            keys = [f"process-{number}" for number in range(first, min(rounds, first + BATCH))]
            answers = await crew.ask({"run_id": str(run_id), "keys": keys})
            claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
            for key in keys:
                won = {token: mine for answer in answers for token, mine in answer[key].items()}
                trial.tally.operations += len(won)
                _judge(trial, key, won, claims.get(key))


def _judge(trial: Trial, key: str, won: dict[str, bool], owner: str | None) -> None:
    winners = [token for token, mine in won.items() if mine]
    for _ in winners[1:]:
        trial.tally.repeat(f"step {key!r} was given to {len(winners)} of {len(won)} claimants at once")
    if not winners:
        trial.tally.mistrust(f"step {key!r} was given to none of {len(won)} claimants")
    elif owner is None:
        trial.tally.lose(f"the claim on step {key!r} was acknowledged and is not there")
    elif owner not in winners:
        trial.tally.mistrust(f"the claim on step {key!r} is held by one who was told that it is not")
    trial.landed()


async def _new_run(store: FlowStore) -> UUID:
    run_id = new_run_id()
    await store.start_run(run_id, "claim races", run_id, "manual")
    return run_id


async def _owner(store: FlowStore, run_id: UUID, key: str) -> str | None:
    return next((c.owner for c in await store.get_step_claims(run_id) if c.step_key == key), None)


async def _claim(store: Any, asked: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """One process's part: two claimants for each step, all steps in the same order as the others."""
    run_id = UUID(asked["run_id"])
    answer: dict[str, dict[str, bool]] = {}
    for key in asked["keys"]:
        tokens = [new_claim_token() for _ in range(CLAIMANTS // PROCESSES)]
        won = await asyncio.gather(
            *(store.try_claim_step(run_id, key, owner=token, lease=LEASE) for token in tokens)
        )
        answer[key] = dict(zip(tokens, won, strict=True))
    return answer


LINE = Line(
    number=8,
    name="claim-races",
    fault=f"{CLAIMANTS} claimants of one step at once: tasks, then {PROCESSES} processes",
    unit="rounds",
    planned=10_000,
    least=100,
    backends=("memory", "sqlite", "postgresql"),
    passes_when="exactly one wins, and the store names it",
    broken="the claim is looked for first, and taken without asking again",
    minutes=5,
    run=run,
)

if __name__ == "__main__":
    serve_crew(_claim, LooksFirst)
