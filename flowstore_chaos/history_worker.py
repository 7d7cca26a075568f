"""Killable client processes of histories: ``python -m flowstore_chaos.history_worker URL``.

A worker reports the start and the result of every call, so that the pending calls of a killed worker are
known.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from flowstore_conformance.context import VirtualClock
from flowstore_conformance.execution import execute, is_unavailable
from flowstore_conformance.history import UNKNOWN, Operation, Outcome, Raised, Returned
from flowstore_conformance.races import ClientResult, ClientTask
from flowstore_conformance.wire import pack, pack_task, read_line, unpack, unpack_task, write_line

from flowstore_core import FlowStore, open_store


class Worker:
    """A worker process, as seen by its parent."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, url: str, *, mutant: bool) -> Worker:
        worker = cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__, url, *["mutant"] * mutant,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
            )
        )  # fmt: skip
        if not await worker._stdout.readline():
            raise RuntimeError("a worker could not open its store; see its standard error")
        return worker

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        self._process.kill()

    async def run(self, tasks: Sequence[ClientTask], now: datetime) -> list[ClientResult]:
        """Run tasks. The results include only calls reported before a kill."""
        with suppress(ConnectionError):
            self._stdin.write(write_line({"now": pack(now), "jobs": [pack_task(task) for task in tasks]}))
            await self._stdin.drain()
        started: dict[tuple[int, int], float] = {}
        ended: dict[tuple[int, int], tuple[float, Outcome]] = {}
        while text := await self._stdout.readline():
            message = read_line(text)
            if "done" in message:
                break
            call_id = (message["job"], message["call"])
            if "begun" in message:
                started[call_id] = message["begun"]
            else:
                ended[call_id] = message["ended"], _unpack_outcome(message["outcome"])
        else:
            await self._process.wait()
        return [_assemble(number, task, started, ended, now) for number, task in enumerate(tasks)]

    async def end(self) -> None:
        self._stdin.close()
        await self._process.wait()


def _assemble(
    number: int,
    task: ClientTask,
    started: Mapping[tuple[int, int], float],
    ended: Mapping[tuple[int, int], tuple[float, Outcome]],
    now: datetime,
) -> ClientResult:
    operations = []
    unavailable = 0
    for position, call in enumerate(task.calls):
        if (number, position) not in started:
            break
        returned, outcome = ended.get((number, position), (float("inf"), UNKNOWN))
        if is_unavailable(outcome):
            unavailable += 1
            continue
        operations.append(
            Operation(
                client=task.client,
                call=call,
                invoked=started[number, position],
                returned=float("inf") if outcome is UNKNOWN else returned,
                outcome=outcome,
                now=now,
            )
        )
    return ClientResult(race=task.race, operations=tuple(operations), suspended=True, unavailable=unavailable)


def _pack_outcome(outcome: Outcome) -> Any:
    if outcome is UNKNOWN:
        return None
    if isinstance(outcome, Raised):
        return {"raised": outcome.error}
    return {"returned": pack(outcome.value)}


def _unpack_outcome(packed: Any) -> Outcome:
    if packed is None:
        return UNKNOWN
    return Raised(packed["raised"]) if "raised" in packed else Returned(unpack(packed["returned"]))


_WITHOUT_RESULT = frozenset(
    (
        "configure_run",
        "record_step_complete",
        "register_waiter",
        "release_step_claim",
        "reschedule_step",
        "retry_step",
        "save_output",
    )
)


class AckBeforeCommitMutant:
    """A store that acknowledges writes without result before they are committed."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._writing: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _WITHOUT_RESULT:
            return method

        async def call(**arguments: Any) -> Any:
            writing = asyncio.ensure_future(method(**arguments))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)

        return call


async def _main(url: str, *, mutant: bool) -> None:
    clock = VirtualClock()

    def send(message: Mapping[str, Any]) -> None:
        # Unbuffered, so that a kill loses no report.
        os.write(sys.stdout.fileno(), write_line(message))

    async with open_store(url, clock=clock) as opened:
        store: Any = AckBeforeCommitMutant(opened) if mutant else opened
        await store.get_active_runs(take=1)
        send({"ready": True})
        while text := await asyncio.to_thread(sys.stdin.buffer.readline):
            request = read_line(text)
            clock.now = unpack(request["now"])

            async def run(number: int, task: ClientTask) -> None:
                for position, call in enumerate(task.calls):
                    call_id = {"job": number, "call": position}
                    send({**call_id, "begun": time.monotonic()})
                    outcome = await execute(store, call)
                    send({**call_id, "ended": time.monotonic(), "outcome": _pack_outcome(outcome)})

            tasks = [unpack_task(packed) for packed in request["jobs"]]
            await asyncio.gather(*(run(number, task) for number, task in enumerate(tasks)))
            send({"done": True})


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], mutant="mutant" in sys.argv[2:]))
