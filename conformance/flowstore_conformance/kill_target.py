"""The process that checks kill in a call: ``python -m flowstore_conformance.kill_target URL``.

Starting Python takes longer than a call, so the process imports everything once and forks for each call. The
protocol is JSON lines. The message ``{"call": [method, arguments], "now": ..., "pause": 3, "limit": 30}``
makes a fork open the store and reply ``{"pid": ...}``. After one more line it makes the call.
With ``pause`` it stops in the call at the third await of any of its tasks and replies ``{"paused": 3}``; it
then does nothing until it is killed. If the call ends first, it replies ``{"ended": outcome}``. If the store
cannot be opened, it replies ``{"refused": error}``; if a call hangs, ``{"hung": ...}``. When the fork is
gone, the process itself replies ``{"gone": true}``. The end of stdin ends both.
"""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from flowstore_conformance.cancellation_points import count_awaits
from flowstore_conformance.execution import execute
from flowstore_conformance.history import Call
from flowstore_conformance.watchdog import Limits, watch_process
from flowstore_conformance.wire import pack_outcome, read_line, unpack, write_line
from flowstore_core import FlowStoreError, open_store


class _Output:
    """The pipe to the harness; whatever prints to stdout must not disturb it."""

    def __init__(self) -> None:
        self._pipe = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(self, message: dict[str, Any]) -> None:
        data = write_line(message)
        while data:
            data = data[os.write(self._pipe, data) :]


def _wait_for_the_kill() -> None:
    """Block until stdin ends, for the case that the harness itself dies."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


async def _make(url: str, order: dict[str, Any], output: _Output) -> None:
    limit = order["limit"]
    watch_process(Limits(limit, limit, limit), lambda hang: output.send({"hung": hang.to_json()}))
    method, packed = order["call"]
    awaits, calling = 0, False

    def waits(number: int) -> None:
        nonlocal awaits
        awaits += calling
        if calling and awaits == order["pause"]:
            output.send({"paused": awaits})
            _wait_for_the_kill()

    def counted(loop: asyncio.AbstractEventLoop, made: Any, **given: Any) -> Any:
        return asyncio.Task(count_awaits(made, waits), loop=loop, **given)

    asyncio.get_running_loop().set_task_factory(counted)
    now = unpack(order["now"])
    try:
        async with open_store(url, clock=None if now is None else lambda: now) as store:
            output.send({"pid": os.getpid()})
            if not _read_line():
                os._exit(1)
            calling = True
            call = Call(method=method, arguments=unpack(packed))
            # In a task, whose awaits are counted.
            outcome = await asyncio.create_task(execute(store, call, exact_times=now is not None))
            calling = False
            output.send({"ended": pack_outcome(outcome)})
            _wait_for_the_kill()
    except Exception as error:  # noqa: BLE001 - reported to the harness
        # Only errors of the contract guarantee a text without secrets.
        text = f": {error}" if isinstance(error, FlowStoreError) else ""
        output.send({"refused": f"{type(error).__name__}{text}"})


async def _open_and_close(url: str) -> None:
    async with open_store(url):
        pass


def main(url: str) -> None:
    output = _Output()
    # Everything that opening imports is imported before the first fork.
    asyncio.run(_open_and_close(url))
    output.send({"ready": True})
    for line in iter(_read_line, b""):
        if not line.strip():
            # A fork was killed before it had read the line that begins its call.
            continue
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_make(url, read_line(line), output))
            finally:
                os._exit(1)
        os.waitpid(child, 0)
        output.send({"gone": True})


def _read_line() -> bytes:
    """Read one line unbuffered, because the fork shares stdin."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            return b""
        line += byte
    return line


if __name__ == "__main__":
    main(sys.argv[1])
