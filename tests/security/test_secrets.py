"""No password and no row content in any message, repr, log record, traceback, report or output."""

from __future__ import annotations

import asyncio
import logging
import resource
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import asyncpg
import pytest
from flowstore_conformance.suite import run_suite

from flowstore_cli.main import main
from flowstore_core import (
    ConfigurationError,
    FlowStore,
    FlowStoreError,
    StoreUnavailableError,
    open_store,
)
from flowstore_core.errors import strip_driver_exceptions
from flowstore_core.plugins import find_backend
from tests.core.conftest import RECORDING, Install
from tests.security.leaks import (
    CANARY,
    ENCODED,
    NAME_CANARY,
    PASSWORD,
    LeakDetector,
    detect_leaks,
    detect_leaks_in_loop,
    exercise,
)

TABLES = (
    *("runs", "steps", "attempts", "controls", "idempotency_keys", "waiters", "deliveries", "outputs"),
    *("events", "buffered_signals", "run_changes", "unsearched", "commits"),
)


@pytest.fixture
async def detector() -> AsyncIterator[LeakDetector]:
    async with detect_leaks_in_loop() as detector:
        yield detector
    detector.assert_no_leaks()


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[str]:
    async with find_backend("postgresql")[1].scratch(postgresql_url) as url:
        yield url


async def _server(url: str) -> asyncpg.Connection:
    query = parse_qs(urlsplit(url).query)
    return await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")


def _schema(url: str) -> str:
    return parse_qs(urlsplit(url).query)["schema"][0]


async def test_contract_errors_and_results_leak_nothing(store: FlowStore, detector: LeakDetector) -> None:
    # The second round calls most operations in an invalid state, so the contract's errors are recorded too.
    assert await exercise(store, detector) >= 5
    assert await exercise(store, detector, retried_run := uuid4(), source_run_id=retried_run) >= 5


async def test_the_detector_finds_a_leak_in_every_output() -> None:
    """Each kind of output with a secret fails, and so does a detector without records."""

    def assert_detected(leak: Callable[[LeakDetector], Any]) -> None:
        with detect_leaks() as detector:
            leak(detector)
        with pytest.raises(AssertionError):
            detector.assert_no_leaks()

    def chained(error: FlowStoreError) -> FlowStoreError:
        error.__context__, error.__suppress_context__ = ValueError(ENCODED), True
        return error

    assert_detected(lambda detector: logging.getLogger("any").debug("row %s", CANARY))
    assert_detected(lambda detector: logging.getLogger("asyncpg").debug("row", extra={"payload": CANARY}))
    assert_detected(lambda detector: detector.record_error(ValueError(PASSWORD), "x"))
    assert_detected(lambda detector: detector.record_error(chained(StoreUnavailableError("x")), "x"))
    assert_detected(lambda detector: detector.record("result of x", CANARY))
    assert_detected(lambda detector: detector.record("event loop", NAME_CANARY))
    assert_detected(lambda detector: None)


def test_only_exceptions_of_flowstore_remain_chained() -> None:
    first, second, third = StoreUnavailableError("1"), ConfigurationError("2"), StoreUnavailableError("3")
    first.__context__, second.__cause__, third.__context__ = second, third, ValueError(CANARY)
    third.__cause__ = KeyError(CANARY)
    assert strip_driver_exceptions(first) is first
    assert first.__context__ is second
    assert second.__cause__ is third
    assert third.__cause__ is None
    assert third.__context__ is None


# Passwords

_URLS = (
    "postgresql://me:{encoded}@127.0.0.1:1/db",
    "postgresql://me:{plain}@127.0.0.1:1/db",
    "postgresql://me:{encoded}@127.0.0.1:1/db?bogus=1",
    "postgresql://me:{encoded}@127.0.0.1:1/db?pool_size=none",
    "postgresql://me:{encoded}@127.0.0.1:1/db?sslmode=bogus",
    "postgresql://me:{encoded}@127.0.0.1:1/db?sslmode=verify-full&sslrootcert=/nowhere/{encoded}",
    "postgresql://me:{encoded}@127.0.0.1:1/db?target_session_attrs={encoded}",
    "postgresql://me:{encoded}@[::1/db",
    "postgresql://me:{encoded}@127.0.0.1:port/db",
    "postgresql://me:{encoded}@127.0.0.1:1,127.0.0.1:x/db",
    "postgresql://me:{encoded}@\u2100/db",
    "postgresql://127.0.0.1:1/db?user=me&password={encoded}",
    "postgresql://127.0.0.1:1/db?user=me&password={encoded}&password={encoded}",
    "postgresql://127.0.0.1:1/db?user=me&{encoded}={encoded}",
    "postgresql://me:{plain}&x=1&x=1@127.0.0.1:1/db",
    "postgresql:/me:{encoded}@127.0.0.1:1/db",
    "postgresql:me:{plain}://127.0.0.1:1/db",
    "me:{encoded}@127.0.0.1:1/db",
    "{plain}",
    "nobody://me:{encoded}@127.0.0.1:1/db",
    "nobody{plain}://x",
    "mysql+{encoded}://x",
    "sqlite://me:{encoded}@host/x.db",
    "sqlite://me:{plain}@[::1/x.db",
    "memory://me:{encoded}@host",
)


