"""Opening a PostgreSQL store: URLs, options, roles and error messages."""

from __future__ import annotations

import asyncio
import logging
import traceback
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import asyncpg
import pytest
from asyncpg.connect_utils import _parse_connect_dsn_and_args
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowstore_core import (
    ConfigurationError,
    FlowStoreError,
    SchemaVersionError,
    StoreConfig,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_core.open import resolve_store
from flowstore_core.plugins import find_backend
from flowstore_postgres.failover import read_hosts
from flowstore_postgres.settings import read_settings

SECRET = "hunter2-Zw"


async def _execute(url: str, sql: str) -> list[asyncpg.Record]:
    """Execute a statement without the store."""
    query = parse_qs(urlsplit(url).query)
    connection = await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")
    try:
        return list(await connection.fetch(sql))
    finally:
        await connection.close()


def _schema(url: str) -> str:
    return parse_qs(urlsplit(url).query)["schema"][0]


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        (
            f"postgresql://u:{SECRET}@127.0.0.1:1/x?retry_timeout=0",
            StoreUnavailableError,
            "cannot be reached",
        ),
        (f"postgresql://u:{SECRET}@127.0.0.1:port/x", ConfigurationError, "percent-encoded"),
        (f"postgresql://u:{SECRET}@127.0.0.1/x?sslmode=bogus", ConfigurationError, "sslmode"),
        (f"postgresql://u:{SECRET}@127.0.0.1/x?pool_size=0", ConfigurationError, "pool_size"),
        (f"postgresql://u:{SECRET}@127.0.0.1/x?schema=pg_mine", ConfigurationError, "schema"),
        (f"postgresql://u:{SECRET}@127.0.0.1/x?frobnicate=1", ConfigurationError, "pool_size"),
        (
            f"postgres://u:{SECRET}@127.0.0.1/x?statement_timeout=soon",
            ConfigurationError,
            "statement_timeout",
        ),
    ],
)
async def test_an_invalid_url_gets_a_clear_error_without_the_password(
    url: str, error: type[FlowStoreError], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(error, match=message) as raised:
        async with open_store(url):
            pytest.fail("open_store succeeded")
    assert SECRET not in "".join(traceback.format_exception(raised.value))
    assert SECRET not in caplog.text


@pytest.mark.parametrize(("name", "value"), [("user", "nobody"), ("dbname", "nowhere")])
async def test_an_unknown_role_or_database_is_a_configuration_error(
    name: str, value: str, postgresql_url: str
) -> None:
    query = parse_qs(urlsplit(postgresql_url).query)
    options = {"host": query["host"][0], "user": "postgres", "dbname": "postgres", name: value}
    with pytest.raises(ConfigurationError, match="SQLSTATE"):
        async with open_store("postgresql://", **options):
            pytest.fail("open_store succeeded")


async def test_libpq_urls_with_an_empty_host_find_the_socket(fresh: str) -> None:
    host, schema = parse_qs(urlsplit(fresh).query)["host"][0], _schema(fresh)
    for url in (
        f"postgresql:///postgres?host={host}&user=postgres&schema={schema}",
        f"postgresql://postgres@/postgres?host={host}&schema={schema}",
        f"postgres://postgres@/?host={host}&dbname=postgres&schema={schema}",
    ):
        async with open_store(url) as store:
            await store.ping()


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("postgresql://u:p@h:1/d", {}, ("h", 1, "d", "u", "p")),
        ("postgresql://u:p@h:1/d", {"user": "x"}, ("h", 1, "d", "x", "p")),
        ("postgresql://u:p%40@h:1/d", {"password": "q%/"}, ("h", 1, "d", "u", "q%/")),
        ("postgresql://u:p%40@h:1/d?user=x", {}, ("h", 1, "d", "x", "p@")),
        ("postgresql://u:p@h:1/d", {"host": "i"}, ("i", 5432, "d", "u", "p")),
        ("postgresql://u:p@h:1/d", {"port": 2}, ("h", 2, "d", "u", "p")),
        ("postgresql://u:p@[::1]:1/d", {"port": 2}, ("::1", 2, "d", "u", "p")),
        ("postgresql://u:p@h:1/d", {"dbname": "e"}, ("h", 1, "e", "u", "p")),
        ("postgresql://u:p@h:1/d?database=e", {"user": "x"}, ("h", 1, "e", "x", "p")),
    ],
)
def test_an_option_overrides_the_same_part_of_the_url(
    url: str, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    _, _, config = resolve_store(url, **options)
    ((address, parameters),) = _parse_with_driver(config)
    assert (*address, parameters.database, parameters.user, parameters.password) == expected


def _parse_with_driver(config: StoreConfig) -> list[tuple[Any, Any]]:
    """Return the address of each host and the parameters that the driver parses from its arguments."""
    settings = read_settings(config)
    arguments = settings.connect_arguments | {"timeout": None}
    parsed = []
    for host, port in read_hosts(config.url, config.options) or [(None, arguments.pop("port", None))]:
        names = signature(_parse_connect_dsn_and_args).parameters
        arguments_of_host = {name: arguments.get(name) for name in names} | {"host": host, "port": port}
        (address, *_), parameters = _parse_connect_dsn_and_args(**arguments_of_host)
        parsed.append((address, parameters))
    return parsed


# A part of a URL, without characters that the server or the driver rejects.
_TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=10)
_HOSTS = st.lists(
    st.tuples(
        st.from_regex(r"[a-z][a-z0-9.-]{0,8}|::1|/run/[a-z:,#]{1,5}", fullmatch=True), st.integers(1, 65535)
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(user=_TEXTS, password=_TEXTS, database=_TEXTS, hosts=_HOSTS)
@example(user="a@b", password="c#d?e/f:g%h@i", database="d/#?%41", hosts=[("/run/a,b", 1), ("::1", 2)])
def test_the_driver_gets_the_parts_of_the_url(
    user: str, password: str, database: str, hosts: list[tuple[str, int]]
) -> None:
    authority = ",".join(
        f"{f'[{host}]' if host == '::1' else quote(host, safe='')}:{port}" for host, port in hosts
    )
    name, secret, path = (quote(text, safe="") for text in (user, password, database))
    _, _, config = resolve_store(f"postgresql://{name}:{secret}@{authority}/{path}?sslmode=disable")
    expected = [f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port) for host, port in hosts]
    parsed = _parse_with_driver(config)
    assert [address for address, _ in parsed] == expected
    for _, parameters in parsed:
        assert (parameters.user, parameters.password, parameters.database) == (user, password, database)
        assert parameters.sslmode.name == "disable"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql://me:p#w@h#1/d#x?sslmode=disable&user=a#b", {}),
        ("postgresql://h#1/d#x?sslmode=disable", {"user": "a#b", "password": "p#w"}),
    ],
)
def test_the_driver_parses_an_unencoded_hash_as_flowstore_does(url: str, options: dict[str, Any]) -> None:
    _, _, config = resolve_store(url, **options)
    ((address, parameters),) = _parse_with_driver(config)
    assert address == ("h#1", 5432)
    assert (parameters.user, parameters.password, parameters.database) == ("a#b", "p#w", "d#x")
    assert parameters.sslmode.name == "disable"


