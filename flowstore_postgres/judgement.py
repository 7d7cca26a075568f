"""What the facts about a PostgreSQL server mean: one function a concern, each without a connection."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime

from flowstore_core.diagnostics import Diagnostic, Severity
from flowstore_postgres.sessions import PINNED

OLDEST = 140000
"""Timeseries use date_bin, which PostgreSQL 14 introduced."""
# The day from which on the PostgreSQL project mends a major version no more.
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
class Setting:
    """A setting as it holds for our connection, and where it comes from."""

    value: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a server says of itself."""

    settings: Mapping[str, Setting]
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
    """Its clock minus this machine's, in seconds."""
    skew_error: float
    pooled: bool
    pool_size: int
    pgbouncer: bool
    place: tuple[str, ...]
    """psql's options that lead to the database."""

    def value(self, name: str, default: str = "") -> str:
        setting = self.settings.get(name)
        return default if setting is None else setting.value

    def number(self, name: str) -> int:
        return int(self.value(name, "0"))


def judge(facts: Facts, today: date | None = None) -> Iterator[Diagnostic]:
    """Every finding that follows from the facts."""
    yield from judge_role_of_server(facts)
    yield from judge_durability(facts)
    yield from judge_defaults(facts)
    yield from judge_version(facts, today or datetime.now(UTC).date())
    yield from judge_connections(facts)
    yield from judge_pooler(facts)
    yield from judge_time_outs(facts)
    yield from judge_housekeeping(facts)
    yield from judge_clock(facts)


