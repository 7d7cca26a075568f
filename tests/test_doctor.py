"""``flowstore doctor``: findings in any store and in SQLite files, and none in a healthy store."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_cli import doctor as command
from flowstore_cli.main import main
from flowstore_core import Capability, FlowStore, RunStatus, StepStatus, open_store
from flowstore_core.inspection import stalled_work
from flowstore_sqlite import file_checks
from tests.calls import FLOW, new_run
from tests.virtual_clock import VirtualClock

# Findings about the test machine, not about the store.
MACHINE_FINDINGS = {"wal-reset-bug", "memory-disk"}
HOUR = timedelta(hours=1)


@dataclass
class DoctorResult:
    """The command's output with --json."""

    code: int
    document: dict[str, Any]

    @property
    def findings(self) -> dict[str, dict[str, Any]]:
        return {one["code"]: one for one in self.document["findings"] if one["code"] not in MACHINE_FINDINGS}

    @property
    def codes(self) -> list[str]:
        codes = [one["code"] for one in self.document["findings"]]
        return [code for code in codes if code not in MACHINE_FINDINGS]


Doctor = Callable[..., DoctorResult]


@pytest.fixture(autouse=True)
def recheck_quickly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(stalled_work, "RECHECK_SECONDS", 0.02)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    def run_doctor(url: str, *options: str) -> DoctorResult:
        code = main(["doctor", url, "--json", *options])
        out, err = capsys.readouterr()
        assert out, err
        return DoctorResult(code, json.loads(out))

    return run_doctor


async def _fill(store: FlowStore) -> None:
    """Create runs that are completed, running, dispatched, and waiting for a signal."""
    done = await new_run(store)
    await store.record_step_start(done, "a", "test")
    await store.record_step_complete(done, "a", StepStatus.SUCCEEDED, output_json="1")
    await store.save_output(done, "a", "1")
    await store.append_event(done, "done")
    await store.complete_run(done, RunStatus.SUCCEEDED)
    run_id = uuid4()
    later = datetime.now(UTC) + HOUR
    await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key=str(run_id), timeout_at=later)
    assert await store.try_claim_step(run_id, "claimed", owner="me", lease=2 * HOUR)
    await store.record_step_start(run_id, "claimed", "test", owner="me")
    assert await store.try_record_dispatch(run_id, "later", due_at=later)
    await store.register_waiter(run_id, "waits", "go")
    attempt = await store.record_step_start(run_id, "waits", "test")
    await store.reschedule_step(run_id, "waits", attempt=attempt)
    waiting = await new_run(store)
    await store.register_waiter(waiting, "only", "go")


def _with_store(url: str, work: Callable[[FlowStore], Awaitable[Any]], *, ago: timedelta = HOUR) -> Any:
    """Call ``work`` with a store whose clock is behind by ``ago`` and return its result."""

    async def run() -> Any:
        async with open_store(url, clock=VirtualClock(datetime.now(UTC) - ago)) as store:
            return await work(store)

    return asyncio.run(run())


