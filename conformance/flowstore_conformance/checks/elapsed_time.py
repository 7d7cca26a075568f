"""Durations are elapsed time and days are UTC days, whatever the local time zone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from flowstore_conformance.checks.fixtures import DAY, HOUR, TICK, require_clock, start
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import Capability, RunStatus, RunTimeseriesGranularity

CLOCK = [Capability.VIRTUAL_CLOCK]

# POSIX time zones, which need no time zone database, and the days before both changes of 2026.
ZONES = {
    "CET-1CEST,M3.5.0,M10.5.0/3": (
        datetime(2026, 3, 28, 12, tzinfo=UTC),
        datetime(2026, 10, 24, 12, tzinfo=UTC),
    ),
    "EST5EDT,M3.2.0,M11.1.0": (datetime(2026, 3, 7, 12, tzinfo=UTC), datetime(2026, 10, 31, 12, tzinfo=UTC)),
}


@contextmanager
def _local_zone(zone: str) -> Iterator[None]:
    """Set the time zone of this process, where the system allows it."""
    if not hasattr(time, "tzset"):
        yield
        return
    before = os.environ.get("TZ")
    os.environ["TZ"] = zone
    time.tzset()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


@check("CLM-6", needs=CLOCK)
async def a_lease_is_elapsed_time_across_a_daylight_saving_change(context: CheckContext) -> None:
    """A lease of whole days, and its renewal, ends after exactly 24 hours per day."""
    clock = require_clock(context)
    for zone, days_before in ZONES.items():
        with _local_zone(zone):
            for begun in days_before:
                clock.now = begun
                run_id = await start(context)
                leases = {f"{days} days": days * DAY for days in (1, 2, 200, 366)}
                for key, lease in leases.items():
                    await context.store.try_claim_step(run_id, key, owner="me", lease=lease)
                ends = {
                    claim.step_key: claim.expires_at for claim in await context.store.get_step_claims(run_id)
                }
                wanted = {key: begun + lease for key, lease in leases.items()}
                context.expect(ends, wanted, f"the ends of leases that start at {begun:%Y-%m-%d}")
                await context.store.renew_step_claim(run_id, "1 days", "me", 2 * DAY)
                (renewed, *_) = await context.store.get_step_claims(run_id)
                context.expect(
                    renewed.expires_at, begun + 2 * DAY, f"the end of a lease renewed at {begun:%Y-%m-%d}"
                )
                clock.now = begun + 2 * DAY - TICK
                won = await context.store.try_claim_step(run_id, "1 days", owner="next", lease=DAY)
                context.expect(won, False, "claiming just before the end of a lease, a day after the change")
                clock.now = begun + 2 * DAY
                won = await context.store.try_claim_step(run_id, "1 days", owner="next", lease=DAY)
                context.expect(won, True, "claiming at the end of a lease, a day after the change")


@check("QRY-5", "QRY-4", needs=CLOCK)
async def buckets_and_days_are_utc_across_a_daylight_saving_change(context: CheckContext) -> None:
    """Buckets, durations and the day of the statistics do not depend on the local time zone."""
    clock = require_clock(context)
    for zone, days_before in ZONES.items():
        with _local_zone(zone):
            for noon in days_before:
                since = noon.replace(hour=0)
                for hours in range(48):
                    clock.now = since + hours * HOUR
                    run_id = await start(context)
                    clock.now += DAY
                    await context.store.complete_run(run_id, RunStatus.SUCCEEDED)
                for granularity, width, number in (
                    (RunTimeseriesGranularity.HOUR, HOUR, 1),
                    (RunTimeseriesGranularity.DAY, DAY, 24),
                ):
                    found = await context.store.get_run_timeseries(granularity, since, since + 2 * DAY)
                    buckets = [(one.timestamp, one.total, one.p50_duration_ms) for one in found]
                    wanted = [
                        (since + bucket * width, number, DAY.total_seconds() * 1000)
                        for bucket in range(2 * DAY // width)
                    ]
                    context.expect(buckets, wanted, f"the {granularity} buckets from {since:%Y-%m-%d}")
                for day in (1, 2):
                    as_of = since + (day + 1) * DAY - TICK
                    today = (await context.store.get_statistics(as_of=as_of)).completed_today
                    context.expect(today, 24, f"completed_today as of {as_of:%Y-%m-%d %H:%M}")