def _quote(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _psql(facts: Facts, *statements: str) -> str:
    """A command for a shell, for somebody who may do that on the server."""
    return shlex.join(["psql", *facts.place, *(part for one in statements for part in ("-c", one))])


def _undo(facts: Facts, name: str, value: str) -> str:
    """The command that takes a setting back where it was made."""
    return _psql(facts, *_undoing(facts, name, value))


def _undoing(facts: Facts, name: str, value: str) -> tuple[str, ...]:
    source = facts.settings[name].source
    role, database = _quote(facts.role), _quote(facts.database)
    if source == "user":
        return (f"ALTER ROLE {role} RESET {name}",)
    if source == "database":
        return (f"ALTER DATABASE {database} RESET {name}",)
    if source == "database user":
        return (f"ALTER ROLE {role} IN DATABASE {database} RESET {name}",)
    return (f"ALTER SYSTEM SET {name} = '{value}'", "SELECT pg_reload_conf()")


def judge_role_of_server(facts: Facts) -> Iterator[Diagnostic]:
    if facts.replica:
        yield Diagnostic(
            code="replica",
            severity=Severity.ERROR,
            summary="the server is a replica",
            meaning="It answers with the past and refuses writes. Nothing may be decided from it.",
            remedy="name all hosts in the URL and add target_session_attrs=read-write to its query",
        )
    elif facts.pgbouncer and facts.value("default_transaction_read_only") == "on":
        yield Diagnostic(
            code="read-only",
            severity=Severity.ERROR,
            summary="transactions are read-only by default (default_transaction_read_only)",
            meaning="Every write fails.",
            remedy=_undo(facts, "default_transaction_read_only", "off"),
        )


def judge_durability(facts: Facts) -> Iterator[Diagnostic]:
    if facts.value("fsync") == "off":
        yield Diagnostic(
            code="fsync-off",
            severity=Severity.ERROR,
            summary="fsync is off",
            meaning="When the server's machine stops, all that was acknowledged may be lost or damaged.",
            remedy=_undo(facts, "fsync", "on"),
        )
    if facts.value("full_page_writes") == "off":
        yield Diagnostic(
            code="full-page-writes-off",
            severity=Severity.ERROR,
            summary="full_page_writes is off",
            meaning="A page that was half written when the machine stopped stays damaged, unless the file "
            "system writes pages whole.",
            remedy=_undo(facts, "full_page_writes", "on"),
        )
    commit = facts.value("synchronous_commit")
    if commit == "off" and facts.pgbouncer:
        yield Diagnostic(
            code="synchronous-commit-off",
            severity=Severity.ERROR,
            summary="synchronous_commit is off for this role and database",
            meaning="A crash of the server would lose claims, results and signals that were acknowledged. "
            "Behind a pooler flowstore cannot turn it on, and refuses to open the store.",
            remedy=_undo(facts, "synchronous_commit", "on"),
        )
    elif commit == "local" and facts.value("synchronous_standby_names"):
        yield Diagnostic(
            code="synchronous-commit-local",
            severity=Severity.WARNING,
            summary="synchronous_commit is local, though there are synchronous standbys",
            meaning="A fail-over may lose what was acknowledged.",
            remedy=_undo(facts, "synchronous_commit", "on"),
        )


# What hurts where a pooler keeps flowstore from setting it.
HARMFUL_DEFAULTS = {
    "default_transaction_isolation": "Concurrent calls on a run are retried and several times slower. "
    "Counters are never folded, so pages get slower with each run.",
    "lock_timeout": "Calls that wait for a lock are retried, and fail while their run or step is busy.",
    "gin_fuzzy_search_limit": "Searches leave out runs.",
}


def judge_defaults(facts: Facts) -> Iterator[Diagnostic]:
    """Defaults of the server, the database or the role that statements must not run under."""
    if facts.value("session_replication_role") == "replica":
        yield Diagnostic(
            code="triggers-off",
            severity=Severity.ERROR,
            summary="session_replication_role is replica for this role and database",
            meaning="Triggers do not run, so counts and pages would be wrong. flowstore cannot change it, "
            "and refuses to open the store.",
            remedy=_undo(facts, "session_replication_role", "origin"),
        )
    if facts.pgbouncer:
        for name, meaning in HARMFUL_DEFAULTS.items():
            if (value := facts.value(name, PINNED[name])) != PINNED[name]:
                yield Diagnostic(
                    code="harmful-default",
                    severity=Severity.WARNING,
                    summary=f"{name} is {value} by default",
                    meaning=f"{meaning} Behind a pooler flowstore cannot set it itself.",
                    remedy=_undo(facts, name, PINNED[name]),
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
            summary="flowstore overrides defaults that would hurt: "
            + ", ".join(f"{name} = {facts.value(name)}" for name in harmful),
            meaning="Its own connections are right. Other programs on the same tables have these defaults, "
            "and flowstore would have them behind a pooler.",
            remedy=_psql(
                facts,
                *dict.fromkeys(
                    statement
                    for name in harmful
                    for statement in _undoing(facts, name, PINNED.get(name, "on"))
                ),
            ),
        )


def judge_version(facts: Facts, today: date) -> Iterator[Diagnostic]:
    major = facts.version // 10000
    remedy = "upgrade the server: https://www.postgresql.org/docs/current/upgrading.html"
    end = END_OF_LIFE.get(major)
    if facts.version < OLDEST:
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
            meaning=f"Its faults, those that lose data among them, have not been mended since {end}.",
            remedy=remedy,
        )


def judge_connections(facts: Facts) -> Iterator[Diagnostic]:
    reserved = 0
    if not facts.superuser:
        reserved = facts.number("superuser_reserved_connections") + facts.number("reserved_connections")
    limits = [
        (
            facts.number("max_connections") - reserved,
            facts.connections,
            "max_connections of the server, less the reserved ones",
            "ALTER SYSTEM SET max_connections = 200",
        )
    ]
    if not facts.superuser:
        role, database = _quote(facts.role), _quote(facts.database)
        limits += [
            (
                facts.role_limit,
                facts.connections_of_role,
                "that of the role",
                f"ALTER ROLE {role} CONNECTION LIMIT -1",
            ),
            (
                facts.database_limit,
                facts.connections,
                "that of the database",
                f"ALTER DATABASE {database} CONNECTION LIMIT -1",
            ),
        ]
    for limit, used, name, raising in limits:
        free = max(limit - used, 0)
        raised = "max_connections" not in raising
        # -1 is no limit.
        if limit >= 0 and facts.pool_size > free:
            yield Diagnostic(
                code="connections-scarce",
                severity=Severity.WARNING,
                summary=f"pool_size is {facts.pool_size}, and {free} of {limit} connections are free",
                meaning=f"The limit is {name}. Beyond it connections are refused, and calls wait.",
                remedy=f"{_psql(facts, raising)}{'' if raised else ', then restart the server'}; or "
                f"add pool_size={max(free // 2, 1)} to the URL's query",
            )
            return


