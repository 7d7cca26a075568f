"""Crashes and restarts of PostgreSQL while clients work: no acknowledged write is lost."""

from __future__ import annotations

from flowstore_chaos.context import RunContext
from flowstore_chaos.outage import run_clients_through
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server_crashes import KINDS, crash
from flowstore_core import open_store

# With asynchronous commits a crash loses acknowledged writes. Set by triggers, because the store sets
# synchronous_commit for its sessions.
COMMIT_ASYNCHRONOUSLY = """
CREATE FUNCTION chaos.commit_asynchronously() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    RETURN NULL;
END $$;
DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT table_name FROM information_schema.tables WHERE table_schema = 'chaos' LOOP
        EXECUTE format('CREATE TRIGGER commit_asynchronously AFTER INSERT OR UPDATE ON chaos.%I'
                       ' FOR EACH STATEMENT EXECUTE FUNCTION chaos.commit_asynchronously()', name);
    END LOOP;
END $$
"""


async def run(context: RunContext) -> None:
    async with context.server({}) as server:
        if context.is_mutant:
            async with open_store(server.url(schema="chaos")):
                await server.psql(COMMIT_ASYNCHRONOUSLY)

        async def outage() -> str | None:
            # Each kind once first, so that short rows cover all.
            injected = context.counts.injected
            kind = KINDS[injected] if injected < len(KINDS) else context.rng.choice(KINDS)
            return kind if await crash(server, kind, context.rng) else None

        await run_clients_through(context, server.url(schema="chaos"), outage)


SCENARIO = FaultScenario(
    number=5,
    name="server-kills",
    fault="SIGKILL and immediate stop of PostgreSQL while clients work, and restart",
    unit="crashes",
    planned=50,
    min_faults=3,
    backends=("postgresql",),
    pass_criterion="no acknowledged write is lost, and clients continue with their open stores",
    mutant="synchronous_commit=off",
    minutes=8,
    run=run,
)
