"""A store used where it must not be: after a fork, in another event loop or thread, after it was closed.

Each time every operation gives an error of our own that says so, nothing hangs, and whoever uses the
store rightly notices nothing.
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

from flowstore_conformance.checks.operations import OPERATIONS, legal_arguments
from flowstore_conformance.nested_loop import run_nested

from flowstore_chaos.leaks import Holdings
from flowstore_chaos.line import Line
from flowstore_chaos.trial import SkippedError, Trial
from flowstore_core import FlowStore, new_run_id, open_store

SOME = 6
"""Operations that are tried at each misuse; all are, sooner or later."""
HUNG_SECONDS = 20.0
BUSY_CALLS = 8
"""Calls of the rightful user that are under way meanwhile."""

FORGETFUL = """
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
"""A program that never closes its store: it must end all the same."""


class Sending:
    """A store that makes every call a task of the event loop that it was opened in."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        operation = getattr(self._store, name)

        async def send(*arguments: Any, **named: Any) -> Any:
            return await self._loop.create_task(operation(*arguments, **named))

        return send


class User:
    """Who uses the store rightly, before, during and after the misuse."""

    def __init__(self, trial: Trial, store: FlowStore) -> None:
        self._trial = trial
        self._store = store
        self._run_id: UUID = new_run_id()
        self._keys: set[str] = set()

    async def start(self) -> None:
        await self._store.start_run(self._run_id, "misuse", self._run_id, "manual")

    def begin(self) -> list[asyncio.Task[bool]]:
        """Some calls that are then under way."""
        keys = [f"step {len(self._keys) + number}" for number in range(BUSY_CALLS)]
        self._keys.update(keys)
        return [asyncio.ensure_future(self._store.try_record_dispatch(self._run_id, key)) for key in keys]

    async def check(self, under_way: Sequence[asyncio.Task[bool]], what: str) -> None:
        """They were answered, and all that ever was written is there."""
        tally = self._trial.tally
        try:
            async with asyncio.timeout(HUNG_SECONDS):
                answers = await asyncio.gather(*under_way)
                found = await self._store.get_dispatched_step_keys(self._run_id)
        except Exception as error:  # noqa: BLE001 - counted, whatever it is
            tally.mistrust(f"{what} disturbed who uses the store rightly: {_brief(error)}")
            return
        tally.operations += len(answers) + 1
        if not all(answers):
            tally.mistrust(f"{what} made a right call answer False")
        if lost := self._keys - found:
            tally.lose(f"{what} lost {len(lost)} dispatches of who uses the store rightly")


Misuse = Callable[[Trial, str, Any], Awaitable[list[str]]]
"""Misuses a store, the one that is open or another of that URL; gives the errors that it got, in words."""


async def _forked(trial: Trial, url: str, store: Any) -> list[str]:
    """A forked process uses the store, closes it, and collects its garbage."""
    if not hasattr(os, "fork"):
        raise SkippedError("it needs a system that forks")
    reading, writing = os.pipe()
    names = _some(trial)
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live_forked(writing, store, names)
    os.close(writing)
    try:
        if not await asyncio.to_thread(_ended, child):
            return [f"hung for {HUNG_SECONDS:.0f} s in a forked process"]
        said = os.read(reading, 1 << 16)
    finally:
        os.close(reading)
    answers: list[str] = json.loads(said) if said else ["ended a forked process without a word"]
    return answers


def _ended(child: int) -> bool:
    """Wait for a process to end, and end it when that takes too long."""
    until = time.monotonic() + HUNG_SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False
        time.sleep(0.01)
    return True


def _live_forked(writing: int, store: Any, names: Sequence[str]) -> NoReturn:
    code = 1
    try:
        found = asyncio.run(_refused(store, names, "ConfigurationError"))
        closing = asyncio.run(_closed_quietly(store))
        gc.collect()
        os.write(writing, json.dumps(found + closing).encode())
        code = 0
    finally:
        # Nothing of the parent is cleaned up here, whatever happens.
        os._exit(code)


async def _other_thread(trial: Trial, url: str, store: Any) -> list[str]:
    """Another thread uses the store in an event loop of its own, and closes it."""
    names = _some(trial)

    async def use() -> list[str]:
        found = await _refused(store, names, "ConfigurationError")
        return found + await _refused(store, ["aclose"], "ConfigurationError")

    return await _in_thread(lambda: asyncio.run(use()))


async def _other_loop(trial: Trial, url: str, store: Any) -> list[str]:
    """A second event loop of one thread uses a store that the first has opened, while both are alive."""
    names = _some(trial)

    def both() -> list[str]:
        with asyncio.Runner() as first, asyncio.Runner() as second:
            opened = open_store(url)
            other: Any = first.run(opened.__aenter__())
            if trial.broken:
                other = first.run(_sending(other))
            try:
                found = second.run(_refused(other, names, "ConfigurationError"))
                found += second.run(_refused(other, ["aclose"], "ConfigurationError"))
            finally:
                first.run(opened.__aexit__(None, None, None))
            return found

    return await _in_thread(both)


async def _nested_loop(trial: Trial, url: str, store: Any) -> list[str]:
    """A loop that runs within the store's own, in its thread, as in notebooks."""
    return run_nested(_refused(store, [*_some(trial), "aclose"], "ConfigurationError"))


