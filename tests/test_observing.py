"""Log records and the reports of backends to observers."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from flowstore_chaos.proxy import Fault, proxy_before
from flowstore_core import Capability, FlowStore, OutcomeUnknownError, StepStatus, StoreConfig, open_store
from flowstore_core.instrumentation import Observers, Resolution
from flowstore_core.plugins import find_backend
from tests.calls import new_run, together

LOGGERS = ("flowstore_core", "flowstore_memory", "flowstore_sqlite", "flowstore_postgres", "flowstore_replay")
CANARY = "canary-7f3a"


class Recorder:
    """An observer that records every report."""

    def __init__(self) -> None:
        self.retries: list[tuple[str, str]] = []
        self.batches: list[tuple[str, int]] = []
        self.waits: list[float] = []
        self.unknown_outcomes: list[tuple[str, Resolution, int]] = []

    def retried(self, operation: str, reason: str, wait: float) -> None:
        assert wait > 0
        self.retries.append((operation, reason))

    def batch(self, operation: str, size: int, waited: float) -> None:
        self.batches.append((operation, size))
        self.waits.append(waited)

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int) -> None:
        self.unknown_outcomes.append((operation, resolution, calls))


def _add_observers(monkeypatch: pytest.MonkeyPatch, *observers: Any) -> list[Any]:
    """Append observers to every opened store, as a wrapper plugin does."""
    opened = []

    def wrap(store: Any, config: StoreConfig, plugin: Any) -> Any:
        config.observers.extend(observers)
        opened.append(store)
        return store

    monkeypatch.setattr("flowstore_core.open.wrap_store", wrap)
    return opened


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    _add_observers(monkeypatch, recorder)
    return recorder


@pytest.fixture
def records() -> Iterator[list[logging.LogRecord]]:
    """The records of flowstore's loggers at level debug."""
    captured: list[logging.LogRecord] = []

    class CapturingHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            record.getMessage()
            captured.append(record)

    handler = CapturingHandler()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield captured
    for name in LOGGERS:
        logging.getLogger(name).removeHandler(handler)
        logging.getLogger(name).setLevel(logging.NOTSET)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name.startswith("flowstore.")}


# Batches


@pytest.mark.needs(Capability.DURABLE)
async def test_batches_are_reported(
    namespace: str, recorder: Recorder, records: list[logging.LogRecord]
) -> None:
    async with open_store(namespace) as store:
        run_id = await new_run(store)
        recorder.batches.clear()
        assert await together(store.try_claim_step(run_id, f"s{n}") for n in range(40)) == [True] * 40
    names = {name for name, _ in recorder.batches}
    assert names == {"write"} or names == {"try_claim_step"}
    assert sum(size for _, size in recorder.batches) == 40
    assert max(size for _, size in recorder.batches) > 1
    assert all(0 <= wait < 30 for wait in recorder.waits)
    batches = [record for record in records if "flowstore.batch_size" in _fields(record)]
    assert {record.levelno for record in batches} == {logging.DEBUG}
    assert set(_fields(batches[-1])) == {
        "flowstore.operation",
        "flowstore.batch_size",
        "flowstore.wait_seconds",
    }


async def test_batches_are_not_reported_without_observer_or_debug_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("a batch was reported")

    monkeypatch.setattr("flowstore_core.batching.scheduler.report_batch", fail)
    async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
        await new_run(store)


async def test_a_failing_observer_does_not_affect_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Callable[..., None]:
            def fail(*arguments: object) -> None:
                raise RuntimeError(CANARY)

            return fail

    recorder = Recorder()
    _add_observers(monkeypatch, Broken(), recorder)
    async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
        await new_run(store)
    assert recorder.batches
    assert any(
        record.levelno == logging.WARNING and "RuntimeError" in record.getMessage() for record in records
    )
    assert CANARY not in _all_text(records)


def test_observers_are_false_while_empty() -> None:
    observers = Observers()
    assert not observers
    observers.batch("write", 1, 0.0)
    recorder = Recorder()
    observers.append(recorder)
    assert observers
    observers.outcome_unknown("write", Resolution.UNKNOWN)
    assert recorder.unknown_outcomes == [("write", Resolution.UNKNOWN, 1)]


# Faults


@pytest.mark.parametrize(
    ("fault", "resolution"),
    [(Fault.REPLY_LOST, Resolution.HAPPENED), (Fault.REQUEST_LOST, Resolution.DID_NOT_HAPPEN)],
)
async def test_an_unacknowledged_write_is_reported_with_its_resolution(
    fault: Fault,
    resolution: Resolution,
    postgresql_url: str,
    recorder: Recorder,
    records: list[logging.LogRecord],
) -> None:
    async with (
        find_backend("postgresql")[1].scratch(postgresql_url) as fresh,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1) as store,
    ):
        run_id = await new_run(store)
        for number in range(2):
            # The statement is prepared on first use.
            recorder.unknown_outcomes.clear()
            recorder.retries.clear()
            if number:
                proxy.arm(1, fault)
            assert await store.try_claim_step(run_id, f"batched {number}")
        assert recorder.unknown_outcomes == [("try_claim_step", resolution, 1)]
        assert recorder.retries == [("try_claim_step", "connection_lost")]
        retried, unknown = (record for record in records if record.levelno == logging.WARNING)
        assert _fields(retried) == {
            "flowstore.operation": "try_claim_step",
            "flowstore.attempt": 1,
            "flowstore.reason": "connection_lost",
            "flowstore.sqlstate": "08003",
            "flowstore.wait_seconds": pytest.approx(0.01, abs=0.006),
        }
        assert _fields(unknown) == {
            "flowstore.operation": "try_claim_step",
            "flowstore.calls": 1,
            "flowstore.resolution": resolution.value,
        }
        # An unacknowledged COMMIT, then an unacknowledged single statement.
        await store.register_waiter(run_id, "a", "go")
        for call in (store.deliver_signal(run_id, "go", "1"), store.append_event(run_id, "e", message="m")):
            recorder.unknown_outcomes.clear()
            proxy.arm(1 if "append" in call.__name__ else 4, fault)
            await call
            assert proxy.has_injected
            proxy.disarm()
            assert all(calls == 1 for _, _, calls in recorder.unknown_outcomes)


