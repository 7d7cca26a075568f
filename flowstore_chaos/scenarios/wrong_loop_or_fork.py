"""Misuse of a store: after a fork, in another event loop or thread, after close, or without close.

Every operation must raise the contract's error, nothing may hang, and correct users must not be affected.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn
from uuid import UUID

from flowstore_conformance.checks.operations import ARGUMENT_KINDS, legal_arguments
from flowstore_conformance.nested_loop import run_nested

from flowstore_chaos.context import RunContext, SkippedError
from flowstore_chaos.leaks import ResourceSnapshot
from flowstore_chaos.scenario import FaultScenario
from flowstore_core import FlowStore, new_run_id, open_store

OPERATIONS_PER_MISUSE = 6
"""Number of random operations called in each misuse."""
HANG_TIMEOUT = 20.0
BUSY_CALLS = 8
"""Pending calls of the correct user during a misuse."""

PROGRAM_WITHOUT_CLOSE = """
import asyncio, sys
from flowstore_core import open_store

kept = []

async def main():
    opened = open_store(sys.argv[1])
    kept.append(opened)
    store = await opened.__aenter__()
    await store.get_runs()

asyncio.run(main())
"""
"""A program that never closes its store; it must exit nevertheless."""


class SpawnTaskPerCallMutant:
    """A store that runs every call as a task of the event loop in which it was opened."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        async def send(*arguments: Any, **named: Any) -> Any:
            return await self._loop.create_task(operation(*arguments, **named))

        return send


class RightfulUser:
    """Correct use of the store before, during and after a misuse."""

    def __init__(self, context: RunContext, store: FlowStore) -> None:
        self._context = context
        self._store = store
        self._run_id: UUID = new_run_id()
        self._keys: set[str] = set()

    async def start(self) -> None:
        await self._store.start_run(self._run_id, "misuse", self._run_id, "manual")

    def begin(self) -> list[asyncio.Task[bool]]:
        """Start some calls."""
        keys = [f"step {len(self._keys) + number}" for number in range(BUSY_CALLS)]
        self._keys.update(keys)
        return [asyncio.ensure_future(self._store.try_record_dispatch(self._run_id, key)) for key in keys]

    async def check(self, pending: Sequence[asyncio.Task[bool]], what: str) -> None:
        """Check that the pending calls succeeded and that all writes exist."""
        counts = self._context.counts
        try:
            async with asyncio.timeout(HANG_TIMEOUT):
                answers = await asyncio.gather(*pending)
                found = await self._store.get_dispatched_step_keys(self._run_id)
        except Exception as error:  # noqa: BLE001 - counted, whatever it is
            counts.count_wrong(f"{what} disturbed a correct user: {_brief(error)}")
            return
        counts.operations += len(answers) + 1
        if not all(answers):
            counts.count_wrong(f"{what} made a correct call return False")
        if lost := self._keys - found:
            counts.count_lost(f"{what} lost {len(lost)} dispatches of a correct user")


Misuse = Callable[[RunContext, str, Any], Awaitable[list[str]]]
"""Misuses the open store or a new one of the same URL. Returns violations, as sentences."""


async def _forked(context: RunContext, url: str, store: Any) -> list[str]:
    """Use and close the store in a forked process, then collect garbage."""
    if not hasattr(os, "fork"):
        raise SkippedError("needs os.fork")
    reading, writing = os.pipe()
    names = _sample_operations(context)
    child = os.fork()
    if child == 0:
        os.close(reading)
        _run_forked_child(writing, store, names)
    os.close(writing)
    try:
        if not await asyncio.to_thread(_ended, child):
            return [f"hung for {HANG_TIMEOUT:.0f} s in a forked process"]
        output = os.read(reading, 1 << 16)
    finally:
        os.close(reading)
    answers: list[str] = json.loads(output) if output else ["ended a forked process without output"]
    return answers


def _ended(child: int) -> bool:
    """Wait for a child process and kill it at the timeout. False if it was killed."""
    until = time.monotonic() + HANG_TIMEOUT
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    return True


def _run_forked_child(writing: int, store: Any, names: Sequence[str]) -> NoReturn:
    code = 1
    try:
        found = asyncio.run(_check_refused(store, names, "ConfigurationError"))
        closing = asyncio.run(_check_close_is_silent(store))
        gc.collect()
        os.write(writing, json.dumps(found + closing).encode())
        code = 0
    finally:
        # Skip the parent's cleanup handlers.
        os._exit(code)


async def _other_thread(context: RunContext, url: str, store: Any) -> list[str]:
    """Use and close the store in another thread with its own event loop."""
    names = _sample_operations(context)

    async def use() -> list[str]:
        found = await _check_refused(store, names, "ConfigurationError")
        return found + await _check_refused(store, ["aclose"], "ConfigurationError")

    return await _in_thread(lambda: asyncio.run(use()))


async def _other_loop(context: RunContext, url: str, store: Any) -> list[str]:
    """Use the store of one event loop in a second event loop of the same thread."""
    names = _sample_operations(context)

    def both() -> list[str]:
        with asyncio.Runner() as first, asyncio.Runner() as second:
            opened = open_store(url)
            other: Any = first.run(opened.__aenter__())
            if context.is_mutant:
                other = first.run(_new_mutant(other))
            try:
                found = second.run(_check_refused(other, names, "ConfigurationError"))
                found += second.run(_check_refused(other, ["aclose"], "ConfigurationError"))
            finally:
                first.run(opened.__aexit__(None, None, None))
            return found

    return await _in_thread(both)


async def _nested_loop(context: RunContext, url: str, store: Any) -> list[str]:
    """Use the store in an event loop nested in the store's loop, as in notebooks."""
    return run_nested(_check_refused(store, [*_sample_operations(context), "aclose"], "ConfigurationError"))


