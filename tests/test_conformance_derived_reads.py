"""The check of repeated reads covers every read, and explains a stale one."""

from __future__ import annotations

import inspect
from datetime import UTC, datetime
from typing import NoReturn
from uuid import UUID

import pytest
from flowstore_conformance.checks.derived_reads import reads_of, values_by_parameter
from flowstore_conformance.context import CheckContext, Profile, Unsupported
from flowstore_conformance.status import Status

from flowstore_core import Capability, FlowStore, RunPosition, RunStatus
from flowstore_core.operations import OPERATIONS
from flowstore_memory.store import SharedStore
from tests.mutants.derived_reads import caches
from tests.test_conformance_races import make_wrong, run

NOW = datetime(2026, 3, 14, 9, 26, 53, 589793, UTC)
READS = [one.name for one in OPERATIONS.values() if not (one.writes or one.is_hint)]


@caches("get_run_status", keeps=lambda status: status is not None and status.is_terminal)
class TerminalStatusKept(SharedStore):
    """Keeps terminal statuses in each store until it writes itself."""


@pytest.mark.parametrize("read", READS)
def test_every_parameter_of_every_read_is_varied(read: str) -> None:
    position = RunPosition(started_at=NOW, run_id=UUID(int=2))
    values = values_by_parameter(UUID(int=1), UUID(int=3), position)
    calls = [call for call in reads_of(values, frozenset(Capability)) if call.method == read]
    parameters = inspect.signature(getattr(FlowStore, read)).parameters.keys() - {"self"}
    assert {name for call in calls for name in call.arguments} == parameters


async def test_a_stale_read_is_told_from_a_missing_write(monkeypatch: pytest.MonkeyPatch) -> None:
    make_wrong(monkeypatch, TerminalStatusKept)
    result = await run("every_read_shows_every_write")
    failure = result.failure
    assert failure is not None
    assert failure.clause == "CLM-2"
    assert "(the result of the same call before cleanup by another store)" in failure.message
    assert "a newly opened store returns the expected result" in failure.message
    assert failure.program is not None
    assert " as store, open_store(url, clock=lambda: now) as second_store:" in failure.program
    assert "store.get_run_status(" in failure.program
    assert "second_store.cleanup(" in failure.program
    assert "get_statistics" not in failure.program


class StatusKept(SharedStore):
    """Keeps the first status of each run permanently."""

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        kept: dict[UUID, RunStatus | None] = self.__dict__.setdefault("kept", {})
        return kept.setdefault(run_id, await super().get_run_status(run_id))


async def test_one_store_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(context: CheckContext, *given: object, **options: object) -> NoReturn:
        raise Unsupported("only one store may be open")

    for name in ("open", "other_stores"):
        monkeypatch.setattr(CheckContext, name, refuse)
    for check in ("every_read_shows_every_write", "call_sequences_agree_with_the_model"):
        result = await run(check, Profile.QUICK)
        assert result.status is Status.PASS
    make_wrong(monkeypatch, StatusKept)
    result = await run("every_read_shows_every_write", Profile.QUICK)
    assert result.failure is not None
    assert "get_run_status: expected" in result.failure.message
    assert result.failure.program is not None
    assert "second_store" not in result.failure.program
