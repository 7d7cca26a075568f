"""The checks of ``flowstore doctor`` for a database file: files, journal, pages and rows.

The files are checked before the database is opened: opening recovers the log, and closing removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import TypeVar
from uuid import UUID

from flowstore_core import StoreConfig, StoreUnavailableError
from flowstore_core.diagnostics import Diagnostic, Severity, orphaned_rows
from flowstore_core.retention import ORPHAN_GRACE
from flowstore_sqlite import counter_checks, file_checks
from flowstore_sqlite.connection import Connection, read_transaction, write_transaction
from flowstore_sqlite.errors import primary_code
from flowstore_sqlite.file_access import SHM_SUFFIX, WAL_SUFFIX, Access, size
from flowstore_sqlite.open import JOURNAL_MODE, Options, has_wal_reset_bug
from flowstore_sqlite.schema_migrations import read_version
from flowstore_sqlite.url import database_path

T = TypeVar("T")

CHECK_TIMEOUT = 3.0
"""Seconds for the check of the pages, and again for that of the rows, unless thorough."""
MAX_COUNTED = 10_000
"""Maximum number of orphaned rows that are counted per table."""
FIX_BATCH = 500
"""Runs whose orphaned rows are deleted in one transaction."""
TIMEOUT_CHECK_INSTRUCTIONS = 10_000
"""Instructions of SQLite's virtual machine between two checks of the deadline."""

QUICK_CHECK = "PRAGMA quick_check(5)"
CHECKPOINT = "PRAGMA wal_checkpoint(PASSIVE)"
LONG_WAL_PAGES = 1000
"""The log size in pages at which SQLite checkpoints; the log restarts when no reader needs it."""
PIN_TIMEOUT = 2.0
"""Seconds after which an unfinished checkpoint means an old snapshot, not just a busy writer."""
INTEGRITY_CHECK = "PRAGMA integrity_check(5)"

# Tables whose old orphans cleanup deletes (RET-4), and tables in which no call can leave an orphan.
EXPIRED_TABLES = ("idempotency_keys", "controls")
ORPHAN_TABLES = {
    **dict.fromkeys(("steps", "attempts", "waiters", "deliveries", "outputs", "events"), 1),
    "buffered_signals": 8,
}
"""Each table with the schema version that created it."""
WITHOUT_RUN = "NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = {table}.run_id)"
FIND_EXPIRED = f"SELECT run_id FROM {{table}} WHERE created_at <= ? AND {WITHOUT_RUN} LIMIT {MAX_COUNTED}"
FIND_ORPHANS = f"SELECT run_id FROM {{table}} WHERE {WITHOUT_RUN} LIMIT {MAX_COUNTED}"
DELETE_EXPIRED = "DELETE FROM {table} WHERE created_at <= ? AND run_id IN ({marks}) AND " + WITHOUT_RUN
DELETE_ORPHANS = "DELETE FROM {table} WHERE run_id IN ({marks}) AND " + WITHOUT_RUN


