"""What ``flowstore doctor`` learns of a database file: where it lies, its neighbours, its pages, its rows.

The files are looked at before the database is opened: opening takes a log in, and closing removes it.
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
from flowstore_sqlite import counters, files
from flowstore_sqlite.connection import Connection, snapshot, written
from flowstore_sqlite.errors import primary_code
from flowstore_sqlite.location import LOG, LOG_INDEX, Access, read_location, size
from flowstore_sqlite.opening import JOURNAL_MODE, Options, has_reset_bug
from flowstore_sqlite.schema import read_version

T = TypeVar("T")

LOOK_SECONDS = 3.0
"""How long the pages, and then the rows, are looked through, unless thorough."""
COUNTED = 10_000
"""As many orphans are counted at most."""
FIXED_AT_ONCE = 500
INSTRUCTIONS = 10_000
"""Of SQLite's virtual machine, between two looks at the clock."""

QUICK_CHECK = "PRAGMA quick_check(5)"
CHECKPOINT = "PRAGMA wal_checkpoint(PASSIVE)"
LONG_LOG_PAGES = 1000
"""From then on SQLite copies the log into the database, and starts it anew when no reader needs it."""
PIN_SECONDS = 2.0
"""A snapshot that is older keeps the log from starting anew; a busy writer does not."""
INTEGRITY_CHECK = "PRAGMA integrity_check(5)"

# Those of which cleanup takes care by itself one day (RET-4), and those that no call can leave behind.
FORGOTTEN = ("idempotency_keys", "controls")
STRAYS = ("steps", "attempts", "waiters", "deliveries", "outputs", "events")
WITHOUT_RUN = "NOT EXISTS (SELECT 1 FROM runs WHERE runs.run_id = {table}.run_id)"
FIND_FORGOTTEN = f"SELECT run_id FROM {{table}} WHERE created_at <= ? AND {WITHOUT_RUN} LIMIT {COUNTED}"
FIND_STRAYS = f"SELECT run_id FROM {{table}} WHERE {WITHOUT_RUN} LIMIT {COUNTED}"
DELETE_FORGOTTEN = "DELETE FROM {table} WHERE created_at <= ? AND run_id IN ({marks}) AND " + WITHOUT_RUN
DELETE_STRAYS = "DELETE FROM {table} WHERE run_id IN ({marks}) AND " + WITHOUT_RUN


