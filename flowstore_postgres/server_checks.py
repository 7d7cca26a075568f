"""Findings from the facts about a PostgreSQL server: one function for each concern, without a connection."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime

from flowstore_core.diagnostics import Diagnostic, Severity
from flowstore_postgres.session_settings import PINNED

MIN_VERSION = 140000
"""Timeseries use date_bin, which PostgreSQL 14 introduced."""
# The end of the PostgreSQL project's support for each major version.
END_OF_LIFE = {
    14: date(2026, 11, 12),
    15: date(2027, 11, 11),
    16: date(2028, 11, 9),
    17: date(2029, 11, 8),
    18: date(2030, 11, 14),
}
SKEW_SECONDS = 1.0
LONG_TRANSACTION_SECONDS = 3600


@dataclass(frozen=True, slots=True)
class ServerParameter:
    """A server parameter as it applies to a new connection, and its source."""

    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """The facts about a server that the checks use."""

    parameters: Mapping[str, ServerParameter]
    replica: bool
    version: int
    version_text: str
    role: str
    database: str
    superuser: bool
    role_limit: int
    database_limit: int
    connections: int
    connections_of_role: int
    oldest_transaction: float | None
    skew: float
    """The server's clock minus this machine's, in seconds."""
    skew_error: float
    pooled: bool
    pool_size: int
    pgbouncer: bool
    psql_options: tuple[str, ...]
    """The options of psql for the database."""

    def value(self, name: str, default: str = "") -> str:
        parameter = self.parameters.get(name)
        return default if parameter is None else parameter.value

    def number(self, name: str) -> int:
        return int(self.value(name, "0"))


def check_server(facts: ServerFacts, today: date | None = None) -> Iterator[Diagnostic]:
    """Every finding that follows from the facts."""
    yield from check_replica(facts)
    yield from check_durability(facts)
    yield from check_defaults(facts)
    yield from check_version(facts, today or datetime.now(UTC).date())
    yield from check_connections(facts)
    yield from check_pooler(facts)
    yield from check_timeouts(facts)
    yield from check_vacuum(facts)
    yield from check_clock(facts)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def psql(facts: ServerFacts, *statements: str) -> str:
    """A shell command for an administrator of the server."""
    return shlex.join(["psql", *facts.psql_options, *(part for one in statements for part in ("-c", one))])


def _reset(facts: ServerFacts, name: str, value: str) -> str:
    """The command that resets a parameter at its source."""
    return psql(facts, *_reset_statements(facts, name, value))


def _reset_statements(facts: ServerFacts, name: str, value: str) -> tuple[str, ...]:
    source = facts.parameters[name].source
    role, database = _quote(facts.role), _quote(facts.database)
    if source == "user":
        return (f"ALTER ROLE {role} RESET {name}",)
    if source == "database":
        return (f"ALTER DATABASE {database} RESET {name}",)
    if source == "database user":
        return (f"ALTER ROLE {role} IN DATABASE {database} RESET {name}",)
    return (f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")


def check_replica(facts: ServerFacts) -> Iterator[Diagnostic]:
    if facts.replica:
        yield Diagnostic(
            code="replica",
            severity=Severity.ERROR,
            summary="the server is a replica",
            meaning="Its data is out of date and it refuses writes. No decision may be based on it.",
            remedy="name all hosts in the URL and add target_session_attrs=read-write to its query",
        )
    elif facts.pgbouncer and facts.value("default_transaction_read_only") == "on":
        yield Diagnostic(
            code="read-only",
            severity=Severity.ERROR,
            summary="transactions are read-only by default (default_transaction_read_only)",
            meaning="Every write fails.",
            remedy=_reset(facts, "default_transaction_read_only", "off"),
        )


def check_durability(facts: ServerFacts) -> Iterator[Diagnostic]:
    if facts.value("fsync") == "off":
        yield Diagnostic(
            code="fsync-off",
            severity=Severity.ERROR,
            summary="fsync is off",
            meaning="When the server's machine stops, acknowledged writes may be lost or damaged.",
            remedy=_reset(facts, "fsync", "on"),
        )
    if facts.value("full_page_writes") == "off":
        yield Diagnostic(
            code="full-page-writes-off",
            severity=Severity.ERROR,
            summary="full_page_writes is off",
            meaning="A page that was partly written when the machine stopped stays damaged, unless the file "
            "system writes pages atomically.",
            remedy=_reset(facts, "full_page_writes", "on"),
        )
    commit = facts.value("synchronous_commit")
    if commit == "off" and facts.pgbouncer:
        yield Diagnostic(
            code="synchronous-commit-off",
            severity=Severity.ERROR,
            summary="synchronous_commit is off for this role and database",
            meaning="A crash of the server would lose acknowledged claims, results and signals. "
            "Behind a pooler flowstore cannot turn it on, and refuses to open the store.",
            remedy=_reset(facts, "synchronous_commit", "on"),
        )
    elif commit == "local" and facts.value("synchronous_standby_names"):
        yield Diagnostic(
            code="synchronous-commit-local",
            severity=Severity.WARNING,
            summary="synchronous_commit is local, though there are synchronous standbys",
            meaning="A failover may lose acknowledged writes.",
            remedy=_reset(facts, "synchronous_commit", "on"),
        )


# The effects of defaults that flowstore cannot override behind a pooler.
HARMFUL_DEFAULTS = {
    "default_transaction_isolation": "Concurrent calls on a run are retried and several times slower. "
    "Counters are never folded, so pages get slower with each run.",
    "lock_timeout": "Calls that wait for a lock are retried, and fail while their run or step is busy.",
    "gin_fuzzy_search_limit": "Searches omit runs.",
}


def check_defaults(facts: ServerFacts) -> Iterator[Diagnostic]:
    """Harmful defaults of the server, the database or the role."""
    if facts.value("session_replication_role") == "replica":
        yield Diagnostic(
            code="triggers-off",
            severity=Severity.ERROR,
            summary="session_replication_role is replica for this role and database",
            meaning="Triggers do not run, so counts and pages would be wrong. flowstore cannot change it, "
            "and refuses to open the store.",
            remedy=_reset(facts, "session_replication_role", "origin"),
        )
    if facts.pgbouncer:
        for name, meaning in HARMFUL_DEFAULTS.items():
            if (value := facts.value(name, PINNED[name])) != PINNED[name]:
                yield Diagnostic(
                    code="harmful-default",
                    severity=Severity.WARNING,
                    summary=f"{name} is {value} by default",
                    meaning=f"{meaning} Behind a pooler flowstore cannot set it itself.",
                    remedy=_reset(facts, name, PINNED[name]),
                )
        return
    harmful = [
        name
        for name in (*HARMFUL_DEFAULTS, "default_transaction_read_only")
        if facts.value(name, PINNED[name]) != PINNED[name]
    ]
    if facts.value("synchronous_commit") == "off":
        harmful.append("synchronous_commit")
    if harmful:
        yield Diagnostic(
            code="defaults-overridden",
            severity=Severity.NOTE,
            summary="flowstore overrides harmful defaults: "
            + ", ".join(f"{name} = {facts.value(name)}" for name in harmful),
            meaning="flowstore's connections are safe. Other programs on the same tables use these defaults, "
            "and so would flowstore behind a pooler.",
            remedy=psql(
                facts,
                *dict.fromkeys(
                    statement
                    for name in harmful
                    for statement in _reset_statements(facts, name, PINNED.get(name, "on"))
                ),
            ),
        )


def check_version(facts: ServerFacts, today: date) -> Iterator[Diagnostic]:
    major = facts.version // 10000
    remedy = "upgrade the server: https://www.postgresql.org/docs/current/upgrading.html"
    end = END_OF_LIFE.get(major)
    if facts.version < MIN_VERSION:
        yield Diagnostic(
            code="server-too-old",
            severity=Severity.ERROR,
            summary=f"the server is PostgreSQL {facts.version_text}",
            meaning="flowstore needs 14 or newer.",
            remedy=remedy,
        )
    elif end is not None and end <= today:
        yield Diagnostic(
            code="server-old",
            severity=Severity.WARNING,
            summary=f"the server is PostgreSQL {facts.version_text}",
            meaning=f"End of life since {end}: it receives no fixes, not even for data loss.",
            remedy=remedy,
        )


@dataclass(frozen=True, slots=True)
class ConnectionLimit:
    """A limit of the number of connections."""

    limit: int
    """-1: none."""
    free: int
    name: str
    remedy: str
    """The command that raises the limit."""


def connection_limits(facts: ServerFacts) -> Sequence[ConnectionLimit]:
    """The limits of the server and, unless the role is a superuser, of the role and the database."""
    reserved = 0
    if not facts.superuser:
        reserved = facts.number("superuser_reserved_connections") + facts.number("reserved_connections")
    limits = [
        (
            facts.number("max_connections") - reserved,
            facts.connections,
            "max_connections of the server, minus the reserved connections",
            psql(facts, "ALTER SYSTEM SET max_connections = 200") + ", then restart the server",
        )
    ]
    if not facts.superuser:
        role, database = _quote(facts.role), _quote(facts.database)
        limits += [
            (
                facts.role_limit,
                facts.connections_of_role,
                "the connection limit of the role",
                psql(facts, f"ALTER ROLE {role} CONNECTION LIMIT -1"),
            ),
            (
                facts.database_limit,
                facts.connections,
                "the connection limit of the database",
                psql(facts, f"ALTER DATABASE {database} CONNECTION LIMIT -1"),
            ),
        ]
    return [
        ConnectionLimit(limit, max(limit - used, 0), name, remedy) for limit, used, name, remedy in limits
    ]


def check_connections(facts: ServerFacts) -> Iterator[Diagnostic]:
    for one in connection_limits(facts):
        if one.limit >= 0 and facts.pool_size > one.free:
            yield Diagnostic(
                code="connections-scarce",
                severity=Severity.WARNING,
                summary=f"pool_size is {facts.pool_size}, and {one.free} of {one.limit} connections are free",
                meaning=f"The limit is {one.name}. Beyond it connections are refused, and calls wait.",
                remedy=f"{one.remedy}; or add pool_size={max(one.free // 2, 1)} to the URL's query",
            )
            return


def check_pooler(facts: ServerFacts) -> Iterator[Diagnostic]:
    if facts.pooled and not facts.pgbouncer:
        yield Diagnostic(
            code="pooler-undeclared",
            severity=Severity.ERROR,
            summary="the URL leads to a transaction pooler, but lacks pgbouncer=true",
            meaning="Statements of one connection reach several server processes: prepared statements and "
            "settings and notifications get lost.",
            remedy="add pgbouncer=true to the URL's query",
        )
    if facts.pgbouncer:
        role = _quote(facts.role)
        missing = [
            name
            for name in ("statement_timeout", "idle_in_transaction_session_timeout")
            if not facts.number(name)
        ]
        if missing:
            statements = [f"ALTER ROLE {role} SET {name} = 30000" for name in missing]
            yield Diagnostic(
                code="no-time-outs",
                severity=Severity.WARNING,
                summary=f"{' and '.join(missing)} not set for the role",
                meaning="Behind a pooler flowstore cannot set them itself. Without them a vanished client "
                "can hold its locks without limit.",
                remedy=psql(facts, *statements),
            )
        schemas = {name.strip(' "') for name in facts.value("search_path").split(",")}
        if schemas - {"pg_catalog", "pg_temp"}:
            yield Diagnostic(
                code="search-path",
                severity=Severity.NOTE,
                summary=f"search_path is {facts.value('search_path')} for the role",
                meaning="Behind a pooler flowstore cannot set it itself. An operator or a function that "
                "another role creates in one of these schemas can shadow the server's own.",
                remedy=psql(facts, f"ALTER ROLE {role} SET search_path = {PINNED['search_path']}"),
            )


def check_timeouts(facts: ServerFacts) -> Iterator[Diagnostic]:
    for name, target in (
        ("idle_session_timeout", "idle connections of the pooler"),
        (
            "transaction_timeout",
            "transactions, including those of cleanup and migrations"
            if facts.pgbouncer
            else "long migrations",
        ),
    ):
        # Without a pooler the store turns both off on its own connections.
        if facts.number(name) and (facts.pgbouncer or name == "transaction_timeout"):
            yield Diagnostic(
                code=name.replace("_", "-"),
                severity=Severity.NOTE,
                summary=f"{name} is {facts.number(name):,} ms",
                meaning=f"The server ends {target}. Calls are retried, and take longer.",
                remedy=_reset(facts, name, "0"),
            )


def check_vacuum(facts: ServerFacts) -> Iterator[Diagnostic]:
    if facts.value("autovacuum") == "off":
        yield Diagnostic(
            code="autovacuum-off",
            severity=Severity.WARNING,
            summary="autovacuum is off",
            meaning="Tables and indexes grow without limit, and every call gets slower.",
            remedy=_reset(facts, "autovacuum", "on"),
        )
    oldest = facts.oldest_transaction
    if oldest is not None and oldest > LONG_TRANSACTION_SECONDS:
        yield Diagnostic(
            code="long-transaction",
            severity=Severity.WARNING,
            summary=f"a transaction has been open for {oldest / 3600:.1f} hours in this database",
            meaning="While it is open, deleted and changed rows cannot be vacuumed.",
            remedy=psql(
                facts,
                "SELECT pid, usename, state, xact_start FROM pg_stat_activity ORDER BY xact_start LIMIT 5",
            ),
        )


def check_clock(facts: ServerFacts) -> Iterator[Diagnostic]:
    if abs(facts.skew) - facts.skew_error > SKEW_SECONDS:
        yield Diagnostic(
            code="clock-skew",
            severity=Severity.WARNING,
            summary=f"the server's clock is {abs(facts.skew):.1f} s "
            f"{'ahead of' if facts.skew > 0 else 'behind'} this machine's",
            meaning="Leases are safe: they use only the server's clock. Times from this machine's clock, "
            "such as as_of, due_at, timeout_at and the cutoff of cleanup, are off by as much.",
            remedy="timedatectl set-ntp true (on the machine that is off)",
        )
