"""Faults of the PostgreSQL schema and its migrations."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from flowstore_core import SchemaVersionError, open_store
from flowstore_postgres.migrate import LOCK_SCHEMA, read_migrations
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import (
    connection,
    create_old_schema,
    outcome,
    outcomes,
    schema_of,
    wait_until_blocked,
)
from tests.virtual_clock import VirtualClock

MIGRATE = "flowstore_postgres/migrate.py"
TABLES = "flowstore_postgres/migrations/0001_runs.sql"
SUMMARIES = "flowstore_postgres/migrations/0002_summaries.sql"
INDEX = "flowstore_postgres/migrations/0003_search.sql"
CLAIM_CALLS = "flowstore_postgres/migrations/0006_claim_calls.sql"
RUNS = "flowstore_postgres/runs.py"
EVENTS = "flowstore_postgres/events.py"

INSERT_RUN = """
INSERT INTO runs (run_id, flow_id, flow_name, status, trigger_key, started_at, completed_at, start_token)
VALUES (gen_random_uuid(), $1, 'orders', $2, 'manual', now(), CASE $2 WHEN 'Running' THEN NULL ELSE now() END,
        gen_random_uuid())
"""


async def _open(url: str, **options: Any) -> None:
    async with open_store(url, **options) as store:
        await store.ping()


# Migrations


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6",),
    changes=[(MIGRATE, "        if found < one.number", "        if max(found, 1) <= one.number")],
)
async def last_migration_is_applied_again(url: str) -> None:
    """Opening an older schema applies its last migration again, which fails."""
    async with connection(url) as other:
        await create_old_schema(url, other, 5)
    assert await outcome(_open(url)) is None, "an older schema cannot be opened"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            MIGRATE,
            "    if works_from > needed:\n"
            '        raise SchemaVersionError(found, needed, "install a newer flowstore")\n'
            "    if found >= needed:\n",
            "    if found >= needed:\n",
        )
    ],
)
async def newer_schema_is_opened(url: str) -> None:
    """A schema that is too new for the code is opened."""
    await _open(url)
    async with connection(url) as other:
        await other.execute("INSERT INTO schema_version (version, name, works_from) VALUES (99, 'new', 99)")
    assert await outcome(_open(url)) is SchemaVersionError, "a newer schema is opened"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            MIGRATE,
            "    if not migrate:\n        raise SchemaVersionError(",
            "    if not migrate and not found:\n        raise SchemaVersionError(",
        )
    ],
)
async def older_schema_is_migrated_without_leave(url: str) -> None:
    """With migrate=False an older schema is migrated all the same."""
    async with connection(url) as other:
        await create_old_schema(url, other, 5)
        opened = await outcome(_open(url, migrate=False))
        assert opened is SchemaVersionError, "the older schema was migrated"


async def _open_during_a_migration(url: str) -> None:
    """Open a store while another one migrates the schema."""
    async with connection(url) as other:
        async with other.transaction():
            await other.execute(LOCK_SCHEMA.replace("$1", f"'{schema_of(url)}'"))
            await create_old_schema(url, other, read_migrations()[-1].number)
            opening = asyncio.ensure_future(outcome(_open(url)))
            await wait_until_blocked(url, other, opening)
        assert await opening is None, "the schema was migrated twice"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6",),
    changes=[(MIGRATE, "    await connection.fetchval(LOCK_SCHEMA, settings.schema)\n", "")],
)
async def migrations_take_no_lock(url: str) -> None:
    """Two stores that open an empty schema at once migrate it at once, and one fails."""
    await _open_during_a_migration(url)


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6",),
    changes=[
        (
            MIGRATE,
            "    await connection.fetchval(LOCK_SCHEMA, settings.schema)\n",
            "    version = await read_version(connection, settings)\n"
            "    await connection.fetchval(LOCK_SCHEMA, settings.schema)\n",
        ),
        (
            MIGRATE,
            "wait for the lock.\n    found, works_from = await read_version(connection, settings)\n",
            "wait for the lock.\n    found, works_from = version\n",
        ),
    ],
)
async def version_is_read_before_the_lock(url: str) -> None:
    """A store that waits for another one's migration migrates the schema again."""
    await _open_during_a_migration(url)


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6", "QRY-1", "QRY-3", "QRY-4"),
    changes=[
        (
            SUMMARIES,
            "FROM {schema}.runs GROUP BY 1, 2, 3, 4;",
            "FROM {schema}.runs WHERE completed_at IS NOT NULL GROUP BY 1, 2, 3, 4;",
        )
    ],
)
async def migration_does_not_count_running_runs(url: str) -> None:
    """Migrating a schema without counters counts only the ended runs."""
    async with connection(url) as other:
        await create_old_schema(url, other, 1)
        await other.execute(INSERT_RUN, FLOW, "Running")
    async with open_store(url) as store:
        assert (await store.get_statistics()).active_runs == 1, "a stored run is not counted"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6", "QRY-1", "QRY-3", "QRY-4"),
    changes=[
        (SUMMARIES, "       count(*)\nFROM {schema}.runs GROUP BY", "       1\nFROM {schema}.runs GROUP BY")
    ],
)
async def migration_counts_runs_of_one_day_once(url: str) -> None:
    """Migrating a schema without counters counts all runs of a flow, a day and a status as one."""
    async with connection(url) as other:
        await create_old_schema(url, other, 1)
        for _ in range(2):
            await other.execute(INSERT_RUN, FLOW, "Running")
    async with open_store(url) as store:
        assert (await store.get_runs_page()).total_count == 2, "a stored run is not counted"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6", "QRY-1", "QRY-3", "QRY-4"),
    changes=[
        (
            CLAIM_CALLS,
            "ALTER TABLE {schema}.steps ADD COLUMN claim_call bigint;\n",
            "ALTER TABLE {schema}.steps ADD COLUMN claim_call bigint;\n"
            "INSERT INTO {schema}.run_changes\n"
            "SELECT flow_id, (started_at AT TIME ZONE 'UTC')::date,\n"
            "       (completed_at AT TIME ZONE 'UTC')::date, status, count(*)\n"
            "FROM {schema}.runs GROUP BY 1, 2, 3, 4;\n",
        )
    ],
)
async def migration_counts_runs_again(url: str) -> None:
    """Migrating a schema that has counters counts its runs a second time."""
    async with connection(url) as other:
        await create_old_schema(url, other, 5)
        await other.execute(INSERT_RUN, FLOW, "Running")
    async with open_store(url) as store:
        assert (await store.get_runs_page()).total_count == 1, "a stored run is counted twice"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CON-6", "QRY-2"),
    changes=[
        (
            INDEX,
            "SELECT run_id FROM {schema}.runs WHERE status <> 'Running'\n    ON CONFLICT DO NOTHING;",
            "SELECT run_id FROM {schema}.runs WHERE status = 'Succeeded'\n    ON CONFLICT DO NOTHING;",
        )
    ],
)
async def migration_does_not_index_failed_runs(url: str) -> None:
    """After a migration to the index for searches, Failed and Cancelled runs are not found."""
    async with connection(url) as other:
        await create_old_schema(url, other, 2)
        await other.execute(INSERT_RUN, FLOW, "Failed")
    async with open_store(url) as store:
        assert (await store.get_runs_page(search="orders")).total_count == 1, "a stored run is not found"