async def diagnose(config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
    """All findings about the file. Changes nothing."""
    path, options = database_path(config.url), Options.read(config)
    found = [*_check_settings(options), *file_checks.check_files(path)]
    if any(finding.prevents_open for finding in found) or not file_checks.exists(path):
        return found
    connection = Connection(path)
    try:
        await connection.open()

        async def query(work: Callable[[sqlite3.Connection], T]) -> T:
            return await connection.run_with_busy_retry(partial(read_transaction, work), options.busy_timeout)

        try:
            if connection.files.access is Access.WRITE:
                found += await query(_check_journal_mode)
                found += await _check_wal_size(connection, options)
            damage = await query(partial(_check_pages, thorough))
            found += damage
            if damage and damage[0].severity is Severity.ERROR:
                # Rows in damaged pages prove nothing.
                return found
            if (await query(read_version))[0]:
                found += await query(partial(_check_rows, thorough, _now(config)))
        except StoreUnavailableError as error:
            if not str(error.database_code).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise
            found.append(_damaged(str(error.database_code)))
    finally:
        await connection.close()
    return found


def _now(config: StoreConfig) -> int:
    return int(config.clock().timestamp() * 1_000_000) if config.clock else time.time_ns() // 1000


def _check_settings(options: Options) -> list[Diagnostic]:
    found = []
    if options.synchronous != "FULL":
        found.append(
            Diagnostic(
                code="synchronous-normal",
                severity=Severity.WARNING,
                summary="the store is opened with synchronous=NORMAL",
                meaning="A commit is not synced to disk: a power failure loses acknowledged claims and "
                "results. A crash of the process loses nothing.",
                remedy="take synchronous=NORMAL out of the URL's query or flowstore.toml",
            )
        )
    if has_wal_reset_bug():
        found.append(
            Diagnostic(
                code="wal-reset-bug",
                severity=Severity.NOTE,
                summary=f"SQLite {sqlite3.sqlite_version} has the WAL-reset bug",
                meaning="Very rarely, two connections that write and checkpoint at the same moment damage "
                "the file. flowstore writes with one connection a process: the risk grows with their number.",
                remedy="use a Python linked with SQLite 3.51.3 or newer; to see yours: "
                'python -c "import sqlite3; print(sqlite3.sqlite_version)"',
            )
        )
    return found


def _check_journal_mode(db: sqlite3.Connection) -> list[Diagnostic]:
    mode = db.execute(JOURNAL_MODE).fetchone()[0]
    if mode == "wal" or not read_version(db)[0]:
        return []
    return [
        Diagnostic(
            code="journal-mode",
            severity=Severity.WARNING,
            summary=f"the file was in journal mode {mode.upper()}, not WAL",
            meaning="Another program has changed it. Readers and writers then wait for each other. "
            "flowstore sets WAL again whenever it opens the store.",
            remedy="find the program that sets journal_mode, or that copies the file, and stop it",
        )
    ]


async def _check_wal_size(connection: Connection, options: Options) -> list[Diagnostic]:
    """Check whether an old snapshot keeps the log from restarting, so that it grows with every write."""

    async def checkpoint() -> tuple[int, int]:
        # A passive checkpoint waits for no lock; the next commit would run the same.
        _, pages, done = await connection.run_with_busy_retry(
            lambda db: db.execute(CHECKPOINT).fetchone(), options.busy_timeout
        )
        return pages, done

    pages, reached = await checkpoint()
    if pages < LONG_WAL_PAGES:
        return []
    deadline = time.monotonic() + PIN_TIMEOUT
    while reached < pages and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        latest, done = await checkpoint()
        if 0 <= latest < pages:
            # The log has restarted.
            return []
        reached = max(reached, done)
    if reached >= pages:
        return []
    path = connection.path
    return [
        Diagnostic(
            code="log-pinned",
            severity=Severity.WARNING,
            summary=f"{path}-wal has grown to {size(path + WAL_SUFFIX) / 1e6:,.0f} MB and cannot restart",
            meaning=f"For at least {PIN_TIMEOUT:g} s a connection has kept a snapshot open: a long read, or "
            "a transaction that a program did not end. Until it ends, the log grows with every write, and "
            "reads become slower.",
            remedy="end that transaction or its process; to list the processes: "
            + shlex.join(["fuser", "-v", path + SHM_SUFFIX]),
        )
    ]


def _damaged(detail: str) -> Diagnostic:
    return Diagnostic(
        code="damaged",
        severity=Severity.ERROR,
        summary="the database file is damaged",
        meaning=f"SQLite reports: {detail}. Results may be wrong, and writes make it worse.",
        remedy="stop every process that uses it, copy file and -wal aside, and restore a backup; or save "
        "the readable part: sqlite3 FILE .recover | sqlite3 NEW",
    )


def _check_pages(thorough: bool, db: sqlite3.Connection) -> list[Diagnostic]:
    statement = INTEGRITY_CHECK if thorough else QUICK_CHECK
    try:
        with _time_limit(db, None if thorough else CHECK_TIMEOUT):
            rows = db.execute(statement).fetchall()
    except sqlite3.OperationalError as error:
        if primary_code(error) != sqlite3.SQLITE_INTERRUPT:
            raise
        return [_incomplete_check("pages", "Checking the pages of the file")]
    # The messages name tables, indexes and pages, and contain no data.
    return [] if rows == [("ok",)] else [_damaged(f"{rows[0][0].splitlines()[0]}")]


def _incomplete_check(what: str, doing: str) -> Diagnostic:
    return Diagnostic(
        code=f"{what}-not-checked",
        severity=Severity.NOTE,
        summary=f"not all {what} were checked",
        meaning=f"{doing} was stopped after {CHECK_TIMEOUT:g} s.",
        remedy="flowstore doctor --thorough",
    )


@contextlib.contextmanager
def _time_limit(db: sqlite3.Connection, seconds: float | None) -> Iterator[None]:
    """Interrupt statements after this many seconds; None: never."""
    if seconds is None:
        yield
        return
    deadline = time.monotonic() + seconds
    db.set_progress_handler(lambda: time.monotonic() > deadline, TIMEOUT_CHECK_INSTRUCTIONS)
    try:
        yield
    finally:
        db.set_progress_handler(None, 0)


def _check_rows(thorough: bool, now: int, db: sqlite3.Connection) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    version, _ = read_version(db)
    tables = (*EXPIRED_TABLES, *(table for table, first in ORPHAN_TABLES.items() if version >= first))
    try:
        with _time_limit(db, None if thorough else CHECK_TIMEOUT):
            found.extend(
                orphaned_rows(
                    table,
                    [str(UUID(bytes=run)) for run in runs],
                    never_started=table in EXPIRED_TABLES,
                    limit=MAX_COUNTED,
                )
                for table in tables
                if (runs := _find_orphaned_runs(table, now, db))
            )
            if version >= counter_checks.FIRST_VERSION:
                found.extend(counter_checks.check_counters(db))
    except sqlite3.OperationalError as error:
        if primary_code(error) != sqlite3.SQLITE_INTERRUPT:
            raise
        found.append(_incomplete_check("rows", "The check of rows"))
    return found


def _find_orphaned_runs(table: str, now: int, db: sqlite3.Connection) -> list[bytes]:
    if table in EXPIRED_TABLES:
        grace = now - ORPHAN_GRACE // timedelta(microseconds=1)
        rows = db.execute(FIND_EXPIRED.replace("{table}", table), (grace,))
    else:
        rows = db.execute(FIND_ORPHANS.replace("{table}", table))
    return [row[0] for row in rows]


async def fix(config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
    """Delete orphans, correct counters and narrow permissions, as the findings say.

    Safe while others write.
    """
    path, options = database_path(config.url), Options.read(config)
    done = [line for finding in findings for line in file_checks.fix(path, finding)]
    tables = [finding.code.removeprefix("orphans-").replace("-", "_") for finding in findings]
    tables_to_fix = [table for table in (*EXPIRED_TABLES, *ORPHAN_TABLES) if table in tables]
    counters_wrong = any(finding.code == "counters-wrong" for finding in findings)
    if not tables_to_fix and not counters_wrong:
        return done
    connection = Connection(path)
    try:
        await connection.open()
        if counters_wrong:
            correct = partial(write_transaction, counter_checks.correct_counters)
            done.append(await connection.run_with_busy_retry(correct, options.busy_timeout))
        for table in tables_to_fix:
            deleted = 0
            delete = partial(write_transaction, partial(_delete_orphans, table, _now(config)))
            # In batches, so that other writers do not wait long for the lock.
            while number := await connection.run_with_busy_retry(delete, options.busy_timeout):
                deleted += number
            done.append(f"deleted {deleted:,} rows of table {table} that belonged to no run")
    finally:
        await connection.close()
    return done


def _delete_orphans(table: str, now: int, db: sqlite3.Connection) -> int:
    runs = list(dict.fromkeys(_find_orphaned_runs(table, now, db)))[:FIX_BATCH]
    if not runs:
        return 0
    statement = DELETE_EXPIRED if table in EXPIRED_TABLES else DELETE_ORPHANS
    statement = statement.replace("{table}", table).replace("{marks}", ", ".join("?" * len(runs)))
    grace = [now - ORPHAN_GRACE // timedelta(microseconds=1)] if table in EXPIRED_TABLES else []
    return db.execute(statement, (*grace, *runs)).rowcount
