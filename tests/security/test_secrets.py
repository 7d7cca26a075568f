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
from tests.security.watch import (
    CANARY,
    ENCODED,
    NAMED,
    PASSWORD,
    Watch,
    exercise,
    watching,
    watching_loop,
)

TABLES = (
    *("runs", "steps", "attempts", "controls", "idempotency_keys", "waiters", "deliveries", "outputs"),
    *("events", "run_changes", "unsearched", "commits"),
)


@pytest.fixture
async def watch() -> AsyncIterator[Watch]:
    async with watching_loop() as watch:
        yield watch
    watch.check()


@pytest.fixture
async def postgresql(postgresql_url: str) -> AsyncIterator[str]:
    async with find_backend("postgresql")[1].scratch(postgresql_url) as url:
        yield url


async def _server(url: str) -> asyncpg.Connection:
    query = parse_qs(urlsplit(url).query)
    return await asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")


def _schema(url: str) -> str:
    return parse_qs(urlsplit(url).query)["schema"][0]


async def test_that_nothing_shows_when_all_is_well(store: FlowStore, watch: Watch) -> None:
    # Most operations are called on a run in a wrong state as well, so the contract's errors are seen.
    assert await exercise(store, watch) >= 5
    assert await exercise(store, watch, other_run := uuid4(), source_run_id=other_run) >= 5


async def test_that_the_watch_records_every_output() -> None:
    """The negative: each way in which a secret could show is noticed."""

    def leak(explain: Callable[[Watch], Any]) -> None:
        with watching() as watch:
            explain(watch)
        with pytest.raises(AssertionError):
            watch.check()

    def chained(error: FlowStoreError) -> FlowStoreError:
        error.__context__, error.__suppress_context__ = ValueError(ENCODED), True
        return error

    leak(lambda watch: logging.getLogger("any").debug("row %s", CANARY))
    leak(lambda watch: logging.getLogger("asyncpg").debug("row", extra={"payload": CANARY}))
    leak(lambda watch: watch.catch(ValueError(PASSWORD), "x"))
    leak(lambda watch: watch.catch(chained(StoreUnavailableError("x")), "x"))
    leak(lambda watch: watch.see("answer of x", CANARY))
    leak(lambda watch: watch.see("event loop", NAMED))
    leak(lambda watch: None)


def test_that_foreign_exceptions_are_unchained_and_ours_stay() -> None:
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
async def test_that_a_password_in_a_url_stays_there(url: str, watch: Watch) -> None:
    url = url.format(plain=PASSWORD, encoded=ENCODED)
    driver: dict[str, Any] = {"retry_timeout": 0.0} if url.startswith("postgresql") else {}
    with pytest.raises(FlowStoreError) as caught:
        async with open_store(url, **driver):
            pytest.fail("it opened")
    watch.catch(caught.value, "open_store")


