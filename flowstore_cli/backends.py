"""``flowstore backends``: the installed backends, their capabilities and their problems."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from flowstore_cli.printing import (
    cell,
    new_console,
    new_table,
    print_form,
    print_json,
    print_table,
)
from flowstore_cli.stores import AsJson, drivers, missing_driver
from flowstore_core import CRASH_SAFE, PROPERTIES, Backend, Capability, StoreLimits
from flowstore_core.distributions import BrokenDistribution, list_broken_distributions
from flowstore_core.plugins import (
    Plugin,
    declared_limits,
    declared_max_skew,
    load_plugins,
    load_wrappers,
)

INSTALLED, DRIVER_MISSING, CONFLICT, BROKEN = "installed", "driver missing", "conflict", "broken"
UNREADABLE = "unreadable"
STYLES = {
    INSTALLED: "green",
    DRIVER_MISSING: "yellow",
    CONFLICT: "yellow",
    UNREADABLE: "yellow",
    BROKEN: "red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """One row of the list. The fields are the keys of --json."""

    name: str
    schemes: list[str]
    distribution: str | None
    status: str
    problem: str | None
    remedy: str | None
    level: str | None
    capabilities: list[str]
    limits: StoreLimits | None
    max_skew_seconds: float | None
    options: list[str]


def backends(as_json: AsJson = False) -> None:
    """List the backends and their problems.

    Any installed package with an entry point in group "flowstore" provides backends; one in group
    "flowstore_wrappers" provides a wrapper, such as otel for spans and metrics. A backend's level is
    "crash-safe" when an engine can recover from crashes on it, "full" when it has every operation.

    \b
      flowstore backends
      flowstore backends --json

    A package whose entry points cannot be read is listed as unreadable: a backend that it provides is
    not found.

    JSON: a list of objects with name, schemes, distribution, status (installed, driver missing,
    conflict, broken or unreadable), problem, remedy, level, capabilities, limits (text_bytes, key_bytes,
    run_steps, run_bytes, page_size; null: no limit), max_skew_seconds (null unless all processes share
    a clock), options.
    """
    plugins = load_plugins()
    claims = _list_claims(plugins)
    # Wrappers provide no backend; a broken one prevents every store from opening.
    found = [entry for plugin in (*plugins, *load_wrappers()) for entry in _list(plugin, claims)]
    broken = {entry.name for entry in found if entry.status == BROKEN}
    found += [_list_unreadable(one) for one in list_broken_distributions() if one.name not in broken]
    if as_json:
        print_json(found)
        return
    console = new_console()
    table = new_table(
        "NAME", "SCHEMES", "STATUS", "LEVEL", "FROM", short=("SCHEMES", "FROM"), spare=("FROM", "LEVEL")
    )
    for entry in found:
        table.add_row(
            cell(entry.name),
            cell(", ".join(entry.schemes) or None),
            cell(entry.status, STYLES[entry.status]),
            cell(entry.level),
            cell(entry.distribution),
        )
    print_table(console, table)
    for entry in found:
        facts = []
        if entry.problem:
            facts.append(("  problem", cell(entry.problem, STYLES[entry.status])))
            facts.append(("  remedy", cell(entry.remedy)))
        if entry.schemes:
            facts.append(("  offers", cell(", ".join(entry.capabilities))))
            facts.append(("  limits", cell(describe_limits(entry.limits or StoreLimits()))))
            facts.append(("  clock", cell(describe_clock(entry.max_skew_seconds))))
            facts.append(("  options", cell(", ".join(entry.options) or "none")))
        if facts:
            console.print()
            console.print(cell(entry.name, "bold"))
            print_form(console, facts)


def _list_claims(plugins: Sequence[Plugin]) -> dict[str, list[str]]:
    """The plugins that claim each scheme; opening a URL imports only one of them."""
    claims: dict[str, list[str]] = {}
    for plugin in plugins:
        for scheme in sorted({scheme for backend in plugin.backends for scheme in backend.schemes}):
            claims.setdefault(scheme, []).append(f"{plugin.name!r} ({plugin.distribution or plugin.module})")
    return claims


def _list(plugin: Plugin, claims: Mapping[str, Sequence[str]]) -> list[Listed]:
    if plugin.error is not None:
        return [
            Listed(
                name=plugin.name,
                schemes=[],
                distribution=plugin.distribution,
                status=BROKEN,
                problem=str(plugin.error).removesuffix(f"; {plugin.error.remedy}"),
                remedy=plugin.error.remedy,
                level=None,
                capabilities=[],
                limits=None,
                max_skew_seconds=None,
                options=[],
            )
        ]
    if not plugin.backends and plugin.wrap is not None:
        return [_list_wrapper(plugin)]
    return [_list_backend(plugin, backend, claims) for backend in plugin.backends]


def _list_unreadable(distribution: BrokenDistribution) -> Listed:
    return Listed(
        name=distribution.name,
        schemes=[],
        distribution=distribution.name,
        status=UNREADABLE,
        problem=distribution.problem,
        remedy=f"reinstall or uninstall {distribution.name}",
        level=None,
        capabilities=[],
        limits=None,
        max_skew_seconds=None,
        options=[],
    )


def _list_wrapper(plugin: Plugin) -> Listed:
    """The row of a plugin that wraps every store, unless a module in its ``drivers`` is missing."""
    missing = [name for name in drivers(sys.modules.get(plugin.module)) if not _is_installed(name)]
    error = missing_driver(plugin, ModuleNotFoundError(name=missing[0])) if missing else None
    return Listed(
        name=plugin.name,
        schemes=[],
        distribution=plugin.distribution,
        status=DRIVER_MISSING if error else INSTALLED,
        problem=f"module {missing[0]!r} is not installed, so this wrapper does nothing" if error else None,
        remedy=error.remedy if error else None,
        level=None,
        capabilities=[],
        limits=None,
        max_skew_seconds=None,
        options=[],
    )


def _list_backend(plugin: Plugin, backend: Backend, claims: Mapping[str, Sequence[str]]) -> Listed:
    contested = sorted(scheme for scheme in backend.schemes if len(claims[scheme]) > 1)
    missing = [name for name in drivers(backend) if not _is_installed(name)]
    error = missing_driver(plugin, ModuleNotFoundError(name=missing[0])) if missing else None
    status, problem, remedy = INSTALLED, None, None
    if error is not None:
        status, problem, remedy = DRIVER_MISSING, f"module {missing[0]!r} is not installed", error.remedy
    elif contested:
        names = " and ".join(claims[contested[0]])
        status, problem = CONFLICT, f"scheme {contested[0]!r} is claimed by plugins {names}"
        remedy = "uninstall all but one"
    return Listed(
        name=backend.name,
        schemes=sorted(backend.schemes),
        distribution=plugin.distribution,
        status=status,
        problem=problem,
        remedy=remedy,
        level=level(backend.capabilities),
        capabilities=sorted(backend.capabilities),
        limits=declared_limits(backend),
        max_skew_seconds=in_seconds(declared_max_skew(backend)),
        options=sorted(backend.options),
    )


def level(capabilities: frozenset[Capability]) -> str:
    """The level of the contract that a backend declares."""
    if capabilities >= frozenset(Capability) - PROPERTIES:
        return "full"
    return "crash-safe" if capabilities >= CRASH_SAFE else "base"


def describe_limits(limits: StoreLimits) -> str:
    """The limits of a store for people: those below the largest."""
    reduced = limits.reduced()
    return f"at most {', '.join(reduced)}" if reduced else "those of the contract: texts of 16 MiB"


def describe_clock(max_skew: float | None) -> str:
    """The clock of a store for people; ``max_skew`` in seconds."""
    if max_skew is None:
        return "that of each process"
    moved = f"; a wrong clock moves it by at most {max_skew:g} s" if max_skew else ""
    return f"one for all processes{moved}"


def in_seconds(max_skew: timedelta | None) -> float | None:
    return None if max_skew is None else max_skew.total_seconds()


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
