"""Search in SQLite: the exact condition, and the trigram index that narrows it (QRY-2, migration 3)."""

from __future__ import annotations

import sqlite3
import time
from uuid import UUID

from flowstore_core.runs import SEARCHED_BYTES, fold_ascii
from flowstore_sqlite.codecs import join_sql

MAX_UNINDEXED = 64
"""Number of unindexed ended runs that a search tolerates: scanning them takes about a millisecond."""
INDEX_BATCH = 256
"""Maximum number of runs that one transaction adds to the index."""
INDEX_SLICE = 0.02
"""Seconds after which such a transaction stops, because writers wait for it."""

# One more trigger, search_closed, is in migration 5. No trigger touches the FTS5 table, because the next
# process may use a SQLite without FTS5. Its deletes leave index entries without a text, which a search skips.
# Texts are stored with letters folded. With detail = none the index knows which trigrams a text contains, not
# their order; SEARCH_CONDITION checks the order.
ENABLE_SEARCH = (
    # An FTS5 index is corrupted by the deletion of a text that it does not contain.
    "DELETE FROM run_texts",
    # Without the triggers below, the ids of deleted runs stay.
    "DELETE FROM unsearched",
    """
    CREATE VIRTUAL TABLE run_trigrams USING fts5 (
        text, content = 'run_texts', content_rowid = 'id', detail = none,
        tokenize = 'trigram case_sensitive 1'
    )
    """,
    """
    CREATE TRIGGER search_ended AFTER UPDATE OF status ON runs WHEN NEW.status <> 'Running' BEGIN
        INSERT INTO unsearched VALUES (NEW.run_id) ON CONFLICT DO NOTHING;
    END
    """,
    """
    CREATE TRIGGER search_loaded AFTER INSERT ON runs WHEN NEW.status <> 'Running' BEGIN
        INSERT INTO unsearched VALUES (NEW.run_id) ON CONFLICT DO NOTHING;
    END
    """,
    """
    CREATE TRIGGER search_deleted AFTER DELETE ON runs BEGIN
        DELETE FROM run_texts WHERE run_id = OLD.run_id;
        DELETE FROM unsearched WHERE run_id = OLD.run_id;
    END
    """,
    """
    CREATE TRIGGER search_skipped AFTER INSERT ON steps WHEN NEW.status = 'Skipped' BEGIN
        INSERT INTO unsearched SELECT run_id FROM runs WHERE run_id = NEW.run_id AND status <> 'Running'
        ON CONFLICT DO NOTHING;
    END
    """,
    "INSERT INTO unsearched SELECT run_id FROM runs WHERE status <> 'Running' ON CONFLICT DO NOTHING",
)
HAS_TRIGGER = "SELECT 1 FROM sqlite_schema WHERE type = 'trigger' AND name = 'search_ended'"
HAS_FTS5 = "SELECT 1 FROM pragma_module_list WHERE name = 'fts5'"

FIND_UNSEARCHED = "SELECT run_id FROM unsearched LIMIT ?"
COUNT_UNSEARCHED = f"SELECT COUNT(*) FROM (SELECT 1 FROM unsearched LIMIT {MAX_UNINDEXED + 1})"
READ_RUN = "SELECT flow_name, trigger_key, status, job_id FROM runs WHERE run_id = ?"
READ_STEPS = """
SELECT step_key, substr(error_message, 1, :max_length), substr(output_json, 1, :max_length) FROM steps
WHERE run_id = :run_id AND status IS NOT NULL
"""
READ_ATTEMPTS = """
SELECT substr(error_message, 1, :max_length), substr(output_json, 1, :max_length) FROM attempts
WHERE run_id = :run_id
"""
MARK_OPEN_STEPS = """
UPDATE steps SET searched_open = 1 WHERE run_id = ? AND status IN ('Pending', 'Running') AND NOT searched_open
"""
DROP_TRIGRAMS = """
INSERT INTO run_trigrams (run_trigrams, rowid, text)
SELECT 'delete', id, text FROM run_texts WHERE run_id = ?
"""
SAVE_TEXT = """
INSERT INTO run_texts (run_id, text) VALUES (?, ?) ON CONFLICT (run_id) DO UPDATE SET text = excluded.text
RETURNING id
"""
SAVE_TRIGRAMS = "INSERT INTO run_trigrams (rowid, text) VALUES (?, ?)"
# A deleted entry stays in the index until FTS5 merges it away, which happens when entries are added.
HAS_ONLY_DELETED = """
SELECT NOT EXISTS (SELECT 1 FROM run_texts) AND EXISTS (SELECT 1 FROM run_trigrams_idx)
"""
EMPTY_TRIGRAMS = "INSERT INTO run_trigrams (run_trigrams) VALUES ('delete-all')"
DROP_UNSEARCHED = "DELETE FROM unsearched WHERE run_id = ?"

# All runs that may match: runs whose text has all trigrams, and runs whose text may be out of date.
MATCH_CANDIDATES = """
AND run_id IN (
    SELECT run_id FROM run_texts
    WHERE id IN (SELECT rowid FROM run_trigrams WHERE run_trigrams MATCH :trigrams)
    UNION ALL SELECT run_id FROM unsearched
    UNION ALL SELECT run_id FROM runs WHERE status = 'Running'
)
"""

