"""Mutants of waiting for steps and runs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from flowstore_core import StoreClosedError
from tests.mutants import mutant

left_open: list[Any] = []
"""What the mutants do not close. A connection that is deleted while open would warn in a later test."""


@mutant("memory", "WAT-1")
class ReopenedRunWakesNobody:
    """Wakes no waiting call when retry_step reopens a run with queued steps."""

    async def retry_step(self, **given: Any) -> None:
        waiting, self._namespace.waiting = self._namespace.waiting, set()
        try:
            await super().retry_step(**given)
        finally:
            self._namespace.waiting = waiting


@mutant("memory", "WAT-1")
class TimeWakesNobody:
    """Looks at the store after commits alone, so the end of a lease wakes nobody."""

    def _seconds_until_ready(self, queues: Any) -> float | None:
        seconds = super()._seconds_until_ready(queues)
        return None if seconds is not None and seconds > 0 else seconds


@mutant("sqlite", "WAT-1")
class WakesOnceOnly:
    """Looks at the store at the first commit only, whatever it changed."""

    def begin(self) -> None:
        commits: Any = self._commits
        wake = commits.waiting.wake_from_thread
        woken = []

        def wake_once() -> None:
            if not woken:
                woken.append(True)
                wake()

        commits.waiting.wake_from_thread = wake_once


@mutant("postgresql", "WAT-1")
class AdvanceSendsNoHint:
    """Sends no hint after advance_run, so other stores learn of dispatched steps at their time-out."""

    async def advance_run(self, **given: Any) -> Any:
        publish, self._notifier.publish = self._notifier.publish, lambda *topics: None
        try:
            return await super().advance_run(**given)
        finally:
            self._notifier.publish = publish


@mutant("postgresql", "WAT-1")
class SignalWakesTheWrongQueue:
    """Sends the hint of a delivered signal to a queue of the signal's name."""

    async def deliver_signal(self, **given: Any) -> Any:
        publish = self._notifier.publish
        self._notifier.publish = lambda *topics: publish(f"q{given['signal_name']}")
        try:
            return await super().deliver_signal(**given)
        finally:
            self._notifier.publish = publish


@mutant("memory", "WAT-2")
class ClosingLeavesCallsWaiting:
    """Closes the store and lets the waiting calls wait until their time-out."""

    def detach(self) -> None:
        self._namespace.waiting.discard(self._waiting)


@mutant("memory", "WAT-2")
class ClosingWakesWithAResult:
    """Lets the waiting calls return at the time of the close as if they had timed out."""

    async def wait_for_steps(self, **given: Any) -> bool:
        try:
            return await super().wait_for_steps(**given)
        except StoreClosedError:
            return False


@mutant("sqlite", "WAT-2")
class ClosingLeavesItsThread:
    """Ends the waiting calls when the store is closed, but not the thread that watches for commits."""

    def begin(self) -> None:
        commits: Any = self._commits
        start = commits._start

        async def start_for_ever() -> None:
            await start()
            commits._connection.close = _do_nothing
            left_open.append(commits._connection)

        commits._start = start_for_ever


@mutant("sqlite", "WAT-2")
class ClosingMissesAThreadThatStarts:
    """Closes the store without waiting for a call that has only just begun, and is starting the thread."""

    def begin(self) -> None:
        commits: Any = self._commits
        commits._lock = nullcontext()
        commits.__class__ = type("KeepingCommits", (type(commits),), {"__setattr__": _keep_connection})


@mutant("postgresql", "WAT-2")
class ClosingLeavesTheListener:
    """Ends the waiting calls when the store is closed, but keeps the connection on which they listened."""

    def begin(self) -> None:
        listener: Any = self._listener

        async def end_calls_only() -> None:
            listener.waiting.close()

        listener.aclose = end_calls_only


def _keep_connection(commits: Any, name: str, value: Any) -> None:
    """Set an attribute. An open connection is kept: its collection would be a warning in another test."""
    if name == "_connection" and value is not None:
        left_open.append(value)
    object.__setattr__(commits, name, value)


async def _do_nothing() -> None:
    pass
