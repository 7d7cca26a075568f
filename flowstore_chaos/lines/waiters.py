"""Many senders and few waiters of one signal at once, or few senders and many waiters (SIG-2, SIG-3)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from flowstore_chaos.line import Line
from flowstore_chaos.processes import Crew, serve_crew
from flowstore_chaos.trial import Trial
from flowstore_core import (
    FlowSignalWaiter,
    FlowStore,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    new_run_id,
    open_store,
)

MOST_WAITERS = 5
MOST_SENDERS = 8
PROCESSES = 4
AT_ONCE = 5
"""Rounds that go on side by side."""
BATCH = 25
"""Rounds that lie in one run, and that one message tells the processes of."""


class LooksTwice:
    """A store that skips a waiter that another sender is just taking, and then says that there is none."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def deliver_signal(
        self, run_id: UUID, signal_name: str, payload_json: str, **more: Any
    ) -> SignalDeliveryResult:
        waiters = await self._store.get_waiters(run_id)
        free = any(one.signal_name == signal_name and one.delivered_at is None for one in waiters)
        await asyncio.sleep(0)
        result = await self._store.deliver_signal(run_id, signal_name, payload_json, **more)
        if free and result.status is SignalDeliveryStatus.ALREADY_DELIVERED:
            return SignalDeliveryResult(
                status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None
            )
        return result


@dataclass(frozen=True, slots=True)
class Round:
    """One signal: so many wait for it and so many send it."""

    name: str
    waiters: int
    senders: int
    repeats: bool
    """Whether each sender says the same twice at once, under one delivery id, as after a lost reply."""

    def key(self, waiter: int) -> str:
        return f"{self.name}-{waiter}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a sender was told."""

    sender: int
    status: str
    step_key: str | None


async def run(trial: Trial) -> None:
    # Nothing crashes here, and races are no closer for waiting for a disk.
    async with trial.store_url({"fsync": "off"}) as url, open_store(url) as store:
        # In memory there are no other processes: all rounds are tasks'.
        half = trial.planned if trial.backend == "memory" else trial.planned // 2
        sending: Any = LooksTwice(store) if trial.broken else store
        for count in _batches(half):
            run_id, rounds = await _begin(trial, store, count)
            answers = await _send_all(sending, run_id, [(one, range(one.senders)) for one in rounds])
            await _judge(trial, store, run_id, rounds, answers)
        if trial.backend == "memory":
            return
        async with Crew(__name__, PROCESSES, url=url, broken=trial.broken) as crew:
            for count in _batches(trial.planned - half):
                run_id, rounds = await _begin(trial, store, count)
                told = {"run_id": str(run_id), "rounds": [asdict(one) for one in rounds]}
                said = await crew.ask_each([{**told, "first": number} for number in range(PROCESSES)])
                # Of each process the answers to each round.
                answers = [
                    [Answer(**answer) for process in said for answer in process[at]]
                    for at in range(len(rounds))
                ]
                await _judge(trial, store, run_id, rounds, answers)


def _batches(rounds: int) -> Sequence[int]:
    return [min(BATCH, rounds - first) for first in range(0, rounds, BATCH)]


async def _begin(trial: Trial, store: FlowStore, count: int) -> tuple[UUID, list[Round]]:
    """A new run in which everybody waits already."""
    run_id = new_run_id()
    await store.start_run(run_id, "waiters", run_id, "manual")
    rounds = [
        Round(
            f"signal-{number}",
            trial.rng.randint(1, MOST_WAITERS),
            trial.rng.randint(2, MOST_SENDERS),
            trial.rng.random() < 0.25,
        )
        for number in range(count)
    ]
    # One after the other within a round, so that the first is the oldest.
    for waiter in range(MOST_WAITERS):
        await asyncio.gather(
            *(
                store.register_waiter(run_id, one.key(waiter), one.name)
                for one in rounds
                if waiter < one.waiters
            )
        )
    trial.tally.operations += sum(one.waiters for one in rounds)
    return run_id, rounds


