"""Pages of runs on PostgreSQL: ordered, after a cursor, counted, searched (QRY-1 to QRY-3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

from flowstore_core import FlowRunRecord, RunPage, RunPosition, RunStatus
from flowstore_core.runs import fold_ascii
from flowstore_core.tags import NO_TAGS, RunTags
from flowstore_core.validation import MAX_INT64
from flowstore_postgres.database import Database
from flowstore_postgres.runs import RUN_COLUMNS, run_record
from flowstore_postgres.search import (
    COUNT_UNINDEXED_CAPPED,
    MAX_UNINDEXED,
    index_some,
    is_indexed,
    match_candidates,
    patterns,
    search_condition,
)
from flowstore_postgres.tags import rarest_first

COMMON_SIZES = frozenset({10, 20, 25, 50, 100, 200})
"""Page sizes that are literals in the statement when nothing is skipped. With a literal size PostgreSQL
keeps the plan. With a parameter it plans each page anew, which takes as long as the page itself, and longer
with more table statistics."""

# The index is ordered within each status, so a page of all statuses merges the first rows of four index
# scans. Skipping reads only ids, from indexes; then the runs of the page are read.
RUNS_OF_STATUS = """
(SELECT r.started_at, r.run_id FROM {runs} r
 WHERE r.status = '{one}' AND {tagged} AND {flow} AND {after}
 ORDER BY r.started_at DESC, r.run_id DESC LIMIT {reach})
"""
# Table run_tags has the runs with a tag in the same order; further tags are looked up by its primary key. A
# scalar subquery, because PostgreSQL may turn EXISTS into a join that reads all runs with a frequent tag.
AND_TAGGED = """
(SELECT true FROM {schema}.run_tags o WHERE o.tag_key = {key} AND o.tag_value = {value}
 AND o.status = r.status AND o.started_at = r.started_at AND o.run_id = r.run_id)
"""
COUNT_TAGGED = "(SELECT count(*) FROM {runs} r WHERE {status} AND {tagged} AND {flow})"
# OFFSET 0 lets the conditions of a search be checked on these runs only.
TAGGED_CANDIDATES = """
(SELECT c.* FROM {candidates} c
 WHERE c.run_id IN (SELECT r.run_id FROM {runs} r WHERE {status} AND {tagged} AND {flow}) OFFSET 0)
"""
PAGE = """
SELECT {columns} FROM (
    SELECT i.run_id FROM ({source}) i ORDER BY i.started_at DESC, i.run_id DESC OFFSET {skip} LIMIT {take}
) page JOIN {schema}.runs r USING (run_id) ORDER BY r.started_at DESC, r.run_id DESC
"""
GET_RUNS = PAGE.replace("{columns}", RUN_COLUMNS)

# One statement, so that the rows and their count come from one snapshot (QRY-3).
GET_RUNS_PAGE = f"""
SELECT {{total}} AS total, ARRAY({PAGE.replace("{columns}", f"ROW({RUN_COLUMNS})")}) AS page
"""
FIND_RUNS = f"""
WITH found AS MATERIALIZED (
    SELECT r.started_at, r.run_id FROM {{candidates}} r WHERE {{status}} AND {{flow}} AND {{search}}
)
SELECT (SELECT count(*) FROM found) AS total, {{unindexed}} AS unindexed,
       ARRAY({PAGE.replace("{columns}", f"ROW({RUN_COLUMNS})")}) AS page
"""
FOUND = """
(SELECT r.started_at, r.run_id FROM found r WHERE {after}
 ORDER BY r.started_at DESC, r.run_id DESC LIMIT {reach})
