"""A ledger of the acknowledged operations of clients, and its comparison with the store."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from flowstore_chaos.counts import Counts
from flowstore_core import FlowRunDetail, FlowStore, RunStatus, StepStatus

READERS = 16


@dataclass(slots=True)
class LedgerEntry:
    """The acknowledged operations on one run. None or a missing key means not acknowledged."""

    idempotency_key: str
    run_id: UUID | None = None
    flow_id: UUID | None = None
    claims: dict[str, str] = field(default_factory=dict)
    """The owner of each step's claim."""
    outputs: dict[str, str] = field(default_factory=dict)
    """The output with which each step was completed."""
    effects: dict[str, int] = field(default_factory=dict)
    """How often each step's work was executed."""
    values: dict[str, str] = field(default_factory=dict)
    """The values saved by save_output."""
    events: dict[str, int] = field(default_factory=dict)
    """Appended messages, each with its maximum number of copies; a lost reply may leave one more copy."""
    delivered: str | None = None
    """The payload of an acknowledged delivery."""
    buffered: set[str] = field(default_factory=set)
    """The payloads that were buffered, and that a waiter then took."""
    completed: bool = False


class Ledger:
    """The entries of all runs of the clients."""

    def __init__(self) -> None:
        self.entries: list[LedgerEntry] = []

    async def verify(self, store: FlowStore, counts: Counts) -> None:
        """Compare all entries with the store, and count lost, duplicate and wrong effects."""
        waiting = iter(self.entries)

        async def reader() -> None:
            for entry in waiting:
                await _verify_entry(store, counts, entry)

        await asyncio.gather(*(reader() for _ in range(READERS)))
        started = {entry.run_id for entry in self.entries if entry.run_id is not None}
        flows = {entry.flow_id for entry in self.entries if entry.flow_id is not None}
        total = sum([(await store.get_runs_page(flow_id=flow, take=1)).total_count for flow in flows])
        # An unacknowledged trigger may have started one more run.
        unacknowledged = [entry for entry in self.entries if entry.run_id is None]
        for _ in range(total - len(started) - len(unacknowledged)):
            counts.count_duplicate(f"there are {total} runs for {len(self.entries)} idempotency keys")


async def _verify_entry(store: FlowStore, counts: Counts, entry: LedgerEntry) -> None:
    if entry.run_id is None or entry.flow_id is None:
        return
    name = f"run {entry.run_id}"
    registered = await store.find_run_id_by_idempotency_key(entry.flow_id, "manual", entry.idempotency_key)
    if registered is None:
        counts.count_lost(f"{name}: its idempotency key is not registered")
    elif registered != entry.run_id:
        counts.count_wrong(f"{name}: its idempotency key belongs to a different run")
    detail = await store.get_run_detail(entry.run_id)
    if detail is None:
        counts.count_lost(f"{name} does not exist")
        return
    if entry.completed and detail.status is not RunStatus.SUCCEEDED:
        counts.count_lost(f"{name} was completed but is {detail.status}")
    _verify_steps(counts, name, entry, detail)
    claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(entry.run_id)}
    for key, owner in entry.claims.items():
        if claims.get(key) is None:
            counts.count_lost(f"{name}: the claim on {key!r} does not exist")
        elif claims[key] != owner:
            counts.count_duplicate(f"{name}: the claim on {key!r} has a different owner too")
    values = await store.get_outputs(entry.run_id)
    for key, value in entry.values.items():
        if values.get(key) != value:
            counts.count_lost(f"{name}: saved output {key!r} is missing")
    await _verify_events(store, counts, name, entry)
    waiters = await store.get_waiters(entry.run_id)
    payloads = [waiter.payload_json for waiter in waiters if waiter.delivered_at is not None]
    if entry.delivered is not None and entry.delivered not in payloads:
        counts.count_lost(f"{name}: its signal was delivered, but its waiter has a different payload or none")
    for payload in entry.buffered:
        if payload not in payloads:
            counts.count_lost(f"{name}: a signal was buffered, and no waiter took its payload")
        for _ in range(payloads.count(payload) - 1):
            counts.count_duplicate(f"{name}: several waiters took one buffered payload")


def _verify_steps(counts: Counts, name: str, entry: LedgerEntry, detail: FlowRunDetail) -> None:
    steps: Mapping[str, object] = {step.step_key: step for step in detail.steps}
    for key, executions in entry.effects.items():
        for _ in range(executions - 1):
            counts.count_duplicate(f"{name}: the work of {key!r} was executed {executions} times")
    for step in detail.steps:
        for _ in step.attempts[1:]:
            counts.count_duplicate(f"{name}: step {step.step_key!r} has {len(step.attempts)} attempts")
        output = entry.outputs.get(step.step_key)
        if output is not None and (step.status is not StepStatus.SUCCEEDED or step.output_json != output):
            counts.count_lost(
                f"{name}: step {step.step_key!r} was completed but is {step.status} or has a different output"
            )
    for key in entry.outputs.keys() - steps.keys():
        counts.count_lost(f"{name}: step {key!r} was completed but does not exist")


async def _verify_events(store: FlowStore, counts: Counts, name: str, entry: LedgerEntry) -> None:
    if not entry.events or entry.run_id is None:
        return
    messages = [event.message for event in await store.get_run_events(entry.run_id)]
    for message, limit in entry.events.items():
        count = messages.count(message)
        if not count:
            counts.count_lost(f"{name}: an event is missing")
        elif count > limit:
            counts.count_duplicate(f"{name}: an event exists {count} times, at most {limit} are explained")
