"""Other processes that run checks of the same run of the suite, each with lanes of its own.

All processes take checks from one queue. Of another process only settled results count (see suite.py), so
whatever happens to it, the other checks run again in the process of the suite.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from flowstore_conformance.child_processes import kill_child, start_module
from flowstore_conformance.guard import Refused, WrappedBackend
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.registry import Check
from flowstore_conformance.results import CheckResult
from flowstore_conformance.status import Status
from flowstore_conformance.wire import read_line, write_line
from flowstore_core import Backend, ConfigurationError

MODULE = "flowstore_conformance.lane_worker"

MAX_PROCESSES = 2
"""The default number of processes, if the machine has as many cores."""

STOP_SECONDS = 8.0
"""Seconds for a process to drop its namespaces after its input has ended. A supervisor waits longer."""

_POSITION = struct.Struct("!H")


def read_processes(processes: int | None) -> int:
    """The number of processes of a run. Raises ConfigurationError unless it is positive."""
    if processes is None:
        return min(MAX_PROCESSES, _count_cores())
    if processes < 1:
        raise ConfigurationError(f"the number of processes must be at least 1, not {processes}")
    return processes


def _count_cores() -> int:
    """The number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def origin_of(backend: Backend) -> str:
    """The class of a backend and its file, to find out whether another process has the same one."""
    while isinstance(backend, WrappedBackend):
        backend = backend.wrapped
    own = type(backend)
    return f"{own.__module__}.{own.__qualname__} in {getattr(sys.modules[own.__module__], '__file__', None)}"


class CheckQueue:
    """A queue of checks that the lanes of several processes share: a pipe that contains their positions.

    Reading a position takes the check. The end of the pipe is the end of the queue.
    """

    def __init__(self, descriptor: int) -> None:
        self._pipe = open(descriptor, "rb", buffering=0)  # noqa: SIM115 - closed by close()

    @staticmethod
    def of(count: int) -> CheckQueue:
        """A new queue of so many checks, which is complete: a pipe holds 2,000 positions at least."""
        read, write = os.pipe()
        with open(write, "wb") as pipe:
            pipe.writelines(_POSITION.pack(position) for position in range(count))
        return CheckQueue(read)

    @property
    def descriptor(self) -> int:
        return self._pipe.fileno()

    def take(self, checks: Sequence[Check]) -> Iterator[Check]:
        """Take the next check, again and again until the queue is empty."""
        while data := self._pipe.read(_POSITION.size):
            yield checks[_POSITION.unpack(data)[0]]

    def close(self) -> None:
        self._pipe.close()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LaneOrder:
    """What another process needs to run checks of a run of the suite."""

    url: str = dataclasses.field(repr=False)
    origin: str
    """The origin of the backend. A process that finds another backend, or none, runs nothing."""
    capabilities: Sequence[str]
    profile: str
    seed: int
    variant: str | None
    """The variant that the user chose."""
    faults: bool
    findings: Sequence[dict[str, Any]]
    """The fields of each SignatureFinding of the backend."""
    limits: dict[str, float]
    """The fields of Limits."""
    lanes: int
    """The number of lanes of the process."""
    checks: Sequence[str]
    """The names of the checks of the queue."""
    queue: int
    """The file descriptor of the queue."""


def pack_check_result(result: CheckResult) -> dict[str, Any]:
    """Encode a result; of a failure only its message, because the check runs again."""
    return {
        "check": result.check.name,
        "status": result.status.value,
        "assertions": result.assertions,
        "seconds": result.seconds,
        "reason": result.reason if result.failure is None else result.failure.message,
        "variant": result.variant,
        "notes": list(result.notes),
        "uncallable": result.finding and result.finding.method,
    }


class LaneProcess:
    """Another process with lanes (see lane_worker.py)."""

    def __init__(self, order: LaneOrder, checks: Sequence[Check]) -> None:
        self._order = order
        self._checks = {check.name: check for check in checks}
        self._findings = {one["method"]: SignatureFinding(**one) for one in order.findings}
        self._in_use: set[str] = set()

    @property
    def in_use(self) -> tuple[str, ...]:
        """The namespaces that the process has made and not dropped, without secrets."""
        return tuple(sorted(self._in_use))

    async def run(self, ended: Callable[[CheckResult], None]) -> None:
        """Run the process until the queue is empty, and call ``ended`` with each result.

        Returns early if the process cannot start or dies. If this call is cancelled, the process drops its
        namespaces, and is killed if that takes too long. Raises Refused if a check of the process did.
        """
        try:
            process = await start_module(MODULE, pass_fds=[self._order.queue])
        except OSError:
            return
        assert process.stdin is not None
        try:
            with suppress(ConnectionError):
                process.stdin.write(write_line(dataclasses.asdict(self._order)))
                await process.stdin.drain()
            await self._receive(process, ended)
        finally:
            process.stdin.close()
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(STOP_SECONDS):
                        await self._receive(process, lambda result: None)
                        await process.wait()
            finally:
                kill_child(process)

    async def _receive(
        self, process: asyncio.subprocess.Process, ended: Callable[[CheckResult], None]
    ) -> None:
        """Receive messages until the process closes its output."""
        assert process.stdout is not None
        # A process that is killed may leave a part of a line.
        while (line := await process.stdout.readline()).endswith(b"\n"):
            message = read_line(line)
            if "made" in message:
                self._in_use.add(message["made"])
            elif "dropped" in message:
                self._in_use.discard(message["dropped"])
            elif "refused" in message:
                raise Refused(message["refused"])
            else:
                ended(self._unpack(message["result"]))

    def _unpack(self, packed: dict[str, Any]) -> CheckResult:
        return CheckResult(
            check=self._checks[packed["check"]],
            status=Status(packed["status"]),
            assertions=packed["assertions"],
            seconds=packed["seconds"],
            seed=self._order.seed,
            reason=packed["reason"],
            variant=packed["variant"],
            notes=tuple(packed["notes"]),
            finding=self._findings.get(packed["uncallable"]),
        )
