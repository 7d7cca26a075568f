"""Mutants that are wrong at some dates, in some time zones, or after a wait in real time."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tests.mutants import mutant
from tests.mutants.sql_patching import PatchedPostgres, SqlPatch

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@mutant("memory", "QRY-5")
class BucketsRoundTowardsTheEpoch:
    """Divides seconds since 1970 by the bucket and cuts off the fraction: wrong by one bucket before 1970."""

    async def get_run_timeseries(self, **given: Any) -> Any:
        buckets = await super().get_run_timeseries(**given)
        shifted = [None, *buckets]
        return tuple(
            bucket
            if bucket.timestamp >= _EPOCH or before is None
            else replace(before, timestamp=bucket.timestamp)
            for before, bucket in zip(shifted, buckets, strict=False)
        )


@mutant("memory", "CTL-2")
class DeadlinesInFloatSeconds:
    """Compares deadlines as floating-point seconds, which have no microseconds in the year 9999."""

    async def mark_timed_out(self, **given: Any) -> bool:
        control, as_of = self._namespace.controls.get(given["run_id"]), given["as_of"]
        deadline = None if control is None else control.timeout_at
        if as_of is not None and deadline is not None and deadline.timestamp() <= as_of.timestamp():
            given["as_of"] = max(as_of, deadline)
        return bool(await super().mark_timed_out(**given))


@mutant("memory", "RET-1")
class CleanupInLocalTime:
    """Compares local times, which repeat an hour at the end of daylight-saving time."""

    def _is_over(self, run_id: UUID, cutoff: datetime) -> bool:
        run = self._runs.get(run_id.int)
        if run is None or run.completed_at is None:
            return False
        return bool(_local(run.completed_at) < _local(cutoff))


def _local(moment: datetime) -> datetime:
    if not 2 < moment.year < 9999:
        return moment.replace(tzinfo=None)
    return moment.astimezone().replace(tzinfo=None, fold=0)


@mutant("sqlite", "SIG-4")
class WaiterExpiryInSignedSeconds:
    """Stores the end of a wait as signed 32-bit seconds: a wait beyond 2038 never ends before 2038."""

    async def expire_waiter(self, **given: Any) -> Any:
        waiter = await super().get_waiter(**given)
        if waiter is not None and waiter.expires_at is not None and waiter.expires_at.year > 2037:
            return waiter
        return await super().expire_waiter(**given)


@mutant("postgresql", "CLM-6", concurrent=True)
class LeaseBeginsBeforeTheWait(PatchedPostgres):
    """Reads the clock at the start of the statement, which then waits for the lock of the run."""

    patch_sql = SqlPatch(
        (
            r"coalesce\(\$2, clock_timestamp\(\)\) AS now WHERE",
            "coalesce($2, statement_timestamp()) AS now WHERE",
        ),
        (r"coalesce\(\$2, clock_timestamp\(\)\) AS now,", "coalesce($2, statement_timestamp()) AS now,"),
    )


@mutant("sqlite", "CLM-6", concurrent=True)
class LeaseBeginsInTheQueue:
    """Reads the clock when a claim is queued, before it gets the write lock."""

    def begin(self) -> None:
        database = self._database
        write = database.write

        def write_with_early_clock(work: Any, on_abandoned: Any = None) -> Any:
            if getattr(getattr(work, "func", None), "__name__", "") != "_try_claim_step":
                return write(work, on_abandoned)
            queued = database.now()
            return write(lambda db, now: work(db, queued), on_abandoned)

        database.write = write_with_early_clock


@mutant("memory", "CLM-6")
class LeaseEndsWithTheNextSweep:
    """Frees expired claims in a sweep that runs every second by the real clock."""

    async def try_claim_step(self, **given: Any) -> bool:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is not None and step.expires_at is not None:
            elapsed = datetime.now(UTC) - step.expires_at
            if timedelta(0) <= elapsed < timedelta(seconds=1):
                return False
        return bool(await super().try_claim_step(**given))
