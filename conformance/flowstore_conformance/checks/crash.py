"""CON-5: acknowledged writes survive the kill of their process; the calls in flight are atomic."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from itertools import islice
from uuid import UUID

from flowstore_conformance import crash_child
from flowstore_conformance.child_processes import start_module
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.history import Call
from flowstore_conformance.model import State
from flowstore_conformance.registry import Kind, check
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
START_TIMEOUT = 60.0
"""Seconds in which a process must start and open the store."""
WRITE_TIMEOUT = 30.0


class Child:
    """A writing process and its acknowledgements."""

    def __init__(self, process: asyncio.subprocess.Process, seed: int, call_seconds: float) -> None:
        self._process = process
        self._call_seconds = call_seconds
        self.seed = seed
        self.acknowledged = [0] * WORKERS
        """The number of returned calls of each worker; the next call may be in flight."""
        self.raised: tuple[int, int, RemoteError] | None = None
        """The worker, the number of the call in its script, and the error."""

    async def ready(self) -> None:
        """Wait until the process has opened the store."""
        assert self._process.stdout is not None
        try:
            seconds = START_TIMEOUT + self._call_seconds
            line = await asyncio.wait_for(self._process.stdout.readline(), seconds)
        except TimeoutError:
            raise Inconclusive(f"no process opened the store within {START_TIMEOUT:.0f} s") from None
        _raise_hang(line)
        if line.startswith(b"refused "):
            reason = line.decode().removeprefix("refused ").strip()
            message = f"another process could not open the store: {reason}"
            raise ContractViolation(message, clause="CON-6")
        if line.strip() != b"ready":
            raise Inconclusive("the process ended before it had opened the store")

    async def write(self, calls: int, seconds: float) -> None:
        """Let the process write until a number of calls is acknowledged and a delay has passed, then kill
        it."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        try:
            # The process itself reports a hanging call.
            await asyncio.wait_for(self._read(calls), WRITE_TIMEOUT + self._call_seconds)
        except TimeoutError:
            if not any(self.acknowledged):
                raise Inconclusive("no call of the process returned before the kill") from None
        await asyncio.sleep(seconds)
        await self.kill()
        await self._read(None)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def _read(self, calls: int | None) -> None:
        """Read acknowledgements up to a number of calls, or to the end of the output."""
        assert self._process.stdout is not None
        while calls is None or sum(self.acknowledged) < calls:
            line = await self._process.stdout.readline()
            # The kill may have truncated the last line; an incomplete line acknowledges nothing.
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


@check("CON-5", needs={Capability.MULTI_PROCESS}, kind=Kind.CRASH, rotation="processes")
async def acknowledged_writes_survive_a_kill(context: CheckContext) -> None:
    """After a SIGKILL acknowledged writes persist, calls in flight are atomic, and the store works."""
    kills = context.profile.of(1, 4, 20)
    async with AsyncExitStack() as stack:
        children = [await stack.enter_async_context(_child(context)) for _ in range(min(kills, 4))]
        for number in range(kills):
            child = children[number] if number < 4 else await stack.enter_async_context(_child(context))
            await child.ready()
            await child.write(context.random.randrange(20, 150), context.random.random() * 0.03)
            if child.raised is not None:
                raise _child_violation(child, context.capabilities)
            # Use the store's own clock, as the killed process did: steps are ordered by their start.
            store = await context.open(clock=None)
            scripts = [
                crash_child.script(child.seed, worker, context.capabilities) for worker in range(WORKERS)
            ]
            pairs = zip(scripts, child.acknowledged, strict=True)
            await asyncio.gather(*(_check_runs(context, store, script, count) for script, count in pairs))
            await _check_usable(context, store)
            await store.aclose()


def _child_violation(child: Child, capabilities: Collection[Capability]) -> ContractViolation:
    assert child.raised is not None
    worker, number, error = child.raised
    call = next(islice(crash_child.script(child.seed, worker, capabilities), number, None))
    foreign = error.name.startswith("!")
    error.name = error.name.removeprefix("!")
    violation = ContractViolation(
        f"{call.method} in another process: expected a result, got {error.name}",
        clause="CON-2" if foreign else "CON-5",
    )
    violation.__cause__ = error
    return violation


async def _check_runs(context: CheckContext, store: FlowStore, script: Iterator[Call], count: int) -> None:
    """Compare every run of one worker with the model, with and without the call in flight."""
    runs: dict[UUID, list[Call]] = {}
    for call in islice(script, count):
        runs.setdefault(crash_child.run_of(call), []).append(call)
    in_flight = next(script)
    last = crash_child.run_of(in_flight)
    runs.setdefault(last, [])
    for run_id, calls in runs.items():
        before = ModelState(lambda: datetime.now(UTC), State())
        for call in calls:
            before = before.apply(call, exact_times=False)
        possible = [before]
        if run_id == last:
            possible.append(before.apply(in_flight, exact_times=False))
        key = (crash_child.FLOW_ID, "manual", f"key of {run_id}")
        probes = list(probe_calls(run_id, context.capabilities, step_keys=("c",), keys=[key]))
        if Capability.TAGS in context.capabilities:
            own = crash_child.tags_of(run_id)
            moved = {**own, "env": "live", "zone": "eu"}
            del moved["team"]
            probes += [Call(method="get_runs", arguments={"tags": tags}) for tags in (own, moved)]
        context.assertions += len(calls)
        done = f"after a kill with {len(calls)} returned calls on a run"
        if run_id == last:
            done += f" and {in_flight.method} in flight"
            partial = await find_partial_effect(
                store, probes, in_flight, before=before, possible=possible, exact_times=False
            )
        else:
            wanted: list[Snapshot] = [before.observe(probes, exact_times=False)]
            seen = await observe_until(store, probes, wanted, exact_times=False)
            partial = None if seen in wanted else difference(probes, seen, wanted)
        if partial is not None:
            raise ContractViolation(f"{done}: {partial}")


async def _check_usable(context: CheckContext, store: FlowStore) -> None:
    """Run one run from start to end in the store that the killed process had open."""
    state = ModelState(lambda: datetime.now(UTC), State())
    calls = list(islice(crash_child.script(context.random.getrandbits(32), 0, context.capabilities), 12))
    run_id = crash_child.run_of(calls[0])
    for call in calls:
        if crash_child.run_of(call) == run_id:
            state = state.apply(call, exact_times=False)
            outcome, wanted_outcome = await outcome_of(store, call, exact_times=False), state.outcome
            context.assertions += 1
            if outcome != wanted_outcome and wanted_outcome is not None:
                message = f"expected {describe_outcome(wanted_outcome)}, got {describe_outcome(outcome)}"
                raise ContractViolation(f"{call.method} after a kill: {message}")
