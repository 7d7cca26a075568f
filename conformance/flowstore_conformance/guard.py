"""The guard of the user's data: checks run only in scratch namespaces, and only in empty ones."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from types import CodeType
from typing import Any
from uuid import uuid4

from flowstore_conformance.method_signatures import SignatureFinding, compare
from flowstore_core import (
    Backend,
    Capability,
    ConfigurationError,
    FlowStore,
    FlowStoreError,
    NotSupportedError,
    SchemaVersionError,
    StoreConfig,
    StoreUnavailableError,
)
from flowstore_core.backend import (
    Describable,
    Diagnosable,
    FaultInjectable,
    Fixable,
    Migratable,
    NonDurableUrls,
    OutageInjectable,
    SchemaRevertible,
    SchemaVersionAdjustable,
    ScratchClearable,
    VariantUrls,
    WriteFailable,
)
from flowstore_core.open import resolve_store
from flowstore_core.platforms import require_posix
from flowstore_core.plugins import declared_limits, declared_max_skew, load_error
from flowstore_core.urls import redact
from flowstore_core.validated_store import ValidatedStore

OPTIONAL_PROTOCOLS = (
    Describable,
    Diagnosable,
    FaultInjectable,
    Fixable,
    Migratable,
    NonDurableUrls,
    OutageInjectable,
    SchemaRevertible,
    SchemaVersionAdjustable,
    ScratchClearable,
    VariantUrls,
    WriteFailable,
)
"""The protocols that a descriptor may implement; see flowstore_core.backend."""

CANNOT_INSPECT = "refused: cannot determine whether the scratch namespace is empty"


class Refused(ConfigurationError):  # noqa: N818 - a refusal by the suite
    """The suite refuses to use a namespace, because it may hold someone's data."""


class NoNamespace(Exception):  # noqa: N818 - makes a check inconclusive, not failed
    """The backend's ``scratch`` failed while checks were running."""


class WrappedBackend:
    """A backend with the members of another one, of which a subclass changes some."""

    def __init__(self, backend: Backend) -> None:
        self.name = backend.name
        self.schemes = backend.schemes
        self.capabilities = backend.capabilities
        """Those of the opened store, once it was opened, as are the limits and max_skew."""
        self.limits = declared_limits(backend)
        self.max_skew = declared_max_skew(backend)
        self.options = backend.options
        self.contract_version = backend.contract_version
        self._backend = backend
        # From Python 3.12 on, isinstance() with a protocol does not find what __getattr__ returns.
        for protocol in OPTIONAL_PROTOCOLS:
            for name in vars(protocol):
                if not name.startswith("_") and hasattr(backend, name):
                    setattr(self, name, getattr(backend, name))

    @property
    def wrapped(self) -> Backend:
        return self._backend

    def open(self, config: StoreConfig) -> Any:
        return self._backend.open(config)

    def scratch(self, url: str) -> AbstractAsyncContextManager[str]:
        return self._backend.scratch(url)


class GuardedBackend(WrappedBackend):
    """A backend whose ``scratch`` may not yield the user's own URL or a namespace that is in use."""

    def __init__(self, backend: Backend, url: str, capabilities: frozenset[Capability] | None = None) -> None:
        super().__init__(backend)
        if capabilities is not None:
            self.capabilities = capabilities
        self._url = url
        self.findings: tuple[SignatureFinding, ...] = ()
        """Methods that core cannot call."""
        self.inspected = False
        """Whether the inspection is complete: a namespace is empty, or no check can run."""
        self._in_use: set[str] = set()

    @property
    def in_use(self) -> tuple[str, ...]:
        """The namespaces in use, without secrets."""
        return tuple(sorted(map(redact, self._in_use)))

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with AsyncExitStack() as stack:
            try:
                fresh = await stack.enter_async_context(self._backend.scratch(url))
            except Exception as error:
                raise NoNamespace(f"no scratch namespace: {_describe_error(error)}") from error
            if fresh == self._url:
                raise Refused(
                    f"refused: scratch() of backend {self.name!r} returned the URL that it was given, "
                    f"{redact(fresh)}, instead of a new namespace beside it"
                )
            if fresh in self._in_use:
                raise Refused(f"refused: scratch() of backend {self.name!r} returned one namespace twice")
            self._in_use.add(fresh)
            try:
                yield fresh
            finally:
                self._in_use.discard(fresh)


class RecyclingBackend(WrappedBackend):
    """A guarded backend whose ``scratch`` yields one namespace again and again, emptied in between.

    A namespace whose check did not pass is not used again; nor is any if the backend is not ScratchClearable.
    """

    def __init__(self, backend: GuardedBackend) -> None:
        super().__init__(backend)
        self._idle: list[tuple[str, AsyncExitStack]] = []

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with AsyncExitStack() as stack:
            if self._idle:
                used, its_stack = self._idle.pop()
                await stack.enter_async_context(its_stack)
                assert isinstance(self._backend, ScratchClearable)
                await self._backend.clear_scratch(used)
            else:
                used = await stack.enter_async_context(self._backend.scratch(url))
            yield used
            if isinstance(self._backend, ScratchClearable):
                self._idle.append((used, stack.pop_all()))

    async def discard(self) -> None:
        """Drop the namespaces that are not in use."""
        while self._idle:
            await self._idle.pop()[1].aclose()


