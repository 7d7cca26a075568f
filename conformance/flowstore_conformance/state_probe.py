"""Snapshots of one run on a store and on the model, which show whether a call had a partial effect."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from random import Random
from typing import Any
from uuid import UUID

from flowstore_conformance.diffing import brief, expected_and_got, plain
from flowstore_conformance.history import Call, Outcome, Raised, Returned, comparable, error_name
from flowstore_conformance.model import Model, State
from flowstore_core import Capability, FlowStore, FlowStoreError

SETTLE_SECONDS = 10.0
"""How long an unexpected snapshot must stay unchanged before it counts: a call may still be in flight."""
MAX_LATE_REPEATS = 3
"""How often a repeated call may meet a cancelled call that has not compensated yet."""

ALWAYS_PROBED = ("export_run", "get_step_claims", "get_dispatches", "find_run_id_by_idempotency_key")
"""The reads that every sample of probes has. An export shows no live claim, and no key of another run."""
SAMPLED_PROBES = 2
"""The number of other reads in a sample of probes."""
ROTATION = 3
"""One of so many other reads is made when probes take turns."""

Clock = Callable[[], datetime]
Snapshot = tuple[Any, ...]
"""The comparable results of the calls of probe_calls, in the same order."""


def reads_of_run(capabilities: Collection[Capability]) -> list[str]:
    """The names of the reads that show state of one run and need only its id, without ``export_run``."""
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
    if Capability.MAILBOX in capabilities:
        names.append("get_buffered_signals")
    if Capability.OUTPUTS in capabilities:
        names.append("get_outputs")
    if Capability.EVENTS in capabilities:
        names.append("get_run_events")
    return names


def probe_calls(
    run_id: UUID,
    capabilities: Collection[Capability],
    *,
    step_keys: Sequence[str] = (),
    keys: Sequence[tuple[UUID, str, str]] = (),
) -> tuple[Call, ...]:
    """Every read that shows state of one run; ``keys`` are idempotency keys that may refer to it."""
    of_run = {"run_id": run_id}
    names = reads_of_run(capabilities)
    if Capability.TRANSFER in capabilities:
        # Shows state that the other reads do not.
        names.append("export_run")
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


def sample_probes(
    probes: Sequence[Call],
    states: Sequence[ModelState],
    generator: Random,
    count: int = SAMPLED_PROBES,
) -> tuple[Call, ...]:
    """Those of ``probes`` that show most of the state of a run, and ``count`` that the generator draws.

    An export shows nearly all of the state in one read. Without an export, or if the run is not stored in one
    of the ``states``, before and after a call, returns all probes: an export does not show remains of a run.
    """
    exports = [one for one in probes if one.method == "export_run"]
    if not exports or any(state.observe(exports, exact_times=True) == (None,) for state in states):
        return tuple(probes)
    others = [one for one in probes if one.method not in ALWAYS_PROBED]
    sampled = generator.sample(others, min(count, len(others)))
    return tuple(one for one in probes if one.method in ALWAYS_PROBED or one in sampled)


def rotate_probes(probes: Sequence[Call], number: int) -> list[Call]:
    """Those of ``probes`` that show most of the state of a run, and every third of the others, in turn.

    Without an export, all.
    """
    if all(one.method != "export_run" for one in probes):
        return list(probes)
    turns = itertools.count(number)
    return [one for one in probes if one.method in ALWAYS_PROBED or next(turns) % ROTATION == 0]


async def invoke(store: FlowStore, call: Call) -> Any:
    """Make a call on a store."""
    return await getattr(store, call.method)(**call.arguments)


async def outcome_of(store: FlowStore, call: Call, *, exact_times: bool) -> Outcome:
    """Make a call and return its outcome; an error of the contract is an outcome."""
    try:
        return Returned(comparable(await invoke(store, call), exact_times=exact_times))
    except FlowStoreError as error:
        return Raised(error_name(error))


async def observe(store: FlowStore, probes: Sequence[Call], *, exact_times: bool) -> Snapshot:
    """Take a snapshot of a store. The reads are sequential, so nothing may write the run meanwhile."""
    return tuple([comparable(await invoke(store, call), exact_times=exact_times) for call in probes])


@dataclass(slots=True)
class ModelState:
    """A state that the store may have according to the model."""

    clock: Clock
    state: State
    outcome: Outcome | None = None
    """The outcome of the last applied call."""

    def apply(self, call: Call, *, exact_times: bool) -> ModelState:
        """Return the state after a call. Does not change this state."""
        following = ModelState(self.clock, self.state.copy())
        model = Model(self.clock, following.state)
        try:
            value = getattr(model, call.method)(**call.arguments)
            following.outcome = Returned(comparable(value, exact_times=exact_times))
        except FlowStoreError as error:
            following.outcome = Raised(error_name(error))
        return following

    def observe(self, probes: Sequence[Call], *, exact_times: bool) -> Snapshot:
        """Take a snapshot of this state."""
        model = Model(self.clock, self.state.copy())
        return tuple(
            comparable(getattr(model, call.method)(**call.arguments), exact_times=exact_times)
            for call in probes
        )


async def observe_until(
    store: FlowStore, probes: Sequence[Call], wanted: Collection[Snapshot], *, exact_times: bool
) -> Snapshot:
    """Take snapshots until one is among ``wanted``, or until another one is stable for SETTLE_SECONDS.

    A call whose caller was cancelled may still be in flight, which the contract allows; its effect must
    be whole.
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
    compensates: bool = False,
    probes_again: Sequence[Call] | None = None,
) -> str | None:
    """Describe a partial effect of a call with an unknown outcome; None if it had a whole or no effect.

    ``before`` is the state before the call, ``possible`` are the allowed states now. The call is then
    repeated: its outcome and its effect must follow from the state that the store is in. ``compensates``
    means that the call was cancelled and undoes its effect. ``probes_again`` are the probes after the
    repeated call, if they are not all.
    """
    wanted = [one.observe(probes, exact_times=exact_times) for one in possible]
    seen = await observe_until(store, probes, wanted, exact_times=exact_times)
    if seen not in wanted:
        return difference(probes, seen, wanted)
    # An effect that the snapshot does not show may still have been in flight to the server.
    again = [one.apply(call, exact_times=exact_times) for one in possible]
    right = [one.outcome for one in again]
    outcome = await outcome_of(store, call, exact_times=exact_times)
    for _ in range(MAX_LATE_REPEATS):
        if outcome in right or not compensates:
            break
        # The cancelled call may have won only now and be about to compensate, which equals no effect.
        if await observe_until(store, probes, wanted, exact_times=exact_times) not in wanted:
            break
        outcome = await outcome_of(store, call, exact_times=exact_times)
    if outcome not in right:
        only = " or ".join(dict.fromkeys(describe_outcome(one) for one in right if one is not None))
        return f"repeated, it returned {describe_outcome(outcome)} instead of {only}"
    if any(one is before for one in possible):
        again.append(before.apply(call, exact_times=exact_times).apply(call, exact_times=exact_times))
    probes = probes if probes_again is None else probes_again
    wanted = [one.observe(probes, exact_times=exact_times) for one in again]
    seen = await observe_until(store, probes, wanted, exact_times=exact_times)
    return None if seen in wanted else f"after repeating it, {difference(probes, seen, wanted)}"


def difference(probes: Sequence[Call], seen: Snapshot, wanted: Sequence[Snapshot]) -> str:
    """Describe how a snapshot differs from the nearest of the expected ones."""

    def wrong(sight: Snapshot) -> list[int]:
        return [number for number, answer in enumerate(seen) if answer != sight[number]]

    nearest = min(wanted, key=lambda sight: len(wrong(sight)))
    parts = [
        f"{probes[number].method}: {expected_and_got(nearest[number], seen[number])}"
        for number in wrong(nearest)
    ]
    return "; ".join(parts)


def describe_outcome(outcome: Outcome) -> str:
    """Describe an outcome in words."""
    if isinstance(outcome, Returned):
        return brief(plain(outcome.value))
    return outcome.error if isinstance(outcome, Raised) else "no answer, so its effect is unknown"
