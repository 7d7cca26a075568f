"""A PostgreSQL server that dies under its clients and comes back: they carry on, and nothing is gone."""

from __future__ import annotations

from flowstore_chaos.crashes import KINDS, crash
from flowstore_chaos.line import Line
from flowstore_chaos.outages import work_through
from flowstore_chaos.trial import Trial
from flowstore_core import open_store

# A crash then forgets commits that were acknowledged. By triggers: the store sets it for its sessions.
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


async def run(trial: Trial) -> None:
    async with trial.server({}) as server:
        if trial.broken:
            async with open_store(server.url(schema="chaos")):
                await server.psql(COMMIT_ASYNCHRONOUSLY)

        async def outage() -> str | None:
            # Each in turn at first, so that small rows meet all.
            landed = trial.tally.landed
            kind = KINDS[landed] if landed < len(KINDS) else trial.rng.choice(KINDS)
            return kind if await crash(server, kind, trial.rng) else None

        await work_through(trial, server.url(schema="chaos"), outage)


LINE = Line(
    number=5,
    name="server-kills",
    fault="SIGKILL and immediate stop of PostgreSQL while clients work, and restart",
    unit="crashes",
    planned=50,
    least=3,
    backends=("postgresql",),
    passes_when="everything acknowledged is there, and the clients carry on with the stores they have",
    broken="synchronous_commit=off",
    minutes=8,
    run=run,
)