async def _left_open(context: RunContext, url: str, store: Any) -> list[str]:
    """Use a store whose event loop has ended without closing it."""
    names = _sample_operations(context)

    async def open_it() -> Any:
        opened = open_store(url)
        kept.append(opened)
        return await opened.__aenter__()

    async def use(other: Any) -> list[str]:
        return await _check_refused(other, names, "StoreClosedError")

    kept: list[object] = []
    return await _in_thread(lambda: asyncio.run(use(asyncio.run(open_it()))))


async def _dropped(context: RunContext, url: str, store: Any) -> list[str]:
    """Drop an open store for the garbage collector."""
    other = await open_store(url).__aenter__()
    await other.get_runs()
    del other
    gc.collect()
    await asyncio.sleep(0.05)
    return []


async def _closed(context: RunContext, url: str, store: Any) -> list[str]:
    """Close a store several times concurrently, then use it."""
    async with open_store(url) as opened:
        other: Any = SpawnTaskPerCallMutant(opened) if context.is_mutant else opened
        await asyncio.gather(*(opened.aclose() for _ in range(3)))
        await opened.aclose()
        found = await _check_refused(other, _sample_operations(context), "StoreClosedError")
    return found + await _check_refused(other, ["ping"], "StoreClosedError")


async def _closed_in_use(context: RunContext, url: str, store: Any) -> list[str]:
    """Use a store while it closes with pending calls."""
    async with open_store(url) as opened:
        calls = [asyncio.ensure_future(opened.get_runs()) for _ in range(BUSY_CALLS)]
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(opened.aclose())
        await asyncio.sleep(0)
        found = await _check_refused(opened, _sample_operations(context), "StoreClosedError")
        await closing
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(error, BaseException) and type(error).__name__ != "StoreClosedError":
                found.append(f"get_runs, while the store was closing, raised {_brief(error)}")
    return found


async def _never_closed(context: RunContext, url: str, store: Any) -> list[str]:
    """Run a program that exits without closing its store."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM_WITHOUT_CLOSE, url, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(HANG_TIMEOUT):
            _, output = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        return [f"hung for {HANG_TIMEOUT:.0f} s at the exit of a program without close"]
    return (
        [f"wrote to standard error at exit: {output.decode()[-300:]}"] if process.returncode or output else []
    )


MISUSES: dict[str, Misuse] = {
    "a fork": _forked,
    "another thread": _other_thread,
    "another event loop": _other_loop,
    "a nested event loop": _nested_loop,
    "an ended event loop": _left_open,
    "use after close": _closed,
    "use while closing": _closed_in_use,
    "a dropped store": _dropped,
    "a program without close": _never_closed,
}


async def run(context: RunContext) -> None:
    async with context.store_url() as url:
        before = ResourceSnapshot.now()
        async with open_store(url) as opened:
            store: Any = SpawnTaskPerCallMutant(opened) if context.is_mutant else opened
            user = RightfulUser(context, opened)
            await user.start()
            while not context.done:
                for what, misuse in MISUSES.items():
                    pending = user.begin()
                    for wrong in await misuse(context, url, store):
                        context.counts.count_wrong(f"{what}: {wrong}")
                    await user.check(pending, what)
                    context.counts.add_detail(what)
                    context.record_faults()
        for leaked in before.leaked(in_loop=True):
            context.counts.count_leak(leaked)


def _sample_operations(context: RunContext) -> list[str]:
    return context.rng.sample(sorted(ARGUMENT_KINDS), OPERATIONS_PER_MISUSE)


async def _new_mutant(store: FlowStore) -> SpawnTaskPerCallMutant:
    return SpawnTaskPerCallMutant(store)


async def _in_thread(work: Callable[[], list[str]]) -> list[str]:
    try:
        async with asyncio.timeout(HANG_TIMEOUT):
            return await asyncio.to_thread(work)
    except TimeoutError:
        return [f"hung for {HANG_TIMEOUT:.0f} s"]
    except Exception as error:  # noqa: BLE001 - counted, whatever it is
        return [f"raised {_brief(error)}"]


async def _check_refused(store: Any, names: Sequence[str], error_name: str) -> list[str]:
    """Call the operations. Returns those that do not raise the expected error, as sentences."""
    found = []
    for name in names:
        arguments = legal_arguments(name) if name in ARGUMENT_KINDS else {}
        try:
            async with asyncio.timeout(HANG_TIMEOUT / OPERATIONS_PER_MISUSE / 2):
                await getattr(store, name)(**arguments)
        except TimeoutError:
            found.append(f"{name} hung")
        except Exception as error:  # noqa: BLE001 - counted, whatever it is
            if type(error).__name__ != error_name:
                found.append(f"{name} raised {_brief(error)}, not {error_name}")
        else:
            found.append(f"{name} returned a result")
    return found


async def _check_close_is_silent(store: Any) -> list[str]:
    try:
        async with asyncio.timeout(HANG_TIMEOUT / 2):
            await store.aclose()
    except TimeoutError:
        return ["aclose hung"]
    except Exception as error:  # noqa: BLE001 - counted, whatever it is
        return [f"aclose raised {_brief(error)}"]
    return []


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


SCENARIO = FaultScenario(
    number=15,
    name="wrong-loop-or-fork",
    fault="a store is used after a fork, in another thread or loop, during or after close, or never closed",
    unit="misuses",
    planned=400,
    min_faults=9,
    backends=("memory", "sqlite", "postgresql"),
    pass_criterion="every operation raises the contract's error, nothing hangs, correct use is unaffected",
    mutant="calls from any loop or thread run as tasks of the store's event loop",
    minutes=6,
    run=run,
)
