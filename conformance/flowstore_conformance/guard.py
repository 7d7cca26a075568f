"""The guard of the user's data: checks work in scratch namespaces alone, and only in empty ones."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
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
from flowstore_core.open import resolve_store
from flowstore_core.platforms import require_posix
from flowstore_core.plugins import load_error
from flowstore_core.urls import redact
from flowstore_core.validated_store import ValidatedStore


class Refused(ConfigurationError):  # noqa: N818 - says what the suite did
    """The suite will not work in a namespace, because it may be somebody's."""


class NoNamespace(Exception):  # noqa: N818 - says that nothing can be said, not that the store is wrong
    """The backend's ``scratch`` failed while checks were running."""


class GuardedBackend:
    """A backend whose ``scratch`` never hands out the user's own URL, nor one namespace to two at once."""

    def __init__(self, backend: Backend, url: str, capabilities: frozenset[Capability] | None = None) -> None:
        self.name = backend.name
        self.schemes = backend.schemes
        self.capabilities = backend.capabilities if capabilities is None else capabilities
        """Of an opened store, once one was."""
        self.options = backend.options
        self.contract_version = backend.contract_version
        self._backend = backend
        self._url = url
        self.findings: tuple[SignatureFinding, ...] = ()
        """Methods that core cannot call."""
        self.inspected = False
        """Whether a namespace was found to be empty, or no check can run anyway."""
        self._in_use: set[str] = set()

    @property
    def in_use(self) -> tuple[str, ...]:
        """The namespaces that were made and not dropped yet, without secrets."""
        return tuple(sorted(map(redact, self._in_use)))

    def __getattr__(self, name: str) -> Any:
        # The optional members of a backend, such as schema_version.
        return getattr(self._backend, name)

    def open(self, config: StoreConfig) -> Any:
        return self._backend.open(config)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        async with AsyncExitStack() as stack:
            try:
                fresh = await stack.enter_async_context(self._backend.scratch(url))
            except Exception as error:
                raise NoNamespace(f"no scratch namespace: {_describe_error(error)}") from error
            if fresh == self._url:
                raise Refused(
                    f"refused: scratch() of backend {self.name!r} gave the URL it was asked for, "
                    f"{redact(fresh)}, instead of a fresh namespace beside it"
                )
            if fresh in self._in_use:
                raise Refused(f"refused: scratch() of backend {self.name!r} gave one namespace twice")
            self._in_use.add(fresh)
            try:
                yield fresh
            finally:
                self._in_use.discard(fresh)


SCRATCH: CodeType = inspect.unwrap(GuardedBackend.scratch).__code__
"""By which a stack shows that a namespace is being made or dropped."""


async def guard(backend: Backend, url: str) -> GuardedBackend:
    """Make a namespace once, see that it is empty, drop it, and return the backend with its guard.

    First the methods of the backend's store are compared with the Protocol. A declared capability without
    its methods keeps core from opening the store; then the namespace is not looked into, and no check runs.

    Raises Refused, a ConfigurationError, when it is not a fresh and empty one, or when that cannot be
    seen; StoreUnavailableError and ConfigurationError as the backend raises them.
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
        raise Refused(
            f"refused: whether the scratch namespace is empty cannot be seen, because "
            f"{_describe_error(error)}"
        ) from error
    return guarded


async def _inspect(guarded: GuardedBackend, url: str) -> None:
    """Open the backend's own store, below core's, and see what it lacks and what it holds."""
    plugin, _, config = resolve_store(url)
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(guarded.open(config))
        except ModuleNotFoundError as error:
            raise load_error(plugin.name, plugin.module, plugin.distribution, error) from error
        # What a store can do may depend on the URL; from now on that counts.
        guarded.capabilities = frozenset(getattr(store, "capabilities", guarded.capabilities))
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
"""By which a stack shows that the store is being opened or closed."""


async def _holds(store: FlowStore, findings: Sequence[SignatureFinding] = ()) -> str | None:
    """What a namespace holds, in words; None when it is empty.

    Operations that the backend does not offer yet, or not with the right signature, are passed over; one
    that lists runs must answer.
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
            return f"{name} finds something{'' if lists_runs else ' for an id that was made up just now'}"
        seen += lists_runs
    if not seen and (found := [wrong[name].title for _, name, _ in reads[:3] if name in wrong]):
        raise Refused(f"refused: whether the namespace is empty cannot be seen, because {'; '.join(found)}")
    if not seen:
        raise Refused("refused: the backend has no operation yet that shows whether a namespace is empty")
    return None


async def _count_runs(store: FlowStore) -> int:
    if Capability.DASHBOARD not in store.capabilities:
        raise NotSupportedError(store.backend, Capability.DASHBOARD, "get_statistics")
    statistics = await store.get_statistics()
    return statistics.total_flows + statistics.active_runs + (await store.get_runs_page(take=1)).total_count


def _describe_error(error: BaseException) -> str:
    """An error in words; of one that is not the contract's only the name, since its text may hold secrets."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, FlowStoreError) else f"{name} surfaced"