SCRATCH: CodeType = inspect.unwrap(GuardedBackend.scratch).__code__
"""Identifies frames that create or drop a namespace."""


async def guard(backend: Backend, url: str) -> GuardedBackend:
    """Create a namespace, check that it is empty, drop it, and return the guarded backend.

    First compares the methods of the backend's store with the Protocol. If a declared capability lacks its
    methods, core cannot open the store; the namespace is then not inspected, and no check runs.

    Raises Refused, a ConfigurationError, if the namespace is not new and empty or cannot be inspected;
    StoreUnavailableError and ConfigurationError as raised by the backend.
    """
    require_posix("the conformance suite")
    guarded = backend if isinstance(backend, GuardedBackend) else GuardedBackend(backend, url)
    try:
        async with guarded.scratch(url) as fresh:
            await _inspect(guarded, fresh)
    except NoNamespace as error:
        cause = error.__cause__
        if isinstance(cause, (ConfigurationError, StoreUnavailableError)):
            raise cause from None
        raise ConfigurationError(f"backend {backend.name!r} makes {error}") from cause
    except (ConfigurationError, SchemaVersionError, StoreUnavailableError):
        raise
    except Exception as error:
        raise Refused(f"{CANNOT_INSPECT}: {_describe_error(error)}") from error
    return guarded


async def _inspect(guarded: GuardedBackend, url: str) -> None:
    """Open the backend's own store, without core's checks, and inspect its methods and its contents."""
    plugin, _, config = resolve_store(url)
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(guarded.open(config))
        except ModuleNotFoundError as error:
            raise load_error(plugin.name, plugin.module, plugin.distribution, error) from error
        # The capabilities of a store may depend on the URL, so they replace those of the backend.
        guarded.capabilities = frozenset(getattr(store, "capabilities", guarded.capabilities))
        guarded.limits = declared_limits(guarded, store)
        guarded.max_skew = declared_max_skew(guarded, store, guarded.capabilities)
        guarded.findings = compare(store, guarded.capabilities)
        if not any(one.missing and one.capability for one in guarded.findings):
            checked = ValidatedStore(store, guarded.name, guarded.capabilities, AsyncExitStack())
            if found := await _holds(checked, guarded.findings):
                raise Refused(
                    f"refused: the namespace that scratch() of backend {guarded.name!r} made, "
                    f"{redact(url)}, is not empty: {found}. Nothing was changed"
                )
        guarded.inspected = True


INSPECT: CodeType = _inspect.__code__
"""Identifies frames that open or close the store."""


async def _holds(store: FlowStore, findings: Sequence[SignatureFinding] = ()) -> str | None:
    """Describe the contents of a namespace; None if it is empty.

    Skips operations that the backend lacks or declares with a wrong signature; at least one that lists runs
    must work.
    """
    unknown, seen = uuid4(), 0
    wrong = {one.method: one for one in findings}
    wrong |= {"get_statistics": wrong["get_runs_page"]} if "get_runs_page" in wrong else {}
    reads: tuple[tuple[bool, str, Callable[[], Awaitable[object]]], ...] = (
        (True, "get_runs", lambda: store.get_runs(take=1)),
        (True, "get_active_runs", lambda: store.get_active_runs(take=1)),
        (True, "get_statistics", lambda: _count_runs(store)),
        (False, "get_run_detail", lambda: store.get_run_detail(unknown)),
        (False, "get_run_control", lambda: store.get_run_control(unknown)),
        (False, "get_step_statuses", lambda: store.get_step_statuses(unknown)),
        (False, "get_step_claims", lambda: store.get_step_claims(unknown)),
        (False, "get_dispatches", lambda: store.get_dispatches(unknown)),
        (
            False,
            "find_run_id_by_idempotency_key",
            lambda: store.find_run_id_by_idempotency_key(unknown, "any", str(unknown)),
        ),
    )
    for lists_runs, name, read in reads:
        if name in wrong:
            continue
        try:
            answer = await read()
        except NotSupportedError:
            continue
        if answer:
            return f"{name} returns data{'' if lists_runs else ' for a new random id'}"
        seen += lists_runs
    if not seen and (found := [wrong[name].title for _, name, _ in reads[:3] if name in wrong]):
        raise Refused(f"{CANNOT_INSPECT}: {'; '.join(found)}")
    if not seen:
        raise Refused("refused: the backend has no operation that shows whether a namespace is empty")
    return None


async def _count_runs(store: FlowStore) -> int:
    if Capability.DASHBOARD not in store.capabilities:
        raise NotSupportedError(store.backend, Capability.DASHBOARD, "get_statistics")
    statistics = await store.get_statistics()
    return statistics.total_flows + statistics.active_runs + (await store.get_runs_page(take=1)).total_count


def _describe_error(error: BaseException) -> str:
    """Describe an error; a foreign one only by its class, because its text may hold secrets."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, FlowStoreError) else f"the backend raised {name}"
