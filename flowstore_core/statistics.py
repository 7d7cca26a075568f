"""Statistics and timeseries of runs (QRY-4, QRY-5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from flowstore_core.runs import RunPages
from flowstore_core.status import RunTimeseriesGranularity


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardStatistics:
    """Counts over all stored runs at one moment."""

    total_flows: int
    """The number of distinct flow_id values among the stored runs."""
    active_runs: int
    completed_today: int
    """Succeeded runs whose completed_at is on the UTC day of ``as_of``."""
    failed_today: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeseriesBucket:
    """The runs that started within one hour or day (UTC), by their current status."""

    timestamp: datetime
    """The start of the bucket."""
    total: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    p50_duration_ms: float | None
    """Over completed runs, in milliseconds, linear-interpolated (type 7); None if there are none."""
    p95_duration_ms: float | None


class Dashboard(RunPages, Protocol):
    """Capability DASHBOARD: pages, statistics and timeseries of runs."""

    async def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        """Count flows and runs; "today" is the UTC day of ``as_of`` (None: the store's now) (QRY-4)."""
        ...

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity | str,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        """Contiguous whole buckets from floor(since) to ceil(until), including empty ones (QRY-5).

        A run counts in the bucket of its started_at. No buckets if since == until. Backends get both bounds
        aligned to the bucket.
        """
        ...
