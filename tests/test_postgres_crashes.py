"""CON-3 and CON-5 on PostgreSQL servers that crash or are failed over in the worst of moments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID

import pytest

from flowstore_chaos.server import Server, new_server
from flowstore_core import OutcomeUnknownError, RunStatus, open_store
from flowstore_postgres.transactions import COMMIT, Transaction

FLOW = UUID(int=1)
RUN = UUID(int=2)

Hook = Callable[[], Awaitable[Any]]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    # Not in pytest's folder, which the server's user cannot reach when another pytest begins meanwhile.
    with TemporaryDirectory() as folder:
        # What is not committed stays out of the log on disk, and is forgotten by a crash.
        async with new_server(Path(folder) / "pg", {"wal_writer_delay": "10s"}) as one:
            yield one


def _instead_of_commit(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    """The next COMMIT is never sent: ``hook`` runs, and the connection is found broken."""
    execute = Transaction.execute
    armed = True

    async def lossy(self: Transaction, statement: str, *arguments: object) -> Any:
        nonlocal armed
        if armed and statement == COMMIT:
            armed = False
            await hook()
            raise ConnectionResetError
        return await execute(self, statement, *arguments)

    monkeypatch.setattr(Transaction, "execute", lossy)


async def test_con_3_a_transaction_id_that_a_crash_gave_to_another_proves_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = False

    async def crash() -> None:
        nonlocal reused
        lost = int(
            await server.psql("SELECT backend_xid FROM pg_stat_activity WHERE backend_xid IS NOT NULL")
        )
        await server.kill()
        await server.start()
        while not reused:
            # A COMMIT of somebody else's, with the id that the crash has forgotten.
            taken = int(await server.psql("SELECT pg_current_xact_id()::xid"))
            assert taken <= lost, "the id was not forgotten"
            reused = taken == lost

    async with open_store(server.url()) as store:
        await store.ping()
        _instead_of_commit(monkeypatch, crash)
        result = await store.trigger_run(FLOW, "orders", RUN, "manual", idempotency_key="k")
        assert reused
        assert result.created
        run = await store.get_run_detail(RUN)
        assert run is not None, "the run was acknowledged, and is not there"
        assert run.status is RunStatus.RUNNING


async def _commits_wait(server: Server) -> None:
    """Until commits wait for a standby: on a busy machine that is long after pg_reload_conf() returned."""
    while True:
        commit = asyncio.create_task(server.psql("SELECT pg_logical_emit_message(true, 'flowstore', '')"))
        waiting = ""
        while not waiting and not commit.done():
            waiting = await server.psql(
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            )
        await commit
        if waiting:
            return


@pytest.mark.parametrize("name", ["trigger_run", "save_output", "try_claim_step"])
async def test_con_3_a_commit_that_no_standby_has_is_not_acknowledged(name: str, server: Server) -> None:
    # Whose wait for the standby is broken off has committed all the same, on this server alone.
    async with open_store(server.url(), statement_timeout=1.5, retry_timeout=1.0) as store:
        calls: dict[str, Hook] = {
            "trigger_run": lambda: store.trigger_run(FLOW, "orders", RUN, "manual", idempotency_key="k"),
            "save_output": lambda: store.save_output(FLOW, "key", "1"),
            "try_claim_step": lambda: store.try_claim_step(FLOW, "step", owner="me"),
        }
        await store.start_run(FLOW, "orders", FLOW, "manual")
        await server.psql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await server.psql("SELECT pg_reload_conf()")
        await _commits_wait(server)
        with pytest.raises(OutcomeUnknownError):
            await calls[name]()
        await server.psql("ALTER SYSTEM RESET synchronous_standby_names")
        await server.psql("SELECT pg_reload_conf()")
        # Said again it is as true as ever.
        assert await calls[name]() is not False
