"""The context of a check: a scratch namespace, the stores opened on it, a clock, and assertions."""

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
    StoreLimits,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.backend import ScratchClearable, VariantUrls

T = TypeVar("T")

DEFAULT_VARIANT = "default"
"""The variant with the options of the URL as given."""


class Profile(StrEnum):
    """How much work a run of the suite does."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"

    def of(self, quick: int, standard: int, thorough: int) -> int:
        """The number for this profile."""
        return {Profile.QUICK: quick, Profile.STANDARD: standard, Profile.THOROUGH: thorough}[self]


class ContractViolation(Exception):  # noqa: N818 - a finding about the store, not an error of the suite
    """The store violated the contract."""

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
        """The broken clause, if it is not the check's first."""
        self.program = program
        """A Python program that reproduces the violation, shrunk if possible."""
        self.history = history
        self.verdict = verdict


class Inconclusive(Exception):  # noqa: N818
    """The check could not decide: too few calls overlapped, or a budget ran out."""

    def __init__(self, message: str, *, retryable: bool = True) -> None:
        super().__init__(message)
        self.retryable = retryable
        """Whether a retry with another seed and more work may decide."""


class Unsupported(Exception):  # noqa: N818
    """The check is impossible on this backend, and the contract does not require that it is possible."""


class VirtualClock:
    """A clock that stands still until a check advances it."""

    def __init__(self, now: datetime = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, duration: timedelta) -> datetime:
        self.now += duration
        return self.now


@dataclass(slots=True, kw_only=True)
class CheckContext:
    """The context of one check on one namespace, which is fresh unless checks share it."""

    url: str
    """The URL of the scratch namespace, with the options of the variant."""
    base_url: str
    """The user's URL. It is passed to the backend's scratch() only."""
    backend: Backend
    capabilities: frozenset[Capability]
    profile: Profile
    seed: int
    store: FlowStore
    clock: VirtualClock | None
    """None if the backend has no VIRTUAL_CLOCK."""
    random: random.Random
    timeout_factor: float = 1.0
    """Multiplies the time before a check becomes inconclusive."""
    call_seconds: float = 30.0
    """Seconds that a call may take in a child process of the check."""
    variant: str | None = None
    """The backend's variant that the stores are opened with, or DEFAULT_VARIANT; None if it has none."""
    processes: Any = None
    """The worker processes of the run (see worker_pool.py); without them a check starts its own."""
    assertions: int = 0
    """Number of assertions made; reported with the result."""
    notes: list[str] = field(default_factory=list)
    """What the check measured; reported with the result if the check passes."""
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Ends with the check."""
    _namespace_stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Ends with the namespace."""
    _other_stores: list[FlowStore] = field(default_factory=list)

    async def open(self, **options: Any) -> FlowStore:
        """Open another store on the same namespace and clock, as a second worker would.

        If the backend refuses it, raises ContractViolation if MULTI_PROCESS is declared, else Unsupported.
        """
        return await self._open(self._stack, **options)

    async def other_stores(self, count: int) -> list[FlowStore]:
        """Return ``count`` stores on the same namespace and clock besides the context's own.

        Checks that share a namespace share these stores, because a store with open connections answers
        faster than a new one. A check that closes a store, or needs a new one, calls ``open``. Raises what
        ``open`` raises.
        """
        while len(self._other_stores) < count:
            self._other_stores.append(await self._open(self._namespace_stack))
        return self._other_stores[:count]

    async def _open(self, stack: AsyncExitStack, **options: Any) -> FlowStore:
        if self.clock is not None:
            options.setdefault("clock", self.clock)
        try:
            return await stack.enter_async_context(open_store(self.url, **options))
        except (ConfigurationError, StoreUnavailableError) as error:
            message = f"a second store on the namespace is refused: {type(error).__name__}: {error}"
            if Capability.MULTI_PROCESS in self.capabilities:
                raise ContractViolation(
                    f"{message}, although MULTI_PROCESS is declared", clause="CON-6"
                ) from error
            raise Unsupported(message) from error

    async def workers(self, count: int) -> list[FlowStore]:
        """Open ``count`` stores, including the context's own; just that one if no second is allowed."""
        try:
            return [self.store, *await self.other_stores(count - 1)]
        except Unsupported:
            return [self.store]

    @asynccontextmanager
    async def new_namespace(self) -> AsyncIterator[CheckContext]:
        """Make a context on another scratch namespace. Its assertions count in this context too."""
        seed = self.random.getrandbits(64)
        more = (self.timeout_factor, self.call_seconds, self.variant, self.processes)
        async with new_context(self.base_url, self.backend, self.profile, seed, *more) as context:
            yield context
        self.assertions += max(context.assertions, 1)

    @property
    def exact_times(self) -> bool:
        """Whether timestamps can be compared exactly."""
        return self.clock is not None

    @property
    def limits(self) -> StoreLimits:
        """What the store holds (LIM-1)."""
        return self.store.limits

    @property
    def page_size(self) -> int:
        """The largest ``take`` of a call."""
        return self.limits.page_size

    def text_size(self, size: int) -> int:
        """A size in bytes that a text of this store may have: at most its limit."""
        return min(size, self.limits.text_bytes)

    # Assertions

    def expect(self, actual: object, wanted: object, sentence: str, *, clause: str | None = None) -> None:
        """Assert that a result equals the expected one (see history.comparable).

        ``clause`` is the one that the assertion tests, if it is not the check's first.
        """
        self.assertions += 1
        if actual == wanted:
            return
        got, want = (
            comparable(actual, exact_times=self.exact_times),
            comparable(wanted, exact_times=self.exact_times),
        )
        if got != want:
            raise ContractViolation(f"{sentence}: {expected_and_got(want, got)}", clause=clause)

    def expect_that(self, condition: object, sentence: str) -> None:
        """Assert a condition; ``sentence`` is the message of the violation."""
        self.assertions += 1
        if not condition:
            raise ContractViolation(sentence)

    async def expect_error(
        self, call: Awaitable[object], error: type[FlowStoreError], sentence: str
    ) -> FlowStoreError:
        """Assert that a call raises an error of exactly this class, and return the error."""
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
    variant: str | None = None,
    processes: Any = None,
) -> AsyncIterator[CheckContext]:
    """Make a context on a scratch namespace of the backend, which is dropped at the end."""
    clock = VirtualClock() if Capability.VIRTUAL_CLOCK in backend.capabilities else None
    async with backend.scratch(base_url) as url, AsyncExitStack() as stack:
        if variant not in (None, DEFAULT_VARIANT):
            assert isinstance(backend, VariantUrls)
            url = backend.variants(url)[variant]
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
            variant=variant,
            processes=processes,
            _stack=stack,
            _namespace_stack=stack,
        )


