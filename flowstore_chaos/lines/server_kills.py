"""A PostgreSQL server that dies under its clients and comes back: they carry on, and nothing is gone."""

from __future__ import annotations

from flowstore_chaos.crashes import KINDS, crash
from flowstore_chaos.line import Line
from flowstore_chaos.outages import work_through
from flowstore_chaos.trial import Trial


async def run(trial: Trial) -> None:
    # A crash then forgets commits that were acknowledged.
    settings = {"synchronous_commit": "off"} if trial.broken else {}
    async with trial.server(settings) as server:

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
