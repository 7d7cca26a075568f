"""The plugin for PostgreSQL; the driver is imported only when a store is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.backend import FaultInjector, OutageInjector
from flowstore_core.diagnostics import Diagnostic
from flowstore_core.urls import parse_url
from flowstore_postgres.driver_options import DRIVER_OPTIONS

STORE_OPTIONS = frozenset(
    {
        "acquire_timeout",
        "connect_timeout",
        "pgbouncer",
        "pool_size",
        "retry_timeout",
        "schema",
        "statement_timeout",
    }
)


class PostgresBackend:
    """The descriptor of the PostgreSQL backend."""

    name = "postgresql"
    schemes = frozenset({"postgresql", "postgres"})
    capabilities = frozenset(Capability)
    max_skew = timedelta(0)
    """The clock is the server's: those of the processes do not matter (CLK-1)."""
    options = DRIVER_OPTIONS | STORE_OPTIONS
    contract_version = 1
    drivers = ("asyncpg",)

    def open(self, config: StoreConfig) -> AbstractAsyncContextManager[Any]:
        from flowstore_postgres.open import StoreContext

        return StoreContext(config)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        from flowstore_postgres.migrate import scratch_schema

        async with scratch_schema(url) as fresh:
            yield fresh

    async def clear_scratch(self, url: str) -> None:
        from flowstore_postgres.migrate import clear_schema

        await clear_schema(url)

    def variants(self, url: str) -> Mapping[str, str]:
        """A pool of one connection, and the statements used behind PgBouncer.

        Behind PgBouncer the store waits until a lost statement has expired; the short statement_timeout keeps
        the checks of lost and cancelled calls short.
        """
        parts = parse_url(url)
        return {
            name: parts.with_more_options(options)
            for name, options in (
                ("pool of one", {"pool_size": "1"}),
                ("pgbouncer", {"pgbouncer": "true", "statement_timeout": "2"}),
            )
        }

    @asynccontextmanager
    async def inject_faults(self, url: str) -> AsyncIterator[FaultInjector]:
        """Route the requests of the stores at the injector's URL through a proxy in this process."""
        from flowstore_postgres.fault_injection import inject_faults

        async with inject_faults(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_outages(self, url: str) -> AsyncIterator[OutageInjector]:
        """Lock every row, or silence a proxy between the stores and the server."""
        from flowstore_postgres.fault_injection import inject_outages

        async with inject_outages(url) as injector:
            yield injector

    @asynccontextmanager
    async def adjust_schema_version(self, url: str, difference: int) -> AsyncIterator[None]:
        from flowstore_postgres.migrate import adjust_version

        async with adjust_version(url, difference):
            yield

    def earlier_schema_versions(self) -> Sequence[int]:
        from flowstore_postgres.migrate import read_migrations

        return [one.number for one in read_migrations()[:-1]]

    async def revert_schema(self, url: str, version: int) -> None:
        from flowstore_postgres.migrate import revert_schema

        await revert_schema(url, version)

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        """Every migration in order, as (number, name, script); the script applies and records it."""
        from flowstore_postgres.migrate import migration_scripts

        return migration_scripts(config)

    async def schema_version(self, config: StoreConfig) -> int:
        """The version of the URL's schema; 0 if there is none. Changes nothing."""
        from flowstore_postgres.migrate import read_schema_version

        return await read_schema_version(config)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """Whether searches use an index."""
        from flowstore_postgres.migrate import has_search_index

        indexed = await has_search_index(config)
        return {
            "search": "by index (pg_trgm)"
            if indexed
            else "reads every run; CREATE EXTENSION pg_trgm, then flowstore migrate up, makes it quick"
        }

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """Check the server, its settings and its clock, and find orphaned rows and wrong counters."""
        from flowstore_postgres.diagnosis import diagnose

        return await diagnose(config, thorough=thorough)

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        """Delete orphans, fold changes and correct counters, as ``findings`` names them."""
        from flowstore_postgres.diagnosis import fix

        return await fix(config, findings)

    async def migrate(self, config: StoreConfig) -> int:
        """Apply the missing migrations and return the version reached."""
        from flowstore_postgres.migrate import migrate_schema

        return await migrate_schema(config)


@hookimpl
def flowstore_backends() -> list[Backend]:
    return [PostgresBackend()]
