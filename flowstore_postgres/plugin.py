"""The plugin that brings PostgreSQL; the driver is imported only when a store is opened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.diagnostics import Diagnostic

# What libpq's URLs may carry and asyncpg understands; TLS options pass through (see docs).
DRIVER_OPTIONS = frozenset(
    {
        "application_name",
        "database",
        "dbname",
        "gsslib",
        "host",
        "krbsrvname",
        "passfile",
        "password",
        "port",
        "service",
        "servicefile",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "target_session_attrs",
        "user",
    }
)
DRIVER_WORDS = {
    "gsslib": ("gssapi", "sspi"),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
}
"""The allowed values of options that take one of a few words."""
DRIVER_VARIABLES = {
    "PGDATABASE": "database",
    "PGHOST": "host",
    "PGPASSFILE": "passfile",
    "PGPASSWORD": "password",
    "PGSERVICE": "service",
    "PGUSER": "user",
}
"""Environment variables of the driver, and the option that replaces each."""
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
    options = DRIVER_OPTIONS | STORE_OPTIONS
    contract_version = 1
    drivers = ("asyncpg",)

    def open(self, config: StoreConfig) -> AbstractAsyncContextManager[Any]:
        from flowstore_postgres.store import OpenPostgres

        return OpenPostgres(config)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        from flowstore_postgres.migrate import scratch_schema

        async with scratch_schema(url) as fresh:
            yield fresh

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        """Every migration as (number, name, a script that applies and records it), in order."""
        from flowstore_postgres.migrate import migration_scripts

        return migration_scripts(config)

    async def schema_version(self, config: StoreConfig) -> int:
        """The version of the schema that the URL names; 0 where there is none. Changes nothing."""
        from flowstore_postgres.migrate import read_schema_version

        return await read_schema_version(config)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """How searches find their runs."""
        from flowstore_postgres.migrate import has_search_index

        indexed = await has_search_index(config)
        return {
            "search": "by index (pg_trgm)"
            if indexed
            else "reads every run; CREATE EXTENSION pg_trgm, then flowstore migrate up, makes it quick"
        }

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """What is wrong with the server, its settings and its clock, rows without a run, and counters."""
        from flowstore_postgres.diagnosis import diagnose

        return await diagnose(config, thorough=thorough)

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        """Delete the rows without a run that were found, and correct the counters."""
        from flowstore_postgres.diagnosis import fix

        return await fix(config, findings)

    async def migrate(self, config: StoreConfig) -> int:
        """Apply what is missing and return the version reached."""
        from flowstore_postgres.migrate import migrate_schema

        return await migrate_schema(config)


@hookimpl
def flowstore_backends() -> list[Backend]:
    return [PostgresBackend()]
