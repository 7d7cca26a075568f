"""What the clients were told, and whether the store still says so."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from uuid import UUID

from flowstore_chaos.tally import Tally
from flowstore_core import FlowRunDetail, FlowStore, RunStatus, StepStatus

READERS = 16


@dataclass(slots=True)
class Entry:
    """What was acknowledged about one run. What is None or missing was not acknowledged."""

    idempotency_key: str
    run_id: UUID | None = None
    flow_id: UUID | None = None
    claims: dict[str, str] = field(default_factory=dict)
    """The owner that won each step."""
    outputs: dict[str, str] = field(default_factory=dict)
    """The output with which each step was completed."""
    effects: dict[str, int] = field(default_factory=dict)
    """How often each step's work was done."""
    values: dict[str, str] = field(default_factory=dict)
    """What was saved by save_output."""
    events: dict[str, int] = field(default_factory=dict)
    """Appended messages, and how often each may be there at most: a lost reply leaves one more."""
    delivered: str | None = None
    """The payload that a sender was told is delivered."""
    completed: bool = False


class Books:
    """The entries of all runs that clients worked on."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    async def verify(self, store: FlowStore, tally: Tally) -> None:
        """Compare every entry with what the store says, and count what is lost, twice or wrong."""
        waiting = iter(self.entries)

        async def reader() -> None:
            for entry in waiting:
                await _verify_entry(store, tally, entry)

        await asyncio.gather(*(reader() for _ in range(READERS)))
        started = {entry.run_id for entry in self.entries if entry.run_id is not None}
        flows = {entry.flow_id for entry in self.entries if entry.flow_id is not None}
        total = sum([(await store.get_runs_page(flow_id=flow, take=1)).total_count for flow in flows])
        # A client whose trigger was never answered may have started one more; its key tells.
        silent = [entry for entry in self.entries if entry.run_id is None]
        for _ in range(total - len(started) - len(silent)):
            tally.repeat(f"there are {total} runs for {len(self.entries)} idempotency keys")


async def _verify_entry(store: FlowStore, tally: Tally, entry: Entry) -> None:
    if entry.run_id is None or entry.flow_id is None:
        return
    name = f"run {entry.run_id}"
    registered = await store.find_run_id_by_idempotency_key(entry.flow_id, "manual", entry.idempotency_key)
    if registered is None:
        tally.lose(f"{name}: its idempotency key is not registered")
    elif registered != entry.run_id:
        tally.mistrust(f"{name}: its idempotency key gives another run")
    detail = await store.get_run_detail(entry.run_id)
    if detail is None:
        tally.lose(f"{name} is not there")
        return
    if entry.completed and detail.status is not RunStatus.SUCCEEDED:
        tally.lose(f"{name} was completed, and is {detail.status}")
    _verify_steps(tally, name, entry, detail)
    claims = {claim.step_key: claim.owner for claim in await store.get_step_claims(entry.run_id)}
    for key, owner in entry.claims.items():
        if claims.get(key) is None:
            tally.lose(f"{name}: the claim on {key!r} is not there")
        elif claims[key] != owner:
            tally.repeat(f"{name}: the claim on {key!r} is another's too")
    values = await store.get_outputs(entry.run_id)
    for key, value in entry.values.items():
        if values.get(key) != value:
            tally.lose(f"{name}: saved output {key!r} is not there")
    await _verify_events(store, tally, name, entry)
    if entry.delivered is not None:
        waiters = await store.get_waiters(entry.run_id)
        payloads = [waiter.payload_json for waiter in waiters if waiter.delivered_at is not None]
        if entry.delivered not in payloads:
            tally.lose(f"{name}: its signal was delivered, and its waiter has another payload or none")


def _verify_steps(tally: Tally, name: str, entry: Entry, detail: FlowRunDetail) -> None:
    steps: Mapping[str, object] = {step.step_key: step for step in detail.steps}
    for key, exact_times in entry.effects.items():
        for _ in range(exact_times - 1):
            tally.repeat(f"{name}: the work of {key!r} was done {exact_times} times")
    for step in detail.steps:
        for _ in step.attempts[1:]:
            tally.repeat(f"{name}: step {step.step_key!r} has {len(step.attempts)} attempts")
        output = entry.outputs.get(step.step_key)
        if output is not None and (step.status is not StepStatus.SUCCEEDED or step.output_json != output):
            tally.lose(
                f"{name}: step {step.step_key!r} was completed, and is {step.status} or has another output"
            )
    for key in entry.outputs.keys() - steps.keys():
        tally.lose(f"{name}: step {key!r} was completed, and is not there")


async def _verify_events(store: FlowStore, tally: Tally, name: str, entry: Entry) -> None:
    if not entry.events or entry.run_id is None:
        return
    messages = [event.message for event in await store.get_run_events(entry.run_id)]
    for message, most in entry.events.items():
        count = messages.count(message)
        if not count:
            tally.lose(f"{name}: an event is not there")
        elif count > most:
            tally.repeat(f"{name}: an event is there {count} times, and {most} can be explained")
