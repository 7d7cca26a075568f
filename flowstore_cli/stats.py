"""``flowstore stats``: counts of flows and runs."""

from __future__ import annotations

from flowstore_cli.printing import print_json, say
from flowstore_cli.stores import AsJson, Url, existing_store, run
from flowstore_core import DashboardStatistics


def stats(url: Url = None, as_json: AsJson = False) -> None:
    """Count flows and runs; today is the current day in UTC.

    \b
      flowstore stats
      flowstore stats --json | jq .active_runs

    JSON: total_flows, active_runs, completed_today, failed_today.
    """
    counts = run(_stats(url))
    if as_json:
        print_json(counts)
        return
    for name, count in (
        ("flows", counts.total_flows),
        ("runs active", counts.active_runs),
        ("succeeded today", counts.completed_today),
        ("failed today", counts.failed_today),
    ):
        say(f"{name:<16}{count:>10,}")


async def _stats(url: str | None) -> DashboardStatistics:
    async with existing_store(url) as store:
        return await store.get_statistics()