@pytest.fixture
def store_url(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store with healthy work, for each backend."""
    url = f"sqlite:///{tmp_path}/flows.db" if backend == "sqlite" else f"memory://doctor-{uuid4().hex}"
    schema = f"doctor_{uuid4().hex}"
    if backend == "postgresql":
        url = f"{request.getfixturevalue('postgresql_url')}&schema={schema}"
    _with_store(url, _fill)
    yield url
    if backend == "postgresql":
        asyncio.run(_drop(request.getfixturevalue("postgresql_url"), schema))


async def _drop(url: str, schema: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(f"DROP SCHEMA {schema} CASCADE")
    await connection.close()


@pytest.fixture(autouse=True)
def ignore_fsync_of_the_test_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shared test server runs with fsync off; test_doctor_postgres.py uses a server with fsync on."""
    monkeypatch.setitem(globals(), "MACHINE_FINDINGS", MACHINE_FINDINGS | {"fsync-off"})


# Any store


def test_a_healthy_store_has_no_findings(store_url: str, doctor: Doctor) -> None:
    result = doctor(store_url)
    assert result.codes == []
    assert result.document["opened"] is True
    assert (result.document["running_runs"], result.document["examined_runs"]) == (2, 2)
    if "postgresql" not in store_url:
        assert result.code == 0


async def _expire_lease(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "a", owner="dead", lease=timedelta(seconds=30))
    return run_id


async def _leave_dispatch_due(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    assert await store.try_record_dispatch(run_id, "a")
    return run_id


async def _start_without_dispatch(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "test")
    return run_id


async def _leave_idle(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    await store.record_step_start(run_id, "a", "test")
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED)
    return run_id


async def _miss_deadline(store: FlowStore) -> UUID:
    run_id = uuid4()
    await store.trigger_run(
        FLOW, "orders", run_id, "manual", timeout_at=datetime.now(UTC) - timedelta(minutes=30)
    )
    await store.register_waiter(run_id, "a", "go")
    return run_id


async def _ignore_cancel(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    await store.register_waiter(run_id, "a", "go")
    await store.request_cancel(run_id)
    return run_id


STALLED_WORK = {
    "leases-expired": _expire_lease,
    "dispatches-due": _leave_dispatch_due,
    "steps-not-dispatched": _start_without_dispatch,
    "runs-idle": _leave_idle,
    "runs-to-stop": _miss_deadline,
}


@pytest.mark.parametrize(("code", "make"), STALLED_WORK.items(), ids=list(STALLED_WORK))
def test_stalled_work_is_found(
    code: str, make: Callable[[FlowStore], Awaitable[UUID]], store_url: str, doctor: Doctor
) -> None:
    run_id = _with_store(store_url, make)
    result = doctor(store_url)
    assert result.codes == [code]
    assert result.code == 1
    findings = result.findings[code]
    assert (findings["severity"], findings["count"], findings["fix"]) == ("warning", 1, None)
    assert str(run_id) in findings["examples"][0]
    assert str(run_id) in findings["remedy"]
    assert doctor(store_url, "--grace", "2h").codes == []


async def _leave_queued(store: FlowStore) -> UUID:
    run_id = await new_run(store)
    for key in ("a", "b"):
        await store.try_record_dispatch(run_id, key, queue="mail", step_type="send")
    assert await store.try_claim_step(run_id, "b", owner="dead", lease=timedelta(seconds=30))
    return run_id


def test_a_queue_that_nobody_serves_is_found_once(store_url: str, doctor: Doctor) -> None:
    _with_store(store_url, _leave_queued)
    result = doctor(store_url)
    assert result.codes == ["queues-not-served"]
    findings = result.findings["queues-not-served"]
    assert (findings["count"], findings["examples"]) == (2, ["mail"])
    assert "flowstore queues" in findings["remedy"]
    assert doctor(store_url, "--grace", "2h").codes == []


async def _work_slowly(store: FlowStore) -> None:
    run_id = await new_run(store)
    for key in ("a", "b"):
        await store.try_record_dispatch(run_id, key, queue="mail", step_type="send")
    assert len(await store.claim_next_steps(["mail"], lease=2 * HOUR)) == 1


def test_a_queue_with_too_few_workers_is_found(store_url: str, doctor: Doctor) -> None:
    _with_store(store_url, _work_slowly)
    result = doctor(store_url)
    assert result.codes == ["queues-behind"]
    assert (result.findings["queues-behind"]["count"], result.code) == (1, 1)
    assert doctor(store_url, "--grace", "2h").codes == []


def test_an_ignored_cancel_request_is_found(store_url: str, doctor: Doctor) -> None:
    _with_store(store_url, _ignore_cancel)
    assert doctor(store_url).codes == ["runs-to-stop"]


def test_a_run_that_progresses_during_the_examination_is_not_idle(
    tmp_path: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    run_id = _with_store(url, _leave_idle)

    async def dispatch_during_sleep(seconds: float) -> None:
        async with open_store(url) as store:
            await store.try_record_dispatch(run_id, "next")

    monkeypatch.setattr(stalled_work.asyncio, "sleep", dispatch_during_sleep)
    assert doctor(url).codes == []


class LimitedStore:
    """A store with only the LEASES capability."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self.capabilities = frozenset({Capability.LEASES})
        self.limits = store.limits

    def __getattr__(self, name: str) -> Any:
        assert name in ("get_active_runs", "get_step_claims", "get_step_statuses", "get_run_status") or (
            name == "get_dispatched_step_keys"
        ), name
        return getattr(self._store, name)


async def test_a_store_with_fewer_capabilities_gets_the_applicable_checks() -> None:
    clock = VirtualClock(datetime.now(UTC) - HOUR)
    async with open_store("memory://", clock=clock) as store:
        await _expire_lease(store)
        await _leave_idle(store)
        limited: Any = LimitedStore(store)
        report = await stalled_work.examine(limited, grace=timedelta(minutes=5), limit=10)
        assert [finding.code for finding in report.findings] == ["leases-expired", "runs-idle"]
        assert (report.running, report.examined) == (2, 2)
        report = await stalled_work.examine(limited, grace=2 * HOUR, limit=10)
        assert report.findings == []


def test_only_the_oldest_of_many_runs_are_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stalled_work, "PAGE", 4)

    url = f"sqlite:///{tmp_path}/flows.db"
    clock = VirtualClock(datetime.now(UTC) - HOUR)

    async def run() -> UUID:
        async with open_store(url, clock=clock) as store:
            oldest = await _leave_idle(store)
            for _ in range(9):
                clock.advance(seconds=1)
                await _leave_idle(store)
            return oldest

    oldest = asyncio.run(run())
    assert main(["doctor", "--url", url, "--runs", "3"]) == 1
    out = capsys.readouterr().out
    assert "examined the oldest 3 of 10 Running runs" in out
    assert "3 runs Running with nothing in flight" in out
    assert str(oldest) in out


# SQLite files


@pytest.fixture
def flows(tmp_path: Path) -> Path:
    """A healthy file in the working directory."""
    path = tmp_path / "flows.db"
    _with_store(f"sqlite:///{path}", _fill)
    return path


def _execute(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    try:
        for statement in statements:
            db.execute(statement)
        db.commit()
    finally:
        db.close()


def _foreign_log(path: Path) -> None:
    other = path.with_name("other.db")
    db = sqlite3.connect(other)
    db.execute("PRAGMA page_size = 8192")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("CREATE TABLE t (x)")
    db.commit()
    log = other.with_name("other.db-wal").read_bytes()
    db.close()
    path.with_name("flows.db-wal").write_bytes(log)


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # After the page of the schema.
    content[8192:20480] = b"\xa5" * 12288
    path.write_bytes(content)


def _link(path: Path) -> None:
    path.rename(path.with_name("real.db"))
    path.symlink_to(path.with_name("real.db"))


FILES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "mode-wide": ("warning", lambda path: path.chmod(0o644)),
    "mode-group": ("note", lambda path: path.chmod(0o660)),
    "symlink": ("error", _link),
    "folder-open": ("warning", lambda path: path.parent.chmod(0o777)),
    "log-missing": ("warning", lambda path: path.with_name("flows.db-shm").write_bytes(bytes(32768))),
    "log-foreign": ("error", _foreign_log),
    "journal-foreign": ("warning", lambda path: path.with_name("flows.db-journal").write_bytes(b"\1" * 600)),
    "journal-mode": ("warning", lambda path: _execute(path, "PRAGMA journal_mode = DELETE")),
    "not-a-database": ("error", lambda path: path.write_bytes(b"no database" * 1000)),
    "damaged": ("error", _damage),
    "schema-behind": (
        "warning",
        lambda path: _execute(path, "DELETE FROM flowstore_schema WHERE version > 1"),
    ),
    "schema-newer": (
        "note",
        lambda path: _execute(path, "INSERT INTO flowstore_schema VALUES (99, 'later', 1, 0)"),
    ),
    "schema-ahead": (
        "error",
        lambda path: _execute(path, "INSERT INTO flowstore_schema VALUES (99, 'later', 99, 0)"),
    ),
}


@pytest.mark.parametrize("code", FILES)
def test_every_defect_of_a_file_is_found(code: str, flows: Path, doctor: Doctor) -> None:
    severity, damage = FILES[code]
    assert doctor("sqlite:///flows.db").codes == []
    damage(flows)
    for suffix in ("-wal", "-shm"):
        if code.startswith("log") and flows.with_name(f"flows.db{suffix}").exists():
            flows.with_name(f"flows.db{suffix}").chmod(0o600)
    content = flows.read_bytes() if code != "journal-mode" else b""
    result = doctor("sqlite:///flows.db", "--thorough")
    assert result.codes == [code]
    assert result.findings[code]["severity"] == severity
    assert result.code == (0 if severity == "note" else 1)
    if result.findings[code]["prevents_open"]:
        assert result.document["opened"] is False
    if content:
        assert flows.read_bytes() == content


def _fill_log(path: Path, rows: int) -> None:
    """Leave the file as after a kill: the newest commits are only in the log."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE IF NOT EXISTS filler (x)")
    for _ in range(rows):
        db.execute("INSERT INTO filler VALUES (zeroblob(9000))")
        db.commit()
    contents = [path.with_name(f"flows.db{suffix}").read_bytes() for suffix in ("", "-wal")]
    db.close()
    _write_state(path, *contents)


def _write_state(path: Path, database: bytes, log: bytes) -> None:
    path.write_bytes(database)
    path.with_name("flows.db-wal").write_bytes(log)
    path.with_name("flows.db-wal").chmod(0o600)


def test_a_damaged_page_is_reported_once(flows: Path, doctor: Doctor) -> None:
    content = flows.read_bytes()
    for start in range(4096, len(content), 4096):
        flows.write_bytes(content[:start] + b"\xa5" * 4096 + content[start + 4096 :])
        result = doctor("sqlite:///flows.db")
        assert (result.code, result.codes) == (1, ["damaged"])


@pytest.mark.parametrize("is_older", [True, False])
def test_a_database_with_the_log_of_another_backup_is_found(
    is_older: bool, flows: Path, doctor: Doctor
) -> None:
    log = flows.with_name("flows.db-wal")
    states = []
    for _ in range(2):
        _fill_log(flows, 5)
        states.append((flows.read_bytes(), log.read_bytes()))
        # Checkpoints the log.
        _execute(flows, "DELETE FROM filler")
    for database, its_log in states:
        _write_state(flows, database, its_log)
        assert doctor("sqlite:///flows.db").codes == []
    _write_state(flows, states[1 if is_older else 0][0], states[0 if is_older else 1][1])
    result = doctor("sqlite:///flows.db")
    assert (result.codes, result.document["opened"]) == (["log-foreign"], False)
    summary = result.findings["log-foreign"]["summary"]
    assert ("is older than the database" if is_older else "a newer state of the database") in summary


HOLDER = """
import asyncio, sys
from flowstore_core import open_store

async def main(url):
    async with open_store(url) as store:
        await store.ping()
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)

asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("replaced", [True, False])
def test_a_file_removed_while_it_is_open_is_found(replaced: bool, flows: Path, doctor: Doctor) -> None:
    command = [sys.executable, "-c", HOLDER, f"sqlite:///{flows}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        content = flows.read_bytes()
        for suffix in ("", "-wal", "-shm"):
            flows.with_name(f"flows.db{suffix}").unlink()
        if replaced:
            flows.write_bytes(content)
            flows.chmod(0o600)
        result = doctor("sqlite:///flows.db")
        assert (result.code, result.codes) == (1, ["file-removed"])
        assert result.findings["file-removed"]["examples"] == [f"process {holder.pid}"]
        assert result.document["opened"] is replaced
        holder.communicate("end\n")
    assert holder.returncode == 0
    if replaced:
        assert doctor("sqlite:///flows.db").codes == []


def test_a_snapshot_that_pins_the_log_is_found(
    flows: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowstore_sqlite.diagnosis.PIN_TIMEOUT", 0.3)
    reader = sqlite3.connect(flows, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM runs").fetchall()
    writer = sqlite3.connect(flows)
    writer.execute("CREATE TABLE filler (x)")
    writer.execute("INSERT INTO filler VALUES (zeroblob(8000000))")
    writer.commit()
    result = doctor("sqlite:///flows.db")
    assert (result.code, result.codes) == (1, ["log-pinned"])
    assert "8 MB" in result.findings["log-pinned"]["summary"]
    reader.execute("COMMIT")
    # The log keeps its length, but the next commit restarts it.
    assert doctor("sqlite:///flows.db").codes == []
    reader.close()
    writer.close()


def test_errors_of_sqlite_do_not_mention_a_server(flows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_id = sqlite3.connect(flows).execute("SELECT run_id FROM runs").fetchone()[0]
    other = sqlite3.connect(flows, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    url = "sqlite:///flows.db?busy_timeout=0"
    assert main(["runs", "cancel", str(UUID(bytes=run_id)), "--url", url]) == 3
    other.close()
    error = capsys.readouterr().err
    assert "was locked by others" in error
    assert "the server" not in error
    flows.write_bytes(b"no database" * 1000)
    assert main(["ping", "--url", "sqlite:///flows.db"]) == 2
    error = capsys.readouterr().err
    assert f"{flows} is not an SQLite database" in error
    assert "the server" not in error


def test_permissions_are_fixed(flows: Path, doctor: Doctor) -> None:
    flows.chmod(0o664)
    flows.with_name("flows.db-turn").chmod(0o644)
    result = doctor("sqlite:///flows.db", "--fix", "--yes")
    assert result.document["fixed"] == [
        f"set the mode of {flows} to 0600",
        f"set the mode of {flows}-turn to 0600",
    ]
    assert (result.code, result.codes) == (0, [])
    assert flows.stat().st_mode & 0o777 == 0o600
    assert doctor("sqlite:///flows.db").codes == []


ORPHANS = {
    "orphans-idempotency-keys": "INSERT INTO idempotency_keys VALUES (x'00', 't', 'k', zeroblob(16), 0)",
    "orphans-controls": "INSERT INTO controls (run_id, flow_id, created_at, trigger_key) "
    "VALUES (zeroblob(16), x'00', 0, 't')",
    "orphans-steps": "INSERT INTO steps (run_id, step_key) VALUES (zeroblob(16), 'a')",
    "orphans-attempts": "INSERT INTO attempts (run_id, step_key, attempt, status, started_at, completed_at, "
    "step_type) VALUES (zeroblob(16), 'a', 1, 'Failed', 0, 0, 't')",
    "orphans-waiters": "INSERT INTO waiters (run_id, step_key, signal_name, created_at) "
    "VALUES (zeroblob(16), 'a', 's', 0)",
    "orphans-deliveries": "INSERT INTO deliveries VALUES (zeroblob(16), 'd', 'a', 0)",
    "orphans-buffered-signals": "INSERT INTO buffered_signals VALUES (1, zeroblob(16), 's', '{}', 0)",
    "orphans-outputs": "INSERT INTO outputs VALUES (zeroblob(16), 'k', '1')",
    "orphans-events": "INSERT INTO events VALUES (zeroblob(16), 1, 0, 'e', NULL, NULL)",
}


@pytest.mark.parametrize("code", ORPHANS)
def test_rows_without_a_run_are_found_and_fixed(code: str, flows: Path, doctor: Doctor) -> None:
    _execute(flows, ORPHANS[code])
    result = doctor("sqlite:///flows.db")
    assert (result.code, result.codes) == (1, [code])
    assert result.findings[code]["count"] == 1
    assert result.findings[code]["examples"] == [str(UUID(int=0))]
    result = doctor("sqlite:///flows.db", "--fix", "--yes")
    assert (result.code, result.codes) == (0, [])
    assert result.document["fixed"][0].startswith("deleted 1 rows of table ")
    assert doctor("sqlite:///flows.db").document["running_runs"] == 2


def test_a_recent_idempotency_key_is_not_an_orphan(flows: Path, doctor: Doctor) -> None:
    async def register(store: FlowStore) -> None:
        assert await store.try_register_idempotency_key(FLOW, "t", "fresh", uuid4())

    _with_store("sqlite:///flows.db", register, ago=timedelta(minutes=50))
    assert doctor("sqlite:///flows.db").codes == []


def test_many_orphans_are_deleted_in_batches(
    flows: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowstore_sqlite.diagnosis.FIX_BATCH", 7)
    rows = ", ".join(f"(x'{n:032x}', 'k', '1')" for n in range(50))
    _execute(flows, f"INSERT INTO outputs VALUES {rows}")
    result = doctor("sqlite:///flows.db", "--fix", "--yes")
    assert result.document["fixed"] == ["deleted 50 rows of table outputs that belonged to no run"]
    assert result.codes == []


def test_an_examination_that_takes_too_long_is_stopped(
    flows: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowstore_sqlite.diagnosis.CHECK_TIMEOUT", -1.0)
    monkeypatch.setattr("flowstore_sqlite.diagnosis.TIMEOUT_CHECK_INSTRUCTIONS", 1)
    result = doctor("sqlite:///flows.db")
    assert (result.code, result.codes) == (0, ["pages-not-checked", "rows-not-checked"])
    assert doctor("sqlite:///flows.db", "--thorough").codes == []


def test_synchronous_normal_is_found(flows: Path, doctor: Doctor) -> None:
    assert doctor("sqlite:///flows.db?synchronous=NORMAL").codes == ["synchronous-normal"]


@pytest.mark.parametrize(("kind", "code"), [("nfs4", "network-file-system"), ("tmpfs", "memory-disk")])
def test_an_unsafe_file_system_is_found(
    kind: str, code: str, flows: Path, doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = flows.stat().st_dev
    mounts = flows.with_name("mounts")
    mounts.write_text(
        f"1 0 0:0 / / rw - ext4 /dev/none rw\n"
        f"2 1 {os.major(device)}:{os.minor(device)} / {flows.parent} rw shared:1 - {kind} server:/x rw\n"
    )
    monkeypatch.setattr(file_checks, "MOUNTS", mounts)
    monkeypatch.setitem(globals(), "MACHINE_FINDINGS", {"wal-reset-bug"})
    assert doctor("sqlite:///flows.db").codes == [code]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_the_type_of_a_file_system_is_detected() -> None:
    assert file_checks.file_system("/dev/shm") in ("tmpfs", "ramfs")
    assert file_checks.file_system("/dev/shm/missing/deep") == ""


@pytest.mark.parametrize(
    ("version", "reported"), [((3, 51, 2), True), ((3, 7, 0), True), ((3, 51, 3), False), ((3, 6, 23), False)]
)
def test_the_wal_reset_bug_is_reported(
    version: tuple[int, int, int], reported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowstore_sqlite.diagnosis import _check_settings
    from flowstore_sqlite.open import Options

    monkeypatch.setattr(sqlite3, "sqlite_version_info", version)
    findings = _check_settings(Options(synchronous="FULL", busy_timeout=1, readers=1))
    assert [finding.code for finding in findings] == (["wal-reset-bug"] if reported else [])


# Text output


def test_a_finding_is_printed_with_its_remedy(flows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flows.chmod(0o644)
    _execute(flows, ORPHANS["orphans-outputs"])
    assert main(["doctor", "sqlite:///flows.db"]) == 1
    out = capsys.readouterr().out
    assert f"WARNING  others may use {flows} (mode 0644; 0600 is right)\n" in out
    assert f"  do     chmod 0600 {flows}\n" in out
    assert "flowstore doctor --fix --url sqlite:///flows.db" in out
    # Without a terminal no line is wrapped.
    assert not [line for line in out.splitlines() if line.startswith("    ")]
    assert not [line for line in out.splitlines() if line != line.rstrip()]


def test_commands_contain_a_placeholder_for_a_url_with_a_password() -> None:
    assert command._complete("flowstore doctor --fix", "sqlite:///x y.db").endswith(
        "--url 'sqlite:///x y.db'"
    )
    assert (
        command._complete("flowstore migrate up", "postgresql://u:secret@h/d")
        == "flowstore migrate up --url URL"
    )
    assert (
        command._complete("pip install --upgrade flowstore", "memory://x")
        == "pip install --upgrade flowstore"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sqlite:///missing.db"], "there is no flowstore schema"),
        (["sqlite:///a.db", "--url", "sqlite:///b.db"], "the store is given twice"),
        (["sqlite:///a.db", "--yes"], "--yes requires --fix"),
        (["sqlite:///a.db", "--grace", "soon"], "a duration such as 30d"),
        (["nonsense://x"], "no installed backend serves scheme"),
        (
            ["postgresql://u:hunter2@127.0.0.1:1/d?connect_timeout=1&retry_timeout=0"],
            "the store is unavailable",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_an_unreadable_store_exits_with_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert "hunter2" not in err


def test_fix_asks_for_confirmation(
    flows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flows.chmod(0o644)
    assert main(["doctor", "sqlite:///flows.db", "--fix"]) == 2
    assert "use --yes" in capsys.readouterr().err
    answers = iter([False, True])
    monkeypatch.setattr(command.sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(command.typer, "confirm", lambda *a, **k: next(answers))
    assert main(["doctor", "sqlite:///flows.db", "--fix"]) == 1
    assert flows.stat().st_mode & 0o777 == 0o644
    assert main(["doctor", "sqlite:///flows.db", "--fix"]) == 0
    out, err = capsys.readouterr()
    assert f"will set the mode of {flows} to 0600" in err
    assert f"fixed: set the mode of {flows} to 0600" in out
