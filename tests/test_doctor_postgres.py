"""``flowstore doctor`` on a dedicated PostgreSQL server with unsafe parameters."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shlex
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from flowstore_cli.main import main
from flowstore_core import FlowStore
from flowstore_core.diagnostics import Severity
from flowstore_core.inspection import stalled_work
from flowstore_core.open import resolve_store
from flowstore_core.urls import parse_url
from flowstore_postgres import diagnosis, queue_checks, server_checks
from flowstore_postgres.server_checks import ServerFacts, ServerParameter, check_server
from flowstore_postgres.settings import read_settings
from tests.calls import new_run
from tests.cluster import Cluster
from tests.test_doctor import _fill, _with_store

# One worker and one server for all of these tests.
pytestmark = pytest.mark.xdist_group("doctor")


Doctor = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    cluster = Cluster(durable=True)
    try:
        yield cluster.url
    finally:
        cluster.stop()


def _execute(url: str, *statements: str) -> Any:
    async def run() -> Any:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(run())


@pytest.fixture
def store_url(server: str) -> Iterator[str]:
    """A store with healthy runs; the server's parameters are reset after the test."""
    schema = f"doctor_{uuid4().hex}"
    url = f"{server}&schema={schema}"
    _with_store(url, _fill)
    yield url
    _execute_and_reload(
        server,
        f"DROP SCHEMA {schema} CASCADE",
        "ALTER SYSTEM RESET ALL",
        "ALTER ROLE postgres RESET ALL",
        "ALTER DATABASE postgres RESET ALL",
    )


def _execute_and_reload(url: str, *statements: str) -> None:
    """Execute statements, reload the server's configuration, and wait until new connections have it."""
    loaded = "SELECT pg_conf_load_time()"
    before = _execute(url, loaded)
    _execute(url, *statements, "SELECT pg_reload_conf()")
    while _execute(url, loaded) == before:
        time.sleep(0.02)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    monkeypatch.setattr(stalled_work, "RECHECK_SECONDS", 0.02)

    def run_doctor(url: str, *options: str) -> tuple[int, dict[str, dict[str, Any]]]:
        code = main(["doctor", url, "--json", *options])
        out, err = capsys.readouterr()
        assert out, err
        return code, {one["code"]: one for one in json.loads(out)["findings"]}

    return run_doctor


def test_a_healthy_server_has_no_findings(store_url: str, doctor: Doctor) -> None:
    assert doctor(store_url) == (0, {})
    assert doctor(store_url, "--thorough") == (0, {})


UNSAFE = {
    "fsync-off": ("error", "ALTER SYSTEM SET fsync = off"),
    "full-page-writes-off": ("error", "ALTER SYSTEM SET full_page_writes = off"),
    "autovacuum-off": ("warning", "ALTER SYSTEM SET autovacuum = off"),
    "triggers-off": ("error", "ALTER ROLE postgres SET session_replication_role = replica"),
    "transaction-timeout": ("note", "ALTER ROLE postgres SET transaction_timeout = 60000"),
    "defaults-overridden synchronous_commit of the server": (
        "note",
        "ALTER SYSTEM SET synchronous_commit = off",
    ),
    "defaults-overridden read-only": ("note", "ALTER ROLE postgres SET default_transaction_read_only = on"),
    "defaults-overridden isolation": (
        "note",
        "ALTER SYSTEM SET default_transaction_isolation = 'repeatable read'",
    ),
    "defaults-overridden lock_timeout": ("note", "ALTER DATABASE postgres SET lock_timeout = 100"),
}
UNSAFE_WITH_POOLER = {
    "synchronous-commit-off": ("error", "ALTER SYSTEM SET synchronous_commit = off"),
    "synchronous-commit-off of the role": ("error", "ALTER ROLE postgres SET synchronous_commit = off"),
    "synchronous-commit-off of the database": (
        "error",
        "ALTER DATABASE postgres SET synchronous_commit = off",
    ),
    "synchronous-commit-off of both": (
        "error",
        "ALTER ROLE postgres IN DATABASE postgres SET synchronous_commit = off",
    ),
    "read-only": ("error", "ALTER ROLE postgres SET default_transaction_read_only = on"),
    "triggers-off": ("error", "ALTER DATABASE postgres SET session_replication_role = replica"),
    "harmful-default isolation": (
        "warning",
        "ALTER DATABASE postgres SET default_transaction_isolation = serializable",
    ),
    "harmful-default of the server": ("warning", "ALTER SYSTEM SET gin_fuzzy_search_limit = 1000"),
    "harmful-default lock_timeout": ("warning", "ALTER ROLE postgres SET lock_timeout = 100"),
    "idle-session-timeout": ("note", "ALTER ROLE postgres SET idle_session_timeout = 60000"),
    "transaction-timeout": ("note", "ALTER ROLE postgres SET transaction_timeout = 60000"),
}
POOLER_DEFAULTS = (
    "ALTER ROLE postgres SET statement_timeout = 30000",
    "ALTER ROLE postgres SET idle_in_transaction_session_timeout = 30000",
    "ALTER ROLE postgres SET search_path = pg_catalog, pg_temp",
)


