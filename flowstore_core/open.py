"""open_store: from a URL to a validated store."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from types import MappingProxyType
from typing import Any

from flowstore_core.config import StoreConfig, resolve_url
from flowstore_core.errors import BackendLoadError, ConfigurationError, NotSupportedError
from flowstore_core.operations import CAPABILITY_METHODS
from flowstore_core.plugins import (
    Backend,
    Plugin,
    declared_limits,
    declared_max_skew,
    find_backend,
    load_error,
    wrap_store,
)
from flowstore_core.status import Capability
from flowstore_core.store import FlowStore
from flowstore_core.suggestions import did_you_mean
from flowstore_core.urls import ENCODING_RULE, parse_url, redact, redact_option
from flowstore_core.validated_store import ValidatedStore
from flowstore_core.validation import check_clock

_log = logging.getLogger("flowstore_core")


@asynccontextmanager
async def open_store(
    url: str | None = None,
    *,
    clock: Callable[[], datetime] | None = None,
    migrate: bool = True,
    **options: object,
) -> AsyncIterator[FlowStore]:
    """Open the store at a URL and close it when the context exits.

    ``url`` defaults to FLOWSTORE_URL, then to key ``url`` of flowstore.toml or [tool.flowstore] in the
    working directory, then to ``sqlite:///flowstore.db``. ``options`` are those of the backend; the URL's
    query may set them too. ``clock``, a callable without arguments that returns an aware datetime, replaces
    the clock of the backend for every timestamp that it writes or compares. ``migrate=False`` never changes
    the schema, for roles without DDL rights.

    Raises ConfigurationError, UnknownBackendError, BackendLoadError, SchemaVersionError,
    StoreUnavailableError, InvalidArgumentError for an unusable clock, and NotSupportedError for a clock on
    a backend without VIRTUAL_CLOCK.
    """
    plugin, backend, config = resolve_store(url, clock=clock, migrate=migrate, **options)
    async with AsyncExitStack() as stack:
        store = await _enter_backend(stack, plugin, backend, config)
        capabilities = frozenset(getattr(store, "capabilities", backend.capabilities))
        _check_capabilities(plugin, store, capabilities)
        limits = declared_limits(backend, store)
        max_skew = declared_max_skew(backend, store, capabilities)
        if Capability.SHARED_CLOCK in capabilities and max_skew is None:
            raise _broken(plugin, f"its store declares capability {Capability.SHARED_CLOCK} but no max_skew")
        if config.clock is not None and Capability.VIRTUAL_CLOCK not in capabilities:
            raise NotSupportedError(backend.name, Capability.VIRTUAL_CLOCK, "open_store(clock=...)")
        store = wrap_store(store, config, plugin)
        checked = ValidatedStore(
            store, backend.name, capabilities, stack.pop_all(), limits=limits, max_skew=max_skew
        )
    _log.debug(
        "opened %s, backend %s",
        redact(config.url),
        backend.name,
        extra={"flowstore.backend": backend.name, "flowstore.url": redact(config.url)},
    )
    try:
        yield checked
    finally:
        await checked.aclose()
        _log.debug(
            "closed %s",
            redact(config.url),
            extra={"flowstore.backend": backend.name, "flowstore.url": redact(config.url)},
        )


def resolve_store(
    url: str | None = None,
    *,
    clock: Callable[[], datetime] | None = None,
    migrate: bool = True,
    **options: object,
) -> tuple[Plugin, Backend, StoreConfig]:
    """The plugin, the backend and the configuration that open_store uses for these arguments.

    Opens nothing. Raises ConfigurationError, UnknownBackendError, BackendLoadError, and
    InvalidArgumentError for the clock.
    """
    checked_clock = check_clock(clock)
    settings = resolve_url(url, options, migrate=migrate)
    parsed = parse_url(settings.url)
    plugin, backend = find_backend(parsed.scheme)
    if unknown := settings.options.keys() - backend.options:
        known = ", ".join(sorted(backend.options)) or "none"
        near = {name: did_you_mean(name, backend.options | {"migrate"}) for name in unknown}
        names = ", ".join(sorted({f"{redact_option(name)}{near[name]}" for name in unknown}))
        if parsed.has_at_in_query:
            names = f"of that name ({ENCODING_RULE})"
        raise ConfigurationError(f"backend {backend.name!r} has no option {names}; it has: {known}")
    config = StoreConfig(
        url=settings.url,
        scheme=parsed.scheme,
        options=MappingProxyType(dict(settings.options)),
        clock=checked_clock,
        migrate=settings.migrate,
    )
    return plugin, backend, config


async def _enter_backend(stack: AsyncExitStack, plugin: Plugin, backend: Backend, config: StoreConfig) -> Any:
    try:
        return await stack.enter_async_context(backend.open(config))
    except ModuleNotFoundError as error:
        # A backend imports its driver in open. load_error tells a missing driver from a bug of the plugin.
        raise load_error(plugin.name, plugin.module, plugin.distribution, error) from error


def _check_capabilities(plugin: Plugin, store: Any, capabilities: frozenset[Capability]) -> None:
    for capability in sorted(capabilities):
        for method in CAPABILITY_METHODS.get(capability, ()):
            if not callable(getattr(store, method, None)):
                raise _broken(
                    plugin, f"its store declares capability {capability} but has no method {method}"
                )


def _broken(plugin: Plugin, problem: str) -> BackendLoadError:
    remedy = f"report it to the authors of {plugin.distribution or plugin.module}"
    return BackendLoadError(plugin.name, problem, remedy)
