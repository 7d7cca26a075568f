"""Opening a server, what ``flowstore ping`` and ``flowstore doctor`` say about it, deleting a prefix."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

from flowstore_core import ConfigurationError, StoreConfig, StoreUnavailableError
from flowstore_core.backend import Diagnostic, Severity
from flowstore_documents import MaybeApplied, NotApplied, clear_keys
from flowstore_redis.connection import Connection
from flowstore_redis.server import ServerFacts, check_server
from flowstore_redis.settings import read_settings
from flowstore_redis.space import RedisSpace

MAX_LEAD = timedelta(seconds=10)
"""How far the clock of a store may be ahead of the server's, before the doctor reports it."""


async def connect(connection: Connection) -> ServerFacts:
    """Connect once.

    Raises ConfigurationError for a server that no store can use, and StoreUnavailableError.
    """
    try:
        await connection.send("PING")
    except NotApplied as error:
        if connection.facts is not None and connection.facts.problem is not None:
            raise ConfigurationError(connection.facts.problem) from None
        raise StoreUnavailableError(error.reason) from None
    except MaybeApplied:
        raise StoreUnavailableError("Redis has not answered") from None
    assert connection.facts is not None
    return connection.facts


@asynccontextmanager
async def _space(config: StoreConfig) -> AsyncIterator[tuple[RedisSpace, ServerFacts]]:
    """A space and its server, usable or not. Raises StoreUnavailableError without one."""
    space = RedisSpace(read_settings(config))
    try:
        try:
            facts = await connect(space.connection)
        except (ConfigurationError, StoreUnavailableError):
            if space.connection.facts is None:
                raise
            facts = space.connection.facts
        yield space, facts
    finally:
        await space.aclose()


async def describe(config: StoreConfig) -> Mapping[str, str]:
    """The version of the server, its memory, and what a crash can lose."""
    async with _space(config) as (_, facts):
        found = {"server": facts.version, "memory": facts.memory, "durability": facts.durability}
        if facts.replicas:
            found["fail-over"] = f"loses acknowledged writes (replicas: {facts.replicas}, asynchronous)"
        return found


async def diagnose(config: StoreConfig) -> Sequence[Diagnostic]:
    """Check the settings of the server, its memory and its clock."""
    async with _space(config) as (space, facts):
        found = [*check_server(facts)]
        if facts.problem is None and not facts.is_replica:
            lead = await space.clock_lead()
            if lead > MAX_LEAD:
                found.append(
                    Diagnostic(
                        code="clock-set-back",
                        severity=Severity.WARNING,
                        summary=f"the clock of the server was set back by {lead.total_seconds():,.0f} s",
                        meaning="The time of the store stands still until the server's clock is there again: "
                        "leases and deadlines end that much later.",
                        remedy="wait, or stop all stores and delete the key PREFIX:clock",
                    )
                )
        return found


async def delete_all(config: StoreConfig, *, clears: bool = False) -> None:
    """Delete every key of a store; with ``clears``, only those that open stores do not need."""
    async with _space(config) as (space, _):
        if clears:
            await clear_keys(space)
            return
        try:
            await space.delete_all()
        except (NotApplied, MaybeApplied) as error:
            raise StoreUnavailableError(f"the prefix was not deleted: {error or 'no answer'}") from None