# lower() folds only ASCII. Long texts are truncated and compared as bytes, so a truncated character does no
# harm. Unstarted steps and their attempts are not visible, so a search does not find them.
SEARCH_CONDITION = """
AND (
    instr(lower(flow_name), :needle) OR instr(lower(trigger_key), :needle)
    OR instr(lower(status), :needle) OR instr(lower(job_id), :needle)
    OR instr(
        lower(
            substr(hex(run_id), 1, 8) || '-' || substr(hex(run_id), 9, 4) || '-'
            || substr(hex(run_id), 13, 4) || '-' || substr(hex(run_id), 17, 4) || '-'
            || substr(hex(run_id), 21)
        ),
        :needle
    )
    OR EXISTS (
        SELECT 1 FROM steps
        WHERE steps.run_id = runs.run_id AND steps.status IS NOT NULL AND (
            instr(lower(step_key), :needle)
            OR instr(CAST(lower(substr(CAST(error_message AS BLOB), 1, :max_length)) AS BLOB), :bytes)
            OR instr(CAST(lower(substr(CAST(output_json AS BLOB), 1, :max_length)) AS BLOB), :bytes)
        )
    )
    OR EXISTS (
        SELECT 1 FROM attempts JOIN steps USING (run_id, step_key)
        WHERE attempts.run_id = runs.run_id AND steps.status IS NOT NULL AND (
            instr(CAST(lower(substr(CAST(attempts.error_message AS BLOB), 1, :max_length)) AS BLOB), :bytes)
            OR instr(CAST(lower(substr(CAST(attempts.output_json AS BLOB), 1, :max_length)) AS BLOB), :bytes)
        )
    )
)
"""


def is_indexed(db: sqlite3.Connection) -> bool:
    """Whether the file has the index and this SQLite has FTS5."""
    return all(db.execute(statement).fetchone() is not None for statement in (HAS_TRIGGER, HAS_FTS5))


def enable_search(db: sqlite3.Connection) -> bool:
    """Create the index, if missing, in the transaction of the caller; False without FTS5."""
    if db.execute(HAS_FTS5).fetchone() is None:
        return False
    if db.execute(HAS_TRIGGER).fetchone() is None:
        for statement in ENABLE_SEARCH:
            db.execute(statement)
    return True


def search_by_scan(needle: str) -> tuple[str, dict[str, object]]:
    """The condition and the values of a search that reads every run. The needle is folded."""
    return SEARCH_CONDITION, {"needle": needle, "bytes": needle.encode(), "max_length": SEARCHED_BYTES}


def search_by_index(needle: str) -> tuple[str, dict[str, object]]:
    """The condition and the values of a search that uses the index, if the needle has three characters."""
    condition, values = search_by_scan(needle)
    trigrams = {needle[at : at + 3] for at in range(len(needle) - 2)}
    if not trigrams:
        return condition, values
    quoted = ('"' + one.replace('"', '""') + '"' for one in sorted(trigrams))
    return join_sql(MATCH_CANDIDATES, condition), {**values, "trigrams": " AND ".join(quoted)}


def is_stale(db: sqlite3.Connection) -> bool:
    """Whether more than MAX_UNINDEXED ended runs are missing in the index."""
    count: int = db.execute(COUNT_UNSEARCHED).fetchone()[0]
    return count > MAX_UNINDEXED


def index_some(db: sqlite3.Connection, now: int, until: float | None = None) -> int:
    """Add up to INDEX_BATCH ended runs to the index; returns how many.

    Stops at ``until``, a time of time.monotonic(), or after INDEX_SLICE.
    """
    deadline = time.monotonic() + INDEX_SLICE if until is None else until
    added = 0
    for (run_id,) in db.execute(FIND_UNSEARCHED, (INDEX_BATCH,)).fetchall():
        db.execute(MARK_OPEN_STEPS, (run_id,))
        text = _read_text(db, run_id)
        db.execute(DROP_TRIGRAMS, (run_id,))
        number = db.execute(SAVE_TEXT, (run_id, text)).fetchone()[0]
        db.execute(SAVE_TRIGRAMS, (number, text))
        db.execute(DROP_UNSEARCHED, (run_id,))
        added += 1
        if time.monotonic() > deadline:
            break
    return added


def empty_index(db: sqlite3.Connection, now: int) -> None:
    """Remove all entries of the index if no text is stored."""
    if has_only_deleted(db):
        db.execute(EMPTY_TRIGRAMS)


def has_only_deleted(db: sqlite3.Connection) -> bool:
    return bool(db.execute(HAS_ONLY_DELETED).fetchone()[0])


def _read_text(db: sqlite3.Connection, run_id: bytes) -> str:
    values = {"run_id": run_id, "max_length": SEARCHED_BYTES}
    texts = [str(UUID(bytes=run_id)), *db.execute(READ_RUN, (run_id,)).fetchone()]
    for statement in (READ_STEPS, READ_ATTEMPTS):
        for row in db.execute(statement, values):
            texts += row
    return fold_ascii("\n".join(text for text in texts if text is not None))
