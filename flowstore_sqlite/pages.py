"""Pages of runs in SQLite: ordered, after a position, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

import logging
import sqlite3
from uuid import UUID

from flowstore_core import FlowRunRecord, FlowStoreError, RunPage, RunPosition, RunStatus
from flowstore_core.runs import fold_ascii
from flowstore_sqlite.codecs import join_sql, to_optional_id, to_us
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import NEWEST_FIRST, SELECT_RUNS, to_runs
from flowstore_sqlite.search import index_some, is_indexed, is_stale, search_by_index, search_by_scan

_log = logging.getLogger("flowstore_sqlite")

# The index on (status, started_at) has the runs of each status in order; a page of all statuses merges four
# index ranges. OFFSET skips index entries only; the runs are read afterwards, by id.
FIND_RUNS_OF_STATUS = "SELECT started_at, run_id FROM runs WHERE status = '{status}'"
WHERE_FLOW = "AND flow_id = :flow_id"
AFTER_POSITION = "AND (started_at, run_id) < (:started_at, :after_id)"

# The counters of migration 2.
COUNT_RUNS = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE TRUE"
WHERE_STATUS = "AND status = :status"

SEARCH_RUNS = "SELECT started_at, run_id FROM runs WHERE TRUE"


class Pages:
    """See flowstore_core.runs for the contract."""

    _database: Database

    async def get_runs(
        self, flow_id: UUID | None, *, after: RunPosition | None, skip: int, take: int
    ) -> tuple[FlowRunRecord, ...]:
        page_filter = _PageFilter(flow_id, None, after, skip, take)
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
    ) -> RunPage:
        page_filter = _PageFilter(flow_id, status, after, skip, take)

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
        self, flow_id: UUID | None, status: RunStatus | None, after: RunPosition | None, skip: int, take: int
    ) -> None:
        self._status = status
        self._where_flow = "" if flow_id is None else WHERE_FLOW
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
        statuses = RunStatus if self._status is None else (self._status,)
        parts = (
            join_sql(FIND_RUNS_OF_STATUS.replace("{status}", one.value), self._where_flow, self._after)
            for one in statuses
        )
        ids = join_sql(" UNION ALL ".join(parts), NEWEST_FIRST, "LIMIT :take OFFSET :skip")
        statement = join_sql(SELECT_RUNS, "WHERE run_id IN (SELECT run_id FROM (", ids, "))", NEWEST_FIRST)
        return to_runs(db.execute(statement, self._values))

    def count(self, db: sqlite3.Connection) -> int:
        statement = join_sql(COUNT_RUNS, self._where_flow, "" if self._status is None else WHERE_STATUS)
        count: int = db.execute(statement, self._values).fetchone()[0]
        return count

    def search(self, db: sqlite3.Connection, needle: str, indexed: bool) -> RunPage:
        """The page and the total count of a search, in one pass over the runs."""
        condition, values = search_by_index(needle) if indexed else search_by_scan(needle)
        of_status = "" if self._status is None else WHERE_STATUS
        statement = join_sql(SEARCH_RUNS, self._where_flow, of_status, condition, NEWEST_FIRST)
        positions = db.execute(statement, {**self._values, **values}).fetchall()
        following = (
            positions if self._position is None else [each for each in positions if each < self._position]
        )
        ids = [run_id for _, run_id in following[self._skip : self._skip + self._take]]
        marks = ", ".join("?" * len(ids))
        rows = db.execute(join_sql(SELECT_RUNS, "WHERE run_id IN (", marks, ")", NEWEST_FIRST), ids)
        return RunPage(runs=to_runs(rows), total_count=len(positions))