@pytest.mark.parametrize("url", _URLS)
async def test_errors_do_not_show_a_password_in_a_url(url: str, detector: LeakDetector) -> None:
    url = url.format(plain=PASSWORD, encoded=ENCODED)
    driver: dict[str, Any] = {"retry_timeout": 0.0} if url.startswith("postgresql") else {}
    with pytest.raises(FlowStoreError) as caught:
        async with open_store(url, **driver):
            pytest.fail("open_store succeeded")
    detector.record_error(caught.value, "open_store")


@pytest.mark.parametrize("url", _URLS)
def test_the_command_line_shows_no_password(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    url = url.format(plain=PASSWORD, encoded=ENCODED)
    driver = "retry_timeout = 0\n" if url.startswith("postgresql") else ""
    (tmp_path / "flowstore.toml").write_text(f"url = '''{url}'''\n{driver}")
    with detect_leaks() as detector:
        for command in (
            ["ping"],
            ["stats"],
            ["runs", "list", "--url", url],
            ["migrate", "status"],
            ["migrate", "up"],
            ["conformance", url, "--profile", "quick", "--clause", "INP-1"],
        ):
            assert main(command) in (0, 2, 3)
            out, err = capfd.readouterr()
            assert "bug" not in err
            detector.record(f"output of {command[0]}", out + err)
    detector.assert_no_leaks()


@pytest.mark.parametrize(
    "given",
    [
        {"password": PASSWORD},
        {"password": PASSWORD, "pool_size": PASSWORD},
        {"password": PASSWORD, "schema": PASSWORD * 9},
        {"password": PASSWORD, PASSWORD: 1},
        {"password": PASSWORD, "sslmode": "verify-full", "sslrootcert": PASSWORD},
        {"passfile": PASSWORD},
        {"password": 5, "statement_timeout": PASSWORD},
    ],
)
async def test_errors_do_not_show_a_password_in_an_option(
    given: dict[str, Any], detector: LeakDetector
) -> None:
    with pytest.raises(FlowStoreError) as caught:
        async with open_store("postgresql://me@127.0.0.1:1/x", **{"retry_timeout": 0.0, **given}):
            pytest.fail("open_store succeeded")
    detector.record_error(caught.value, "open_store")


async def test_errors_do_not_show_a_password_in_the_environment_or_a_passfile(
    detector: LeakDetector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passfile = tmp_path / "passfile"
    passfile.write_text(f"127.0.0.1:1:x:me:{PASSWORD}\nbroken {PASSWORD}\n")
    for mode in (0o600, 0o644):
        # The driver warns about the second mode.
        passfile.chmod(mode)
        for variable, value in (("PGPASSWORD", PASSWORD), ("PGPASSFILE", str(passfile))):
            with monkeypatch.context() as patched:
                patched.setenv(variable, value)
                with pytest.raises(StoreUnavailableError) as caught:
                    async with open_store("postgresql://me@127.0.0.1:1/x", retry_timeout=0):
                        pytest.fail("open_store succeeded")
                detector.record_error(caught.value, variable)


@pytest.mark.parametrize(
    "text", ["url = 'x:{0}'\nurl = '{0}'", "url = '{0}\n", "url = {0}", "{0}", "\udc80url = '{0}'", "url=1"]
)
async def test_errors_do_not_show_a_password_in_an_invalid_configuration_file(
    text: str, detector: LeakDetector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flowstore.toml", "pyproject.toml"):
        head = "[tool.flowstore]\n" if name == "pyproject.toml" else ""
        content = head + text.format(f"postgresql://me:{ENCODED}@host/db")
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigurationError) as caught:
            async with open_store():
                pytest.fail("open_store succeeded")
        detector.record_error(caught.value, name)
        (tmp_path / name).unlink()


async def test_no_repr_of_a_store_or_its_parts_shows_a_password(
    postgresql: str, detector: LeakDetector
) -> None:
    # This server trusts every client, so it accepts any password.
    async with open_store(postgresql, password=PASSWORD) as store:
        await store.ping()
        pending: list[Any] = [store]
        visited: set[int] = set()
        while pending:
            one = pending.pop()
            if id(one) in visited or len(visited) > 2000 or type(one).__module__ == "asyncpg.connect_utils":
                # The driver's connection parameters contain the password; no repr of flowstore shows them.
                continue
            visited.add(id(one))
            if type(one).__module__.startswith("flowstore"):
                detector.record(f"repr of {type(one).__name__}", repr(one))
                slots = getattr(type(one), "__slots__", ())
                pending += [*vars(one).values()] if hasattr(one, "__dict__") else []
                pending += [getattr(one, name, None) for name in slots]


# Rows


async def test_errors_do_not_show_rows_refused_by_postgresql(postgresql: str, detector: LeakDetector) -> None:
    """The server's DETAIL for a violated constraint contains the whole row."""
    schema = _schema(postgresql)
    server = await _server(postgresql)
    try:
        async with open_store(postgresql, retry_timeout=0.2) as store:
            # A run that exists, so that updates are refused too.
            await exercise(store, detector, existing := uuid4())
            raised = len(detector.errors)
            for table in TABLES:
                name = f'"{schema}".{table}'
                await server.execute(f"ALTER TABLE {name} ADD CONSTRAINT added CHECK (false) NOT VALID")
                await exercise(store, detector, rounds=1)
                await exercise(store, detector, existing, rounds=1)
                await server.execute(f"ALTER TABLE {name} DROP CONSTRAINT added")
            await server.execute(
                f'CREATE FUNCTION "{schema}".refuse() RETURNS trigger LANGUAGE plpgsql AS '
                "$$ BEGIN RAISE EXCEPTION 'refused: %', NEW USING HINT = NEW::text; END $$"
            )
            for table in TABLES:
                name = f'"{schema}".{table}'
                await server.execute(
                    f"CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW "
                    f'EXECUTE FUNCTION "{schema}".refuse()'
                )
                await exercise(store, detector, rounds=1)
                await server.execute(f"DROP TRIGGER refuse ON {name}")
            assert len(detector.errors) > raised + 2 * len(TABLES)
            assert any("SQLSTATE 23514, constraint added" in str(error) for error in detector.errors)
            assert any("SQLSTATE P0001" in str(error) for error in detector.errors)
    finally:
        await server.close()


async def test_errors_do_not_show_rows_when_postgresql_fails(postgresql: str, detector: LeakDetector) -> None:
    """Killed connections, locks, time-outs, missing tables, a closed store."""
    schema = _schema(postgresql)
    server = await _server(postgresql)
    killing = True

    async def kill() -> None:
        while killing:
            await server.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name = 'victim' AND random() < 0.5"
            )
            await asyncio.sleep(0.005)

    try:
        async with open_store(postgresql, application_name="victim", retry_timeout=0.1) as store:
            killer = asyncio.create_task(kill())
            for _ in range(3):
                await exercise(store, detector)
            killing = False
            await killer
        limits: dict[str, Any] = {
            "statement_timeout": 0.1,
            "retry_timeout": 0.1,
            "acquire_timeout": 0.2,
            "pool_size": 1,
        }
        async with open_store(postgresql, **limits) as store:
            await server.execute("BEGIN")
            await server.execute(f'LOCK TABLE "{schema}".runs, "{schema}".steps IN ACCESS EXCLUSIVE MODE')
            assert await exercise(store, detector, rounds=1)
            await server.execute("ROLLBACK")
            for table in ("events", "waiters", "controls", "steps", "runs"):
                await server.execute(f'ALTER TABLE "{schema}".{table} RENAME TO missing')
                assert await exercise(store, detector, rounds=1)
                await server.execute(f'ALTER TABLE "{schema}".missing RENAME TO {table}')
        assert await exercise(store, detector, rounds=1)
    finally:
        await server.close()


async def test_cancelled_calls_leak_nothing(store: FlowStore, detector: LeakDetector) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0
    for steps in range(12):
        task = asyncio.ensure_future(exercise(store, detector))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    loop.set_debug(False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flows.db"


async def _execute(file: Path, statement: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute(statement, parameters)
        db.commit()


async def test_errors_do_not_show_rows_of_sqlite(file: Path, detector: LeakDetector) -> None:
    """Invalid UTF-8, added triggers and indexes, locks, missing tables, a closed store."""
    url = f"sqlite:///{file}"
    async with open_store(url, busy_timeout=0) as store:
        await exercise(store, detector, run_id := uuid4())
        invalid = b"\xff\xfe" + CANARY.encode()
        for table, column in (
            ("runs", "trigger_data"),
            ("steps", "output_json"),
            ("controls", "cancel_reason"),
        ):
            await _execute(file, f"UPDATE {table} SET {column} = CAST(? AS TEXT)", invalid)
        assert await exercise(store, detector, run_id)
        for table in ("runs", "steps", "waiters", "controls"):
            for event in ("INSERT", "UPDATE"):
                # In older versions of SQLite the message of RAISE is a constant.
                await _execute(
                    file,
                    f"CREATE TRIGGER added BEFORE {event} ON {table} BEGIN "
                    "SELECT RAISE(ABORT, 'wAxbill is refused'); END",
                )
                assert await exercise(store, detector)
                await _execute(file, "DROP TRIGGER added")
        await _execute(file, "DELETE FROM runs")
        await _execute(file, "CREATE UNIQUE INDEX added ON runs (flow_name)")
        assert await exercise(store, detector)
        assert any("UNIQUE constraint failed: runs.flow_name" in str(error) for error in detector.errors)
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            assert await exercise(store, detector)
        await _execute(file, "ALTER TABLE steps RENAME TO missing")
        assert await exercise(store, detector)
        assert any("no such table: " in str(error) for error in detector.errors)
    assert await exercise(store, detector)


async def test_errors_do_not_show_rows_when_the_disk_is_full(file: Path, detector: LeakDetector) -> None:
    async with open_store(f"sqlite:///{file}", busy_timeout=0) as store:
        await exercise(store, detector)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        large = f"{CANARY} " * 500_000
        # A write beyond the limit fails as on a full disk; Python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))
        try:
            assert await exercise(store, detector, trigger_data=large, input_json=large, output_json=large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", [CANARY.encode() * 1000, b"SQLite format 3\0" + CANARY.encode() * 1000])
async def test_errors_do_not_show_the_content_of_an_invalid_database(
    content: bytes, file: Path, detector: LeakDetector
) -> None:
    await asyncio.to_thread(file.write_bytes, content)
    with pytest.raises(FlowStoreError) as caught:
        async with open_store(f"sqlite:///{file}"):
            pytest.fail("open_store succeeded")
    detector.record_error(caught.value, "open_store")


# Plugins, the command line, the conformance suite


def test_the_command_line_shows_no_password_when_a_plugin_fails(
    install: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install("mine", RECORDING.replace("opened.append(config)", "raise RuntimeError(config.url)"))
    url = f"mine://me:{ENCODED}@host/db"
    with detect_leaks() as detector:
        for command in (["stats", "--url", url], ["runs", "list", "--url", url]):
            for debug in ("", "1"):
                monkeypatch.setenv("FLOWSTORE_DEBUG", debug)
                assert main(command) == 1
                out, err = capfd.readouterr()
                assert "RuntimeError" in err
                assert ("plugin_of_mine.py" in err) == bool(debug)
                detector.record("output", out + err)
    detector.assert_no_leaks()


@pytest.mark.parametrize(
    "command", ["ping", "stats", "runs list", "runs list --search wAxbill", "cleanup --older-than 0s --yes"]
)
def test_the_command_line_shows_no_data_when_a_store_fails(
    command: str, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        async with open_store(f"sqlite:///{file}") as store, detect_leaks_in_loop() as detector:
            await exercise(store, detector)
        await _execute(file, "UPDATE runs SET flow_name = CAST(? AS TEXT)", b"\xff" + CANARY.encode())
        await _execute(file, "DROP TABLE waiters")

    asyncio.run(fill())
    with detect_leaks() as detector:
        code = main([*command.split(), "--url", f"sqlite:///{file}"])
        assert code == 0 or command != "ping"
        out, err = capfd.readouterr()
        assert "bug" not in err
        detector.record(f"output of {command}", out + err)
    detector.assert_no_leaks()


async def test_reports_show_no_password(install: Install, detector: LeakDetector) -> None:
    code = RECORDING.replace("opened.append(config)", "raise RuntimeError(config.url)").replace(
        "yield url", "yield url + '/scratch'"
    )
    install("mine", code)
    for password in (ENCODED, PASSWORD.replace("@", "").replace("?", "").replace("/", "").replace("#", "")):
        with pytest.raises(ConfigurationError) as caught:
            await run_suite(f"mine://me:{password}@host/db?password={ENCODED}", clauses=["RUN-1"])
        detector.record_error(caught.value, "run_suite")