def test_options_for_tls_reach_the_driver_unchanged(tmp_path: Path) -> None:
    root = tmp_path / "r#oot&=+%41.pem"
    root.write_bytes(b"")
    _, _, config = resolve_store(f"postgresql://h/d?sslmode=Verify-Full&sslrootcert={quote(str(root))}")
    dsn = read_settings(config).connect_arguments["dsn"]
    assert parse_qs(urlsplit(dsn).query) == {"sslmode": ["verify-full"], "sslrootcert": [str(root)]}


def test_a_service_is_read_from_the_file_that_an_option_names(tmp_path: Path) -> None:
    file = tmp_path / "services"
    file.write_text("[mine]\nhost=h\nport=7\nuser=me\npassword=p#w\ndbname=d\n")
    _, _, config = resolve_store(f"postgresql://?service=mine&servicefile={file}&sslmode=disable")
    ((address, parameters),) = _parse_with_driver(config)
    assert address == ("h", 7)
    assert (parameters.user, parameters.password, parameters.database) == ("me", "p#w", "d")


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql://h:port/d", {}),
        ("postgresql://h:0/d", {}),
        ("postgresql://h:65536/d", {}),
        (f"postgresql://h:{'9' * 5000}/d", {}),
        ("postgresql://h:1:2/d", {}),
        ("postgresql://[::1/d", {}),
        ("postgresql://me:secret", {}),
        ("postgresql:///d", {"port": "x"}),
        ("postgresql:///d", {"port": "1,"}),
        ("postgresql://a,b,c/d", {"port": "1,2"}),
        ("postgresql://a/d", {"port": "1,2"}),
        ("postgresql://a/d", {"host": "b:x"}),
    ],
)
def test_a_malformed_host_or_port_is_a_configuration_error(url: str, options: dict[str, Any]) -> None:
    _, _, config = resolve_store(url, **options)
    with pytest.raises(ConfigurationError, match=r"port|host") as raised:
        read_settings(config)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("user", "postgresql://m%0Ae@h/d"),
        ("password", "postgresql://me:p%0A@h/d"),
        ("database", "postgresql://me@h/d%0D"),
        ("host", "postgresql://me@h%09/d"),
        ("password", "postgresql://me@h/d?password=p%0A"),
        ("service", "postgresql://me@h/d?service=x%0A"),
    ],
)
def test_a_control_character_in_an_option_is_refused(name: str, url: str) -> None:
    _, _, config = resolve_store(url)
    with pytest.raises(ConfigurationError, match=f"option {name} .*control characters"):
        read_settings(config)


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("PGPASSWORD", "postgresql://me:pw@h/d"),
        ("PGUSER", "postgresql://me@h/d"),
        ("PGDATABASE", "postgresql://me@h/d"),
        ("PGHOST", "postgresql://me@h/d"),
        ("PGSERVICE", "postgresql://me@h/d?service=x"),
        ("PGPASSFILE", "postgresql://me@h/d?passfile=x"),
    ],
)
def test_a_line_end_in_an_environment_variable_of_the_driver_is_refused(
    variable: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, f"{SECRET}\n")
    _, _, config = resolve_store(url)
    read_settings(config)
    with pytest.raises(ConfigurationError, match=f"{variable} .*line end") as raised:
        read_settings(replace(config, url="postgresql://", options={}))
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("query", "suggestion"),
    [
        ("sslmode=requird", "require"),
        ("sslmode=verify_full", "verify-full"),
        ("target_session_attrs=readwrite", "read-write"),
        ("poolsize=5", "pool_size"),
        ("Pool_Size=5", "pool_size"),
        ("migrat=false", "migrate"),
    ],
)
def test_a_misspelt_option_or_value_gets_a_suggestion(query: str, suggestion: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        read_settings(resolve_store(f"postgresql://me:{SECRET}@h/d?{query}")[2])
    assert f"(did you mean {suggestion!r}?)" in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "options", "expected"),
    [
        ("postgresql:///d", {}, []),
        ("postgresql://h/d", {}, [("h", None)]),
        ("postgresql://me:p@h:5/d", {}, [("h", 5)]),
        ("postgresql://h,[::1]:6,::2,i:/d", {}, [("h", None), ("::1", 6), ("::2", None), ("i", None)]),
        ("postgresql://h,i/d", {"port": "7"}, [("h", 7), ("i", 7)]),
        ("postgresql://h:1/d", {"host": "/run/pg,i"}, [("/run/pg", None), ("i", None)]),
    ],
)
def test_the_port_of_a_host_is_optional(
    url: str, options: dict[str, str], expected: list[tuple[str, int | None]]
) -> None:
    assert read_hosts(url, options) == expected


