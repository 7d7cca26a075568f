"""Tags of runs on PostgreSQL: a column of the run; triggers keep the table that finds runs (migration 10)."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from flowstore_core import RunNotFoundError
from flowstore_core.tags import RunTags, decode_tags, encode_tags, merge_tags
from flowstore_postgres.database import Database
from flowstore_postgres.transactions import Transaction

LOCK_TAGS = "SELECT tags FROM {schema}.runs WHERE run_id = $1 FOR NO KEY UPDATE"
SAVE_TAGS = "UPDATE {schema}.runs SET tags = $2::jsonb WHERE run_id = $1"

MAX_COUNTED = 1_000
"""Tags of more runs than this count as equally frequent; counting so many takes a tenth of a millisecond."""
RAREST_FIRST = f"""
SELECT t.tag_key, t.tag_value, counted.runs
FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS t (tag_key, tag_value, number), LATERAL (
    SELECT count(*) AS runs FROM (
        SELECT FROM {{schema}}.run_tags r
        WHERE r.tag_key = t.tag_key AND r.tag_value = t.tag_value LIMIT {MAX_COUNTED}
    ) few
) counted
ORDER BY counted.runs, t.number
"""


class Tags:
    """The contract of these operations is in flowstore_core/tags.py."""

    _database: Database

    async def set_tags(self, *, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        async def work(transaction: Transaction) -> None:
            row = await transaction.row(LOCK_TAGS, run_id)
            if row is None:
                raise RunNotFoundError(run_id)
            before = decode_tags(row[0])
            after = merge_tags(run_id, before, tags)
            if after != before:
                await transaction.execute(SAVE_TAGS, run_id, encode_tags(after))

        await self._database.transaction("set_tags", work)


async def rarest_first(
    database: Database, tags: Mapping[str, str], *, count: bool = False
) -> tuple[RunTags, bool]:
    """The tags, beginning with the one that the fewest runs have, and whether that one is known to be rare.

    ``count``: a single tag is counted too.
    """
    if len(tags) < (1 if count else 2):
        return tuple(tags.items()), False
    rows = await database.read(RAREST_FIRST, list(tags), list(tags.values()))
    return tuple((row[0], row[1]) for row in rows), rows[0]["runs"] < MAX_COUNTED
