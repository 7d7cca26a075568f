"""Concurrent senders of one signal, with more or fewer waiters than senders (SIG-2, SIG-3)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID

from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.worker_pool import WorkerPool, serve_pool
from flowstore_core import (
    FlowSignalWaiter,
    FlowStore,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    new_run_id,
    open_store,
)

MAX_WAITERS = 5
MAX_SENDERS = 8
PROCESSES = 4
CONCURRENT_ROUNDS = 5
"""Number of concurrent rounds."""
ROUNDS_PER_RUN = 25
"""Number of rounds in one run, and in one request to the processes."""


class DoubleReadMutant:
    """A store that skips a waiter claimed by a concurrent sender and then reports NOT_FOUND."""

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
    """One signal with its numbers of waiters and senders."""

    name: str
    waiters: int
    senders: int
    repeats: bool
    """Whether each sender delivers twice concurrently with one delivery id, as after a lost reply."""

    def key(self, waiter: int) -> str:
        return f"{self.name}-{waiter}"


@dataclass(frozen=True, slots=True)
class DeliveryReply:
    """The result of one delivery."""

    sender: int
    status: str
    step_key: str | None


async def run(context: RunContext) -> None:
    # No server crashes in this scenario, and without fsync races are closer.
    async with context.store_url({"fsync": "off"}) as url, open_store(url) as store:
        # A memory store is local to its process: all rounds use tasks.
        half = context.planned if context.backend == "memory" else context.planned // 2
        sending: Any = DoubleReadMutant(store) if context.is_mutant else store
        for count in _batches(half):
            run_id, rounds = await _set_up(context, store, count)
            answers = await _send_all(sending, run_id, [(one, range(one.senders)) for one in rounds])
            await _verify(context, store, run_id, rounds, answers)
        if context.backend == "memory":
            return
        async with WorkerPool(__name__, PROCESSES, url=url, mutant=context.is_mutant) as pool:
            for count in _batches(context.planned - half):
                run_id, rounds = await _set_up(context, store, count)
                packed = {"run_id": str(run_id), "rounds": [asdict(one) for one in rounds]}
                replies = await pool.request_each(
                    [{**packed, "first": number} for number in range(PROCESSES)]
                )
                # Each reply holds the results of all rounds; regroup them by round.
                answers = [
                    [DeliveryReply(**result) for reply in replies for result in reply[at]]
                    for at in range(len(rounds))
                ]
                await _verify(context, store, run_id, rounds, answers)


def _batches(rounds: int) -> Sequence[int]:
    return [min(ROUNDS_PER_RUN, rounds - first) for first in range(0, rounds, ROUNDS_PER_RUN)]


async def _set_up(context: RunContext, store: FlowStore, count: int) -> tuple[UUID, list[Round]]:
    """Start a run and register all waiters."""
    run_id = new_run_id()
    await store.start_run(run_id, "waiters", run_id, "manual")
    rounds = [
        Round(
            f"signal-{number}",
            context.rng.randint(1, MAX_WAITERS),
            context.rng.randint(2, MAX_SENDERS),
            context.rng.random() < 0.25,
        )
        for number in range(count)
    ]
    # In sequence within a round, so that the first waiter is the oldest.
    for waiter in range(MAX_WAITERS):
        await asyncio.gather(
            *(
                store.register_waiter(run_id, one.key(waiter), one.name)
                for one in rounds
                if waiter < one.waiters
            )
        )
    context.counts.operations += sum(one.waiters for one in rounds)
    return run_id, rounds


async def _send_all(
    store: Any, run_id: UUID, rounds: Sequence[tuple[Round, Sequence[int]]]
) -> list[list[DeliveryReply]]:
    """Run the senders of some rounds, a few rounds concurrently."""
    answers: list[list[DeliveryReply]] = []
    for first in range(0, len(rounds), CONCURRENT_ROUNDS):
        some = rounds[first : first + CONCURRENT_ROUNDS]
        answers += await asyncio.gather(*(_send(store, run_id, one, senders) for one, senders in some))
    return answers


async def _send(store: Any, run_id: UUID, one: Round, senders: Sequence[int]) -> list[DeliveryReply]:
    """Run some of a round's senders concurrently, each with a distinct payload."""
    deliveries = [sender for sender in senders for _ in range(1 + one.repeats)]
    results: list[SignalDeliveryResult] = await asyncio.gather(
        *(
            store.deliver_signal(run_id, one.name, str(sender), delivery_id=f"{one.name}-{sender}")
            for sender in deliveries
        )
    )
    return [
        DeliveryReply(sender, result.status, result.step_key)
        for sender, result in zip(deliveries, results, strict=True)
    ]


