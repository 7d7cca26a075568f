"""Pages of runs in SQLite: in order, behind a position, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

import sqlite3
from uuid import UUID

from flowstore_core import FlowRunRecord, RunPage, RunPosition, RunStatus
from flowstore_core.runs import SEARCHED_BYTES, fold_ascii
from flowstore_sqlite.database import Database
from flowstore_sqlite.runs import NEWEST_FIRST, SELECT_RUNS, to_runs
from flowstore_sqlite.values import sql, to_optional_id, to_us

# Each status lies in order in an index of its own, so a page of all of them merges four of them. Only ids
# are skipped, and only in indexes; the runs of the page are read then.
OF_ONE_STATUS = "SELECT started_at, run_id FROM runs WHERE status = '{status}'"
OF_FLOW = "AND flow_id = :flow_id"
BEHIND = "AND (started_at, run_id) < (:started_at, :after_id)"

# See migration 2.
COUNT_RUNS = "SELECT COALESCE(SUM(amount), 0) FROM run_counts WHERE TRUE"
OF_STATUS = "AND status = :status"

# lower() folds ASCII alone. The long texts are cut as bytes; a character cut in half does no harm,
# because bytes are what is compared then. Unstarted steps and their attempts are not shown, so not found.
OF_SEARCH = """
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
            OR instr(CAST(lower(substr(CAST(error_message AS BLOB), 1, :most)) AS BLOB), :bytes)
            OR instr(CAST(lower(substr(CAST(output_json AS BLOB), 1, :most)) AS BLOB), :bytes)
        )
    )
    OR EXISTS (
        SELECT 1 FROM attempts JOIN steps USING (run_id, step_key)
        WHERE attempts.run_id = runs.run_id AND steps.status IS NOT NULL AND (
            instr(CAST(lower(substr(CAST(attempts.error_message AS BLOB), 1, :most)) AS BLOB), :bytes)
            OR instr(CAST(lower(substr(CAST(attempts.output_json AS BLOB), 1, :most)) AS BLOB), :bytes)
        )
    )
)
"""

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

        def page(db: sqlite3.Connection) -> RunPage:
            if search is not None:
                return wanted.found(db, fold_ascii(search))
            return RunPage(runs=wanted.runs(db), total_count=wanted.count(db))

        return await self.read(page)


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
            "started_at": None if after is None else to_us(after.started_at),
            "after_id": None if after is None else after.run_id.bytes,
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

    def found(self, db: sqlite3.Connection, needle: str) -> RunPage:
        """The page and the count of a search, which looks at each run once."""
        statement = sql(
            FIND_RUNS, self._flow, "" if self._status is None else OF_STATUS, OF_SEARCH, NEWEST_FIRST
        )
        values = {**self._values, "needle": needle, "bytes": needle.encode(), "most": SEARCHED_BYTES}
        places = db.execute(statement, values).fetchall()
        behind = places if self._place is None else [place for place in places if place < self._place]
        ids = [place[1] for place in behind[self._skip : self._skip + self._take]]
        marks = ", ".join("?" * len(ids))
        rows = db.execute(sql(SELECT_RUNS, "WHERE run_id IN (", marks, ")", NEWEST_FIRST), ids)
        return RunPage(runs=to_runs(rows), total_count=len(places))