class SharedNamespace:
    """One namespace and its stores, which checks share as long as each of them passes.

    Creating a namespace in a database takes longer than most checks.
    """

    def __init__(
        self,
        base_url: str,
        backend: Backend,
        profile: Profile,
        call_seconds: float = 30.0,
        variant: str | None = None,
        processes: Any = None,
    ) -> None:
        self._new_context = partial(
            new_context,
            base_url,
            backend,
            profile,
            0,
            call_seconds=call_seconds,
            variant=variant,
            processes=processes,
        )
        self.variant = variant
        self._context: CheckContext | None = None
        self._stack = AsyncExitStack()

    @asynccontextmanager
    async def context(
        self, seed: int, backend: Backend | None = None, *, empty: bool = False
    ) -> AsyncIterator[CheckContext]:
        """Make a context for the next check, with its own random draws and the clock reset.

        ``backend`` makes the further namespaces of the check, if it is not that of the shared one. ``empty``
        first deletes everything in the namespace; the backend must be ScratchClearable.
        """
        if self._context is None:
            self._context = await self._stack.enter_async_context(self._new_context())
        elif empty:
            assert isinstance(self._context.backend, ScratchClearable)
            await self._context.backend.clear_scratch(self._context.url)
        if self._context.clock is not None:
            self._context.clock.now = VirtualClock().now
        async with AsyncExitStack() as stack:
            yield replace(
                self._context,
                backend=backend or self._context.backend,
                seed=seed,
                random=random.Random(seed),
                assertions=0,
                notes=[],
                _stack=stack,
            )

    async def discard(self) -> None:
        """Drop the namespace; the next check gets a new one."""
        stack, self._stack, self._context = self._stack, AsyncExitStack(), None
        await stack.aclose()
