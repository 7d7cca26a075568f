"""Discovery of backends and wrappers: pluggy hooks behind two groups of entry points.

Entry points of group ``flowstore`` are backends, each named after a URL scheme: opening a URL imports only
the plugin of its scheme. If no entry point has that name, all backend plugins are imported and searched for
the scheme. Entry points of group ``flowstore_wrappers`` wrap the stores of every backend; opening a store
imports all of them.

Plugins are loaded independently, so a broken one does not disable the others. A scheme that two plugins
claim is an error when it is opened. A distribution with unreadable metadata counts as a broken plugin of
each group that it mentions.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import EntryPoint
from typing import Any, Protocol

import pluggy

from flowstore_core.config import StoreConfig
from flowstore_core.distributions import (
    BrokenDistribution,
    distribution_name,
    read_entry_points,
    read_requirements,
)
from flowstore_core.errors import BackendLoadError, UnknownBackendError
from flowstore_core.limits import LARGEST_LIMITS, StoreLimits
from flowstore_core.status import Capability
from flowstore_core.suggestions import did_you_mean

PROJECT = "flowstore"
BACKENDS = PROJECT
"""The group of entry points of backends, named after the URL schemes that they serve."""
WRAPPERS = "flowstore_wrappers"
"""The group of entry points of wrappers, whose hook wraps the stores of every backend."""
CONTRACT_VERSION = 1

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)


class Backend(Protocol):
    """The descriptor of a backend, as a plugin returns it. Structural: no base class is needed."""

    @property
    def name(self) -> str: ...

    @property
    def schemes(self) -> frozenset[str]:
        """The URL schemes of the backend, in lower case."""
        ...

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The capabilities of its stores; overridden by the attribute ``capabilities`` of a store."""
        ...

    @property
    def options(self) -> frozenset[str]:
        """The names of its options, for the URL's query and keywords; core rejects any other name."""
        ...

    @property
    def contract_version(self) -> int:
        """The version of the contract that it implements: 1."""
        ...

    def open(self, config: StoreConfig) -> AbstractAsyncContextManager[Any]:
        """Open a store that implements FlowStore or a part of it; leaving the context closes it.

        Import the driver here, not at the top of the plugin module: then a missing driver is reported with
        its remedy, and users of other backends do not import it.
        """
        ...

    def scratch(self, url: str) -> AbstractAsyncContextManager[str]:
        """Create an empty namespace next to the store at ``url``, yield its URL, and drop it on exit.

        Conformance checks run in this namespace. The store at ``url`` itself is never touched.
        """
        ...


def declared_limits(backend: Backend, store: Any = None) -> StoreLimits:
    """The limits of a store, or of a backend: its own, else those of the descriptor, else the largest."""
    declared = (getattr(owner, "limits", None) for owner in (store, backend))
    return next((limits for limits in declared if isinstance(limits, StoreLimits)), LARGEST_LIMITS)


def declared_max_skew(
    backend: Backend, store: Any = None, capabilities: frozenset[Capability] | None = None
) -> timedelta | None:
    """The max_skew of a store, or of a backend, in the same way; None without SHARED_CLOCK."""
    if Capability.SHARED_CLOCK not in (backend.capabilities if capabilities is None else capabilities):
        return None
    declared = (getattr(owner, "max_skew", None) for owner in (store, backend))
    return next((max_skew for max_skew in declared if isinstance(max_skew, timedelta)), None)


class Hooks:
    """The hooks that a plugin may implement with ``hookimpl``."""

    @hookspec
    def flowstore_backends(self) -> Sequence[Backend]:
        """Return the backends of the plugin."""
        raise NotImplementedError

    @hookspec
    def flowstore_wrap_store(self, store: Any, config: StoreConfig) -> Any:
        """Wrap a store that was just opened, for example for tracing or encryption; None does not wrap it.

        A plugin of group ``flowstore`` wraps the stores of its own backends, a plugin of group
        ``flowstore_wrappers`` those of every backend. The plugin's own wrapper is the innermost; the others
        follow in the order of their entry points' names, the last one outermost. Validation surrounds all
        wrappers: a wrapper gets validated arguments, all by keyword, and its results reach the caller
        unchanged.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A loaded plugin, or one that could not be loaded, with its error."""

    name: str
    """The name of its entry point; of several, the one named like its backend, else the first."""
    distribution: str | None
    module: str
    value: str = ""
    """The value of its entry points: a module, or an object in it."""
    backends: tuple[Backend, ...] = ()
    wrap: Callable[..., Any] | None = None
    error: BackendLoadError | None = None


def load_plugins() -> tuple[Plugin, ...]:
    """Every plugin of group ``flowstore``, ordered by name, including broken ones."""
    return tuple(sorted(_load_group(BACKENDS), key=lambda plugin: plugin.name))


