"""A process that is killed while it writes: what it was told stays, what was under way is whole (CON-5)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from uuid import UUID

from flowstore_conformance import crash_child
from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.child_processes import start_module
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.history import Call
from flowstore_conformance.model import State
from flowstore_conformance.state_probe import (
    ModelState,
    Snapshot,
    describe_outcome,
    difference,
    find_partial_effect,
    observe_until,
    outcome_of,
    probe_calls,
)
from flowstore_conformance.traces import RemoteError
from flowstore_conformance.watchdog import Hang, Hung
from flowstore_core import Capability, FlowStore

WORKERS = 6
START_SECONDS = 60.0
"""How long a process may take to start and to open the store."""
ANSWER_SECONDS = 30.0


class Child:
    """A writing process, and what it said until it was killed."""

    def __init__(self, process: asyncio.subprocess.Process, seed: int, call_seconds: float) -> None:
        self._process = process
        self._call_seconds = call_seconds
        self.seed = seed
        self.acknowledged = [0] * WORKERS
        """How many calls of each worker returned; the next one may have been under way."""
        self.raised: tuple[int, int, RemoteError] | None = None
        """A worker, the number of a call of its script, and what it raised."""

    async def ready(self) -> None:
        assert self._process.stdout is not None
        try:
            seconds = START_SECONDS + self._call_seconds
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except TimeoutError:
            raise Inconclusive(f"no process opened the store within {START_SECONDS:.0f} s") from None
        _raise_hang(line)
        if line.startswith(b"refused "):
            told = line.decode().removeprefix("refused ").strip()
            message = f"a process of its own could not open the store: {told}"
            raise ContractViolation(message, clause="CON-6")
        if line.strip() != b"ready":
            raise Inconclusive("a process that should open the store ended before it had")

    async def write(self, calls: int, seconds: float) -> None:
        """Let it write until so many calls were acknowledged, and a moment longer, then kill it."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        try:
            # It tells by itself when a call hangs.
            await asyncio.wait_for(self._read(calls), ANSWER_SECONDS + self._call_seconds)
        except TimeoutError:
            if not any(self.acknowledged):
                raise Inconclusive("the process that should be killed was told nothing") from None
        await asyncio.sleep(seconds)
        await self.kill()
        await self._read(None)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _read(self, calls: int | None) -> None:
        """Read what was said: until so many calls, or to the end."""
        assert self._process.stdout is not None
        while calls is None or sum(self.acknowledged) < calls:
            line = await self._process.stdout.readline()
            # The last line may have been cut by the kill: what is not whole was not said.
            if not line.endswith(b"\n"):
                return
            _raise_hang(line)
            worker, number, *error = line.decode().split(maxsplit=3)
            if error:
                self.raised = self.raised or (
                    int(worker),
                    int(number),
                    RemoteError(error[0], **json.loads(error[1])),
                )
            else:
                self.acknowledged[int(worker)] = int(number) + 1


def _raise_hang(line: bytes) -> None:
    if line.startswith(b"hung "):
        raise Hung(Hang.from_json(line.decode().removeprefix("hung ")))


@asynccontextmanager
async def _child(context: CheckContext) -> AsyncIterator[Child]:
    seed = context.random.getrandbits(32)
    arguments = (context.url, str(seed), str(WORKERS), str(context.call_seconds))
    process = await start_module(crash_child.__name__, *arguments)
    child = Child(process, seed, context.call_seconds)
    try:
        yield child
    finally:
        await child.kill()


@check("CON-5", needs={Capability.MULTI_PROCESS}, kind=Kind.CRASH)
async def what_returned_survives_a_kill(context: CheckContext) -> None:
    """After a SIGKILL what was acknowledged is there, the rest whole or not at all, and the store works."""
    kills = context.profile.of(1, 4, 20)
    async with AsyncExitStack() as stack:
        children = [await stack.enter_async_context(_child(context)) for _ in range(min(kills, 4))]
        for number in range(kills):
            child = children[number] if number < 4 else await stack.enter_async_context(_child(context))
            await child.ready()
            await child.write(context.random.randrange(20, 150), context.random.random() * 0.03)
            if child.raised is not None:
                raise _raised(child, context.capabilities)
            # On its own clock, as the dead process was: steps are ordered by their start.
            store = await context.open(clock=None)
            scripts = [
                crash_child.script(child.seed, worker, context.capabilities) for worker in range(WORKERS)
            ]
            pairs = zip(scripts, child.acknowledged, strict=True)
            await asyncio.gather(*(_examine(context, store, script, count) for script, count in pairs))
            await _use(context, store)
            await store.aclose()


def _raised(child: Child, capabilities: Collection[Capability]) -> ContractViolation:
    assert child.raised is not None
    worker, number, error = child.raised
    call = next(islice(crash_child.script(child.seed, worker, capabilities), number, None))
    foreign = error.name.startswith("!")
    error.name = error.name.removeprefix("!")
    violation = ContractViolation(
        f"in a process of its own {call.method} raised {error.name}", clause="CON-2" if foreign else "CON-5"
    )
    violation.__cause__ = error
    return violation


async def _examine(context: CheckContext, store: FlowStore, script: Iterator[Call], count: int) -> None:
    """Hold every run of one worker against the model, the last one with and without the call under way."""
    runs: dict[UUID, list[Call]] = {}
    for call in islice(script, count):
        runs.setdefault(crash_child.run_of(call), []).append(call)
    under_way = next(script)
    last = crash_child.run_of(under_way)
    runs.setdefault(last, [])
    for run_id, calls in runs.items():
        before = ModelState(lambda: datetime.now(UTC), State())
        for call in calls:
            before = before.apply(call, exact_times=False)
        possible = [before]
        if run_id == last:
            possible.append(before.apply(under_way, exact_times=False))
        key = (crash_child.FLOW_ID, "manual", f"key of {run_id}")
        asked = probe_calls(run_id, context.capabilities, step_keys=("c",), keys=[key])
        context.assertions += len(calls)
        done = f"{len(calls)} calls on a run had returned"
        if run_id == last:
            done += f" and {under_way.method} was under way"
            half = await find_partial_effect(
                store, asked, under_way, before=before, possible=possible, exact_times=False
            )
        else:
            wanted: list[Snapshot] = [before.observe(asked, exact_times=False)]
            seen = await observe_until(store, asked, wanted, exact_times=False)
            half = None if seen in wanted else difference(asked, seen, wanted)
        if half is not None:
            raise ContractViolation(f"{done} when the process was killed: {half}")


async def _use(context: CheckContext, store: FlowStore) -> None:
    """A run from its beginning to its end, in the store that a dead process had open."""
    state = ModelState(lambda: datetime.now(UTC), State())
    calls = list(islice(crash_child.script(context.random.getrandbits(32), 0, context.capabilities), 12))
    run_id = crash_child.run_of(calls[0])
    for call in calls:
        if crash_child.run_of(call) == run_id:
            state = state.apply(call, exact_times=False)
            outcome, right = await outcome_of(store, call, exact_times=False), state.outcome
            context.assertions += 1
            if outcome != right and right is not None:
                told = f"gives {describe_outcome(outcome)}, where {describe_outcome(right)} is right"
                raise ContractViolation(f"after a kill {call.method} {told}")