"""

# A count is the sum over the folded counters and the changes since (migration 2).
COUNT_RUNS = """
(SELECT coalesce(sum(number), 0)::bigint FROM (
    SELECT {counts} AS number FROM {schema}.run_counts WHERE {flow}
    UNION ALL
    SELECT amount FROM {schema}.run_changes WHERE {flow} AND {status}
) numbers)
"""


class _Statement:
    """Builds a statement from constant conditions and bound values, so that each combination has one plan."""

    def __init__(
        self,
        flow_id: UUID | None,
        status: RunStatus | None,
        after: RunPosition | None,
        skip: int,
        take: int,
        tags: RunTags,
    ) -> None:
        self.arguments: list[object] = []
        limits = (skip, take, min(skip + take, MAX_INT64))
        is_common = skip == 0 and take in COMMON_SIZES
        self._limits = [str(one) if is_common else f"{self.argument(one)}::bigint" for one in limits]
        self._statuses = tuple(RunStatus) if status is None else (status,)
        self._status = "true" if status is None else f"status = '{status.value}'"
        self._flow = "true" if flow_id is None else f"flow_id = {self.argument(flow_id)}"
        self._after = "true"
        if after is not None:
            position = f"({self.argument(after.started_at)}, {self.argument(after.run_id)})"
            self._after = f"(r.started_at, r.run_id) < {position}"
        self._has_tags = bool(tags)
        self._runs = "{schema}.run_tags" if tags else "{schema}.runs"
        self._tagged = self._with_tags(tags) if tags else "true"

    def argument(self, value: object) -> str:
        """Bind a value and return its parameter."""
        self.arguments.append(value)
        return f"${len(self.arguments)}"

    def _with_tags(self, tags: RunTags) -> str:
        """The condition that run ``r`` of table run_tags has all tags."""
        key, value = map(self.argument, tags[0])
        conditions = [f"r.tag_key = {key}", f"r.tag_value = {value}"]
        for tag in tags[1:]:
            key, value = map(self.argument, tag)
            conditions.append(AND_TAGGED.replace("{key}", key).replace("{value}", value))
        return " AND ".join(conditions)

    def find(self, needle: str, *, indexed: bool) -> str:
        """The statement of a search for a folded needle."""
        like = [f"{self.argument(pattern)}::text" for pattern in patterns(needle)] if indexed else []
        candidates = match_candidates(like) if like else "{schema}.runs"
        if self._has_tags:
            candidates = TAGGED_CANDIDATES.replace("{candidates}", candidates)
        statement = FIND_RUNS.replace("{source}", FOUND)
        for name, value in (
            ("{candidates}", candidates),
            ("{search}", search_condition(f"{self.argument(needle)}::text")),
            ("{unindexed}", COUNT_UNINDEXED_CAPPED if indexed else "0"),
        ):
            statement = statement.replace(name, value)
        return self.text(statement)

    def text(self, statement: str) -> str:
        source = " UNION ALL ".join(RUNS_OF_STATUS.replace("{one}", one.value) for one in self._statuses)
        columns = " + ".join(one.value.lower() for one in self._statuses)
        for name, value in (
            ("{source}", source),
            ("{total}", COUNT_TAGGED if self._has_tags else COUNT_RUNS),
            ("{runs}", self._runs),
            ("{tagged}", self._tagged),
            ("{counts}", columns),
            ("{status}", self._status),
            ("{flow}", self._flow),
            ("{after}", self._after),
            ("{skip}", self._limits[0]),
            ("{take}", self._limits[1]),
            ("{reach}", self._limits[2]),
        ):
            statement = statement.replace(name, value)
        return statement


class Pages:
    """The contract of these operations is in flowstore_core/runs.py."""

    _database: Database

    async def get_runs(
        self,
        *,
        flow_id: UUID | None,
        after: RunPosition | None,
        skip: int,
        take: int,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> Sequence[FlowRunRecord]:
        rarest, _ = await rarest_first(self._database, tags)
        statement = _Statement(flow_id, None, after, skip, take, rarest)
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
        tags: Mapping[str, str] = NO_TAGS,
    ) -> RunPage:
        rarest, is_rare = await rarest_first(self._database, tags, count=search is not None)
        statement = _Statement(flow_id, status, after, skip, take, rarest)
        if search is None:
            row = await self._database.read_row(statement.text(GET_RUNS_PAGE), *statement.arguments)
        else:
            # Reading the few runs with a rare tag is faster than finding all runs with the text.
            indexed = not is_rare and await is_indexed(self._database)
            text = statement.find(fold_ascii(search), indexed=indexed)
            row = await self._database.read_row(text, *statement.arguments)
            if row["unindexed"] > MAX_UNINDEXED:
                await index_some(self._database)
        return RunPage(runs=tuple(run_record(one) for one in row["page"]), total_count=row["total"])
