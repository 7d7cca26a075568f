"""All that can be seen of one run, on a store and on the model: did a call happen, did it not, or half?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_conformance.diffing import brief, expected_and_got, plain
from flowstore_conformance.history import Call, Outcome, Raised, Returned, comparable, error_name
from flowstore_conformance.model import Model, State
from flowstore_core import Capability, FlowStore, FlowStoreError

SETTLE_SECONDS = 4.0
"""How long a wrong sight must stay as it is to be believed: a call may still have been on its way."""
MAX_LATE_REPEATS = 3
"""So often a call may find that the one before it, which was cancelled, has still to give back."""

Clock = Callable[[], datetime]
Snapshot = tuple[Any, ...]
"""The answers to the questions of what_to_ask, comparable, in the same order."""


def probe_calls(
    run_id: UUID,
    capabilities: Collection[Capability],
    *,
    step_keys: Sequence[str] = (),
    keys: Sequence[tuple[UUID, str, str]] = (),
) -> tuple[Call, ...]:
    """Every read that tells something about one run; ``keys`` are idempotency keys that may lead to it."""
    of_run = {"run_id": run_id}
    names = [
        "get_run_detail",
        "get_run_status",
        "get_step_statuses",
        "get_step_claims",
        "get_claimed_step_keys",
        "get_dispatches",
        "get_dispatched_step_keys",
        "get_run_control",
    ]
    if Capability.WAITERS in capabilities:
        names.append("get_waiters")
    if Capability.OUTPUTS in capabilities:
        names.append("get_outputs")
    if Capability.EVENTS in capabilities:
        names.append("get_run_events")
    probes = [Call(method=name, arguments=of_run) for name in names]
    if Capability.WAITERS not in capabilities:
        probes += [Call(method="get_waiter", arguments={**of_run, "step_key": key}) for key in step_keys]
    probes += [
        Call(
            method="find_run_id_by_idempotency_key",
            arguments={"flow_id": flow_id, "trigger_key": trigger_key, "idempotency_key": key},
        )
        for flow_id, trigger_key, key in keys
    ]
    return tuple(probes)


async def invoke(store: FlowStore, call: Call) -> Any:
    """Make a call on a store."""
    return await getattr(store, call.method)(**call.arguments)


async def outcome_of(store: FlowStore, call: Call, *, exact_times: bool) -> Outcome:
    """Make a call and give what it answered, an error of the contract included."""
    try:
        return Returned(comparable(await invoke(store, call), exact_times=exact_times))
    except FlowStoreError as error:
        return Raised(error_name(error))


async def observe(store: FlowStore, probes: Sequence[Call], *, exact_times: bool) -> Snapshot:
    """What a store shows. The reads follow each other, so look while nothing else moves the run."""
    return tuple([comparable(await invoke(store, call), exact_times=exact_times) for call in probes])


@dataclass(slots=True)
class ModelState:
    """A state that the store may be in, according to the model."""

    clock: Clock
    state: State
    outcome: Outcome | None = None
    """Of the last call that was made on it."""

    def apply(self, call: Call, *, exact_times: bool) -> ModelState:
        """The state after a call; this one stays as it is."""
        following = copy(self)
        following.state = self.state.copy()
        model = Model(self.clock, following.state)
        try:
            value = getattr(model, call.method)(**call.arguments)
            following.outcome = Returned(comparable(value, exact_times=exact_times))
        except FlowStoreError as error:
            following.outcome = Raised(error_name(error))
        return following

    def observe(self, probes: Sequence[Call], *, exact_times: bool) -> Snapshot:
        """What the model shows in this state."""
        model = Model(self.clock, self.state.copy())
        return tuple(
            comparable(getattr(model, call.method)(**call.arguments), exact_times=exact_times)
            for call in probes
        )


async def observe_until(
    store: FlowStore, probes: Sequence[Call], wanted: Collection[Snapshot], *, exact_times: bool
) -> Snapshot:
    """Look again and again until one of the wanted sights is seen, or a wrong one does not change any more.

    A call whose caller has gone may still be under way, which is allowed; what it leaves must be whole.
    """
    loop = asyncio.get_running_loop()
    since = loop.time()
    before: Snapshot | None = None
    pause = 0.002
    while True:
        seen = await observe(store, probes, exact_times=exact_times)
        if seen in wanted:
            return seen
        if seen != before:
            before, since = seen, loop.time()
        elif loop.time() - since > SETTLE_SECONDS:
            return seen
        await asyncio.sleep(pause)
        pause = min(pause * 2, 0.1)


async def find_partial_effect(
    store: FlowStore,
    probes: Sequence[Call],
    call: Call,
    *,
    before: ModelState,
    possible: Sequence[ModelState],
    exact_times: bool,
) -> str | None:
    """What shows that a call of unknown outcome was neither whole nor undone; None if it was one of them.

    ``before`` is the state that it found, ``possible`` are those that may be now. Then the call is
    made again, and must be answered, and change the store, as the state demands in which it is.
    """
    wanted = [one.observe(probes, exact_times=exact_times) for one in possible]
    seen = await observe_until(store, probes, wanted, exact_times=exact_times)
    if seen not in wanted:
        return difference(probes, seen, wanted)
    # What had not happened when we looked may still have been on its way to the server.
    again = [one.apply(call, exact_times=exact_times) for one in possible]
    right = [one.outcome for one in again]
    outcome = await outcome_of(store, call, exact_times=exact_times)
    for _ in range(MAX_LATE_REPEATS):
        if outcome in right or any(one is not before for one in possible):
            break
        # It may have won only now, behind our back, and be about to give back; then it is as if it had not.
        if await observe_until(store, probes, wanted, exact_times=exact_times) not in wanted:
            break
        outcome = await outcome_of(store, call, exact_times=exact_times)
    if outcome not in right:
        only = " or ".join(dict.fromkeys(answer(one) for one in right if one is not None))
        return f"said again it gives {answer(outcome)}, where only {only} is right"
    if any(one is before for one in possible):
        again.append(before.apply(call, exact_times=exact_times).apply(call, exact_times=exact_times))
    wanted = [one.observe(probes, exact_times=exact_times) for one in again]
    seen = await observe_until(store, probes, wanted, exact_times=exact_times)
    return None if seen in wanted else f"after saying it again {difference(probes, seen, wanted)}"


def difference(probes: Sequence[Call], seen: Snapshot, wanted: Sequence[Snapshot]) -> str:
    """Where the answers differ from the nearest of the wanted sights."""

    def wrong(sight: Snapshot) -> list[int]:
        return [number for number, answer in enumerate(seen) if answer != sight[number]]

    nearest = min(wanted, key=lambda sight: len(wrong(sight)))
    parts = [
        f"{probes[number].method}: {expected_and_got(nearest[number], seen[number])}"
        for number in wrong(nearest)
    ]
    return "; ".join(parts)


def answer(outcome: Outcome) -> str:
    """An outcome in words."""
    if isinstance(outcome, Returned):
        return brief(plain(outcome.value))
    return outcome.error if isinstance(outcome, Raised) else "no answer, so it may have happened or not"
