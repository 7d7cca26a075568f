"""A watchdog for hanging calls: it reports the call, its arguments and the line of the backend that waits.

The watchdog runs in the event loop of the checks and inspects the stacks of all tasks a few times a second. A
call of a store is a frame of core's ValidatedStore, so the calls need no wrapper. A blocked loop cannot run
the watchdog; another thread detects it (see supervisor.py).
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from flowstore_conformance.context import Profile
from flowstore_conformance.diffing import brief
from flowstore_conformance.guard import INSPECT, SCRATCH
from flowstore_conformance.history import Call
from flowstore_conformance.phrasing import call_words
from flowstore_conformance.traces import OPEN_STORE, OPERATIONS, is_authors, is_suites, place, stack_text
from flowstore_core.urls import redact

CHECK_SECONDS = {Profile.QUICK: 120.0, Profile.STANDARD: 300.0, Profile.THOROUGH: 3600.0}
"""Time limit of a check, by profile."""

CALL_SECONDS = 30.0
"""Time limit of a call of a store."""

MAX_SLOW_FAILURES = 10
"""The number of checks that may fail after the whole time limit of a check; then the run ends."""

RETRIES_SHARE = 0.2
"""The share of that time that may be spent on retries of inconclusive or slow checks."""

KNOWN_HANG_SECONDS = 2.0
"""Time limit of a call of an operation that is already known to hang."""

CANCEL_SECONDS = 5.0
"""Time after which a cancelled check that has not ended is cancelled again."""

MAX_CANCELS = 3

TICK = 0.5
SLOW_TICK = 1.0
"""Maximum seconds between two inspections of the stacks while no operation is known to hang."""
MAX_STACKS = 4
"""Maximum number of stacks in a report."""

OPTION = "--check-timeout"


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits in seconds."""

    check: float = CHECK_SECONDS[Profile.STANDARD]
    call: float = CALL_SECONDS
    known_hang: float = KNOWN_HANG_SECONDS
    failures: float = MAX_SLOW_FAILURES * CHECK_SECONDS[Profile.STANDARD]
    """After this time, spent on checks that did not pass, no further check begins."""

    @staticmethod
    def of(profile: Profile, check_timeout: float | None = None) -> Limits:
        """The defaults of a profile; ``check_timeout`` replaces them, and a call may take half of it."""
        usual = CHECK_SECONDS[profile]
        if check_timeout is None:
            return Limits(usual, CALL_SECONDS, failures=MAX_SLOW_FAILURES * usual)
        call = check_timeout / 2
        failures = MAX_SLOW_FAILURES * max(usual, check_timeout)
        return Limits(check_timeout, call, min(KNOWN_HANG_SECONDS, call), failures)

    def scaled(self, factor: float) -> Limits:
        """The limits for a backend that is slower than expected by a factor."""
        scaled = (limit * factor for limit in (self.check, self.call, self.known_hang, self.failures))
        return Limits(*scaled)

    @property
    def retries(self) -> float:
        """After this time, spent on retries of inconclusive or slow checks, no further retry begins."""
        return self.failures * RETRIES_SHARE

    @property
    def tick(self) -> float:
        """Seconds between two inspections of the stacks."""
        return min(TICK, self.check / 5, self.call / 5, self.known_hang / 5)

    @property
    def slow_tick(self) -> float:
        """Seconds between two inspections of the stacks while no operation is known to hang."""
        return min(SLOW_TICK, self.check / 5, self.call / 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hang:
    """A call that did not end within its limit."""

    message: str
    operation: str | None
    """The operation that did not end; None if no single call exceeded its limit."""
    place: str | None
    """The innermost line of the author's code."""
    stack: str

    def to_json(self) -> str:
        """Encode as a line of JSON, for another process."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Hang:
        return Hang(**json.loads(text))


class Hung(Exception):  # noqa: N818 - a finding about the store, not an error of the suite
    """A call of the store did not end."""

    def __init__(self, hang: Hang) -> None:
        super().__init__(hang.message)
        self.hang = hang


@dataclass(frozen=True, slots=True)
class PendingCall:
    """A call of a store in progress."""

    owner: Any
    """The coroutine or generator of the call; it lives as long as the call."""
    operation: str
    frames: tuple[FrameType, ...]
    """The frames from the call inwards."""

    @property
    def text(self) -> str:
        """The call as shown in reports."""
        frame = self.frames[0]
        if frame.f_code in (OPEN_STORE, SCRATCH, INSPECT):
            return f"{self.operation}({redact(str(frame.f_locals.get('url')))})"
        code = frame.f_code
        names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
        given = {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        return brief(call_words(Call(method=self.operation, arguments=given)))


class Watchdog:
    """Watches the calls in progress in one event loop, and cancels a check with a call that does not end."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self.known_hangs: set[str] = set()
        """Operations that are known to hang."""
        self.retry_seconds = 0.0
        """The time spent on retries of inconclusive or slow checks."""
        self.hang: Hang | None = None
        """The hang found in the current check."""
        self.stuck = False
        """Whether the current check did not end although it was cancelled several times."""
        self._left_over: WeakSet[asyncio.Task[Any]] = WeakSet()

    @asynccontextmanager
    async def watch(self, *, timeout_factor: float = 1.0) -> AsyncIterator[None]:
        """Watch the body of the context. Raises Hung if a call in it, or the whole body, exceeds its limit.

        ``timeout_factor`` multiplies the limit of the body.
        """
        task = asyncio.current_task()
        assert task is not None
        before = asyncio.all_tasks()
        watch_ = _Watch(self, task, self.limits.check * timeout_factor)
        self.hang, self.stuck = None, False
        try:
            yield
        except BaseException as error:
            # A cancellation from outside passes through.
            if watch_.end() and not (isinstance(error, asyncio.CancelledError) and task.cancelling()):
                raise Hung(self._hung()) from None
            raise
        else:
            if watch_.end():
                with suppress(asyncio.CancelledError):
                    # A cancellation that arrives late must not reach the caller's next await.
                    await asyncio.sleep(0)
                raise Hung(self._hung())
        finally:
            if self.hang is not None:
                for one in asyncio.all_tasks() - before - {task}:
                    self._left_over.add(one)
                    one.cancel()

    def _hung(self) -> Hang:
        assert self.hang is not None
        return self.hang

    def limit_of(self, operation: str) -> float:
        """The time limit of a call."""
        return self.limits.known_hang if operation in self.known_hangs else self.limits.call

    def pending(self) -> list[PendingCall]:
        """The calls in progress, without those left over from an earlier check."""
        tasks = [one for one in asyncio.all_tasks() if one not in self._left_over]
        found = [one for task in tasks if (one := pending_call(task)) is not None]
        return list({id(one.owner): one for one in found}.values())

    def describe_pending(self) -> str | None:
        """Describe the first call in progress and where it waits."""
        pending = self.pending()
        if not pending:
            return None
        where = _innermost(pending[0].frames)
        return f"{pending[0].text} was in progress{f' at {where}' if where else ''}"


class _Watch:
    """The watch over the body of one Watchdog.watch()."""

    def __init__(self, watchdog: Watchdog, task: asyncio.Task[Any], limit: float) -> None:
        self._watchdog = watchdog
        self._limit = limit
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._ages: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._spent = 0.0
        self._since_cancel = 0.0
        self._cancels = 0
        self._last = time.monotonic()
        self._interval = watchdog.limits.tick if watchdog.known_hangs else watchdog.limits.slow_tick
        self._handle = self._loop.call_later(self._interval, self._tick)

    def end(self) -> bool:
        """Stop watching. Returns whether a hang was found, and undoes its own cancellations of the task."""
        self._handle.cancel()
        for _ in range(self._cancels):
            self._task.uncancel()
        self._cancels = 0
        return self._watchdog.hang is not None

    def _tick(self) -> None:
        self._handle = self._loop.call_later(self._interval, self._tick)
        now = time.monotonic()
        # Limits the effect of time in which this process did not run.
        passed, self._last = min(now - self._last, 2 * self._interval), now
        if self._watchdog.hang is not None:
            self._since_cancel += passed
            is_known = self._watchdog.hang.operation in self._watchdog.known_hangs
            if self._since_cancel >= (self._watchdog.limits.known_hang if is_known else CANCEL_SECONDS):
                self._cancel()
            return
        self._spent += passed
        pending = self._watchdog.pending()
        ages: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        for one in pending:
            ages[one.owner] = self._ages.get(one.owner, 0.0) + passed
        self._ages = ages
        pending.sort(key=lambda one: -ages[one.owner])
        if pending and ages[pending[0].owner] >= (limit := self._watchdog.limit_of(pending[0].operation)):
            self._watchdog.hang = describe_call(
                pending, limit, known_hang=pending[0].operation in self._watchdog.known_hangs
            )
            self._cancel()
        elif self._spent >= self._limit:
            self._watchdog.hang = describe_check(self._task, pending, self._limit)
            self._cancel()

    def _cancel(self) -> None:
        self._since_cancel = 0.0
        if self._cancels == MAX_CANCELS:
            self._watchdog.stuck = True
            return
        self._cancels += 1
        self._task.cancel()


# Descriptions of hangs


def describe_call(pending: list[PendingCall], limit: float, *, known_hang: bool = False) -> Hang:
    """Describe the hang of the first of the pending calls."""
    first = pending[0]
    where = _innermost(first.frames)
    waits = f"; it waits at {where}" if where else ""
    limited = (
        "it hung in an earlier check, so its limit is shorter now"
        if known_hang
        else f"{OPTION} raises the limit"
    )
    return Hang(
        message=f"{first.text} did not return within {limit:g} s{waits} ({limited})",
        operation=first.operation,
        place=where,
        stack=_stacks(pending),
    )


def describe_task(task: asyncio.Task[Any], limit: float) -> Hang:
    """Describe the hang of the call that a task awaits."""
    pending = pending_call(task)
    assert pending is not None
    return describe_call([pending], limit)


def describe_check(task: asyncio.Task[Any], pending: list[PendingCall], limit: float) -> Hang:
    """Describe the hang of a check in which no single call exceeded its limit."""
    pending_text = (
        f"; {pending[0].text} was in progress" if pending else "; no call of the store was in progress"
    )
    frames = [frame for _, frame in await_chain(task.get_coro())]
    return Hang(
        message=f"the check did not end within {limit:g} s{pending_text} ({OPTION} raises the limit)",
        # The pending call may be one of many that each ended in time.
        operation=None,
        place=_innermost(pending[0].frames if pending else frames),
        stack=_stacks(pending) if pending else stack_text(frames),
    )


def describe_blocked(thread: int, seconds: float) -> Hang:
    """Describe the hang of a thread with a blocked event loop. Called from another thread."""
    frames = _of_thread(thread)
    found = [number for number, one in enumerate(frames) if one.f_code in OPERATIONS]
    inner = frames[found[-1] :] if found else frames
    if found:
        call = PendingCall(None, OPERATIONS[inner[0].f_code], tuple(inner))
        text, operation = call.text, call.operation
    else:
        text, operation = "code of the backend", None
    where = _innermost(inner)
    return Hang(
        message=(
            f"{text} blocks the event loop{f' at {where}' if where else ''}: no other task ran "
            f"for {seconds:.3g} s ({OPTION} raises the limit)"
        ),
        operation=operation,
        place=where,
        stack=stack_text(inner),
    )


def _innermost(frames: Sequence[FrameType]) -> str | None:
    found = [one for one in frames if is_authors(one.f_code.co_filename)]
    return (
        place(found[-1].f_code.co_filename, found[-1].f_lineno, found[-1].f_code.co_name) if found else None
    )


def _stacks(pending: list[PendingCall]) -> str:
    """The stacks of the pending calls, then those of the backend's own tasks and threads."""
    stacks: dict[str, list[PendingCall]] = {}
    for one in pending:
        stacks.setdefault(stack_text(one.frames), []).append(one)
    parts = []
    for stack, calls in list(stacks.items())[:MAX_STACKS]:
        more = f", and {len(calls) - 1} more at the same line," if len(calls) > 1 else ""
        parts.append(f"{calls[0].text}{more} waits:\n{stack}")
    if len(stacks) > MAX_STACKS:
        parts.append(f"calls at {len(stacks) - MAX_STACKS} more lines wait\n")
    shown = {id(frame) for one in pending for frame in one.frames}
    others: dict[str, str] = {}
    for task in asyncio.all_tasks():
        frames = [frame for _, frame in await_chain(task.get_coro())]
        if _is_backends(frames) and id(frames[-1]) not in shown:
            others.setdefault(stack_text(frames), f"a task of the backend, {task.get_name()}, waits")
    for thread in threading.enumerate():
        frames = _of_thread(thread.ident or 0)
        ours = thread.ident == threading.get_ident() or thread is threading.main_thread()
        if not ours and _is_backends(frames):
            others.setdefault(stack_text(frames), f"a thread, {thread.name}, is at")
    parts += [f"{title}:\n{stack}" for stack, title in list(others.items())[:MAX_STACKS]]
    return "\n".join(parts)


def _is_backends(frames: list[FrameType]) -> bool:
    """Whether a stack has frames of the backend and none of the suite."""
    files = [one.f_code.co_filename for one in frames]
    return any(map(is_authors, files)) and not any(map(is_suites, files))


def _of_thread(thread: int) -> list[FrameType]:
    """The stack of a thread, outermost frame first."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.insert(0, frame)
        frame = frame.f_back
    return frames


# Stacks


def pending_call(task: asyncio.Task[Any]) -> PendingCall | None:
    """The call of a store that a task awaits; None if there is none."""
    links = list(await_chain(task.get_coro()))
    for number in range(len(links) - 1, -1, -1):
        owner, frame = links[number]
        operation = _operation(frame)
        if operation is not None:
            return PendingCall(owner, operation, tuple(frame for _, frame in links[number:]))
    return None


def _operation(frame: FrameType) -> str | None:
    if frame.f_code is OPEN_STORE:
        return "open_store"
    if frame.f_code is SCRATCH:
        return "scratch"
    if frame.f_code is INSPECT:
        return "close" if "checked" in frame.f_locals else "open"
    return OPERATIONS.get(frame.f_code)


def await_chain(awaitable: Any) -> Iterator[tuple[Any, FrameType]]:
    """The chain of awaited coroutines and generators, outermost first, with the frame of each.

    Follows awaited tasks and the generators of async context managers.
    """
    seen: set[int] = set()
    current: Any = awaitable
    last: FrameType | None = None
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        frame, following = _next_link(current)
        if frame is not None:
            yield current, frame
            last = frame
        if following is None and last is not None:
            following, last = _task_in(last), None
        current = following


def _next_link(one: Any) -> tuple[FrameType | None, Any]:
    if isinstance(one, CoroutineType):
        return one.cr_frame, one.cr_await
    if isinstance(one, AsyncGeneratorType):
        return one.ag_frame, one.ag_await
    if isinstance(one, GeneratorType):
        return one.gi_frame, one.gi_yieldfrom
    if isinstance(one, asyncio.Task):
        return None, None if one.done() else one.get_coro()
    # The awaitables of async generators, coroutines and futures are objects that refer to them.
    kinds = (AsyncGeneratorType, CoroutineType, GeneratorType, asyncio.Task)
    return None, next((each for each in gc.get_referents(one) if isinstance(each, kinds)), None)


def _task_in(frame: FrameType) -> asyncio.Task[Any] | None:
    """The only unfinished task among the locals of a frame, which it awaits through asyncio.shield."""
    tasks = [one for one in frame.f_locals.values() if isinstance(one, asyncio.Task) and not one.done()]
    return tasks[0] if len(tasks) == 1 else None


# Child processes


def watch_process(limits: Limits, report: Callable[[Hang], None]) -> None:
    """Watch the running loop until the process ends: if a call hangs or blocks it, report and exit."""
    loop, watchdog, thread = asyncio.get_running_loop(), Watchdog(limits), threading.get_ident()
    ages: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
    beats = 0

    def exit_with(hang: Hang) -> None:
        try:
            report(hang)
        finally:
            os._exit(1)

    def poll() -> None:
        nonlocal ages, beats
        beats += 1
        loop.call_later(limits.tick, poll)
        pending = watchdog.pending()
        older: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        for one in pending:
            older[one.owner] = ages.get(one.owner, 0.0) + limits.tick
        ages = older
        pending.sort(key=lambda one: -ages[one.owner])
        if pending and ages[pending[0].owner] >= limits.call:
            exit_with(in_child_process(describe_call(pending, limits.call)))

    def watch_loop() -> None:
        still, seen = 0.0, -1
        while True:
            time.sleep(limits.tick)
            still, seen = (0.0 if beats != seen else still + limits.tick), beats
            if still >= limits.call:
                exit_with(in_child_process(describe_blocked(thread, still)))

    poll()
    threading.Thread(target=watch_loop, name="flowstore-watch", daemon=True).start()


def in_child_process(hang: Hang) -> Hang:
    """The hang with a message that names the child process."""
    return replace(hang, message=f"in another process, {hang.message}")
