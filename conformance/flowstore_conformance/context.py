"""What a check works with: a fresh namespace, stores opened on it, a clock, and words for what is wrong."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import partial
from typing import Any, TypeVar

from flowstore_conformance.diffing import brief, expected_and_got, plain
from flowstore_conformance.history import History, comparable
from flowstore_conformance.linearizability import Verdict
from flowstore_core import (
    Backend,
    Capability,
    ConfigurationError,
    FlowStore,
    FlowStoreError,
    StoreUnavailableError,
    open_store,
)

T = TypeVar("T")


class Profile(StrEnum):
    """How much work the suite puts in."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"

    def of(self, quick: int, standard: int, thorough: int) -> int:
        """The number for this profile."""
        return {Profile.QUICK: quick, Profile.STANDARD: standard, Profile.THOROUGH: thorough}[self]


class ContractViolation(Exception):  # noqa: N818 - a finding about the store, not an error of the suite
    """The store broke a promise."""

    def __init__(
        self,
        message: str,
        *,
        clause: str | None = None,
        program: str | None = None,
        history: History | None = None,
        verdict: Verdict | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.clause = clause
        """The clause that is broken, where it is another than the check's first."""
        self.program = program
        """A program in Python that shows it, shrunk where possible."""
        self.history = history
        self.verdict = verdict


class Inconclusive(Exception):  # noqa: N818
    """The check could not look closely enough: too little overlapped, or a budget ran out."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable
        """Whether more work, with another seed, may show more; the suite then tries again."""


class Unsupported(Exception):  # noqa: N818
    """The check cannot be made on this backend, and nothing in the contract says that it must be possible."""


class VirtualClock:
    """A clock that stands still until a check moves it."""

    def __init__(self, now: datetime = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, duration: timedelta) -> datetime:
        self.now += duration
        return self.now


@dataclass(slots=True)
class SharedResources:
    """What lasts as long as a namespace that checks share."""

    stack: AsyncExitStack
    worker_pools: list[Any] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class CheckContext:
    """One check's workplace on one namespace, which is fresh unless checks share it."""

    url: str
    """Of the fresh namespace."""
    base_url: str
    """What the user named; only its backend's scratch() ever gets it."""
    backend: Backend
    capabilities: frozenset[Capability]
    profile: Profile
    seed: int
    store: FlowStore
    clock: VirtualClock | None
    """None where the backend has no VIRTUAL_CLOCK."""
    random: random.Random
    timeout_factor: float = 1.0
    """By how much longer than usual to go on, before a check is inconclusive."""
    call_seconds: float = 30.0
    """How long a call may take in a process of the check's."""
    shared: SharedResources | None = None
    """None in a namespace of the check's own."""
    assertions: int = 0
    """How often the promise was put to the test; reported with the result."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def open(self, **options: Any) -> FlowStore:
        """A further store on the same namespace and clock, as another worker would open it.

        Raises Unsupported where the backend lets one store in at a time, as one may that several
        processes cannot use; Violation where they can.
        """
        if self.clock is not None:
            options.setdefault("clock", self.clock)
        try:
            return await self._stack.enter_async_context(open_store(self.url, **options))
        except (ConfigurationError, StoreUnavailableError) as error:
            told = f"a second store on the namespace is refused: {type(error).__name__}: {error}"
            if Capability.MULTI_PROCESS in self.capabilities:
                raise ContractViolation(f"{told}; yet MULTI_PROCESS is declared", clause="CON-6") from error
            raise Unsupported(told) from error

    async def workers(self, count: int) -> list[FlowStore]:
        """So many stores, the bench's own the first; it alone where the backend lets one in at a time."""
        try:
            return [self.store, *[await self.open() for _ in range(count - 1)]]
        except Unsupported:
            return [self.store]

    @asynccontextmanager
    async def new_namespace(self) -> AsyncIterator[CheckContext]:
        """A bench on another fresh namespace, for one example of many. Counts on this bench."""
        seed = self.random.getrandbits(64)
        more = (self.timeout_factor, self.call_seconds)
        async with new_context(self.base_url, self.backend, self.profile, seed, *more) as another:
            yield another
        self.assertions += max(another.assertions, 1)

    @property
    def exact_times(self) -> bool:
        """Whether timestamps can be compared exactly."""
        return self.clock is not None

    # What a store answered, held against what it should have

    def expect(self, actual: object, wanted: object, sentence: str) -> None:
        """Compare an answer (see history.comparable) and count it; Violation with both otherwise."""
        self.assertions += 1
        got, want = (
            comparable(actual, exact_times=self.exact_times),
            comparable(wanted, exact_times=self.exact_times),
        )
        if got != want:
            raise ContractViolation(f"{sentence}: {expected_and_got(want, got)}")

    def expect_that(self, condition: object, sentence: str) -> None:
        """Count a condition; Violation with the sentence when it does not hold."""
        self.assertions += 1
        if not condition:
            raise ContractViolation(sentence)

    async def expect_error(
        self, call: Awaitable[object], error: type[FlowStoreError], sentence: str
    ) -> FlowStoreError:
        """Await a call that must raise an error of the contract, exactly this class, and return it."""
        self.assertions += 1
        try:
            value = await call
        except FlowStoreError as raised:
            if type(raised) is not error:
                raise ContractViolation(
                    f"{sentence}: expected {error.__name__}, got {type(raised).__name__}"
                ) from raised
            return raised
        except Exception as raised:
            message = f"{sentence}: expected {error.__name__}, got {type(raised).__name__}"
            raise ContractViolation(message, clause="CON-2") from raised
        raise ContractViolation(
            f"{sentence}: expected {error.__name__}, got {brief(plain(comparable(value)))}"
        )


@asynccontextmanager
async def new_context(
    base_url: str,
    backend: Backend,
    profile: Profile,
    seed: int,
    timeout_factor: float = 1.0,
    call_seconds: float = 30.0,
) -> AsyncIterator[CheckContext]:
    """A bench on a namespace that the backend makes afresh, and drops at the end."""
    clock = VirtualClock() if Capability.VIRTUAL_CLOCK in backend.capabilities else None
    async with backend.scratch(base_url) as url, AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_store(url, clock=clock))
        yield CheckContext(
            url=url,
            base_url=base_url,
            backend=backend,
            capabilities=store.capabilities,
            profile=profile,
            seed=seed,
            store=store,
            clock=clock,
            random=random.Random(seed),
            timeout_factor=timeout_factor,
            call_seconds=call_seconds,
            _stack=stack,
        )


class SharedNamespace:
    """One namespace, store and crew for all checks that can share them, as long as each of them passes.

    Making a namespace takes a database longer than most checks do.
    """

    def __init__(self, base_url: str, backend: Backend, profile: Profile, call_seconds: float = 30.0) -> None:
        self._make = partial(new_context, base_url, backend, profile, 0, call_seconds=call_seconds)
        self._first: CheckContext | None = None
        self._stack = AsyncExitStack()

    @asynccontextmanager
    async def context(self, seed: int) -> AsyncIterator[CheckContext]:
        """A bench for the next check: draws and stores of its own, and the clock as it is at first."""
        if self._first is None:
            self._first = await self._stack.enter_async_context(self._make())
            self._first.shared = SharedResources(self._stack)
        if self._first.clock is not None:
            self._first.clock.now = VirtualClock().now
        async with AsyncExitStack() as stack:
            yield replace(self._first, seed=seed, random=random.Random(seed), assertions=0, _stack=stack)

    async def discard(self) -> None:
        """Drop the namespace; the next check gets a fresh one."""
        stack, self._stack, self._first = self._stack, AsyncExitStack(), None
        await stack.aclose()