# Columns and keys


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("IDM-1", "IDM-2", "CON-2"),
    changes=[
        (
            TABLES,
            "PRIMARY KEY (flow_id, trigger_key, idempotency_key)",
            "PRIMARY KEY (flow_id, idempotency_key)",
        )
    ],
    hangs=True,
)
async def idempotency_keys_of_two_triggers_collide(url: str) -> None:
    """An idempotency key that another trigger has registered can never be registered: the call hangs."""
    async with open_store(url) as store:
        for trigger in ("manual", "timer"):
            assert await store.try_register_idempotency_key(FLOW, trigger, "k", uuid4())


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-3", "CLM-1", "INP-3"),
    changes=[(TABLES, "    due_at           timestamptz,", "    due_at           timestamptz(3),")],
)
async def due_time_loses_its_microseconds(url: str) -> None:
    """The due_at of a dispatch is rounded to milliseconds."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        due_at = clock.now + timedelta(microseconds=1)
        await store.try_record_dispatch(run_id, "a", due_at=due_at)
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.due_at == due_at, "the due time was rounded"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("QRY-5", "RUN-2", "QRY-1"),
    changes=[(TABLES, "timestamptz,\n    source_run_id", "timestamptz(0),\n    source_run_id")],
)
async def end_of_a_run_loses_its_fraction(url: str) -> None:
    """The completed_at of a run is rounded to seconds."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.complete_run(run_id, "Succeeded")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.completed_at == clock.now, "the end of the run was rounded"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("INP-1", "SIG-1"),
    changes=[(TABLES, "    signal_name  text        NOT NULL,", "    signal_name  varchar(255) NOT NULL,")],
)
async def signal_name_has_255_characters(url: str) -> None:
    """A signal_name of 256 characters is refused by the database."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        registered = await outcome(store.register_waiter(run_id, "a", "s" * 256))
        assert registered is None, "a name of 256 characters is refused"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("INP-1", "CLM-7"),
    changes=[(TABLES, "    dispatch_job_id  text,", "    dispatch_job_id  varchar(512),")],
)
async def job_id_of_a_dispatch_has_512_characters(url: str) -> None:
    """annotate_dispatch loses a job id of more than 512 characters."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        await store.annotate_dispatch(run_id, "a", "j" * 1024)
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id == "j" * 1024, "the job id is lost"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("INP-2", "EVT-2"),
    changes=[
        (
            TABLES,
            "PRIMARY KEY (run_id, key)\n",
            "PRIMARY KEY (run_id, key),\n    UNIQUE (run_id, key, value_json)\n",
        ),
    ],
)
async def long_outputs_exceed_an_index(url: str) -> None:
    """An output that is too long for an index entry cannot be saved."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        value = "".join(str(UUID(int=n * 7919)) for n in range(10_000))
        assert await outcome(store.save_output(run_id, "k", value)) is None, "the output is refused"
        assert await store.get_output(run_id, "k") == value


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("QRY-6",),
    changes=[(RUNS, "r.run_id DESC LIMIT $1\n", "r.run_id DESC LIMIT coalesce($1, 1000)\n")],
)
async def active_runs_beyond_a_thousand_are_cut_off(url: str) -> None:
    """get_active_runs without ``take`` returns at most 1,000 runs."""
    async with open_store(url) as store:
        runs = [uuid4() for _ in range(1001)]
        for first in range(0, len(runs), 100):
            await outcomes([new_run(store, run_id=run_id) for run_id in runs[first : first + 100]])
        assert len(await store.get_active_runs()) == 1001, "active runs are missing"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("EVT-1",),
    changes=[(EVENTS, "ORDER BY sequence LIMIT $3", "ORDER BY sequence LIMIT least($3, 500)")],
)
async def events_beyond_five_hundred_are_cut_off(url: str) -> None:
    """get_run_events returns at most 500 events, whatever ``take`` is."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for _ in range(501):
            await store.append_event(run_id, "tick")
        assert len(await store.get_run_events(run_id, take=1000)) == 501, "events are missing"