async def _send_all(
    store: Any, run_id: UUID, rounds: Sequence[tuple[Round, Sequence[int]]]
) -> list[list[Answer]]:
    """The senders of some rounds, a few rounds at once."""
    answers: list[list[Answer]] = []
    for first in range(0, len(rounds), AT_ONCE):
        some = rounds[first : first + AT_ONCE]
        answers += await asyncio.gather(*(_send(store, run_id, one, senders) for one, senders in some))
    return answers


async def _send(store: Any, run_id: UUID, one: Round, senders: Sequence[int]) -> list[Answer]:
    """Some of a round's senders, all at once; each sends a payload of its own."""
    saying = [sender for sender in senders for _ in range(1 + one.repeats)]
    results: list[SignalDeliveryResult] = await asyncio.gather(
        *(
            store.deliver_signal(run_id, one.name, str(sender), delivery_id=f"{one.name}-{sender}")
            for sender in saying
        )
    )
    return [
        Answer(sender, result.status, result.step_key) for sender, result in zip(saying, results, strict=True)
    ]


async def _judge(
    trial: Trial, store: FlowStore, run_id: UUID, rounds: Sequence[Round], answers: Sequence[Sequence[Answer]]
) -> None:
    waiters = {waiter.step_key: waiter for waiter in await store.get_waiters(run_id)}
    for one, said in zip(rounds, answers, strict=True):
        _judge_round(trial, one, said, waiters)
        trial.tally.operations += len(said)
        trial.landed()


def _judge_round(
    trial: Trial, one: Round, said: Sequence[Answer], waiters: dict[str, FlowSignalWaiter]
) -> None:
    tally = trial.tally
    what = f"with {one.waiters} waiters and {one.senders} senders"
    taken: dict[int, str | None] = {}
    for answer in said:
        if answer.status == SignalDeliveryStatus.NOT_FOUND:
            tally.mistrust(f"{what} one was told that nobody waits")
        elif answer.status == SignalDeliveryStatus.DELIVERED:
            if taken.setdefault(answer.sender, answer.step_key) != answer.step_key:
                tally.repeat(f"{what} one delivery id was delivered to two steps")
        elif answer.step_key != one.key(0):
            tally.mistrust(f"{what} the oldest delivered was said to be {answer.step_key!r}")
    payloads = [waiters[one.key(number)].payload_json for number in range(one.waiters)]
    given = [payload for payload in payloads if payload is not None]
    for _ in range(len(given) - len(set(given))):
        tally.repeat(f"{what} one payload was given to two waiters")
    for sender, key in taken.items():
        if key is None or key not in waiters or waiters[key].payload_json != str(sender):
            tally.lose(f"{what} a payload that was delivered to {key!r} is not there")
    wanted = min(one.waiters, one.senders)
    if len(taken) != wanted:
        tally.mistrust(f"{what} {len(taken)} were told that they delivered, not {wanted}")
    if [payload is not None for payload in payloads] != [at < wanted for at in range(one.waiters)]:
        tally.mistrust(f"{what} not just the {wanted} oldest have a payload")


async def _part(store: Any, asked: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """One process's senders of each round; all processes take the rounds in the same order."""
    run_id, first = UUID(asked["run_id"]), int(asked["first"])
    rounds = [Round(**told) for told in asked["rounds"]]
    mine = [(one, range(first, one.senders, PROCESSES)) for one in rounds]
    return [[asdict(answer) for answer in answers] for answers in await _send_all(store, run_id, mine)]


LINE = Line(
    number=9,
    name="waiters",
    fault=f"1 to {MOST_WAITERS} waiters and 2 to {MOST_SENDERS} senders of one signal at once: tasks, then "
    f"{PROCESSES} processes",
    unit="rounds",
    planned=5_000,
    least=100,
    backends=("memory", "sqlite", "postgresql"),
    passes_when="min(waiters, senders) are delivered, each once, and nobody is told that none waits",
    broken="a waiter that another sender is taking is skipped, and then none is found",
    minutes=8,
    run=run,
)

if __name__ == "__main__":
    serve_crew(_part, LooksTwice)