async def test_an_outcome_that_stays_unknown_is_reported(postgresql_url: str, recorder: Recorder) -> None:
    async with (
        find_backend("postgresql")[1].scratch(postgresql_url) as fresh,
        proxy_before(fresh) as (proxy, through),
        open_store(through, pool_size=1, retry_timeout=0.3, statement_timeout=1) as store,
    ):
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "prepared")
        proxy.arm(1, Fault.REPLY_LOST)
        call = asyncio.ensure_future(store.try_claim_step(run_id, "lost"))
        while not call.done():
            if proxy.has_injected:
                # From now on every message is dropped, so a probe is impossible.
                proxy.arm(1, Fault.REQUEST_LOST)
            await asyncio.wait({call}, timeout=0.001)
        proxy.disarm()
        with pytest.raises(OutcomeUnknownError):
            await call
    assert ("try_claim_step", Resolution.UNKNOWN, 1) in recorder.unknown_outcomes


async def test_a_transaction_conflict_is_logged_at_debug(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, records: list[logging.LogRecord]
) -> None:
    recorder = Recorder()
    opened = _add_observers(monkeypatch, recorder)
    async with find_backend("postgresql")[1].scratch(postgresql_url) as fresh, open_store(fresh):
        database: Any = opened[0]._database
        tries = 0

        async def conflict() -> int:
            nonlocal tries
            tries += 1
            if tries < 3:
                raise asyncpg.SerializationError(CANARY)
            return tries

        assert await database.pool.retries.run(conflict, "complete_run") == 3
    assert recorder.retries == [("complete_run", "40001")] * 2
    retries = [record for record in records if "flowstore.attempt" in _fields(record)]
    assert [record.levelno for record in retries] == [logging.DEBUG] * 2
    assert [_fields(record)["flowstore.sqlstate"] for record in retries] == ["40001"] * 2
    assert CANARY not in _all_text(records)


# Log records


async def test_the_log_contains_no_application_data(namespace: str, records: list[logging.LogRecord]) -> None:
    async with open_store(namespace) as store:
        await _exercise_store(store)
    assert records
    assert CANARY not in _all_text(records)
    opened = [record for record in records if "flowstore.backend" in _fields(record)]
    assert [record.levelno for record in opened] == [logging.DEBUG] * 2
    assert opened[0].name == "flowstore_core"


async def _exercise_store(store: FlowStore) -> None:
    run_id = await new_run(store, flow_name=CANARY, trigger_data=CANARY)
    owner = f"{CANARY}-owner"
    assert await store.try_claim_step(run_id, CANARY, owner=owner, lease=timedelta(seconds=9))
    attempt = await store.record_step_start(run_id, CANARY, CANARY, input_json=f'"{CANARY}"', owner=owner)
    await store.register_waiter(run_id, CANARY, CANARY)
    await store.deliver_signal(run_id, CANARY, f'"{CANARY}"', delivery_id=CANARY)
    await store.deliver_signal(run_id, CANARY, f'"{CANARY}"', buffer=True)
    await store.save_output(run_id, CANARY, f'"{CANARY}"')
    await store.append_event(run_id, CANARY, message=CANARY)
    await store.record_step_complete(run_id, CANARY, StepStatus.FAILED, error_message=CANARY, attempt=attempt)
    await store.get_runs_page(search=CANARY)
    await store.annotate_dispatch(run_id, CANARY, CANARY)


def _all_text(records: list[logging.LogRecord]) -> str:
    formatter = logging.Formatter()
    return "\n".join(f"{formatter.format(record)} {vars(record)}" for record in records)


@pytest.mark.needs(Capability.DURABLE)
async def test_migrations_are_logged_at_level_info(namespace: str, records: list[logging.LogRecord]) -> None:
    async with open_store(namespace):
        pass
    versions = [
        _fields(record)["flowstore.schema_version"]
        for record in records
        if record.levelno == logging.INFO and "flowstore.schema_version" in _fields(record)
    ]
    assert versions[0] == 1
    assert versions == sorted(set(versions))


def test_log_records_are_not_printed_by_default() -> None:
    code = "import logging\n" + "\n".join(
        f"import {name}; logging.getLogger({name!r}).warning('message')" for name in LOGGERS
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