def load_wrappers() -> tuple[Plugin, ...]:
    """Every plugin of group ``flowstore_wrappers``, ordered by name, including broken ones."""
    return _load_group(WRAPPERS)


def _load_group(group: str) -> tuple[Plugin, ...]:
    path = tuple(sys.path)
    _, broken = _read_metadata(path)
    unreadable = [_explain_distribution(one) for one in broken if group in one.groups]
    return (*(_load_plugin(path, entries) for entries in _list_entries(path, group)), *unreadable)


def _explain_distribution(broken: BrokenDistribution) -> Plugin:
    remedy = f"reinstall or uninstall {broken.name}"
    return Plugin(
        name=broken.name,
        distribution=broken.name,
        module="",
        error=BackendLoadError(broken.name, broken.problem, remedy),
    )


# The caches are keyed by sys.path, so that a plugin installed into a running process is found.


@functools.lru_cache(maxsize=4)
def _read_metadata(path: tuple[str, ...]) -> tuple[list[EntryPoint], list[BrokenDistribution]]:
    return read_entry_points((BACKENDS, WRAPPERS))


@functools.lru_cache(maxsize=8)
def _list_entries(path: tuple[str, ...], group: str) -> tuple[tuple[EntryPoint, ...], ...]:
    """The entry points of a group, grouped by plugin; read from metadata, without an import."""
    entries, _ = _read_metadata(path)
    # An editable install and a wheel of the same distribution may both be on the path.
    found = {(entry.name, entry.value): entry for entry in entries if entry.group == group}
    plugins: dict[str, list[EntryPoint]] = {}
    for key in sorted(found):
        plugins.setdefault(found[key].value, []).append(found[key])
    return tuple(tuple(entries) for entries in plugins.values())


@functools.lru_cache(maxsize=128)
def _load_plugin(path: tuple[str, ...], entries: tuple[EntryPoint, ...]) -> Plugin:
    names = [entry.name for entry in entries]
    name, value = names[0], entries[0].value
    distribution = distribution_name(entries[0].dist) if entries[0].dist is not None else None
    named = entries[0].pattern.match(value)
    if named is None:
        problem = f"its entry point names {value!r}, which is not a module"
        error = BackendLoadError(name, problem, f"report it to the authors of {distribution or name}")
        return Plugin(name=name, distribution=distribution, module=value, value=value, error=error)
    module = named["module"]
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    try:
        manager.register(entries[0].load(), name=name)
        manager.check_pending()
        backends = tuple(b for result in manager.hook.flowstore_backends() for b in result)
        for backend in backends:
            _check_backend(backend)
    except Exception as error:  # noqa: BLE001 - stored, and raised when its scheme is opened
        return Plugin(
            name=name,
            distribution=distribution,
            module=module,
            value=value,
            error=load_error(name, module, distribution, error),
        )
    wrap = manager.hook.flowstore_wrap_store
    return Plugin(
        name=next((b.name for b in backends if b.name in names), name),
        distribution=distribution,
        module=module,
        value=value,
        backends=backends,
        wrap=wrap if wrap.get_hookimpls() else None,
    )


def _check_backend(backend: Any) -> None:
    for attribute, kind in (("name", str), ("contract_version", int)):
        if not isinstance(getattr(backend, attribute, None), kind):
            raise TypeError(f"a backend's {attribute} must be {kind.__name__}")
    for attribute in ("schemes", "capabilities", "options"):
        value = getattr(backend, attribute, None)
        if not isinstance(value, frozenset) or not all(isinstance(item, str) for item in value):
            raise TypeError(f"{attribute} of backend {backend.name!r} must be a frozenset of str")
    if unknown := backend.capabilities - frozenset(Capability):
        raise TypeError(f"backend {backend.name!r} declares unknown {', '.join(sorted(unknown))}")
    if not isinstance(getattr(backend, "limits", LARGEST_LIMITS), StoreLimits):
        raise TypeError(f"limits of backend {backend.name!r} must be a StoreLimits")
    if Capability.SHARED_CLOCK in backend.capabilities:
        max_skew = getattr(backend, "max_skew", None)
        if not isinstance(max_skew, timedelta) or max_skew < timedelta(0):
            raise TypeError(f"max_skew of backend {backend.name!r} must be a timedelta of 0 or more")
    for scheme in backend.schemes:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
            raise ValueError(f"scheme {scheme!r} of backend {backend.name!r} is not a URL scheme")
    if backend.contract_version != CONTRACT_VERSION:
        raise ValueError(
            f"backend {backend.name!r} was written for contract version "
            f"{backend.contract_version}, this flowstore supports {CONTRACT_VERSION}"
        )
    for method in ("open", "scratch"):
        if not callable(getattr(backend, method, None)):
            raise TypeError(f"backend {backend.name!r} has no method {method}")


