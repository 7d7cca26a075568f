"""Tags of runs in SQLite: a column of the run, and the table that finds runs by tag (migration 7)."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_core.tags import RunTags, decode_tags, encode_tags, merge_tags
from flowstore_sqlite.database import Database

READ_TAGS = "SELECT tags FROM runs WHERE run_id = ?"
SAVE_TAGS = "UPDATE runs SET tags = ? WHERE run_id = ?"
ADD_TAG = """
INSERT INTO run_tags (run_id, tag_key, tag_value, flow_id, status, started_at)
SELECT run_id, ?, ?, flow_id, status, started_at FROM runs WHERE run_id = ?
"""
DELETE_TAG = "DELETE FROM run_tags WHERE run_id = ? AND tag_key = ?"

MAX_COUNTED = 1_000
"""Tags of more runs than this count as equally frequent; counting so many takes a tenth of a millisecond."""
COUNT_TAGGED_CAPPED = f"""
SELECT COUNT(*) FROM (SELECT 1 FROM run_tags WHERE tag_key = ? AND tag_value = ? LIMIT {MAX_COUNTED})
"""


class Tags:
    """See flowstore_core.tags for the contract."""

    _database: Database

    async def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        def change(db: sqlite3.Connection, now: int) -> None:
            row = db.execute(READ_TAGS, (run_id.bytes,)).fetchone()
            if row is None:
                raise RunNotFoundError(run_id)
            before = decode_tags(row[0])
            after = merge_tags(run_id, before, tags)
            if after != before:
                save_tags(db, run_id, before, after)

        await self._database.write(change)


def save_tags(db: sqlite3.Connection, run_id: UUID, before: RunTags, after: RunTags) -> None:
    """Change the tags of a stored run, and the table that finds runs by tag."""
    db.execute(SAVE_TAGS, (encode_tags(after), run_id.bytes))
    db.executemany(DELETE_TAG, [(run_id.bytes, key) for key, _ in set(before).difference(after)])
    added = set(after).difference(before)
    db.executemany(ADD_TAG, [(key, value, run_id.bytes) for key, value in sorted(added)])


def rarest_first(db: sqlite3.Connection, tags: Mapping[str, str]) -> tuple[RunTags, bool]:
    """The tags, beginning with the one that the fewest runs have, and whether that one is rare."""
    counts = {tag: db.execute(COUNT_TAGGED_CAPPED, tag).fetchone()[0] for tag in tags.items()}
    ordered = tuple(sorted(counts, key=counts.__getitem__))
    return ordered, counts[ordered[0]] < MAX_COUNTED
