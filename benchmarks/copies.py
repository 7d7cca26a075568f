"""Bulk creation of runs: copies of a few model runs made by the store's operations.

The rows of each model run are copied inside the database with all their columns. Copies differ in ids, flow
and times: all times are shifted together, and the end of a run is delayed by up to ten minutes. Triggers
maintain derived rows; the caller migrates the store, which updates its indexes, and verifies the copies
through the store.
"""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg

from benchmarks.options import say
from benchmarks.workload import INPUT, OUTPUT
from flowstore_core import FlowRunDetail, FlowStore, RunStatus, StepStatus, new_run_id

DAYS = 90
FLOWS = 20
STEPS = 3
CHUNK = 50_000
RARE = "zebrafinch"
"""A word that occurs only in the outputs of RARE_RUNS runs."""
RARE_RUNS = 10
TAGS = {"team": "payments"}
"""The tags of the failed runs. Those with the rare word have it in a tag too; the others have none."""
LONGEST_END = 600.0
LIVED_STEPS = 55
"""Fill factor of PostgreSQL's step pages after real lifecycles, in percent."""

# Tables with the rows of a run, runs first; other tables are derived from them.
NOUNS = (
    "runs",
    "steps",
    "attempts",
    "controls",
    "idempotency_keys",
    "waiters",
    "deliveries",
    "outputs",
    "events",
)
# And the tables of queued steps.
POSTGRES_NOUNS = (*NOUNS, "pending")
SQLITE_NOUNS = (*NOUNS, "queued_steps", "run_tags")
RUN_COLUMNS = ("run_id", "model", "flow_id", "flow_name", "moved", "put_off")


@dataclass(frozen=True, slots=True)
class Copy:
    """A planned copy of a model run, with its id, flow and time."""

    run_id: UUID
    model: FlowRunDetail
    flow: int
    started_at: datetime
    put_off: timedelta

    @property
    def flow_id(self) -> UUID:
        return UUID(int=0x0190B7A0_0000_7000_8000_000000001000 + self.flow)

    @property
    def flow_name(self) -> str:
        return f"flow-{self.flow:02}"

    @property
    def completed_at(self) -> datetime:
        assert self.model.completed_at is not None
        return self.model.completed_at + (self.started_at - self.model.started_at) + self.put_off


async def make_models(store: FlowStore) -> list[FlowRunDetail]:
    """Create a succeeded, a failed and a cancelled run, and one with the rare word, each of three steps."""
    return [
        await _model(store, RunStatus.SUCCEEDED, OUTPUT),
        await _model(store, RunStatus.FAILED, OUTPUT, TAGS),
        await _model(store, RunStatus.CANCELLED, OUTPUT),
        await _model(store, RunStatus.SUCCEEDED, f'{{"found": "{RARE}"}}', {"word": RARE}),
    ]


async def _model(
    store: FlowStore, status: RunStatus, output: str, tags: Mapping[str, str] | None = None
) -> FlowRunDetail:
    run_id, flow_id = new_run_id(), UUID(int=0x0190B7A0_0000_7000_8000_000000001000)
    await store.start_run(flow_id, "flow-00", run_id, "manual", tags=tags)
    for number in range(STEPS):
        key = f"step-{number}"
        failed = status is RunStatus.FAILED and number == STEPS - 1
        await store.try_record_dispatch(run_id, key)
        await store.annotate_dispatch(run_id, key, "job-4711")
        await store.try_claim_step(run_id, key)
        attempt = await store.record_step_start(run_id, key, "task", input_json=INPUT)
        if failed:
            await store.record_step_complete(
                run_id, key, StepStatus.FAILED, error_message="the card was declined", attempt=attempt
            )
        else:
            await store.record_step_complete(
                run_id, key, StepStatus.SUCCEEDED, output_json=output, attempt=attempt
            )
    await store.complete_run(run_id, status)
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    return detail


def plan(models: Sequence[FlowRunDetail], amount: int, *, random_ids: bool, now: datetime) -> list[Copy]:
    """Plan ``amount`` copies over the last 90 days, ordered by start; 90 % of them succeeded."""
    dice = random.Random(amount)
    starts = sorted(
        now - timedelta(seconds=1200 + dice.random() * (DAYS * 86_400 - 3600)) for _ in range(amount)
    )
    rare = {round((number + 0.5) * amount / RARE_RUNS) for number in range(RARE_RUNS)}
    copies = []
    for number, started_at in enumerate(starts):
        which = 3 if number in rare else dice.choices((0, 1, 2), (90, 8, 2))[0]
        run_id = UUID(int=dice.getrandbits(128), version=4) if random_ids else _timed_id(started_at, dice)
        put_off = timedelta(seconds=round(dice.random() ** 3 * LONGEST_END, 6))
        copies.append(Copy(run_id, models[which], dice.randrange(FLOWS), started_at, put_off))
    return copies


def _timed_id(moment: datetime, dice: random.Random) -> UUID:
    """An id as created by new_run_id() at that time."""
    milliseconds = int(moment.timestamp() * 1000)
    return UUID(
        int=milliseconds << 80 | 0x7 << 76 | dice.getrandbits(12) << 64 | 0b10 << 62 | dice.getrandbits(62)
    )


def _chunks(copies: Sequence[Copy]) -> Iterator[Sequence[Copy]]:
    for start in range(0, len(copies), CHUNK):
        yield copies[start : start + CHUNK]
        if len(copies) > CHUNK:
            say(f"{min(start + CHUNK, len(copies)):,} of {len(copies):,} runs copied")