async def test_a_schema_of_any_name_is_quoted(fresh: str) -> None:
    name = 'dr"op; schema ä'
    async with open_store(fresh, schema=name) as store:
        run = new_run_id()
        await store.start_run(run, "f", run, "t")
    try:
        rows = await _execute(fresh, """SELECT run_id FROM "dr""op; schema ä".runs""")
        assert [row["run_id"] for row in rows] == [run]
    finally:
        await _execute(fresh, """DROP SCHEMA "dr""op; schema ä" CASCADE""")


async def test_con_6_migrate_false_creates_no_tables(fresh: str) -> None:
    with pytest.raises(SchemaVersionError, match="flowstore migrate up"):
        async with open_store(fresh, migrate=False):
            pytest.fail("open_store succeeded")
    assert await _execute(fresh, f"SELECT 1 FROM pg_tables WHERE schemaname = '{_schema(fresh)}'") == []


async def test_con_6_a_newer_schema_is_refused_unless_it_allows_this_code(fresh: str) -> None:
    async with open_store(fresh):
        pass
    table = f'"{_schema(fresh)}".schema_version'
    await _execute(fresh, f"INSERT INTO {table} (version, name, works_from) VALUES (900, 'later', 1)")
    async with open_store(fresh) as store:
        await store.ping()
    await _execute(fresh, f"INSERT INTO {table} (version, name, works_from) VALUES (901, 'last', 901)")
    with pytest.raises(SchemaVersionError, match="newer flowstore") as raised:
        async with open_store(fresh):
            pytest.fail("open_store succeeded")
    assert raised.value.found == 901


