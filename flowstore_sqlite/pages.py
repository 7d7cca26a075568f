"""Pages of runs in SQLite: in order, behind a position, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

import logging
import sqlite3
from uuid import UUID

from flowstore_core import FlowRunRecord, FlowStoreError, RunPage, RunPosition, RunStatus
from flowstore_core.runs import fold_ascii
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import NEWEST_FIRST, SELECT_RUNS, to_runs
from flowstore_sqlite.search import gather_texts, indexed_search, is_far_behind, is_indexed, search_values
from flowstore_sqlite.values import sql, to_optional_id, to_us

_log = logging.getLogger("flowstore_sqlite")

# Each status lies in order in an index of its own, so a page of all of them merges four of them. Only ids
# are skipped, and only in indexes; the runs of the page are read then.
OF_ONE_STATUS = "SELECT started_at, run_id FROM runs WHERE status = '{status}'"
OF_FLOW = "AND flow_id = :flow_id"
BEHIND = "AND (started_at, run_id) < (:started_at, :after_id)"

# See migration 2.
COUNT_RUNS = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE TRUE"
OF_STATUS = "AND status = :status"

FIND_RUNS = "SELECT started_at, run_id FROM runs WHERE TRUE"


class Pages(Database):
    """See flowstore_core.runs for the promises."""

    async def get_runs(
        self, flow_id: UUID | None, *, after: RunPosition | None, skip: int, take: int
    ) -> tuple[FlowRunRecord, ...]:
        wanted = _Wanted(flow_id, None, after, skip, take)
        return await self.read(wanted.runs)

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
        wanted = _Wanted(flow_id, status, after, skip, take)

        def page(db: sqlite3.Connection) -> tuple[RunPage, bool]:
            if search is None:
                return RunPage(runs=wanted.runs(db), total_count=wanted.count(db)), False
            indexed = is_indexed(db)
            return wanted.found(db, fold_ascii(search), indexed), indexed and is_far_behind(db)

        found, behind = await self.read(page)
        if behind:
            try:
                await self.write(gather_texts)
            except FlowStoreError as error:
                # They were found without the index, and will be again.
                _log.debug("no texts were gathered: %s", error)
        return found


class _Wanted:
    """What a page is asked for; its statements are put together from constants, and values are bound."""

    def __init__(
        self, flow_id: UUID | None, status: RunStatus | None, after: RunPosition | None, skip: int, take: int
    ) -> None:
        self._status = status
        self._flow = "" if flow_id is None else OF_FLOW
        self._behind = "" if after is None else BEHIND
        self._place = None if after is None else (to_us(after.started_at), after.run_id.bytes)
        self._skip, self._take = skip, take
        self._values: dict[str, object] = {
            "flow_id": to_optional_id(flow_id),
            "status": None if status is None else status.value,
            "started_at": self._place and self._place[0],
            "after_id": self._place and self._place[1],
            "skip": skip,
            "take": take,
        }

    def runs(self, db: sqlite3.Connection) -> tuple[FlowRunRecord, ...]:
        statuses = RunStatus if self._status is None else (self._status,)
        parts = (
            sql(OF_ONE_STATUS.replace("{status}", one.value), self._flow, self._behind) for one in statuses
        )
        ids = sql(" UNION ALL ".join(parts), NEWEST_FIRST, "LIMIT :take OFFSET :skip")
        statement = sql(SELECT_RUNS, "WHERE run_id IN (SELECT run_id FROM (", ids, "))", NEWEST_FIRST)
        return to_runs(db.execute(statement, self._values))

    def count(self, db: sqlite3.Connection) -> int:
        statement = sql(COUNT_RUNS, self._flow, "" if self._status is None else OF_STATUS)
        count: int = db.execute(statement, self._values).fetchone()[0]
        return count

    def found(self, db: sqlite3.Connection, needle: str, indexed: bool) -> RunPage:
        """The page and the count of a search, which looks at each run once."""
        condition, values = indexed_search(needle) if indexed else search_values(needle)
        of_status = "" if self._status is None else OF_STATUS
        statement = sql(FIND_RUNS, self._flow, of_status, condition, NEWEST_FIRST)
        places = db.execute(statement, {**self._values, **values}).fetchall()
        behind = places if self._place is None else [place for place in places if place < self._place]
        ids = [place[1] for place in behind[self._skip : self._skip + self._take]]
        marks = ", ".join("?" * len(ids))
        rows = db.execute(sql(SELECT_RUNS, "WHERE run_id IN (", marks, ")", NEWEST_FIRST), ids)
        return RunPage(runs=to_runs(rows), total_count=len(places))
