"""Pages of runs in SQLite: ordered, after a position, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping
from uuid import UUID

from flowstore_core import FlowRunRecord, FlowStoreError, RunPage, RunPosition, RunStatus
from flowstore_core.runs import fold_ascii
from flowstore_core.tags import NO_TAGS
from flowstore_sqlite.codecs import join_sql, to_optional_id, to_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import NEWEST_FIRST, SELECT_RUNS, to_runs
from flowstore_sqlite.search import index_some, is_indexed, is_stale, search_by_index, search_by_scan
from flowstore_sqlite.tags import rarest_first

_log = logging.getLogger("flowstore_sqlite")

# The index on (status, started_at) has the runs of each status in order; a page of all statuses merges four
# index ranges. OFFSET skips index entries only; the runs are read afterwards, by id.
FIND_RUNS_OF_STATUS = "SELECT started_at, run_id FROM {source} AND status = '{status}'"
WHERE_FLOW = "AND flow_id = :flow_id"
AFTER_POSITION = "AND (started_at, run_id) < (:started_at, :after_id)"

# The counters of migration 2.
COUNT_RUNS = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE TRUE"
WHERE_STATUS = "AND status = :status"

SEARCH_RUNS = "SELECT started_at, run_id FROM runs WHERE TRUE"

# All runs, or those with tags: the first tag by the index of migration 7, the others by the primary key.
ALL_RUNS = "runs WHERE TRUE"
TAGGED_RUNS = "run_tags AS tagged WHERE tag_key = :key_0 AND tag_value = :value_0"
AND_TAGGED = """
AND EXISTS (
    SELECT 1 FROM run_tags WHERE run_id = tagged.run_id
        AND tag_key = :key_{number} AND tag_value = :value_{number}
)
"""


class Pages:
    """See flowstore_core.runs for the contract."""

    _database: Database

    async def get_runs(
        self,
        flow_id: UUID | None,
        *,
        after: RunPosition | None,
        skip: int,
        take: int,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> tuple[FlowRunRecord, ...]:
        page_filter = _PageFilter(flow_id, None, after, skip, take, tags)
        return await self._database.read(page_filter.runs)

    async def get_runs_page(
        self,
        flow_id: UUID | None,
        *,
        status: RunStatus | None,
        after: RunPosition | None,
        skip: int,
        take: int,
        search: str | None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> RunPage:
        page_filter = _PageFilter(flow_id, status, after, skip, take, tags)

        def page(db: sqlite3.Connection) -> tuple[RunPage, bool]:
            if search is None:
                return RunPage(runs=page_filter.runs(db), total_count=page_filter.count(db)), False
            indexed = is_indexed(db)
            return page_filter.search(db, fold_ascii(search), indexed), indexed and is_stale(db)

        found, stale = await self._database.read(page)
        if stale:
            try:
                await self._database.write(index_some)
            except FlowStoreError as error:
                # The search does not need them: it scans runs that are not indexed.
                _log.debug("no runs were added to the search index: %s", error)
        return found


class _PageFilter:
    """The filter of a page. Statements are assembled from constants; values are bound."""

    def __init__(
        self,
        flow_id: UUID | None,
        status: RunStatus | None,
        after: RunPosition | None,
        skip: int,
        take: int,
        tags: Mapping[str, str],
    ) -> None:
        self._status = status
        self._tags = tags
        self._where_flow = "" if flow_id is None else WHERE_FLOW
        self._where_status = "" if status is None else WHERE_STATUS
        self._after = "" if after is None else AFTER_POSITION
        self._position = None if after is None else (to_us(after.started_at), after.run_id.bytes)
        self._skip, self._take = skip, take
        self._values: dict[str, object] = {
            "flow_id": to_optional_id(flow_id),
            "status": None if status is None else status.value,
            "started_at": self._position and self._position[0],
            "after_id": self._position and self._position[1],
            "skip": skip,
            "take": take,
        }

    def runs(self, db: sqlite3.Connection) -> tuple[FlowRunRecord, ...]:
        source, _ = self._source(db)
        parts = (
            join_sql(
                FIND_RUNS_OF_STATUS.replace("{source}", source).replace("{status}", one.value),
                self._where_flow,
                self._after,
            )
            for one in (RunStatus if self._status is None else (self._status,))
        )
        ids = join_sql(" UNION ALL ".join(parts), NEWEST_FIRST, "LIMIT :take OFFSET :skip")
        statement = join_sql(SELECT_RUNS, "WHERE run_id IN (SELECT run_id FROM (", ids, "))", NEWEST_FIRST)
        return to_runs(db.execute(statement, self._values))

    def count(self, db: sqlite3.Connection) -> int:
        counted = COUNT_RUNS
        if self._tags:
            counted = join_sql("SELECT COUNT(*) FROM", self._source(db)[0])
        statement = join_sql(counted, self._where_flow, self._where_status)
        count: int = db.execute(statement, self._values).fetchone()[0]
        return count

    def _source(self, db: sqlite3.Connection) -> tuple[str, bool]:
        """The source of the ids of runs, with their flow and status; and whether it has few runs."""
        if not self._tags:
            return ALL_RUNS, False
        rarest, is_rare = rarest_first(db, self._tags)
        parts = [TAGGED_RUNS]
        for number, (key, value) in enumerate(rarest):
            self._values |= {f"key_{number}": key, f"value_{number}": value}
            if number:
                parts.append(AND_TAGGED.replace("{number}", str(number)))
        return join_sql(*parts), is_rare

    def search(self, db: sqlite3.Connection, needle: str, indexed: bool) -> RunPage:
        """The page and the total count of a search, in one pass over the runs."""
        where = join_sql(self._where_flow, self._where_status)
        if self._tags:
            source, is_rare = self._source(db)
            where = join_sql("AND run_id IN (SELECT run_id FROM", source, where, ")")
            # Reading the few runs with a rare tag is faster than finding all runs with the text.
            indexed = indexed and not is_rare
        condition, values = search_by_index(needle) if indexed else search_by_scan(needle)
        statement = join_sql(SEARCH_RUNS, where, condition, NEWEST_FIRST)
        positions = db.execute(statement, {**self._values, **values}).fetchall()
        following = (
            positions if self._position is None else [each for each in positions if each < self._position]
        )
        ids = [run_id for _, run_id in following[self._skip : self._skip + self._take]]
        marks = ", ".join("?" * len(ids))
        rows = db.execute(join_sql(SELECT_RUNS, "WHERE run_id IN (", marks, ")", NEWEST_FIRST), ids)
        return RunPage(runs=to_runs(rows), total_count=len(positions))
