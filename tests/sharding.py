"""What of a store each operation touches if its runs are sharded: ``python -m tests.sharding``.

A simulation of a distributed database on one server. Every table whose primary key contains ``run_id`` is
partitioned by its hash; a partition stands for a shard. Each operation is called on the partitioned tables,
and the plans of its statements, those in triggers included, show which partitions were scanned.
``--publish`` writes the result into docs/scaling.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg

from flowstore_core import open_store
from tests.cluster import Cluster
from tests.virtual_clock import VirtualClock
from tests.writing_calls import CALLS, FLOW, Call, prepare_run

SHARDS = 4
SCHEMA = "flowstore"
NOTES = "commits"
"""The table in which a connection notes what it is about to commit; most transactions write it."""
SHARD = re.compile(r"(.+)_shard(\d+)$")
PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN = "<!-- shards: written by python -m tests.sharding --publish, not by hand -->"
END = "<!-- end of shards -->"
NOW = VirtualClock()()
YEAR = timedelta(days=365)
PLAN = re.compile(r"plan:\n((?:\t.*\n)+)")
READS: dict[str, Call] = {
    "get_run": lambda s, r: s.get_run(r),
    "get_run_status": lambda s, r: s.get_run_status(r),
    "get_run_detail": lambda s, r: s.get_run_detail(r),
    "get_step": lambda s, r: s.get_step(r, "open"),
    "get_step_statuses": lambda s, r: s.get_step_statuses(r),
    "get_step_claims": lambda s, r: s.get_step_claims(r),
    "get_dispatches": lambda s, r: s.get_dispatches(r),
    "get_run_control": lambda s, r: s.get_run_control(r),
    "get_waiters": lambda s, r: s.get_waiters(r),
    "get_buffered_signals": lambda s, r: s.get_buffered_signals(r),
    "get_run_events": lambda s, r: s.get_run_events(r),
    "get_outputs": lambda s, r: s.get_outputs(r),
    "export_run": lambda s, r: s.export_run(r),
    "find_run_id_by_idempotency_key": lambda s, r: s.find_run_id_by_idempotency_key(FLOW, "t", "k"),
    "get_runs": lambda s, r: s.get_runs(take=5),
    "get_active_runs": lambda s, r: s.get_active_runs(take=5),
    "get_stalled_steps": lambda s, r: s.get_stalled_steps(),
    "get_runs_to_stop": lambda s, r: s.get_runs_to_stop(),
    "get_queues": lambda s, r: s.get_queues(),
    "get_statistics": lambda s, r: s.get_statistics(),
    "get_run_timeseries": lambda s, r: s.get_run_timeseries("day", NOW - YEAR, NOW),
    "get_run_controls": lambda s, r: s.get_run_controls([r]),
    "get_claimed_step_keys": lambda s, r: s.get_claimed_step_keys(r),
    "get_dispatched_step_keys": lambda s, r: s.get_dispatched_step_keys(r),
    "get_waiter": lambda s, r: s.get_waiter(r, "waiting"),
    "get_output": lambda s, r: s.get_output(r, "saved"),
    "get_derived_runs": lambda s, r: s.get_derived_runs(r),
    "get_runs_page": lambda s, r: s.get_runs_page(search="orders", take=5),
}

ALL_CALLS: dict[str, Call] = {**CALLS, **READS, "cleanup": lambda s, r: s.cleanup(NOW - YEAR)}

TABLES = """
SELECT c.oid, c.relname::text AS name,
       EXISTS (SELECT FROM pg_constraint k
               JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (k.conkey)
               WHERE k.conrelid = c.oid AND k.contype = 'p' AND a.attname = 'run_id') AS by_run