async def test_a_role_with_only_dml_privileges_suffices_at_run_time(fresh: str) -> None:
    async with open_store(fresh):
        pass
    schema, role = _schema(fresh), f"{_schema(fresh)}_worker"
    await _execute(fresh, f"CREATE ROLE {role} LOGIN")
    try:
        await _execute(fresh, f"GRANT USAGE ON SCHEMA {schema} TO {role}")
        await _execute(
            fresh, f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}"
        )
        async with open_store(fresh, user=role, migrate=False) as store:
            run = new_run_id()
            await store.start_run(run, "f", run, "t")
            assert await store.try_claim_step(run, "a")
            await store.record_step_start(run, "a", "t")
            await store.complete_run(run, "Succeeded")
            assert await store.cleanup((await store.get_runs())[0].completed_at) == 0
    finally:
        await _execute(fresh, f"DROP OWNED BY {role}")
        await _execute(fresh, f"DROP ROLE {role}")


async def test_pgbouncer_mode_needs_no_session_state(fresh: str) -> None:
    async with open_store(fresh, pgbouncer=True) as store:
        run = new_run_id()
        await store.start_run(run, "f", run, "t")
        assert await store.try_claim_step(run, "a")
        assert (await store.get_run_detail(run)) is not None


async def test_a_pool_without_a_free_connection_gets_a_clear_error(fresh: str) -> None:
    async with open_store(fresh, pool_size=1, acquire_timeout=0.5) as store:
        run = new_run_id()
        await store.start_run(run, "f", run, "t")
        locker = asyncio.Event()

        async def hold() -> None:
            query = parse_qs(urlsplit(fresh).query)
            connection = await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")
            async with connection.transaction():
                await connection.execute(f"LOCK TABLE {_schema(fresh)}.runs IN ACCESS EXCLUSIVE MODE")
                locker.set()
                await released.wait()
            await connection.close()

        released = asyncio.Event()
        holder = asyncio.create_task(hold())
        await locker.wait()
        blocked = asyncio.create_task(store.try_claim_step(run, "a"))
        await asyncio.sleep(0.02)  # otherwise one batch would contain all three calls
        with pytest.raises(StoreUnavailableError, match="pool_size"):
            await asyncio.gather(store.try_claim_step(run, "b"), store.try_claim_step(run, "c"))
        released.set()
        await holder
        assert await blocked


async def test_a_restarted_connection_is_replaced_without_an_error(fresh: str) -> None:
    async with open_store(fresh, application_name="flowstore-restart") as store:
        run = new_run_id()
        await store.start_run(run, "f", run, "t")
        await _execute(
            fresh,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'flowstore-restart'",
        )
        assert await store.try_claim_step(run, "a")
        assert await store.get_run_status(run) == "Running"


def test_a_store_belongs_to_its_event_loop(fresh_url: str) -> None:
    with asyncio.Runner() as first, asyncio.Runner() as second:
        opened = open_store(fresh_url)
        store = first.run(opened.__aenter__())
        with pytest.raises(ConfigurationError, match="event loop"):
            second.run(store.get_runs())
        first.run(opened.__aexit__(None, None, None))


@pytest.fixture
def fresh_url(postgresql_url: str) -> str:
    return f"{postgresql_url}&schema=flowstore_loops"


async def test_the_descriptor_reads_and_migrates_the_schema_version(fresh: str) -> None:
    backend = find_backend("postgresql")[1]
    config = StoreConfig(
        url=fresh, scheme="postgresql", options=parse_options(fresh), clock=None, migrate=True
    )
    assert await backend.schema_version(config) == 0  # type: ignore[attr-defined]
    newest = backend.migrations(config)[-1][0]  # type: ignore[attr-defined]
    assert await backend.migrate(config) == newest  # type: ignore[attr-defined]
    assert await backend.schema_version(config) == newest  # type: ignore[attr-defined]


async def test_the_migration_scripts_create_a_valid_schema(fresh: str) -> None:
    backend = find_backend("postgresql")[1]
    config = StoreConfig(
        url=fresh, scheme="postgresql", options=parse_options(fresh), clock=None, migrate=True
    )
    connection = await asyncpg.connect(
        host=str(parse_options(fresh)["host"]), user="postgres", database="postgres"
    )
    for _, _, script in backend.migrations(config):  # type: ignore[attr-defined]
        await connection.execute(script)
    await connection.close()
    async with open_store(fresh, migrate=False) as store:
        await store.ping()


def parse_options(url: str) -> dict[str, object]:
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
