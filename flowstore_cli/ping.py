"""``flowstore ping``: the response time of a store, and what it is."""

from __future__ import annotations

import platform
import time
from statistics import median
from typing import Annotated, Any

import typer

from flowstore_cli.backends import describe_clock, describe_limits, in_seconds, level
from flowstore_cli.printing import cell, new_console, print_form, print_json
from flowstore_cli.stores import AsJson, Url, drivers, existing_store, run, whereabouts
from flowstore_core.backend import Describable, Migratable
from flowstore_core.distributions import installed_version
from flowstore_core.inspection.diagnosis import schema_version
from flowstore_core.open import resolve_store


def ping(
    url: Url = None,
    times: Annotated[int, typer.Option("--times", "-n", min=1, max=1000, help="Number of requests.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show what the store is and how fast it responds.

    Exit code 3 if it does not respond.

    \b
      flowstore ping
      flowstore ping --url postgresql://user@host/db --json

    JSON: backend, url (without secrets), distribution, version, schema_version, python, drivers,
    level, capabilities, limits (text_bytes, key_bytes, run_steps, run_bytes, page_size; null: no limit),
    max_skew_seconds (null unless all processes share a clock), details (further facts from the backend,
    such as its search index), round_trip_ms (min, median, max).
    """
    facts = run(_ping(url, times))
    if as_json:
        print_json(facts)
        return
    trip = facts["round_trip_ms"]
    versions = [f"{name} {number}" for name, number in facts["drivers"].items()]
    for_people = (
        ("backend", f"{facts['backend']} ({facts['distribution']} {facts['version']})"),
        ("store", facts["url"]),
        ("schema", f"version {facts['schema_version']}" if facts["schema_version"] is not None else "none"),
        ("runs on", ", ".join([f"Python {facts['python']}", *versions])),
        ("level", facts["level"]),
        ("offers", ", ".join(facts["capabilities"])),
        ("limits", describe_limits(facts["limits"])),
        ("clock", describe_clock(facts["max_skew_seconds"])),
        *facts["details"].items(),
        (
            "round trip",
            f"{trip['median']:.2f} ms (median of {times}, {trip['min']:.2f} to {trip['max']:.2f})",
        ),
    )
    print_form(new_console(), ((name, cell(value)) for name, value in for_people))


async def _ping(url: str | None, times: int) -> dict[str, Any]:
    plugin, backend, config = resolve_store(url, migrate=False)
    async with existing_store(url) as store:
        taken = []
        for _ in range(times):
            began = time.perf_counter()
            await store.ping()
            taken.append((time.perf_counter() - began) * 1000)
        capabilities, limits, max_skew = store.capabilities, store.limits, store.max_skew
    schema = None
    if isinstance(backend, Migratable):
        schema = await schema_version(plugin, backend, config)
    details = await backend.describe(config) if isinstance(backend, Describable) else {}
    return {
        "backend": backend.name,
        "url": whereabouts(config),
        "distribution": plugin.distribution,
        "version": installed_version(plugin.distribution) if plugin.distribution else None,
        "schema_version": schema,
        "python": platform.python_version(),
        "drivers": {name: installed_version(name) for name in drivers(backend)},
        "level": level(capabilities),
        "capabilities": sorted(capabilities),
        "limits": limits,
        "max_skew_seconds": in_seconds(max_skew),
        "details": dict(details),
        "round_trip_ms": {"min": min(taken), "median": median(taken), "max": max(taken)},
    }