async def _left_open(trial: Trial, url: str, store: Any) -> list[str]:
    """An event loop ends with a store open in it, which the next one uses."""
    names = _some(trial)

    async def open_it() -> Any:
        opened = open_store(url)
        kept.append(opened)
        return await opened.__aenter__()

    async def use(other: Any) -> list[str]:
        return await _refused(other, names, "StoreClosedError")

    kept: list[object] = []
    return await _in_thread(lambda: asyncio.run(use(asyncio.run(open_it()))))


async def _dropped(trial: Trial, url: str, store: Any) -> list[str]:
    """A store is opened and forgotten; the garbage collector finds it."""
    other = await open_store(url).__aenter__()
    await other.get_runs()
    del other
    gc.collect()
    await asyncio.sleep(0.05)
    return []


async def _closed(trial: Trial, url: str, store: Any) -> list[str]:
    """A store is closed, several times, by several at once, and used afterwards."""
    async with open_store(url) as opened:
        other: Any = Sending(opened) if trial.broken else opened
        await asyncio.gather(*(opened.aclose() for _ in range(3)))
        await opened.aclose()
        found = await _refused(other, _some(trial), "StoreClosedError")
    return found + await _refused(other, ["ping"], "StoreClosedError")


async def _closed_in_use(trial: Trial, url: str, store: Any) -> list[str]:
    """A store is closed while its calls are under way, and used meanwhile."""
    async with open_store(url) as opened:
        calls = [asyncio.ensure_future(opened.get_runs()) for _ in range(BUSY_CALLS)]
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(opened.aclose())
        await asyncio.sleep(0)
        found = await _refused(opened, _some(trial), "StoreClosedError")
        await closing
        for error in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(error, BaseException) and type(error).__name__ != "StoreClosedError":
                found.append(f"get_runs, while the store was closed, gave {_brief(error)}")
    return found


async def _never_closed(trial: Trial, url: str, store: Any) -> list[str]:
    """A program ends that has never closed its store."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FORGETFUL, url, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()
        return [f"hung for {HUNG_SECONDS:.0f} s at the end of a program that did not close it"]
    return [f"said at the end of a program: {said.decode()[-300:]}"] if process.returncode or said else []


MISUSES: dict[str, Misuse] = {
    "a fork": _forked,
    "another thread": _other_thread,
    "another event loop": _other_loop,
    "an event loop within the store's own": _nested_loop,
    "a loop that ended": _left_open,
    "use after close": _closed,
    "use while closing": _closed_in_use,
    "a store that was dropped": _dropped,
    "a program that never closed": _never_closed,
}


async def run(trial: Trial) -> None:
    async with trial.store_url() as url:
        before = Holdings.now()
        async with open_store(url) as opened:
            store: Any = Sending(opened) if trial.broken else opened
            user = User(trial, opened)
            await user.start()
            while not trial.done:
                for what, misuse in MISUSES.items():
                    under_way = user.begin()
                    for wrong in await misuse(trial, url, store):
                        trial.tally.mistrust(f"{what}: {wrong}")
                    await user.check(under_way, what)
                    trial.tally.add(what)
                    trial.landed()
        for leaked in before.leaked():
            # The event loop keeps the threads of its own executor until it ends.
            if not leaked.startswith("thread asyncio_"):
                trial.tally.leak(leaked)


def _some(trial: Trial) -> list[str]:
    return trial.rng.sample(sorted(OPERATIONS), SOME)


async def _sending(store: FlowStore) -> Sending:
    return Sending(store)


async def _in_thread(work: Callable[[], list[str]]) -> list[str]:
    try:
        async with asyncio.timeout(HUNG_SECONDS):
            return await asyncio.to_thread(work)
    except TimeoutError:
        return [f"hung for {HUNG_SECONDS:.0f} s"]
    except Exception as error:  # noqa: BLE001 - counted, whatever it is
        return [f"gave {_brief(error)}"]


async def _refused(store: Any, names: Sequence[str], error_name: str) -> list[str]:
    """Those of the operations that do not raise the error that they should, in words."""
    found = []
    for name in names:
        arguments = legal_arguments(name) if name in OPERATIONS else {}
        try:
            async with asyncio.timeout(HUNG_SECONDS / SOME / 2):
                await getattr(store, name)(**arguments)
        except TimeoutError:
            found.append(f"{name} hung")
        except Exception as error:  # noqa: BLE001 - counted, whatever it is
            if type(error).__name__ != error_name:
                found.append(f"{name} gave {_brief(error)}, not {error_name}")
        else:
            found.append(f"{name} was answered")
    return found


async def _closed_quietly(store: Any) -> list[str]:
    try:
        async with asyncio.timeout(HUNG_SECONDS / 2):
            await store.aclose()
    except TimeoutError:
        return ["aclose hung"]
    except Exception as error:  # noqa: BLE001 - counted, whatever it is
        return [f"aclose gave {_brief(error)}"]
    return []


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


LINE = Line(
    number=15,
    name="misuse",
    fault="an open store is used after a fork, in another thread or event loop, after it was closed and "
    "meanwhile, or is never closed",
    unit="misuses",
    planned=400,
    least=9,
    backends=("memory", "sqlite", "postgresql"),
    passes_when="every operation gives an error of our own, nothing hangs, and other users notice nothing",
    broken="calls are sent to the event loop of the store, wherever they come from",
    minutes=6,
    run=run,
)