def _columns(columns: Sequence[tuple[str, str]], of: Callable[[str, str], str]) -> str:
    return ", ".join(of(name, kind) for name, kind in columns)


async def copy_into_postgres(url: str, schema: str, copies: Sequence[Copy]) -> None:
    """Copy the model runs' rows in every table that has some."""
    db = await asyncpg.connect(url)
    try:
        await db.execute(
            "CREATE TEMP TABLE wanted (run_id uuid, model uuid, flow_id uuid, flow_name text,"
            " moved interval, put_off interval)"
        )
        tables = await _postgres_tables(db, schema, copies[0].model.run_id)
        # Copied rows have their final length at once and would fill pages more densely than rows that grew in
        # their lifecycle. The fill factor imitates the latter.
        given = await db.fetchval(
            "SELECT option_value FROM pg_class, pg_options_to_table(reloptions)"
            " WHERE oid = $1::regclass AND option_name = 'fillfactor'",
            f"{schema}.steps",
        )
        await db.execute(f"ALTER TABLE {schema}.steps SET (fillfactor = {LIVED_STEPS})")
        for chunk in _chunks(copies):
            async with db.transaction():
                await db.execute("TRUNCATE wanted")
                await db.copy_records_to_table(
                    "wanted",
                    columns=RUN_COLUMNS,
                    records=(
                        (
                            copy.run_id,
                            copy.model.run_id,
                            copy.flow_id,
                            copy.flow_name,
                            copy.started_at - copy.model.started_at,
                            copy.put_off,
                        )
                        for copy in chunk
                    ),
                )
                for statement in tables:
                    await db.execute(statement)
        await db.execute(f"ALTER TABLE {schema}.steps SET (fillfactor = {given})")
        # Do the work of autovacuum.
        await db.execute("VACUUM (ANALYZE)")
        await db.execute("CHECKPOINT")
    finally:
        await db.close()


async def _postgres_tables(db: Any, schema: str, model: UUID) -> list[str]:
    """A statement for each table with rows of a model run, runs first."""
    statements = []
    for table in POSTGRES_NOUNS:
        name = f"{schema}.{table}"
        if not await db.fetchval(f"SELECT count(*) FROM {name} WHERE run_id = $1", model):
            continue
        columns = await db.fetch(
            "SELECT attname, format_type(atttypid, NULL) FROM pg_attribute"
            " WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''",
            name,
        )
        pairs = [(str(column), str(kind)) for column, kind in columns]

        def value(column: str, kind: str, table: str = table) -> str:
            if column in ("run_id", "flow_id", "flow_name"):
                return f"w.{column}"
            if column == "completed_at" and table == "runs":
                return "m.completed_at + w.moved + w.put_off"
            if kind == "timestamp with time zone":
                return f"m.{column} + w.moved"
            if column.endswith("_token") and kind == "uuid":
                return f"CASE WHEN m.{column} IS NOT NULL THEN gen_random_uuid() END"
            return f"m.{column}"

        statements.append(
            f"INSERT INTO {name} ({_columns(pairs, lambda column, kind: column)})"
            f" SELECT {_columns(pairs, value)}"
            f" FROM wanted w JOIN {name} m ON m.run_id = w.model ORDER BY w.run_id"
        )
    return statements


def copy_into_sqlite(path: Path, copies: Sequence[Copy]) -> None:
    """Copy the model runs' rows in every table that has some."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA cache_size = -200000")
    db.execute("CREATE TEMP TABLE wanted (run_id, model, flow_id, flow_name, moved, put_off)")
    statements = _sqlite_tables(db, {copy.model.run_id.bytes for copy in copies})
    microsecond = timedelta(microseconds=1)
    for chunk in _chunks(copies):
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM wanted")
        db.executemany(
            "INSERT INTO wanted VALUES (?, ?, ?, ?, ?, ?)",
            (
                (
                    copy.run_id.bytes,
                    copy.model.run_id.bytes,
                    copy.flow_id.bytes,
                    copy.flow_name,
                    (copy.started_at - copy.model.started_at) // microsecond,
                    copy.put_off // microsecond,
                )
                for copy in chunk
            ),
        )
        for statement in statements:
            db.execute(statement)
        db.execute("COMMIT")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()


def _sqlite_tables(db: sqlite3.Connection, models: Collection[bytes]) -> list[str]:
    """A statement for each table with rows of a model run, runs first."""
    marks = ", ".join("?" * len(models))
    statements = []
    for table in SQLITE_NOUNS:
        info = db.execute(f"PRAGMA table_info({table})").fetchall()
        pairs = [(str(row[1]), str(row[2])) for row in info]
        found = db.execute(f"SELECT count(*) FROM {table} WHERE run_id IN ({marks})", [*models])
        if not found.fetchone()[0]:
            continue

        def value(column: str, kind: str, table: str = table) -> str:
            if column in ("run_id", "flow_id", "flow_name"):
                return f"w.{column}"
            if column == "completed_at" and table == "runs":
                return "m.completed_at + w.moved + w.put_off"
            if column.endswith("_at") and kind == "INTEGER":
                return f"m.{column} + w.moved"
            return f"m.{column}"

        statements.append(
            f"INSERT INTO {table} ({_columns(pairs, lambda column, kind: column)})"
            f" SELECT {_columns(pairs, value)}"
            f" FROM wanted w JOIN {table} m ON m.run_id = w.model ORDER BY w.run_id"
        )
    return statements


def utc_now() -> datetime:
    return datetime.now(UTC)
