"""Limits that only a database sees become LimitExceededError, and change nothing (LIM-2)."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest

from flowstore_cli.main import main
from flowstore_core import LimitExceededError, new_run_id, open_store
from flowstore_documents import Change, TooLarge, Version
from flowstore_documents.memory_space import MemoryData, MemorySpace
from flowstore_postgres.errors import describe
from flowstore_sqlite.errors import map_error
from tests.documents_backend.stores import open_on
from tests.limited_backend import DIST

FLOW = UUID(int=1)


async def test_postgresql_names_a_limit_of_the_server(admin: asyncpg.Connection) -> None:
    await admin.execute('CREATE TEMPORARY TABLE keys (key text COLLATE "C" PRIMARY KEY)')
    with pytest.raises(asyncpg.ProgramLimitExceededError) as refused:
        await admin.execute(
            "INSERT INTO keys SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) AS n"
        )
    error = describe(refused.value)
    assert isinstance(error, LimitExceededError)
    assert (error.backend, error.database_code) == ("postgresql", "54000")


def test_sqlite_names_a_limit_of_its_library() -> None:
    with sqlite3.connect(":memory:") as db:
        db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)
        with pytest.raises(sqlite3.Error) as refused:
            db.execute("SELECT hex(randomblob(900))").fetchall()
    db.close()
    error = map_error(refused.value, "flows.db")
    assert isinstance(error, LimitExceededError)
    assert (error.backend, error.database_code) == ("sqlite", "SQLITE_TOOBIG")


async def test_the_document_toolkit_names_a_limit_of_the_space() -> None:
    class SmallSpace(MemorySpace):
        async def commit(self, changes: Sequence[Change]) -> Sequence[Version | None]:
            if any(len(value) > 5_000 for change in changes for value in change.puts.values()):
                raise TooLarge("5,000 bytes in one value")
            return await super().commit(changes)

    run_id = new_run_id()
    async with open_on(SmallSpace(MemoryData())) as backend_store:
        store = backend_store
        await store.start_run(
            flow_id=FLOW,
            flow_name="orders",
            run_id=run_id,
            trigger_key="manual",
            trigger_data=None,
            job_id=None,
            source_run_id=None,
        )
        await store.save_output(run_id=run_id, key="small", value_json="1")
        with pytest.raises(LimitExceededError) as refused:
            await store.save_output(run_id=run_id, key="large", value_json="x" * 5_200)
        assert (refused.value.backend, refused.value.limit) == ("documents", "5,000 bytes in one value")
        assert await store.get_outputs(run_id=run_id, prefix="", after=None, take=None) == {"small": "1"}


def test_a_copy_reports_the_runs_that_the_target_cannot_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DIST)
    origin, large = f"sqlite:///{tmp_path}/origin.db", new_run_id()

    async def fill() -> None:
        async with open_store(origin) as store:
            for run_id in (new_run_id(), large, new_run_id()):
                text = "x" * (65_537 if run_id == large else 10)
                await store.start_run(FLOW, "orders", run_id, "manual", trigger_data=text)

    asyncio.run(fill())
    assert main(["copy", origin, "limited://copies", "--engines-stopped"]) == 1
    printed = capsys.readouterr()
    assert str(large) in printed.err + printed.out
    assert "the limit of backend 'limited'" in printed.err + printed.out

    async def count() -> int:
        async with open_store("limited://copies") as store:
            return len(await store.get_runs())

    assert asyncio.run(count()) == 2


def test_the_command_line_shows_limits_and_clocks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(DIST)
    assert main(["backends", "--json"]) == 0
    found = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["limited"]["limits"]["run_steps"] == 10_000
    assert found["postgresql"]["limits"]["run_steps"] is None
    assert found["postgresql"]["max_skew_seconds"] == 0
    assert found["sqlite"]["max_skew_seconds"] is None
    assert main(["ping", "--url", "limited://", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["limits"] == found["limited"]["limits"]
    assert main(["ping", "--url", "limited://"]) == 0
    assert "at most texts of 65,536 bytes" in capsys.readouterr().out