@pytest.mark.parametrize("name", UNSAFE_WITH_POOLER)
def test_the_remedy_of_an_unsafe_default_behind_a_pooler_works(
    name: str, store_url: str, server: str, doctor: Doctor
) -> None:
    _execute(server, *POOLER_DEFAULTS, "SELECT 1")
    _assert_remedy_works(f"{store_url}&pgbouncer=true", server, doctor, name, *UNSAFE_WITH_POOLER[name])


@pytest.mark.parametrize("name", UNSAFE)
def test_the_remedy_of_an_unsafe_setting_works(
    name: str, store_url: str, server: str, doctor: Doctor
) -> None:
    _assert_remedy_works(store_url, server, doctor, name, *UNSAFE[name])


def _assert_remedy_works(
    store_url: str, server: str, doctor: Doctor, name: str, severity: str, statement: str
) -> None:
    code = name.partition(" ")[0]
    _execute_and_reload(server, statement)
    exit_code, findings = doctor(store_url)
    assert list(findings) == [code]
    assert findings[code]["severity"] == severity
    assert exit_code == (0 if severity == "note" else 1)
    commands = _commands(findings[code]["remedy"])
    _execute_and_reload(server, "SET default_transaction_read_only = off", *commands)
    assert doctor(store_url) == (0, {})


def _commands(remedy: str) -> list[str]:
    """The statements of a remedy, to be executed without psql."""
    words = shlex.split(remedy)
    assert words[0] == "psql"
    return [word for option, word in itertools.pairwise(words) if option == "-c"]


def test_a_pool_larger_than_the_free_connections_is_found(
    store_url: str, server: str, doctor: Doctor
) -> None:
    code, findings = doctor(f"{store_url}&pool_size=1000")
    assert (code, list(findings)) == (1, ["connections-scarce"])
    assert "max_connections" in findings["connections-scarce"]["remedy"]
    with _small_role(server, store_url) as small:
        assert doctor(f"{small}&pool_size=4") == (0, {})
        code, findings = doctor(f"{small}&pool_size=5")
        assert list(findings) == ["connections-scarce"]
        assert 'ALTER ROLE "small" CONNECTION LIMIT -1' in findings["connections-scarce"]["remedy"]


@contextlib.contextmanager
def _small_role(server: str, store_url: str) -> Iterator[str]:
    """The URL of the store for a role that may have four connections."""
    schema = store_url.rpartition("=")[2]
    _execute(
        server,
        "CREATE ROLE small LOGIN CONNECTION LIMIT 4",
        f"GRANT USAGE ON SCHEMA {schema} TO small",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO small",
        "SELECT 1",
    )
    try:
        yield store_url.replace("user=postgres", "user=small")
    finally:
        _execute(server, "DROP OWNED BY small", "DROP ROLE small", "SELECT 1")


def test_a_role_behind_a_pooler_needs_time_outs_and_a_search_path(
    store_url: str, server: str, doctor: Doctor
) -> None:
    _, findings = doctor(f"{store_url}&pgbouncer=true")
    assert list(findings) == ["no-time-outs", "search-path"]
    commands = _commands(findings["no-time-outs"]["remedy"]) + _commands(findings["search-path"]["remedy"])
    assert len(commands) == 3
    _execute(server, *commands, "SELECT 1")
    assert doctor(f"{store_url}&pgbouncer=true") == (0, {})