def judge_pooler(facts: Facts) -> Iterator[Diagnostic]:
    if facts.pooled and not facts.pgbouncer:
        yield Diagnostic(
            code="pooler-undeclared",
            severity=Severity.ERROR,
            summary="the URL leads to a transaction pooler, and does not say so",
            meaning="Statements of one connection meet several server processes: prepared statements and "
            "settings go astray.",
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
                meaning="Behind a pooler flowstore cannot set them itself. Without them a client that "
                "vanished holds its locks for as long as it likes.",
                remedy=_psql(facts, *statements),
            )
        schemas = {name.strip(' "') for name in facts.value("search_path").split(",")}
        if schemas - {"pg_catalog", "pg_temp"}:
            yield Diagnostic(
                code="search-path",
                severity=Severity.NOTE,
                summary=f"search_path is {facts.value('search_path')} for the role",
                meaning="Behind a pooler flowstore cannot set it itself. An operator or a function that "
                "others make in one of these schemas can be called in place of the server's own.",
                remedy=_psql(facts, f"ALTER ROLE {role} SET search_path = {PINNED['search_path']}"),
            )


def judge_time_outs(facts: Facts) -> Iterator[Diagnostic]:
    for name, cut in (
        ("idle_session_timeout", "connections that the pooler holds idle"),
        (
            "transaction_timeout",
            "transactions, cleanup and migrations among them" if facts.pgbouncer else "long migrations",
        ),
    ):
        # Without a pooler the store's own connections have neither.
        if facts.number(name) and (facts.pgbouncer or name == "transaction_timeout"):
            yield Diagnostic(
                code=name.replace("_", "-"),
                severity=Severity.NOTE,
                summary=f"{name} is {facts.number(name):,} ms",
                meaning=f"The server cuts {cut}. Calls are tried again, and take longer.",
                remedy=_undo(facts, name, "0"),
            )


def judge_housekeeping(facts: Facts) -> Iterator[Diagnostic]:
    if facts.value("autovacuum") == "off":
        yield Diagnostic(
            code="autovacuum-off",
            severity=Severity.WARNING,
            summary="autovacuum is off",
            meaning="Tables and indexes grow without end, and every call gets slower.",
            remedy=_undo(facts, "autovacuum", "on"),
        )
    oldest = facts.oldest_transaction
    if oldest is not None and oldest > LONG_TRANSACTION_SECONDS:
        yield Diagnostic(
            code="long-transaction",
            severity=Severity.WARNING,
            summary=f"a transaction has been open for {oldest / 3600:.1f} hours in this database",
            meaning="While it lasts nothing that was deleted or changed can be cleared away.",
            remedy=_psql(
                facts,
                "SELECT pid, usename, state, xact_start FROM pg_stat_activity ORDER BY xact_start LIMIT 5",
            ),
        )


def judge_clock(facts: Facts) -> Iterator[Diagnostic]:
    if abs(facts.skew) - facts.skew_error > SKEW_SECONDS:
        yield Diagnostic(
            code="clock-skew",
            severity=Severity.WARNING,
            summary=f"the server's clock is {abs(facts.skew):.1f} s "
            f"{'ahead of' if facts.skew > 0 else 'behind'} this machine's",
            meaning="Leases are safe: only the server's clock counts. What is computed here, such as as_of, "
            "due_at, timeout_at and the cutoff of cleanup, is off by as much.",
            remedy="timedatectl set-ntp true (on the machine that is off)",
        )
