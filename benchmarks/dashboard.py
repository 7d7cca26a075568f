"""How fast the dashboard's pages are in a large PostgreSQL store: ``python -m benchmarks.dashboard``.

Each page is requested over HTTP, on a new connection each time. The column "first" is the first request, for
which the store opens its connections and fills its caches. The store has completed runs of 3 steps over 90
days, a tenth of them failed.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from time import perf_counter

from benchmarks.cluster import cluster
from benchmarks.copies import make_models, plan, utc_now
from benchmarks.growth_stores import open_postgres
from benchmarks.machine import disk_folder
from benchmarks.options import say
from benchmarks.workload import percentile
from flowstore_core import RunStatus
from flowstore_core.backend import Diagnosable, Fixable
from flowstore_core.open import resolve_store
from flowstore_dashboard.serve import serving

LIMIT_MS = 100.0
"""The target of the overview, the page that a person sees first: its median."""


def _get(address: str, path: str) -> float:
    """Request a page; its time in seconds."""
    began = perf_counter()
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RuntimeError(f"{path} answered {response.status}")
    return perf_counter() - began


async def _fold_counters(url: str) -> None:
    """Do what writers do and a bulk load does not: fold the changes of runs into the counters."""
    _, backend, config = resolve_store(url)
    assert isinstance(backend, Diagnosable)
    assert isinstance(backend, Fixable)
    findings = await backend.diagnose(config, thorough=False)
    await backend.fix(config, [one for one in findings if one.code == "changes-unfolded"])


async def program(runs: int, requests: int, folder: Path | None) -> bool:
    """Measure every page and print the times; whether the overview met its target."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="flowstore-bench-", dir=disk_folder(folder))
        )
        url = await stack.enter_async_context(cluster(Path(directory)))
        say(f"making {runs:,} runs")
        store, copy, migrate, _ = await open_postgres(url, stack, "dashboard")
        models = await make_models(store)
        await copy(plan(models, runs - len(models), random_ids=False, now=utc_now()))
        await migrate()
        await _fold_counters(f"{url}&schema=dashboard")
        run_id = (await store.get_runs(take=1))[0].run_id
        flow_id = (await store.get_runs(take=1))[0].flow_id
        pages = {
            "overview, 24 hours": "/",
            "overview, 30 days": "/?by=day",
            "runs": "/runs",
            "runs, failed": f"/runs?status={RunStatus.FAILED}",
            "runs of a flow": f"/runs?flow={flow_id}",
            "run": f"/runs/{run_id}",
            "queues": "/queues",
        }
        address = await stack.enter_async_context(serving(store, f"{url}&schema=dashboard"))
        medians: dict[str, float | None] = {}
        sys.stdout.write(f"{'page':<20} {'first':>9} {'p50':>9} {'p99':>9}   (ms, {runs:,} runs)\n")
        for name, path in pages.items():
            first = await asyncio.to_thread(_get, address, path)
            times = sorted([await asyncio.to_thread(_get, address, path) for _ in range(requests)])
            medians[name] = percentile(times, 0.5)
            numbers = (first * 1000, medians[name], percentile(times, 0.99))
            sys.stdout.write(f"{name:<20} " + " ".join(f"{number:>9.1f}" for number in numbers) + "\n")
    is_met = (medians["overview, 24 hours"] or 0.0) < LIMIT_MS
    sys.stdout.write(f"overview under {LIMIT_MS:.0f} ms: {'yes' if is_met else 'NO'}\n")
    return is_met


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=1_000_000, help="stored runs (1,000,000)")
    options.add_argument("--requests", type=int, default=50, help="requests of each page (50)")
    options.add_argument("--folder", type=Path, help="folder for the database, on a real disk")
    given = options.parse_args()
    sys.exit(0 if asyncio.run(program(given.runs, given.requests, given.folder)) else 1)


if __name__ == "__main__":
    main()
