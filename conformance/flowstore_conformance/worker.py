"""A worker process that runs clients of races: ``python -m flowstore_conformance.worker``.

The protocol is JSON lines: one reply on stdout for each message on stdin. The first message is ``{"open":
url, "clock": true, "limit": 30}``; if the store cannot be opened, the reply is ``{"refused": error}`` and the
process ends. Each phase of a round has two messages: ``{"now": ..., "tasks": [...]}``, with a reply once all
clients wait at the barrier, and ``{"at": seconds}``, the start time on the monotonic clock, which all
processes of a machine share; the reply holds the client results. If a call exceeds the limit, ``{"hung":
...}`` describes it and the process ends. After ``{"close": true}`` another store can be opened. The end of
stdin ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any

from flowstore_conformance.races import run_tasks
from flowstore_conformance.watchdog import Limits, watch_process
from flowstore_conformance.wire import Receive, Send, connect_harness, pack_result, unpack, unpack_task
from flowstore_core import FlowStore, FlowStoreError, open_store

SPIN_SECONDS = 0.0005
"""Slept so long less and then spun, because a sleep ends late."""


async def main() -> None:
    receive, send = await connect_harness()
    is_watched = False
    while (command := await receive()) is not None:
        if not is_watched:
            limit = command["limit"]
            watch_process(Limits(limit, limit, limit), lambda hang: send({"hung": hang.to_json()}))
            is_watched = True
        try:
            await _serve_store(command["open"], command["clock"], receive, send)
        except _Refused as error:
            send({"refused": str(error)})
            return
        send({"closed": True})


class _Refused(Exception):  # noqa: N818
    """The store cannot be opened."""


async def _serve_store(
    url: str,
    exact_times: bool,
    receive: Receive,
    send: Send,
) -> None:
    clock = _Clock()
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(open_store(url, clock=clock if exact_times else None))
            # Connected before the first race.
            await store.get_active_runs(take=1)
        except Exception as error:
            # Only errors of the contract guarantee a text without secrets.
            text = f": {error}" if isinstance(error, FlowStoreError) else ""
            raise _Refused(f"{type(error).__name__}{text}") from error
        send({"open": store.backend})
        while (command := await receive()) is not None and "close" not in command:
            await _phase(store, clock, exact_times, command, receive, send)


async def _phase(
    store: FlowStore,
    clock: _Clock,
    exact_times: bool,
    command: dict[str, Any],
    receive: Receive,
    send: Send,
) -> None:
    clock.now = unpack(command["now"])
    client_tasks = [unpack_task(packed) for packed in command["tasks"]]

    async def start() -> None:
        send({"ready": len(client_tasks)})
        go = await receive()
        if go is None:
            raise EOFError
        remaining = go["at"] - time.monotonic()
        if remaining > SPIN_SECONDS:
            await asyncio.sleep(remaining - SPIN_SECONDS)
        while time.monotonic() < go["at"]:
            pass

    done = await run_tasks(
        [(store, client_task) for client_task in client_tasks], clock.now, exact_times, start
    )
    send({"done": [pack_result(one) for one in done]})


class _Clock:
    """The virtual clock; the harness sets it for each phase."""

    now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


if __name__ == "__main__":
    # The harness may end during a phase.
    with contextlib.suppress(EOFError):
        asyncio.run(main())
