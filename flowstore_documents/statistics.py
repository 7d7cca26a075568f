"""Dashboard counts and timeseries (QRY-4, QRY-5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core import DashboardStatistics, RunStatus, RunTimeseriesBucket, RunTimeseriesGranularity
from flowstore_core.backend import bucket_starts, percentile_ms
from flowstore_core.timeseries import bucket_floor, day_start
from flowstore_documents import keys
from flowstore_documents.access import Access, finish_intents, groups_of
from flowstore_documents.documents import RunDocument
from flowstore_documents.runs import read_runs
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction

_DAY = timedelta(days=1)
_MICROSECOND = timedelta(microseconds=1)


class Statistics(Access):
    async def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        async def read(tx: Transaction) -> DashboardStatistics:
            await finish_intents(tx)
            day = day_start(await tx.now() if as_of is None else as_of)

            def today(status: RunStatus) -> Range:
                prefix = keys.completed_runs(status)
                first, last = keys.time_bytes(day), keys.time_bytes(day + _DAY)
                return Range(prefix + first, prefix + last, 0, keys_only=True, count=True)

            active = keys.prefix_range(keys.runs_of(None, RunStatus.RUNNING), 0, keys_only=True, count=True)
            view = await tx.read((), [active, today(RunStatus.SUCCEEDED), today(RunStatus.FAILED)])
            active_runs, completed_today, failed_today = (page.count or 0 for page in view.pages)
            return DashboardStatistics(
                total_flows=await _count_flows(tx),
                active_runs=active_runs,
                completed_today=completed_today,
                failed_today=failed_today,
            )

        return await self._read("get_statistics", read)

    async def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        async def read(tx: Transaction) -> Sequence[RunTimeseriesBucket]:
            prefix = keys.runs_of(flow_id)
            newest = prefix + keys.before_position(until)
            oldest = prefix + keys.before_position(since)
            wanted = [Range(newest, oldest, keys_only=True)] if since < until else []
            await finish_intents(tx, ahead=wanted)
            entries = [entry for one in wanted for entry in await tx.scan(one)]
            buckets: dict[datetime, list[RunDocument]] = {}
            for one in await read_runs(tx, [keys.parse_position(key) for key, _ in entries]):
                buckets.setdefault(bucket_floor(one.run.started_at, granularity), []).append(one.run)
            return tuple(
                _bucket(start, buckets.get(start, [])) for start in bucket_starts(since, until, granularity)
            )

        return await self._read("get_run_timeseries", read)


async def _count_flows(tx: Transaction) -> int:
    """The number of flows that have a stored run."""
    flows = groups_of(tx, keys.FLOWS, lambda key: key[: len(keys.FLOWS) + 16])
    return len([flow async for flow in flows])


def _bucket(start: datetime, runs: Sequence[RunDocument]) -> RunTimeseriesBucket:
    count = Counter(run.status for run in runs)
    durations = sorted(
        (run.completed_at - run.started_at) // _MICROSECOND for run in runs if run.completed_at is not None
    )
    return RunTimeseriesBucket(
        timestamp=start,
        total=len(runs),
        succeeded=count[RunStatus.SUCCEEDED],
        failed=count[RunStatus.FAILED],
        cancelled=count[RunStatus.CANCELLED],
        running=count[RunStatus.RUNNING],
        p50_duration_ms=percentile_ms(durations, 0.5),
        p95_duration_ms=percentile_ms(durations, 0.95),
    )