def test_a_transaction_that_stays_open_is_found(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor(store_url) == (0, {})
    monkeypatch.setattr(server_checks, "LONG_TRANSACTION_SECONDS", 0.05)
    with _session(server) as execute:
        execute("BEGIN")
        execute("SELECT pg_sleep(0.1)")
        assert list(doctor(store_url)[1]) == ["long-transaction"]


async def _queue_a_step(store: FlowStore) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    await store.try_record_dispatch(await new_run(store), "a", queue="mail", step_type="test", due_at=later)


def _leave_dead_rows(server: str, store_url: str, number: int) -> None:
    schema = store_url.rpartition("=")[2]
    update = f"UPDATE {schema}.pending SET ready_at = ready_at + interval '1 ms'"
    _execute(server, *([update] * number), "SELECT pg_stat_force_next_flush()")


def test_a_queue_with_dead_rows_is_healthy_between_two_vacuums(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_store(store_url, _queue_a_step)
    monkeypatch.setattr(queue_checks, "MAX_DEAD_ROWS", 100)
    _leave_dead_rows(server, store_url, 200)
    with _session(server) as execute:
        execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        execute("SELECT 1")
        assert doctor(store_url) == (0, {})


def test_a_snapshot_that_holds_back_vacuum_is_named(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_store(store_url, _queue_a_step)
    monkeypatch.setattr(queue_checks, "MAX_DEAD_ROWS", 100)
    monkeypatch.setattr(queue_checks, "MAX_DEAD_SECONDS", 0.05)
    schema = store_url.rpartition("=")[2]
    with _session(f"{server}&application_name=dump") as execute:
        execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        execute("SELECT pg_sleep(0.1)")
        _leave_dead_rows(server, store_url, 200)
        _execute(server, f"VACUUM {schema}.pending", "SELECT 1")
        code, findings = doctor(store_url)
        assert (code, list(findings)) == (1, ["queue-bloated"])
        finding = findings["queue-bloated"]
        pid = _execute(server, "SELECT pid FROM pg_stat_activity WHERE application_name = 'dump'")
        assert finding["examples"] == [f"pid {pid}"]
        assert finding["count"] >= 200
        assert "application dump, idle in transaction" in finding["meaning"]
        monkeypatch.setattr(queue_checks, "MAX_HELD_TRANSACTIONS", 1)
        with _small_role(server, store_url) as small:
            # Another role does not see for how long.
            (other,) = doctor(f"{small}&pool_size=3")[1].values()
        assert (other["code"], other["examples"]) == ("queue-bloated", [f"pid {pid}"])
        assert "transactions so far (role postgres, application dump" in other["meaning"]
        (command,) = _commands(finding["remedy"])
        assert _execute(server, command) is True
        with pytest.raises((asyncpg.PostgresError, ConnectionError)):
            execute("SELECT 1")


def test_a_table_of_queues_that_is_not_vacuumed_is_found(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_store(store_url, _queue_a_step)
    monkeypatch.setattr(queue_checks, "MAX_DEAD_ROWS", 100)
    _leave_dead_rows(server, store_url, 200)
    assert doctor(store_url) == (0, {})
    with monkeypatch.context() as patch:
        patch.setattr(queue_checks, "MAX_DEAD_SECONDS", 0.01)
        code, findings = doctor(store_url)
    assert (code, list(findings)) == (1, ["queue-bloated"])
    assert findings["queue-bloated"]["examples"] == []
    (command,) = _commands(findings["queue-bloated"]["remedy"])
    _execute(server, command, "SELECT 1")
    monkeypatch.setattr(queue_checks, "MAX_DEAD_SECONDS", 0.01)
    assert doctor(store_url) == (0, {})


def test_an_index_of_empty_pages_is_found(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_store(store_url, _queue_a_step)
    monkeypatch.setattr(queue_checks, "MAX_INDEX_BYTES", 1 << 20)
    schema = store_url.rpartition("=")[2]
    _execute(
        server,
        f"INSERT INTO {schema}.pending SELECT {RUN}, n::text, 'q', 0, now() FROM generate_series(1, 20000) n",
        f"DELETE FROM {schema}.pending WHERE queue = 'q'",
        f"VACUUM ANALYZE {schema}.pending",
        "SELECT pg_stat_force_next_flush()",
    )
    code, findings = doctor(store_url)
    assert (code, list(findings)) == (0, ["queue-index-large"])
    (command,) = _commands(findings["queue-index-large"]["remedy"])
    _execute(server, command, "SELECT 1")
    assert doctor(store_url) == (0, {})


def test_a_store_with_queues_behind_a_pooler_has_to_poll(store_url: str, server: str, doctor: Doctor) -> None:
    _execute(server, *POOLER_DEFAULTS, "SELECT 1")
    assert doctor(f"{store_url}&pgbouncer=true") == (0, {})
    _with_store(store_url, _queue_a_step)
    code, findings = doctor(f"{store_url}&pgbouncer=true")
    assert (code, list(findings)) == (0, ["watch-unavailable"])
    assert "pgbouncer=true" in findings["watch-unavailable"]["remedy"]


def test_a_listener_without_a_free_connection_is_found(store_url: str, server: str, doctor: Doctor) -> None:
    _with_store(store_url, _queue_a_step)
    with _small_role(server, store_url) as small:
        assert doctor(f"{small}&pool_size=3") == (0, {})
        code, findings = doctor(f"{small}&pool_size=4")
        assert (code, list(findings)) == (1, ["listener-refused"])
        assert findings["listener-refused"]["remedy"].endswith("; or add pool_size=3 to the URL's query")
        assert list(doctor(f"{small}&pool_size=5")[1]) == ["connections-scarce"]


def test_a_proxy_that_drops_notifications_is_found(
    store_url: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = parse_url(store_url).options
    with _notifications_dropped(f"{options['host']}/.s.PGSQL.5432") as port:
        through = (
            f"postgresql://postgres@127.0.0.1:{port}/postgres?sslmode=disable&schema={options['schema']}"
        )
        assert doctor(through) == (0, {})
        _with_store(store_url, _queue_a_step)
        assert doctor(store_url) == (0, {})
        monkeypatch.setattr(queue_checks, "NOTIFICATION_SECONDS", 0.2)
        code, findings = doctor(through)
    assert (code, list(findings)) == (1, ["notifications-lost"])


@contextlib.contextmanager
def _notifications_dropped(socket: str) -> Iterator[int]:
    """The port of a proxy before the server that forwards all messages but notifications."""

    async def serve(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_unix_connection(socket)

        async def forward_requests() -> None:
            while data := await client_in.read(1 << 16):
                server_out.write(data)
            server_out.close()

        forwarding = asyncio.create_task(forward_requests())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await server_in.readexactly(5)
                content = await server_in.readexactly(int.from_bytes(head[1:], "big") - 4)
                if head[:1] != b"A":
                    client_out.write(head + content)
        client_out.close()
        await forwarding

    async def finish() -> None:
        proxy.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)

    loop = asyncio.new_event_loop()
    proxy = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield proxy.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(finish())
        loop.close()


@contextlib.contextmanager
def _session(url: str) -> Iterator[Callable[[str], Any]]:
    """Keep a connection open in another event loop while the command runs."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(url))
    try:
        yield lambda statement: loop.run_until_complete(connection.execute(statement))
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


@pytest.mark.parametrize(("skew", "direction"), [(5.0, "ahead of"), (-5.0, "behind")])
def test_clock_skew_is_found(
    skew: float, direction: str, store_url: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "local_time", lambda: datetime.now(UTC).timestamp() - skew)
    code, findings = doctor(store_url)
    assert (code, list(findings)) == (1, ["clock-skew"])
    assert f"5.0 s {direction} this machine's" in findings["clock-skew"]["summary"]


RUN = "'00000000-0000-0000-0000-000000000000'"
ORPHANS = {
    "orphans-idempotency-keys": f"INTO idempotency_keys VALUES ({RUN}, 't', 'k', {RUN}, '2020-01-01')",
    "orphans-controls": "INTO controls (run_id, flow_id, created_at, trigger_key) "
    f"VALUES ({RUN}, {RUN}, '2020-01-01', 't')",
    "orphans-steps": f"INTO steps (run_id, step_key) VALUES ({RUN}, 'a')",
    "orphans-attempts": "INTO attempts (run_id, step_key, attempt, status, started_at, completed_at, "
    f"step_type) VALUES ({RUN}, 'a', 1, 'Failed', '2020-01-01', '2020-01-01', 't')",
    "orphans-waiters": "INTO waiters (run_id, step_key, signal_name, created_at) "
    f"VALUES ({RUN}, 'a', 's', '2020-01-01')",
    "orphans-deliveries": f"INTO deliveries VALUES ({RUN}, 'd', 'a', '2020-01-01')",
    "orphans-buffered-signals": f"INTO buffered_signals VALUES ({RUN}, 's', 1, '{{}}', '2020-01-01')",
    "orphans-outputs": f"INTO outputs VALUES ({RUN}, 'k', '1')",
    "orphans-events": f"INTO events VALUES ({RUN}, 1, '2020-01-01', 'e', NULL, NULL, {RUN})",
}


@pytest.mark.parametrize("code", ORPHANS)
def test_rows_without_a_run_are_found_and_fixed(
    code: str, store_url: str, server: str, doctor: Doctor
) -> None:
    schema = store_url.rpartition("=")[2]
    _execute(server, f"SET search_path = {schema}", f"INSERT {ORPHANS[code]}", "SELECT 1")
    exit_code, findings = doctor(store_url)
    assert (exit_code, list(findings)) == (1, [code])
    assert findings[code]["count"] == 1
    assert findings[code]["examples"] == [RUN.strip("'")]
    assert doctor(store_url, "--fix", "--yes") == (0, {})
    assert doctor(store_url) == (0, {})


def test_a_slow_check_of_rows_is_stopped(
    store_url: str, server: str, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "ROWS_SECONDS", 0.5)
    schema = store_url.rpartition("=")[2]
    with _session(server) as execute:
        execute("BEGIN")
        execute(f"LOCK TABLE {schema}.attempts IN ACCESS EXCLUSIVE MODE")
        code, findings = doctor(store_url)
    assert (code, list(findings)) == (0, ["rows-not-checked"])
    assert "attempts" in findings["rows-not-checked"]["summary"]


def test_a_locked_table_of_queues_is_not_waited_for(store_url: str, server: str, doctor: Doctor) -> None:
    _with_store(store_url, _queue_a_step)
    schema = store_url.rpartition("=")[2]
    with _session(server) as execute:
        execute("BEGIN")
        execute(f"LOCK TABLE {schema}.pending IN ACCESS EXCLUSIVE MODE")
        assert not asyncio.run(diagnosis.diagnose(resolve_store(store_url)[2], thorough=False))


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("DELETE FROM {schema}.schema_version WHERE version > 1", "schema-behind"),
        ("INSERT INTO {schema}.schema_version VALUES (99, 'later', 1)", "schema-newer"),
        ("INSERT INTO {schema}.schema_version VALUES (99, 'later', 99)", "schema-ahead"),
    ],
)
def test_a_different_schema_version_is_found(
    statement: str, code: str, store_url: str, server: str, doctor: Doctor
) -> None:
    _execute(server, statement.replace("{schema}", store_url.rpartition("=")[2]), "SELECT 1")
    assert list(doctor(store_url)[1]) == [code]


# Findings that the test server cannot produce, from facts only


async def _facts(url: str) -> ServerFacts:
    _, _, config = resolve_store(url)
    settings = read_settings(config)
    one, two = [await settings.hosts.connect(**settings.connect_arguments) for _ in range(2)]
    try:
        return await diagnosis.collect_facts(one, two, settings, config)
    finally:
        await one.close()
        await two.close()


@pytest.mark.parametrize(
    ("facts", "code", "severity"),
    [
        ({"replica": True}, "replica", Severity.ERROR),
        ({"version": 130022, "version_text": "13.22"}, "server-too-old", Severity.ERROR),
        ({"version": 140020, "version_text": "14.20"}, "server-old", Severity.WARNING),
        ({"pooled": True}, "pooler-undeclared", Severity.ERROR),
    ],
)
async def test_server_facts_become_findings(
    facts: dict[str, Any], code: str, severity: Severity, server: str
) -> None:
    findings = list(check_server(replace(await _facts(server), **facts), date(2026, 12, 1)))
    assert [(finding.code, finding.severity) for finding in findings] == [(code, severity)]


async def test_synchronous_commit_local_matters_only_with_standbys(server: str) -> None:
    facts = await _facts(server)
    local = {**facts.parameters, "synchronous_commit": ServerParameter("local", "configuration file")}
    assert list(check_server(replace(facts, parameters=local))) == []
    local["synchronous_standby_names"] = ServerParameter("b", "configuration file")
    (finding,) = check_server(replace(facts, parameters=local))
    assert finding.code == "synchronous-commit-local"


class PooledConnection:
    """A connection whose alternating statements reach given server processes."""

    def __init__(self, connection: Any, pids: Iterator[int]) -> None:
        self._connection = connection
        self._pids = pids

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    async def fetchval(self, statement: str) -> Any:
        if statement == diagnosis.READ_PID:
            return next(self._pids)
        return await self._connection.fetchval(statement)


@pytest.mark.parametrize(
    ("pids", "pooled"),
    [([1, 2, 1, 2], False), ([1, 1, 1, 1], True), ([1, 2, 2, 1], True), ([1, 2, 3, 2], True)],
)
async def test_a_transaction_pooler_is_detected_by_its_server_processes(
    pids: list[int], pooled: bool, server: str
) -> None:
    _, _, config = resolve_store(server)
    settings = read_settings(config)
    connection = await asyncpg.connect(server)
    numbers = iter(pids)
    try:
        connections: list[Any] = [PooledConnection(connection, numbers) for _ in range(2)]
        facts = await diagnosis.collect_facts(connections[0], connections[1], settings, config)
    finally:
        await connection.close()
    assert facts.pooled is pooled


async def test_a_server_that_refuses_the_settings_counts_as_a_pooler(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @asynccontextmanager
    async def refuse(settings: Any) -> AsyncIterator[Any]:
        with diagnosis.map_errors():
            raise asyncpg.ProtocolViolationError("unsupported startup parameter: statement_timeout")
        yield

    monkeypatch.setattr(diagnosis, "_connect", refuse)
    _, _, config = resolve_store(server)
    (finding,) = await diagnosis.diagnose(config, thorough=False)
    assert (finding.code, finding.remedy) == ("pooler-undeclared", "add pgbouncer=true to the URL's query")


async def test_a_key_in_use_by_a_trigger_is_not_deleted(server: str) -> None:
    from flowstore_core import open_store

    schema = f"doctor_{uuid4().hex}"
    url = f"{server}&schema={schema}"
    _, _backend, config = resolve_store(url)
    async with open_store(url):
        pass
    blocker = await asyncpg.connect(server)
    try:
        await blocker.execute(f"SET search_path = {schema}")
        for key in ("locked", "free"):
            await blocker.execute(
                f"INSERT INTO idempotency_keys VALUES ({RUN}, 't', '{key}', {RUN}, '2020-01-01')"
            )
        await blocker.execute("BEGIN")
        await blocker.execute("SELECT FROM idempotency_keys WHERE idempotency_key = 'locked' FOR UPDATE")
        findings = await diagnosis.diagnose(config, thorough=False)
        fixing = diagnosis.fix(config, findings)
        done = await asyncio.wait_for(fixing, 60)
        assert done == ["deleted 1 rows of table idempotency_keys that belonged to no run"]
        await blocker.execute("ROLLBACK")
        assert await blocker.fetchval("SELECT idempotency_key FROM idempotency_keys") == "locked"
    finally:
        await blocker.execute(f"DROP SCHEMA {schema} CASCADE")
        await blocker.close()
