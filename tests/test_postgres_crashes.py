"""CON-3 and CON-5 on PostgreSQL servers that crash or fail over during a commit."""

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
from flowstore_postgres.transactions import Transaction

FLOW = UUID(int=1)
RUN = UUID(int=2)

Hook = Callable[[], Awaitable[Any]]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    # Not in pytest's directory: another pytest process would revoke the server's access to it.
    with TemporaryDirectory() as folder:
        # Uncommitted changes are not flushed to the log, so that a crash loses them.
        async with new_server(Path(folder) / "pg", {"wal_writer_delay": "10s"}) as server:
            yield server


def _replace_next_commit(monkeypatch: pytest.MonkeyPatch, hook: Hook) -> None:
    """Call ``hook`` instead of sending the next COMMIT, and raise a connection error."""
    commit = Transaction.commit
    armed = True

    async def lossy(self: Transaction) -> str:
        nonlocal armed
        if armed:
            armed = False
            await hook()
            raise ConnectionResetError
        return await commit(self)

    monkeypatch.setattr(Transaction, "commit", lossy)


async def test_con_3_a_transaction_id_reused_after_a_crash_does_not_prove_a_commit(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    reused = False

    async def crash() -> None:
        nonlocal reused
        lost_xid = int(
            await server.psql("SELECT backend_xid FROM pg_stat_activity WHERE backend_xid IS NOT NULL")
        )
        await server.kill()
        await server.start()
        while not reused:
            # Another transaction gets the id that the crash lost.
            xid = int(await server.psql("SELECT pg_current_xact_id()::xid"))
            assert xid <= lost_xid, "the crash did not lose the id"
            reused = xid == lost_xid

    async with open_store(server.url()) as store:
        # A run whose key is registered already is stored by several statements and a COMMIT.
        assert await store.try_register_idempotency_key(FLOW, "manual", "k", RUN)
        _replace_next_commit(monkeypatch, crash)
        result = await store.trigger_run(FLOW, "orders", RUN, "manual", idempotency_key="k")
        assert reused
        assert result.created
        run = await store.get_run_detail(RUN)
        assert run is not None, "the acknowledged run does not exist"
        assert run.status is RunStatus.RUNNING


async def _wait_until_commits_wait(server: Server) -> None:
    """Wait until commits wait for a standby, which may take longer than pg_reload_conf()."""
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
async def test_con_3_a_commit_without_a_standby_is_not_acknowledged(name: str, server: Server) -> None:
    # A commit whose wait for the standby is interrupted is committed on this server only.
    async with open_store(server.url(), statement_timeout=1.5, retry_timeout=1.0) as store:
        calls: dict[str, Hook] = {
            "trigger_run": lambda: store.trigger_run(FLOW, "orders", RUN, "manual", idempotency_key="k"),
            "save_output": lambda: store.save_output(FLOW, "key", "1"),
            "try_claim_step": lambda: store.try_claim_step(FLOW, "step", owner="me"),
        }
        await store.start_run(FLOW, "orders", FLOW, "manual")
        await server.psql("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
        await server.psql("SELECT pg_reload_conf()")
        await _wait_until_commits_wait(server)
        with pytest.raises(OutcomeUnknownError):
            await calls[name]()
        await server.psql("ALTER SYSTEM RESET synchronous_standby_names")
        await server.psql("SELECT pg_reload_conf()")
        # Returns when commits no longer wait for a standby.
        await server.psql("SELECT pg_logical_emit_message(true, 'flowstore', '')")
        # The retried call succeeds.
        assert await calls[name]() is not False