FROM pg_class c WHERE c.relnamespace = $1::text::regnamespace AND c.relkind = 'r' ORDER BY c.relname
"""
TRIGGERS = "SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE tgrelid = $1 AND NOT tgisinternal"
EXPLAIN = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_nested_statements": "on",
    "auto_explain.log_format": "json",
    # The plans of large tables.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
}


@dataclass(frozen=True, slots=True)
class Touched:
    """What the statements of one call scanned and changed."""

    is_spread: bool
    """Whether they scanned more than one shard."""
    others: frozenset[str]
    """Tables of the store that are not sharded."""


async def shard(connection: asyncpg.Connection) -> frozenset[str]:
    """Partition the tables by run_id; returns the names of those whose primary key does not contain it."""
    await connection.execute(f"SET search_path = {SCHEMA}")
    others = set()
    for oid, name, by_run in await connection.fetch(TABLES, SCHEMA):
        if not by_run:
            others.add(name)
            continue
        triggers = [row[0] for row in await connection.fetch(TRIGGERS, oid)]
        await connection.execute(f"""
            ALTER TABLE {name} RENAME TO {name}_whole;
            CREATE TABLE {name} (LIKE {name}_whole INCLUDING ALL EXCLUDING STORAGE) PARTITION BY HASH (run_id)
        """)
        for number in range(SHARDS):
            await connection.execute(
                f"CREATE TABLE {name}_shard{number} PARTITION OF {name} "
                f"FOR VALUES WITH (MODULUS {SHARDS}, REMAINDER {number})"
            )
        await connection.execute(f"DROP TABLE {name}_whole")
        for trigger in triggers:
            await connection.execute(trigger.replace(f"{name}_whole", name))
    return frozenset(others)


def touched(log: str, others: frozenset[str]) -> Touched:
    """Read the plans in a part of the server's log."""
    shards, found = set(), set()
    for match in PLAN.finditer(log):
        plan = json.loads("".join(line[1:] for line in match[1].splitlines(keepends=True)))["Plan"]
        for node in _nodes(plan):
            name = node.get("Relation Name", "")
            if not node["Actual Loops"]:
                continue
            if is_shard := SHARD.match(name):
                shards.add(int(is_shard[2]))
            elif name in others:
                found.add(name)
    return Touched(len(shards) > 1, frozenset(found))


def _nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", ()):
        yield from _nodes(child)


async def simulate() -> dict[str, Touched]:
    """Call every operation on a sharded store, one at a time."""
    cluster = Cluster()
    try:
        connection = await asyncpg.connect(cluster.url)
        url = f"{cluster.url}&schema={SCHEMA}"
        async with open_store(url):
            pass
        others = await shard(connection)
        for name, value in EXPLAIN.items():
            await connection.execute(f"ALTER DATABASE postgres SET {name} = '{value}'")
        log = Path(await connection.fetchval("SHOW data_directory")) / "log"
        found = {}
        async with open_store(f"{url}&migrate=false", clock=VirtualClock()) as store:
            for name, call in ALL_CALLS.items():
                run_id = uuid4()
                await prepare_run(store, run_id)
                start = log.stat().st_size
                await call(store, run_id)
                found[name] = touched(_since(log, start), others)
        await connection.close()
        return found
    finally:
        cluster.stop()


def _since(log: Path, start: int) -> str:
    with log.open(encoding="utf-8") as file:
        file.seek(start)
        return file.read()


def operation_of(call: str) -> str:
    """The operation of a call, such as "retry_step with a dispatch"."""
    return call.partition(" ")[0]


def render(found: Mapping[str, Touched]) -> str:
    """The operations by what they touch, as a Markdown table."""
    operations: dict[str, Touched] = {}
    for name, what in found.items():
        known = operations.get(operation_of(name), Touched(is_spread=False, others=frozenset()))
        operations[operation_of(name)] = Touched(
            known.is_spread or what.is_spread, known.others | what.others - {NOTES}
        )
    groups: dict[tuple[bool, tuple[str, ...]], list[str]] = {}
    for name, what in operations.items():
        groups.setdefault((what.is_spread, tuple(sorted(what.others))), []).append(name)
    lines = ["| operations | shards of the run's tables | other tables |", "|---|---|---|"]
    for (is_spread, others), names in sorted(groups.items(), key=lambda group: group[0]):
        lines.append(f"| {', '.join(names)} | {'all' if is_spread else 'one'} | {', '.join(others)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sharding", description=__doc__)
    parser.add_argument("--publish", action="store_true", help="write the table into docs/scaling.md")
    arguments = parser.parse_args()
    table = render(asyncio.run(simulate()))
    if arguments.publish:
        before, _, after = split(PAGE.read_text(encoding="utf-8"))
        PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}", encoding="utf-8")
    else:
        sys.stdout.write(f"{table}\n")


def split(page: str) -> tuple[str, str, str]:
    """The page before the table, the table, and the page after it."""
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no markers {BEGIN} ... {END}")
    return before, table.strip("\n"), after


if __name__ == "__main__":
    main()
