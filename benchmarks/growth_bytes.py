"""Bytes per lifecycle: in the log and on disk."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import asyncpg

from benchmarks.baselines.postgres_transactions import transaction_per_call
from benchmarks.baselines.sqlite_transactions import transaction_per_call as sqlite_transaction_per_call
from benchmarks.options import Options
from benchmarks.results import Measure, Report, Result, Sample
from benchmarks.workload import Records, StepCalls, StoreRecords, lifecycles, store_url
from flowstore_core import open_store

WRITTEN_BYTES = 5_000
"""Number of lifecycles over which bytes are counted."""

Count = Callable[[], Awaitable[int]]


async def postgres_bytes(report: Report, options: Options, url: str) -> None:
    if not options.wants("PostgreSQL, bytes per lifecycle"):
        return
    db = await asyncpg.connect(url)

    async def written() -> int:
        return int(await db.fetchval("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))

    async def stored() -> int:
        return int(await db.fetchval("SELECT pg_database_size(current_database())"))

    try:
        async with open_store(f"{url}&schema=bytes") as store, transaction_per_call(url, 10) as other:
            await _bytes(
                report,
                options,
                "PostgreSQL",
                "write-ahead log",
                (
                    ("flowstore", store, StoreRecords(store), written, stored),
                    ("a transaction per call", other, other, written, stored),
                ),
            )
    finally:
        await db.close()


async def sqlite_bytes(report: Report, options: Options, directory: Path) -> None:
    if not options.wants("SQLite, bytes per lifecycle"):
        return

    async def written() -> int:
        # ru_oublock counts blocks of 512 bytes on every file system.
        return resource.getrusage(resource.RUSAGE_SELF).ru_oublock * 512

    async def stored(path: Path) -> int:
        db = sqlite3.connect(path)
        found = db.execute(
            "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        ).fetchone()
        db.close()
        return int(found[0])

    own, others = directory / "bytes.db", directory / "bytes-transactions.db"
    async with open_store(store_url(own)) as store, sqlite_transaction_per_call(others) as other:
        await _bytes(
            report,
            options,
            "SQLite",
            "written to disk, log and file",
            (
                ("flowstore", store, StoreRecords(store), written, partial(stored, own)),
                ("a transaction per call", other, other, written, partial(stored, others)),
            ),
        )


async def _bytes(
    report: Report,
    options: Options,
    backend: str,
    log: str,
    variants: Sequence[tuple[str, StepCalls, Records, Count, Count]],
) -> None:
    """Measure bytes in the log and on disk over many lifecycles in a new database."""
    amount = max(64, int(WRITTEN_BYTES * options.scale))
    logged = Measure(f"{backend}, bytes per lifecycle: {log}", "bytes")
    kept = Measure(f"{backend}, bytes per lifecycle: on disk", "bytes")
    for name, calls, records, written, stored in variants:
        before = await written(), await stored()
        await lifecycles(calls, records, max(options.callers), amount)
        after = await written(), await stored()
        logged.results.append(Result(name, [Sample(amount, value=(after[0] - before[0]) / amount)]))
        kept.results.append(Result(name, [Sample(amount, value=(after[1] - before[1]) / amount)]))
    report.measures += (logged, kept)
