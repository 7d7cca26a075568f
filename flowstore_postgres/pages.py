"""Pages of runs on PostgreSQL: in order, behind a position, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from flowstore_core import FlowRunRecord, RunPage, RunPosition, RunStatus
from flowstore_core.runs import fold_ascii
from flowstore_core.validation import MAX_INT64
from flowstore_postgres.database import Database
from flowstore_postgres.runs import RUN_COLUMNS, run_record
from flowstore_postgres.search import (
    COUNT_LEFT_OUT,
    TOLERATED,
    candidates,
    gather_some,
    is_indexed,
    patterns,
    search_condition,
)

COMMON = frozenset({10, 20, 25, 50, 100, 200})
"""Sizes of pages that get a statement of their own when nothing is skipped. With the size in its text
PostgreSQL knows how little a page is, and keeps the plan; else it makes one anew for each, which takes as
long as the page itself, and longer the more it knows of the table."""

# Each status lies in order in an index of its own, so a page of all of them merges what four of them
# begin with. Only ids are skipped, and only in indexes; the runs of the page are read then.
OF_ONE_STATUS = """
(SELECT r.started_at, r.run_id FROM {schema}.runs r WHERE r.status = '{one}' AND {flow} AND {behind}
 ORDER BY r.started_at DESC, r.run_id DESC LIMIT {reach})
"""
PAGE = """
SELECT {columns} FROM (
    SELECT i.run_id FROM ({source}) i ORDER BY i.started_at DESC, i.run_id DESC OFFSET {skip} LIMIT {take}
) page JOIN {schema}.runs r USING (run_id) ORDER BY r.started_at DESC, r.run_id DESC
"""
GET_RUNS = PAGE.replace("{columns}", RUN_COLUMNS)

# One statement is one snapshot: the rows and their count belong together (QRY-3).
GET_RUNS_PAGE = f"""
SELECT {{total}} AS total, ARRAY({PAGE.replace("{columns}", f"ROW({RUN_COLUMNS})")}) AS page
"""
FIND_RUNS = f"""
WITH found AS MATERIALIZED (
    SELECT r.started_at, r.run_id FROM {{candidates}} r WHERE {{status}} AND {{flow}} AND {{search}}
)
SELECT (SELECT count(*) FROM found) AS total, {{left_out}} AS left_out,
       ARRAY({PAGE.replace("{columns}", f"ROW({RUN_COLUMNS})")}) AS page
"""
FOUND = """
(SELECT r.started_at, r.run_id FROM found r WHERE {behind}
 ORDER BY r.started_at DESC, r.run_id DESC LIMIT {reach})
"""

# See migration 2: a number is the sum of what was folded and of what changed since.
COUNT_RUNS = """
(SELECT coalesce(sum(number), 0)::bigint FROM (
    SELECT {counts} AS number FROM {schema}.run_counts WHERE {flow}
    UNION ALL
    SELECT amount FROM {schema}.run_changes WHERE {flow} AND {status}
) numbers)
"""


class _Statement:
    """Conditions put together from constants, never from values, so that each combination gets a plan."""

    def __init__(
        self, flow_id: UUID | None, status: RunStatus | None, after: RunPosition | None, skip: int, take: int
    ) -> None:
        self.arguments: list[object] = []
        places = (skip, take, min(skip + take, MAX_INT64))
        is_common = skip == 0 and take in COMMON
        self._places = [str(one) if is_common else f"{self.argument(one)}::bigint" for one in places]
        self._statuses = tuple(RunStatus) if status is None else (status,)
        self._status = "true" if status is None else f"status = '{status.value}'"
        self._flow = "true" if flow_id is None else f"flow_id = {self.argument(flow_id)}"
        self._behind = "true"
        if after is not None:
            place = f"({self.argument(after.started_at)}, {self.argument(after.run_id)})"
            self._behind = f"(r.started_at, r.run_id) < {place}"

    def argument(self, value: object) -> str:
        """The place of a value that is bound."""
        self.arguments.append(value)
        return f"${len(self.arguments)}"

    def find(self, needle: str, *, indexed: bool) -> str:
        """FIND_RUNS for a folded needle."""
        like = [f"{self.argument(pattern)}::text" for pattern in patterns(needle)] if indexed else []
        statement = FIND_RUNS.replace("{source}", FOUND)
        for name, value in (
            ("{candidates}", candidates(like) if like else "{schema}.runs"),
            ("{search}", search_condition(f"{self.argument(needle)}::text")),
            ("{left_out}", COUNT_LEFT_OUT if indexed else "0"),
        ):
            statement = statement.replace(name, value)
        return self.text(statement)

    def text(self, statement: str) -> str:
        source = " UNION ALL ".join(OF_ONE_STATUS.replace("{one}", one.value) for one in self._statuses)
        columns = " + ".join(one.value.lower() for one in self._statuses)
        for name, value in (
            ("{source}", source),
            ("{total}", COUNT_RUNS),
            ("{counts}", columns),
            ("{status}", self._status),
            ("{flow}", self._flow),
            ("{behind}", self._behind),
            ("{skip}", self._places[0]),
            ("{take}", self._places[1]),
            ("{reach}", self._places[2]),
        ):
            statement = statement.replace(name, value)
        return statement


class Pages:
    _database: Database

    async def get_runs(
        self, *, flow_id: UUID | None, after: RunPosition | None, skip: int, take: int
    ) -> Sequence[FlowRunRecord]:
        statement = _Statement(flow_id, None, after, skip, take)
        rows = await self._database.read(statement.text(GET_RUNS), *statement.arguments)
        return tuple(run_record(row) for row in rows)

    async def get_runs_page(
        self,
        *,
        flow_id: UUID | None,
        status: RunStatus | None,
        after: RunPosition | None,
        skip: int,
        take: int,
        search: str | None,
    ) -> RunPage:
        statement = _Statement(flow_id, status, after, skip, take)
        if search is None:
            row = await self._database.read_row(statement.text(GET_RUNS_PAGE), *statement.arguments)
        else:
            text = statement.find(fold_ascii(search), indexed=await is_indexed(self._database))
            row = await self._database.read_row(text, *statement.arguments)
            if row["left_out"] > TOLERATED:
                await gather_some(self._database)
        return RunPage(runs=tuple(run_record(one) for one in row["page"]), total_count=row["total"])