def find_backend(scheme: str) -> tuple[Plugin, Backend]:
    """The plugin and backend of a scheme; imports only the plugins named after it if one of them serves it.

    Raises UnknownBackendError if no backend or several backends serve the scheme, BackendLoadError if the
    plugin named after the scheme could not be loaded.
    """
    path = tuple(sys.path)
    named = [
        _load_plugin(path, entries)
        for entries in _list_entries(path, BACKENDS)
        if any(entry.name == scheme for entry in entries)
    ]
    if serving := _choose(scheme, named):
        return serving
    for plugin in named:
        _refuse_broken(plugin)
    plugins = load_plugins()
    if serving := _choose(scheme, plugins):
        return serving
    known = sorted({s for p in plugins for b in p.backends for s in b.schemes})
    message = f"no installed backend serves scheme {scheme!r}{did_you_mean(scheme, known)}"
    message += f"; installed: {', '.join(known) or 'none'}"
    if broken := [plugin for plugin in plugins if plugin.error is not None]:
        message += "; broken plugins: " + ", ".join(repr(plugin.name) for plugin in broken)
        message += " (flowstore backends says why)"
    if all(plugin.distribution != PROJECT for plugin in plugins):
        message += (
            "; the metadata of flowstore, which names its backends, is missing: install flowstore with pip, "
            "or add its metadata to the frozen program (PyInstaller: --copy-metadata flowstore)"
        )
    raise UnknownBackendError(scheme, message)


def _choose(scheme: str, plugins: Iterable[Plugin]) -> tuple[Plugin, Backend] | None:
    serving = [(p, b) for p in plugins for b in p.backends if scheme in b.schemes]
    if len(serving) > 1:
        names = " and ".join(f"{p.name!r} ({p.distribution or p.module})" for p, _ in serving)
        raise UnknownBackendError(
            scheme, f"scheme {scheme!r} is claimed by plugins {names}; uninstall all but one"
        )
    return serving[0] if serving else None


def wrap_store(store: Any, config: StoreConfig, plugin: Plugin) -> Any:
    """Wrap a backend's store with its own plugin's wrapper, if any, then with those of flowstore_wrappers.

    Raises BackendLoadError if a wrapper could not be loaded: skipping one that encrypts would leak data.
    """
    wrappers = [wrapper for wrapper in load_wrappers() if wrapper.value != plugin.value]
    for wrapper in (plugin, *wrappers):
        _refuse_broken(wrapper)
        if wrapper.wrap is not None:
            for wrapped in wrapper.wrap(store=store, config=config):
                store = wrapped
    return store


def _refuse_broken(plugin: Plugin) -> None:
    if plugin.error is not None:
        # The error is cached; without this, each raise would add to its traceback.
        raise plugin.error.with_traceback(None)


def load_error(plugin: str, module: str, distribution: str | None, error: Exception) -> BackendLoadError:
    """The error of a plugin that could not be loaded, with its remedy; tells a missing driver from a bug."""
    own = module.partition(".")[0]
    missing = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    top = missing.partition(".")[0]
    if missing and f"{module}.".startswith(f"{missing}."):
        remedy = f"reinstall or uninstall {distribution or module}"
        if getattr(sys, "frozen", False):
            remedy = f"add it to the frozen program (PyInstaller: --collect-all {own})"
        found = BackendLoadError(plugin, f"its module {module!r} is not installed", remedy)
    elif top and top != own:
        found = BackendLoadError(
            plugin,
            f"module {top!r} is not installed",
            f"pip install {_requirement(top, distribution)}",
        )
    else:
        found = BackendLoadError(
            plugin,
            f"{type(error).__name__} in {module}: {error}",
            f"report it to the authors of {distribution or module}",
        )
    found.__cause__ = error
    return found


def _requirement(module: str, distribution: str | None) -> str:
    """The requirement that installs a module: the extra that lists it, if any.

    It is an extra of flowstore if the plugin's distribution does not list the module.
    """
    for offering in filter(None, (distribution, PROJECT)):
        requirements = read_requirements(offering)
        listing = [_extra(requirement) for requirement in requirements if _installs(requirement, module)]
        if extras := [extra for extra in listing if extra is not None]:
            # The smallest such extra: others, such as "all", install more than needed.
            sizes = Counter(map(_extra, requirements))
            return f"'{offering}[{min(extras, key=sizes.__getitem__)}]'"
        if listing:
            break
    return module


def _extra(requirement: str) -> str | None:
    """The extra that a requirement is of."""
    found = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
    return found[1] if found else None


def _installs(requirement: str, module: str) -> bool:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    # Several distributions may share a module; their names then begin with it, as with opentelemetry.
    return name is not None and f"{re.sub(r'[-.]', '_', name[0])}_".lower().startswith(f"{module.lower()}_")