async def _verify(
    context: RunContext,
    store: FlowStore,
    run_id: UUID,
    rounds: Sequence[Round],
    answers: Sequence[Sequence[DeliveryReply]],
) -> None:
    waiters = {waiter.step_key: waiter for waiter in await store.get_waiters(run_id)}
    for one, results in zip(rounds, answers, strict=True):
        _verify_round(context, one, results, waiters)
        context.counts.operations += len(results)
        context.record_faults()


def _verify_round(
    context: RunContext, one: Round, answers: Sequence[DeliveryReply], waiters: dict[str, FlowSignalWaiter]
) -> None:
    counts = context.counts
    what = f"with {one.waiters} waiters and {one.senders} senders"
    delivered: dict[int, str | None] = {}
    for answer in answers:
        if answer.status == SignalDeliveryStatus.NOT_FOUND:
            counts.count_wrong(f"{what} a delivery returned NOT_FOUND")
        elif answer.status == SignalDeliveryStatus.DELIVERED:
            if delivered.setdefault(answer.sender, answer.step_key) != answer.step_key:
                counts.count_duplicate(f"{what} one delivery id was delivered to two steps")
        elif answer.step_key != one.key(0):
            counts.count_wrong(f"{what} ALREADY_DELIVERED named step {answer.step_key!r}, not the oldest")
    payloads = [waiters[one.key(number)].payload_json for number in range(one.waiters)]
    given = [payload for payload in payloads if payload is not None]
    for _ in range(len(given) - len(set(given))):
        counts.count_duplicate(f"{what} one payload was delivered to two waiters")
    for sender, key in delivered.items():
        if key is None or key not in waiters or waiters[key].payload_json != str(sender):
            counts.count_lost(f"{what} the payload delivered to {key!r} is missing")
    wanted = min(one.waiters, one.senders)
    if len(delivered) != wanted:
        counts.count_wrong(f"{what} {len(delivered)} deliveries were acknowledged, not {wanted}")
    if [payload is not None for payload in payloads] != [at < wanted for at in range(one.waiters)]:
        counts.count_wrong(f"{what} the waiters with a payload are not the {wanted} oldest")


async def _send_part(store: Any, request: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Handle one request: run this process's senders of each round, in the same order as the others."""
    run_id, first = UUID(request["run_id"]), int(request["first"])
    rounds = [Round(**packed) for packed in request["rounds"]]
    mine = [(one, range(first, one.senders, PROCESSES)) for one in rounds]
    return [[asdict(answer) for answer in answers] for answers in await _send_all(store, run_id, mine)]


SCENARIO = FaultScenario(
    number=9,
    name="signal-races",
    fault=f"1 to {MAX_WAITERS} waiters and 2 to {MAX_SENDERS} concurrent senders of one signal: tasks, then "
    f"{PROCESSES} processes",
    unit="rounds",
    planned=5_000,
    min_faults=100,
    backends=("memory", "sqlite", "postgresql"),
    pass_criterion="min(waiters, senders) payloads are delivered, each once; none returns NOT_FOUND",
    mutant="a waiter claimed by a concurrent sender is skipped, and NOT_FOUND is returned",
    minutes=8,
    run=run,
)

if __name__ == "__main__":
    serve_pool(_send_part, DoubleReadMutant)
