"""Dashboard counts and timeseries (QRY-4, QRY-5)."""

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
    """Distinct flow_id among stored runs."""
    active_runs: int
    completed_today: int
    """Succeeded, by completed_at on the UTC day of as_of."""
    failed_today: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunTimeseriesBucket:
    """The runs that started in one hour or day (UTC), by their present status."""

    timestamp: datetime
    """The bucket's start."""
    total: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    p50_duration_ms: float | None
    """Over the completed runs, in milliseconds, linear-interpolated (type 7); None without any."""
    p95_duration_ms: float | None


class Dashboard(RunPages, Protocol):
    """Capability DASHBOARD: what a dashboard shows."""

    async def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        """Counts of flows and runs; "today" is the UTC day of ``as_of`` (None: the store's now) (QRY-4)."""
        ...

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity | str,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        """Whole buckets from floor(since) to ceil(until), contiguous, empty ones included (QRY-5).

        Runs count by started_at. since == until gives none. A backend is called with both bounds
        already aligned to the bucket.
        """
        ...
