"""Pages of runs in SQLite: in order, behind a position, counted, searched (QRY-1 to QRY-3)."""

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

# Each status lies in order in an index of its own, so a page of all of them merges four of them. Only ids
# are skipped, and only in indexes; the runs of the page are read then.
FIND_RUNS_OF_STATUS = "SELECT started_at, run_id FROM runs WHERE status = '{status}'"
WHERE_FLOW = "AND flow_id = :flow_id"
AFTER_POSITION = "AND (started_at, run_id) < (:started_at, :after_id)"

# See migration 2.
COUNT_RUNS = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE TRUE"
WHERE_STATUS = "AND status = :status"

FIND_RUNS = "SELECT started_at, run_id FROM runs WHERE TRUE"


class Pages(Database):
    """See flowstore_core.runs for the promises."""

    async def get_runs(
        self, flow_id: UUID | None, *, after: RunPosition | None, skip: int, take: int
    ) -> tuple[FlowRunRecord, ...]:
        filtered = _PageFilter(flow_id, None, after, skip, take)
        return await self.read(filtered.runs)

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
        filtered = _PageFilter(flow_id, status, after, skip, take)

        def page(db: sqlite3.Connection) -> tuple[RunPage, bool]:
            if search is None:
                return RunPage(runs=filtered.runs(db), total_count=filtered.count(db)), False
            indexed = is_indexed(db)
            return filtered.found(db, fold_ascii(search), indexed), indexed and is_stale(db)

        found, behind = await self.read(page)
        if behind:
            try:
                await self.write(index_some)
            except FlowStoreError as error:
                # They were found without the index, and will be again.
                _log.debug("no texts were gathered: %s", error)
        return found


class _PageFilter:
    """What a page is asked for; its statements are put together from constants, and values are bound."""

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

    def found(self, db: sqlite3.Connection, needle: str, indexed: bool) -> RunPage:
        """The page and the count of a search, which looks at each run once."""
        condition, values = search_by_index(needle) if indexed else search_by_scan(needle)
        of_status = "" if self._status is None else WHERE_STATUS
        statement = join_sql(FIND_RUNS, self._where_flow, of_status, condition, NEWEST_FIRST)
        positions = db.execute(statement, {**self._values, **values}).fetchall()
        behind = (
            positions if self._position is None else [place for place in positions if place < self._position]
        )
        ids = [place[1] for place in behind[self._skip : self._skip + self._take]]
        marks = ", ".join("?" * len(ids))
        rows = db.execute(join_sql(SELECT_RUNS, "WHERE run_id IN (", marks, ")", NEWEST_FIRST), ids)
        return RunPage(runs=to_runs(rows), total_count=len(positions))