async def diagnose(config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
    """Every finding about the file; changes nothing."""
    path, options = read_location(config.url), Options.read(config)
    found = [*_judge_settings(options), *files.inspect(path)]
    if any(finding.prevents_open for finding in found) or not files.exists(path):
        return found
    connection = Connection(path)
    try:
        await connection.open()

        async def ask(work: Callable[[sqlite3.Connection], T]) -> T:
            return await connection.run_patiently(partial(snapshot, work), options.busy_timeout)

        try:
            if connection.files.access is Access.WRITE:
                found += await ask(_judge_journal)
                found += await _judge_log_size(connection, options)
            damage = await ask(partial(_check_pages, thorough))
            found += damage
            if damage and damage[0].severity is Severity.ERROR:
                # The rows of damaged pages tell nothing more.
                return found
            if (await ask(read_version))[0]:
                found += await ask(partial(_check_rows, thorough, _now(config)))
        except StoreUnavailableError as error:
            if not str(error.database_code).startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
                raise
            found.append(_damaged(str(error.database_code)))
    finally:
        await connection.shut()
    return found


def _now(config: StoreConfig) -> int:
    return int(config.clock().timestamp() * 1_000_000) if config.clock else time.time_ns() // 1000


def _judge_settings(options: Options) -> list[Diagnostic]:
    found = []
    if options.synchronous != "FULL":
        found.append(
            Diagnostic(
                code="synchronous-normal",
                severity=Severity.WARNING,
                summary="the store is opened with synchronous=NORMAL",
                meaning="A commit is not synced to disk: a power cut loses claims and results that were "
                "acknowledged. A crash of the process loses nothing.",
                remedy="take synchronous=NORMAL out of the URL's query or flowstore.toml",
            )
        )
    if has_reset_bug():
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


def _judge_journal(db: sqlite3.Connection) -> list[Diagnostic]:
    mode = db.execute(JOURNAL_MODE).fetchone()[0]
    if mode == "wal" or not read_version(db)[0]:
        return []
    return [
        Diagnostic(
            code="journal-mode",
            severity=Severity.WARNING,
            summary=f"the file was in journal mode {mode.upper()}, not WAL",
            meaning="Another program has changed it. Readers and writers then wait for each other. Whenever "
            "flowstore opens the store, as it does now, it sets WAL again.",
            remedy="find the program that sets journal_mode, or that copies the file, and stop it",
        )
    ]


async def _judge_log_size(connection: Connection, options: Options) -> list[Diagnostic]:
    """Whether a reader keeps the log from starting anew, so that it grows with every write."""

    async def checkpoint() -> tuple[int, int]:
        # Waits for nobody, and does only what the next commit would do anyway.
        _, pages, done = await connection.run_patiently(
            lambda db: db.execute(CHECKPOINT).fetchone(), options.busy_timeout
        )
        return pages, done

    pages, reached = await checkpoint()
    if pages < LONG_LOG_PAGES:
        return []
    deadline = time.monotonic() + PIN_SECONDS
    while reached < pages and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
        latest, done = await checkpoint()
        if 0 <= latest < pages:
            # It has started anew meanwhile.
            return []
        reached = max(reached, done)
    if reached >= pages:
        return []
    path = connection.path
    return [
        Diagnostic(
            code="log-pinned",
            severity=Severity.WARNING,
            summary=f"{path}-wal has grown to {size(path + LOG) / 1e6:,.0f} MB and cannot start anew",
            meaning=f"For at least {PIN_SECONDS:g} s a connection has kept a snapshot open: a long read, or "
            "a program that began a transaction and did not end it. Until it ends, the log grows with "
            "every write, and reads become slower.",
            remedy="end that transaction or its process; to list the processes: "
            + shlex.join(["fuser", "-v", path + LOG_INDEX]),
        )
    ]


def _damaged(detail: str) -> Diagnostic:
    return Diagnostic(
        code="damaged",
        severity=Severity.ERROR,
        summary="the database file is damaged",
        meaning=f"SQLite says: {detail}. Answers may be wrong, and writes make it worse.",
        remedy="stop every process that uses it, copy file and -wal aside, and restore a backup; or save "
        "what can be read: sqlite3 FILE .recover | sqlite3 NEW",
    )


def _check_pages(thorough: bool, db: sqlite3.Connection) -> list[Diagnostic]:
    statement = INTEGRITY_CHECK if thorough else QUICK_CHECK
    try:
        with _bounded(db, None if thorough else LOOK_SECONDS):
            rows = db.execute(statement).fetchall()
    except sqlite3.OperationalError as error:
        if primary_code(error) != sqlite3.SQLITE_INTERRUPT:
            raise
        return [_not_to_the_end("pages", "Checking the pages of the file")]
    # Its messages name tables, indexes and pages, never what is in a row.
    return [] if rows == [("ok",)] else [_damaged(f"{rows[0][0].splitlines()[0]}")]


def _not_to_the_end(what: str, doing: str) -> Diagnostic:
    return Diagnostic(
        code=f"{what}-not-checked",
        severity=Severity.NOTE,
        summary=f"not all {what} were looked at",
        meaning=f"{doing} was stopped after {LOOK_SECONDS:g} s.",
        remedy="flowstore doctor --thorough",
    )


@contextlib.contextmanager
def _bounded(db: sqlite3.Connection, seconds: float | None) -> Iterator[None]:
    """Interrupt what takes longer."""
    if seconds is None:
        yield
        return
    deadline = time.monotonic() + seconds
    db.set_progress_handler(lambda: time.monotonic() > deadline, INSTRUCTIONS)
    try:
        yield
    finally:
        db.set_progress_handler(None, 0)


def _check_rows(thorough: bool, now: int, db: sqlite3.Connection) -> list[Diagnostic]:
    found: list[Diagnostic] = []
    try:
        with _bounded(db, None if thorough else LOOK_SECONDS):
            found.extend(
                orphaned_rows(
                    table,
                    [str(UUID(bytes=run)) for run in runs],
                    never_started=table in FORGOTTEN,
                    limit=COUNTED,
                )
                for table in (*FORGOTTEN, *STRAYS)
                if (runs := _runs_of_orphans(table, now, db))
            )
            if read_version(db)[0] >= counters.SINCE:
                found.extend(counters.compare(db))
    except sqlite3.OperationalError as error:
        if primary_code(error) != sqlite3.SQLITE_INTERRUPT:
            raise
        found.append(_not_to_the_end("rows", "The check of rows"))
    return found


def _runs_of_orphans(table: str, now: int, db: sqlite3.Connection) -> list[bytes]:
    if table in FORGOTTEN:
        grace = now - ORPHAN_GRACE // timedelta(microseconds=1)
        rows = db.execute(FIND_FORGOTTEN.replace("{table}", table), (grace,))
    else:
        rows = db.execute(FIND_STRAYS.replace("{table}", table))
    return [row[0] for row in rows]


async def fix(config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
    """Delete orphans, correct counters, narrow permissions, as the findings say; safe while others write."""
    path, options = read_location(config.url), Options.read(config)
    done = [line for finding in findings for line in files.fix(path, finding)]
    tables = [finding.code.removeprefix("orphans-").replace("-", "_") for finding in findings]
    wanted = [table for table in (*FORGOTTEN, *STRAYS) if table in tables]
    counters_wrong = any(finding.code == "counters-wrong" for finding in findings)
    if not wanted and not counters_wrong:
        return done
    connection = Connection(path)
    try:
        await connection.open()
        if counters_wrong:
            correct = partial(written, counters.correct)
            done.append(await connection.run_patiently(correct, options.busy_timeout))
        for table in wanted:
            deleted = 0
            delete = partial(written, partial(_delete_orphans, table, _now(config)))
            # Little by little, so that nobody waits long for the lock.
            while number := await connection.run_patiently(delete, options.busy_timeout):
                deleted += number
            done.append(f"deleted {deleted:,} rows of table {table} that belonged to no run")
    finally:
        await connection.shut()
    return done


def _delete_orphans(table: str, now: int, db: sqlite3.Connection) -> int:
    runs = list(dict.fromkeys(_runs_of_orphans(table, now, db)))[:FIXED_AT_ONCE]
    if not runs:
        return 0
    statement = DELETE_FORGOTTEN if table in FORGOTTEN else DELETE_STRAYS
    statement = statement.replace("{table}", table).replace("{marks}", ", ".join("?" * len(runs)))
    grace = [now - ORPHAN_GRACE // timedelta(microseconds=1)] if table in FORGOTTEN else []
    return db.execute(statement, (*grace, *runs)).rowcount