@pytest.mark.parametrize("url", _URLS)
def test_that_the_command_line_shows_no_password(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    url = url.format(plain=PASSWORD, encoded=ENCODED)
    driver = "retry_timeout = 0\n" if url.startswith("postgresql") else ""
    (tmp_path / "flowstore.toml").write_text(f"url = '''{url}'''\n{driver}")
    with watching() as watch:
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
            watch.see(f"output of {command[0]}", out + err)
    watch.check()


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
async def test_that_a_password_in_an_option_stays_there(given: dict[str, Any], watch: Watch) -> None:
    with pytest.raises(FlowStoreError) as caught:
        async with open_store("postgresql://me@127.0.0.1:1/x", **{"retry_timeout": 0.0, **given}):
            pytest.fail("it opened")
    watch.catch(caught.value, "open_store")


async def test_that_a_password_in_the_environment_or_a_passfile_stays_there(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    passfile = tmp_path / "passfile"
    passfile.write_text(f"127.0.0.1:1:x:me:{PASSWORD}\nbroken {PASSWORD}\n")
    for mode in (0o600, 0o644):
        # The driver warns of the second.
        passfile.chmod(mode)
        for variable, value in (("PGPASSWORD", PASSWORD), ("PGPASSFILE", str(passfile))):
            with monkeypatch.context() as patched:
                patched.setenv(variable, value)
                with pytest.raises(StoreUnavailableError) as caught:
                    async with open_store("postgresql://me@127.0.0.1:1/x", retry_timeout=0):
                        pytest.fail("it opened")
                watch.catch(caught.value, variable)


@pytest.mark.parametrize(
    "text", ["url = 'x:{0}'\nurl = '{0}'", "url = '{0}\n", "url = {0}", "{0}", "\udc80url = '{0}'", "url=1"]
)
async def test_that_a_password_in_a_broken_file_stays_there(
    text: str, watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flowstore.toml", "pyproject.toml"):
        head = "[tool.flowstore]\n" if name == "pyproject.toml" else ""
        content = head + text.format(f"postgresql://me:{ENCODED}@host/db")
        (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigurationError) as caught:
            async with open_store():
                pytest.fail("it opened")
        watch.catch(caught.value, name)
        (tmp_path / name).unlink()


async def test_that_a_store_and_its_parts_show_no_password(postgresql: str, watch: Watch) -> None:
    # The server trusts everyone here, so any password opens.
    async with open_store(postgresql, password=PASSWORD) as store:
        await store.ping()
        todo: list[Any] = [store]
        seen: set[int] = set()
        while todo:
            one = todo.pop()
            if id(one) in seen or len(seen) > 2000 or type(one).__module__ == "asyncpg.connect_utils":
                # The driver's own parameters hold it, of course; nothing of ours shows them.
                continue
            seen.add(id(one))
            if type(one).__module__.startswith("flowstore"):
                watch.see(f"repr of {type(one).__name__}", repr(one))
                slots = getattr(type(one), "__slots__", ())
                todo += [*vars(one).values()] if hasattr(one, "__dict__") else []
                todo += [getattr(one, name, None) for name in slots]


# Rows


async def test_that_refused_rows_stay_in_postgresql(postgresql: str, watch: Watch) -> None:
    """A constraint of somebody else's: the server's DETAIL holds the whole row."""
    schema = _schema(postgresql)
    server = await _server(postgresql)
    try:
        async with open_store(postgresql, retry_timeout=0.2) as store:
            # One that is there, so that updates are refused too.
            await exercise(store, watch, present := uuid4())
            raised = len(watch.errors)
            for table in TABLES:
                name = f'"{schema}".{table}'
                await server.execute(f"ALTER TABLE {name} ADD CONSTRAINT strange CHECK (false) NOT VALID")
                await exercise(store, watch, rounds=1)
                await exercise(store, watch, present, rounds=1)
                await server.execute(f"ALTER TABLE {name} DROP CONSTRAINT strange")
            await server.execute(
                f'CREATE FUNCTION "{schema}".tell() RETURNS trigger LANGUAGE plpgsql AS '
                "$$ BEGIN RAISE EXCEPTION 'refused: %', NEW USING HINT = NEW::text; END $$"
            )
            for table in TABLES:
                name = f'"{schema}".{table}'
                await server.execute(
                    f"CREATE TRIGGER tell BEFORE INSERT OR UPDATE ON {name} FOR EACH ROW "
                    f'EXECUTE FUNCTION "{schema}".tell()'
                )
                await exercise(store, watch, rounds=1)
                await server.execute(f"DROP TRIGGER tell ON {name}")
            assert len(watch.errors) > raised + 2 * len(TABLES)
            assert any("SQLSTATE 23514, constraint strange" in str(error) for error in watch.errors)
            assert any("SQLSTATE P0001" in str(error) for error in watch.errors)
    finally:
        await server.close()


async def test_that_rows_stay_out_of_sight_when_postgresql_fails(postgresql: str, watch: Watch) -> None:
    """Killed connections, locks, time-outs, lacking tables, a closed store."""
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
                await exercise(store, watch)
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
            assert await exercise(store, watch, rounds=1)
            await server.execute("ROLLBACK")
            for table in ("events", "waiters", "controls", "steps", "runs"):
                await server.execute(f'ALTER TABLE "{schema}".{table} RENAME TO lacking')
                assert await exercise(store, watch, rounds=1)
                await server.execute(f'ALTER TABLE "{schema}".lacking RENAME TO {table}')
        assert await exercise(store, watch, rounds=1)
    finally:
        await server.close()


async def test_that_cancelled_calls_reveal_nothing(store: FlowStore, watch: Watch) -> None:
    loop = asyncio.get_running_loop()
    loop.set_debug(True)
    loop.slow_callback_duration = 0.0
    for steps in range(12):
        task = asyncio.ensure_future(exercise(store, watch))
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    loop.set_debug(False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "flows.db"


async def _break(file: Path, statement: str, *parameters: Any) -> None:
    with closing(sqlite3.connect(file)) as db:
        db.execute(statement, parameters)
        db.commit()


async def test_that_rows_stay_in_sqlite(file: Path, watch: Watch) -> None:
    """Text that is no text, strange triggers and indexes, lacking tables, locks, a closed store."""
    url = f"sqlite:///{file}"
    async with open_store(url, busy_timeout=0) as store:
        await exercise(store, watch, run_id := uuid4())
        spoiled = b"\xff\xfe" + CANARY.encode()
        for table, column in (
            ("runs", "trigger_data"),
            ("steps", "output_json"),
            ("controls", "cancel_reason"),
        ):
            await _break(file, f"UPDATE {table} SET {column} = CAST(? AS TEXT)", spoiled)
        assert await exercise(store, watch, run_id)
        for table in ("runs", "steps", "waiters", "controls"):
            for act in ("INSERT", "UPDATE"):
                # The name of a trigger, not a value, is all that RAISE could tell in older versions.
                await _break(
                    file,
                    f"CREATE TRIGGER strange BEFORE {act} ON {table} BEGIN "
                    "SELECT RAISE(ABORT, 'wAxbill is refused'); END",
                )
                assert await exercise(store, watch)
                await _break(file, "DROP TRIGGER strange")
        await _break(file, "DELETE FROM runs")
        await _break(file, "CREATE UNIQUE INDEX strange ON runs (flow_name)")
        assert await exercise(store, watch)
        assert any("UNIQUE constraint failed: runs.flow_name" in str(error) for error in watch.errors)
        with closing(sqlite3.connect(file, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            assert await exercise(store, watch)
        await _break(file, "ALTER TABLE steps RENAME TO lacking")
        assert await exercise(store, watch)
        assert any("no such table: " in str(error) for error in watch.errors)
    assert await exercise(store, watch)


async def test_that_rows_stay_in_sqlite_when_the_disk_is_full(file: Path, watch: Watch) -> None:
    async with open_store(f"sqlite:///{file}", busy_timeout=0) as store:
        await exercise(store, watch)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        large = f"{CANARY} " * 500_000
        # A write beyond it fails as on a full disk; Python ignores the signal.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, hard))
        try:
            assert await exercise(store, watch, trigger_data=large, input_json=large, output_json=large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", [CANARY.encode() * 1000, b"SQLite format 3\0" + CANARY.encode() * 1000])
async def test_that_a_file_that_is_no_database_is_not_quoted(
    content: bytes, file: Path, watch: Watch
) -> None:
    await asyncio.to_thread(file.write_bytes, content)
    with pytest.raises(FlowStoreError) as caught:
        async with open_store(f"sqlite:///{file}"):
            pytest.fail("it opened")
    watch.catch(caught.value, "open_store")


# Plugins, the command line, the conformance suite


def test_that_a_plugin_that_fails_does_not_make_the_command_line_show_a_password(
    install: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    install("mine", RECORDING.replace("opened.append(config)", "raise RuntimeError(config.url)"))
    url = f"mine://me:{ENCODED}@host/db"
    with watching() as watch:
        for command in (["stats", "--url", url], ["runs", "list", "--url", url]):
            for debug in ("", "1"):
                monkeypatch.setenv("FLOWSTORE_DEBUG", debug)
                assert main(command) == 1
                out, err = capfd.readouterr()
                assert "RuntimeError" in err
                assert ("plugin_of_mine.py" in err) == bool(debug)
                watch.see("output", out + err)
    watch.check()


@pytest.mark.parametrize(
    "command", ["ping", "stats", "runs list", "runs list --search wAxbill", "cleanup --older-than 0s --yes"]
)
def test_that_the_command_line_shows_nothing_of_a_store_that_fails(
    command: str, file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def fill() -> None:
        async with open_store(f"sqlite:///{file}") as store, watching_loop() as watch:
            await exercise(store, watch)
        await _break(file, "UPDATE runs SET flow_name = CAST(? AS TEXT)", b"\xff" + CANARY.encode())
        await _break(file, "DROP TABLE waiters")

    asyncio.run(fill())
    with watching() as watch:
        code = main([*command.split(), "--url", f"sqlite:///{file}"])
        assert code == 0 or command != "ping"
        out, err = capfd.readouterr()
        assert "bug" not in err
        watch.see(f"output of {command}", out + err)
    watch.check()


async def test_that_reports_show_no_password(install: Install, watch: Watch) -> None:
    code = RECORDING.replace("opened.append(config)", "raise RuntimeError(config.url)").replace(
        "yield url", "yield url + '/scratch'"
    )
    install("mine", code)
    for password in (ENCODED, PASSWORD.replace("@", "").replace("?", "").replace("/", "").replace("#", "")):
        with pytest.raises(ConfigurationError) as caught:
            await run_suite(f"mine://me:{password}@host/db?password={ENCODED}", clauses=["RUN-1"])
        watch.catch(caught.value, "run_suite")
