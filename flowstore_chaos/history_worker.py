"""Processes with clients of histories, which may be killed: ``python -m flowstore_chaos.history_worker URL``.

A worker tells of every call that it begins it, and what it was answered, so that it is known of a killed
one which of its calls were under way.
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
    """One such process, seen from the harness."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout

    @classmethod
    async def start(cls, url: str, *, broken: bool) -> Worker:
        worker = cls(
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__, url, *["broken"] * broken,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
            )
        )  # fmt: skip
        if not await worker._stdout.readline():
            raise RuntimeError("a worker could not open its store; it told on stderr why")
        return worker

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def kill(self) -> None:
        self._process.kill()

    async def do(self, jobs: Sequence[ClientTask], now: datetime) -> list[ClientResult]:
        """What came of the jobs, as far as it could tell before it was killed."""
        with suppress(ConnectionError):
            self._stdin.write(write_line({"now": pack(now), "jobs": [pack_task(job) for job in jobs]}))
            await self._stdin.drain()
        begun: dict[tuple[int, int], float] = {}
        ended: dict[tuple[int, int], tuple[float, Outcome]] = {}
        while text := await self._stdout.readline():
            told = read_line(text)
            if "done" in told:
                break
            place = (told["job"], told["call"])
            if "begun" in told:
                begun[place] = told["begun"]
            else:
                ended[place] = told["ended"], _unpack_outcome(told["outcome"])
        else:
            await self._process.wait()
        return [_assemble(number, job, begun, ended, now) for number, job in enumerate(jobs)]

    async def end(self) -> None:
        self._stdin.close()
        await self._process.wait()


def _assemble(
    number: int,
    job: ClientTask,
    begun: Mapping[tuple[int, int], float],
    ended: Mapping[tuple[int, int], tuple[float, Outcome]],
    now: datetime,
) -> ClientResult:
    operations = []
    unavailable = 0
    for position, call in enumerate(job.calls):
        if (number, position) not in begun:
            break
        returned, outcome = ended.get((number, position), (float("inf"), UNKNOWN))
        if is_unavailable(outcome):
            unavailable += 1
            continue
        operations.append(
            Operation(
                client=job.client,
                call=call,
                invoked=begun[number, position],
                returned=float("inf") if outcome is UNKNOWN else returned,
                outcome=outcome,
                now=now,
            )
        )
    return ClientResult(race=job.race, operations=tuple(operations), suspended=True, unavailable=unavailable)


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


_WITHOUT_ANSWER = frozenset(
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


class AnswersEarly:
    """A store that answers, where there is nothing to be told, before it has written."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._writing: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in _WITHOUT_ANSWER:
            return method

        async def call(**arguments: Any) -> Any:
            writing = asyncio.ensure_future(method(**arguments))
            self._writing.add(writing)
            writing.add_done_callback(self._writing.discard)

        return call


async def _main(url: str, *, broken: bool) -> None:
    clock = VirtualClock()

    def say(message: Mapping[str, Any]) -> None:
        # Not buffered: what was said is known, whenever this process is killed.
        os.write(sys.stdout.fileno(), write_line(message))

    async with open_store(url, clock=clock) as opened:
        store: Any = AnswersEarly(opened) if broken else opened
        await store.get_active_runs(take=1)
        say({"ready": True})
        while text := await asyncio.to_thread(sys.stdin.buffer.readline):
            order = read_line(text)
            clock.now = unpack(order["now"])

            async def do(number: int, job: ClientTask) -> None:
                for position, call in enumerate(job.calls):
                    place = {"job": number, "call": position}
                    say({**place, "begun": time.monotonic()})
                    outcome = await execute(store, call)
                    say({**place, "ended": time.monotonic(), "outcome": _pack_outcome(outcome)})

            jobs = [unpack_task(packed) for packed in order["jobs"]]
            await asyncio.gather(*(do(number, job) for number, job in enumerate(jobs)))
            say({"done": True})


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], broken="broken" in sys.argv[2:]))
