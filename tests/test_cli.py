"""The command ``flowstore``: what it answers, to people and to scripts, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

from flowstore_cli.main import main
from flowstore_core import FlowStore, RunStatus, StepStatus, new_run_id, open_store
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=7)
READING = (
    ["runs", "list"],
    ["runs", "show", str(UUID(int=1))],
    ["runs", "retry", str(UUID(int=1)), "step"],
    ["runs", "cancel", str(UUID(int=1))],
    ["stats"],
    ["timeseries"],
    ["signal", "deliver", str(UUID(int=1)), "go"],
    ["cleanup", "--older-than", "30d"],
    ["ping"],
    ["doctor"],
)
COMMANDS = (["backends"], ["migrate", "up"], ["migrate", "status"], ["migrate", "sql"], ["replay"], *READING)

Answer = tuple[int, str, str]
Flowstore = Callable[..., Answer]


@pytest.fixture
def flowstore(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Flowstore:
    """Runs the command in this process, in a directory of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Answer:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def database(tmp_path: Path) -> dict[str, UUID]:
    """flowstore.db in the working directory: one run that is old, one that failed, one that waits."""

    async def fill() -> dict[str, UUID]:
        clock = VirtualClock(datetime.now(UTC) - timedelta(days=40))
        runs = {name: new_run_id() for name in ("old", "failed", "waiting")}
        async with open_store(f"sqlite:///{tmp_path}/flowstore.db", clock=clock) as store:
            await _run(store, runs["old"], StepStatus.SUCCEEDED, RunStatus.SUCCEEDED)
            clock.advance(days=40)
            await _run(store, runs["failed"], StepStatus.FAILED, RunStatus.FAILED)
            clock.advance(seconds=1)
            await _run(store, runs["waiting"], StepStatus.PENDING, None)
            await store.register_waiter(runs["waiting"], "step", "approval")
        return runs

    async def _run(store: FlowStore, run_id: UUID, step: StepStatus, run: RunStatus | None) -> None:
        await store.trigger_run(FLOW, "nightly \x1b[31mred\x1b[0m import", run_id, "manual")
        await store.record_step_start(run_id, "step", "test")
        error = "it broke\nin two lines" if step is StepStatus.FAILED else None
        await store.record_step_complete(run_id, "step", step, error_message=error)
        await store.save_output(run_id, "step", '"ä"')
        await store.append_event(run_id, "note", message="hello")
        if run is not None:
            await store.complete_run(run_id, run)

    return asyncio.run(fill())


def test_without_arguments_it_says_what_it_can_do(flowstore: Flowstore) -> None:
    code, out, _ = flowstore()
    assert code == 0
    assert "flowstore replay --kill 2" in out
    assert "4 the work is done, but the output cannot be written; 130 interrupted" in out
    assert flowstore("runs")[0] == 0


def test_version(flowstore: Flowstore) -> None:
    code, out, _ = flowstore("--version")
    assert (code, out.split()[0]) == (0, "flowstore")


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example_and_its_json_keys(
    command: list[str], flowstore: Flowstore
) -> None:
    words = [word for word in command if word.isalpha()][
        : 2 if command[0] in ("runs", "migrate", "signal") else 1
    ]
    code, out, _ = flowstore(*words, "--help")
    assert code == 0
    assert f"    flowstore {' '.join(words)}" in out
    assert "JSON: " in out
    assert "--json" in out
    assert ("--url" in out) or words == ["backends"]
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", READING, ids=" ".join)
def test_a_command_that_looks_makes_no_database(
    command: list[str], flowstore: Flowstore, tmp_path: Path
) -> None:
    code, out, err = flowstore(*command)
    assert (code, out) == (2, "")
    assert "there is no flowstore schema at sqlite:///flowstore.db" in err
    assert "flowstore migrate up" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["runs", "list", "--take", "lots"], 2, "runs list --help tells more"),
        (["runs", "show", "no-uuid"], 2, "'RUN_ID'"),
        (["stats", "--url", "nonsense"], 2, "a store URL begins with scheme://"),
        (["stats", "--url", "nonsense://x"], 2, "no installed backend serves scheme 'nonsense'"),
        (["stats", "--url", "memory://x?colour=red"], 2, "has no option colour"),
        (["cleanup", "--older-than", "soon"], 2, "a length of time such as 30d"),
        (["cleanup", "--older-than", "999999999w"], 2, "too long"),
        (["cleanup", "--older-than", "999999w"], 2, "before the year 1"),
        (["cleanup"], 2, "--older-than"),
        (["timeseries", "--since", "yesterday"], 2, "2025-06-01T12:00"),
        (["timeseries", "--url", "memory://", "--since", "2w", "--until", "3w"], 2, "since must be"),
        (["timeseries", "--url", "memory://", "--since", "520w"], 2, "10,000 buckets"),
        (["signal", "deliver", str(UUID(int=1)), "go", "{broken"], 2, "is not JSON"),
        (["replay", "missing.json"], 2, "missing.json cannot be read"),
        (["replay", "--url", "memory://"], 2, "several processes"),
        (["replay", "--approve", "nope"], 2, "no step 'nope'"),
        (["replay", "--fail-rate", "2"], 2, "--fail-rate"),
        (["runs", "show", str(UUID(int=1)), "--url", "memory://"], 1, "does not exist"),
        (["runs", "retry", str(UUID(int=1)), "s", "--url", "memory://"], 1, "does not exist"),
        (["runs", "cancel", str(UUID(int=1)), "--url", "memory://"], 1, "does not exist"),
        (["signal", "deliver", str(UUID(int=1)), "go", "--url", "memory://"], 1, "does not exist"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_clear_line(command: list[str], code: int, said: str, flowstore: Flowstore) -> None:
    found, _, err = flowstore(*command)
    assert found == code, err
    assert said in err
    assert err.startswith("flowstore: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_unreachable_server_is_exit_code_3_and_its_password_stays_secret(flowstore: Flowstore) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/db?connect_timeout=1&retry_timeout=0"
    for command in (["ping"], ["stats"], ["migrate", "up"], ["migrate", "status"]):
        code, out, err = flowstore(*command, "--url", url)
        assert code == 3, err
        assert err.startswith("flowstore: the store is unavailable")
        assert "hunter2" not in out + err


def test_passwords_are_not_shown_where_a_store_is_named(flowstore: Flowstore) -> None:
    url = "sqlite://user:hunter2@host/missing.db?busy_timeout=1"
    _, out, err = flowstore("stats", "--url", url)
    assert "hunter2" not in out + err


def test_an_unexpected_error_is_a_line_too(flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("boom\nboom")

    monkeypatch.setattr("flowstore_cli.backends.load_plugins", broken)
    code, _, err = flowstore("backends")
    assert code == 1
    assert err.startswith("flowstore: this is a bug: RuntimeError; FLOWSTORE_DEBUG=1 shows where")
    assert err.count("\n") == 1
    monkeypatch.setenv("FLOWSTORE_DEBUG", "1")
    told = flowstore("backends")[2]
    assert "Traceback" in told
    assert "in broken" in told
    # Nobody knows what the text of an unexpected error holds.
    assert "boom boom" not in err + told


def test_runs_list(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("runs", "list")
    assert code == 0
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        str(database[name]) for name in ("waiting", "failed", "old")
    ]
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in out

    assert str(database["failed"]) in flowstore("runs", "list", "--status", "failed")[1]
    assert flowstore("runs", "list", "--status", "Cancelled")[1] == "no runs\n"
    out = flowstore("runs", "list", "-n", "1", "--skip", "1")[1]
    assert "2 to 2 of 3\nnext: --after " in out
    assert max(map(len, out.splitlines())) <= 80
    onward = out.split()[-1]
    assert str(database["old"]) in flowstore("runs", "list", "--after", onward)[1]
    document = json.loads(flowstore("runs", "list", "-n", "2", "--json")[1])
    assert document["after"] == onward
    code, _, error = flowstore("runs", "list", "--after", "yesterday")
    assert code == 2
    assert "position must be" in error
    assert "no runs from number 10 on; there are 3" in flowstore("runs", "list", "--skip", "9")[1]
    found = json.loads(flowstore("runs", "list", "--search", "BROKE", "--json")[1])
    assert [run["run_id"] for run in found["runs"]] == [str(database["failed"])]
    assert flowstore("runs", "list", "--flow", str(UUID(int=8)))[1] == "no runs\n"

    page = json.loads(flowstore("runs", "list", "--json", "--take", "1")[1])
    assert page["total_count"] == 3
    run = page["runs"][0]
    assert set(run) == {
        "run_id",
        "flow_id",
        "flow_name",
        "status",
        "trigger_key",
        "trigger_data",
        "job_id",
        "started_at",
        "completed_at",
        "source_run_id",
    }
    assert run["run_id"] == str(database["waiting"])
    assert run["flow_name"] == "nightly \x1b[31mred\x1b[0m import"
    assert datetime.fromisoformat(run["started_at"]).tzinfo is not None


def test_runs_show(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("runs", "show", str(database["failed"]))
    assert code == 0
    assert "it broke in two lines" in out
    assert "\\x1b[31mred" in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    assert "step 'step' waits for signal 'approval'" in flowstore("runs", "show", str(database["waiting"]))[1]

    shown = json.loads(flowstore("runs", "show", str(database["failed"]), "--json")[1])
    assert set(shown) == {"run", "control", "claims", "dispatches", "waiters", "outputs", "events"}
    assert shown["run"]["steps"][0]["attempts"][0]["error_message"] == "it broke\nin two lines"
    assert shown["outputs"] == {"step": '"ä"'}
    assert [event["event_type"] for event in shown["events"]] == ["note"]


def test_runs_retry(database: dict[str, UUID], flowstore: Flowstore) -> None:
    run_id = str(database["failed"])
    code, _, err = flowstore("runs", "retry", run_id, "step", "--attempt", "2")
    assert (code, "attempt 2 of step 'step'" in err) == (1, True)
    code, out, _ = flowstore("runs", "retry", run_id, "step", "--attempt", "1", "--reset-skipped", "--json")
    assert code == 0
    assert json.loads(out) == {
        "run_id": run_id,
        "step_key": "step",
        "status": "Pending",
        "attempt_count": 2,
        "run_status": "Running",
    }
    assert "attempt 2 is to come" in flowstore("runs", "retry", run_id, "step")[1]
    assert flowstore("runs", "retry", run_id, "other")[0] == 1


def test_runs_cancel(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, _, err = flowstore("runs", "cancel", str(database["failed"]))
    assert (code, "is Failed already" in err) == (1, True)
    code, out, _ = flowstore("runs", "cancel", str(database["waiting"]), "--reason", "wrong", "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["requested"], answer["control"]["cancel_reason"]) == (True, "wrong")
    code, out, _ = flowstore("runs", "cancel", str(database["waiting"]))
    assert (code, out.strip()[-23:]) == (0, "requested before: wrong")


def test_stats(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("stats", "--json")
    assert code == 0
    counts = json.loads(out)
    assert (counts["total_flows"], counts["active_runs"], counts["completed_today"]) == (1, 1, 0)
    assert "runs active              1\n" in flowstore("stats")[1]


def test_timeseries(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("timeseries", "--by", "day", "--since", "45d", "--json")
    assert code == 0
    buckets = json.loads(out)
    assert len(buckets) in (45, 46, 47)
    assert [sum(b[n] for b in buckets) for n in ("total", "succeeded", "failed", "running")] == [3, 1, 1, 1]
    out = flowstore("timeseries", "--by", "day", "--since", "45d")[1]
    assert "in all 3 runs" in out
    assert all(mark in out for mark in "█▓░")
    assert max(map(len, out.splitlines())) <= 80
    assert flowstore("timeseries", "--since", "2025-06-01", "--until", "2025-06-01T12:00")[0] == 0


def test_signal_deliver(
    database: dict[str, UUID], flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = str(database["waiting"])
    code, out, _ = flowstore("signal", "deliver", run_id, "other", "{}")
    assert (code, "no step of the run waits" in out) == (1, True)
    monkeypatch.setattr("flowstore_cli.signals.read_stdin", lambda: '{"from": "stdin"}')
    code, out, _ = flowstore("signal", "deliver", run_id, "approval", "-", "--delivery-id", "d1", "--json")
    assert code == 0
    assert {**json.loads(out), "delivered_at": None} == {
        "status": "Delivered",
        "step_key": "step",
        "delivered_at": None,
    }
    code, out, _ = flowstore("signal", "deliver", run_id, "approval", "1", "--delivery-id", "d1")
    assert (code, out) == (0, "delivered to step 'step'\n")
    code, out, _ = flowstore("signal", "deliver", run_id, "approval", "1")
    assert (code, "has had this signal already" in out) == (1, True)


def test_cleanup(database: dict[str, UUID], flowstore: Flowstore) -> None:
    assert (
        "would delete 1 run completed before" in flowstore("cleanup", "--older-than", "30d", "--dry-run")[1]
    )
    assert "would delete 0 runs" in flowstore("cleanup", "--older-than", "41d", "--dry-run")[1]
    code, out, _ = flowstore("cleanup", "--older-than", "30d", "--json")
    answer = json.loads(out)
    assert (code, answer["runs"], answer["dry_run"]) == (0, 1, False)
    assert datetime.fromisoformat(answer["cutoff"]) < datetime.now(UTC) - timedelta(days=29)
    assert flowstore("runs", "show", str(database["old"]))[0] == 1
    assert flowstore("runs", "show", str(database["failed"]))[0] == 0


def test_migrate(flowstore: Flowstore, tmp_path: Path) -> None:
    code, out, _ = flowstore("migrate", "status")
    assert (code, "pending  0001" in out) == (1, True)
    assert not (tmp_path / "flowstore.db").exists()
    code, out, _ = flowstore("migrate", "up")
    assert (code, out.startswith("migrated from version 0 to ")) == (0, True)
    assert (tmp_path / "flowstore.db").exists()
    code, out, _ = flowstore("migrate", "up", "--json")
    answer = json.loads(out)
    assert (code, answer["before"]) == (0, answer["version"])
    code, out, _ = flowstore("migrate", "status", "--json")
    assert (code, json.loads(out)["pending"]) == (0, [])
    for url in ("sqlite:///a.db", "postgresql://nowhere/db"):
        code, out, _ = flowstore("migrate", "sql", "--url", url)
        assert (code, "CREATE TABLE" in out) == (0, True)
        listed = json.loads(flowstore("migrate", "sql", "--url", url, "--json")[1])
        assert set(listed[0]) == {"number", "name", "sql"}
        assert json.loads(flowstore("migrate", "sql", "--url", url, "--after", "9999", "--json")[1]) == []
    assert flowstore("migrate", "up", "--url", "memory://")[1] == "backend 'memory' needs no migrations\n"
    assert json.loads(flowstore("migrate", "sql", "--url", "memory://", "--json")[1]) == []


def test_a_store_that_is_opened_without_migrating(flowstore: Flowstore, tmp_path: Path) -> None:
    code, _, err = flowstore("replay", "--no-migrate")
    assert (code, "schema version 0" in err) == (2, True)
    assert not (tmp_path / "flowstore.db").exists()


def test_ping(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("ping", "--json", "--times", "2")
    assert code == 0
    facts = json.loads(out)
    assert (facts["backend"], facts["level"], facts["distribution"]) == ("sqlite", "full", "flowstore")
    assert facts["schema_version"] >= 1
    assert facts["round_trip_ms"]["min"] <= facts["round_trip_ms"]["median"] <= facts["round_trip_ms"]["max"]
    assert "round trip" in flowstore("ping")[1]
    assert json.loads(flowstore("ping", "-u", "memory://", "--json")[1])["schema_version"] is None


def test_backends(flowstore: Flowstore) -> None:
    code, out, _ = flowstore("backends")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    listed = {entry["name"]: entry for entry in json.loads(flowstore("backends", "--json")[1])}
    assert {"memory", "postgresql", "sqlite"} <= set(listed)
    assert listed["sqlite"]["status"] == "installed"
    assert "durable" in listed["sqlite"]["capabilities"]
    assert "durable" not in listed["memory"]["capabilities"]
    assert "postgres" in listed["postgresql"]["schemes"]


def test_backends_tells_a_missing_driver_and_its_remedy(
    flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util as real

    monkeypatch.setattr(
        "flowstore_cli.backends.importlib.util.find_spec",
        lambda name, find=real.find_spec: None if name == "asyncpg" else find(name),
    )
    listed = {entry["name"]: entry for entry in json.loads(flowstore("backends", "--json")[1])}
    assert listed["postgresql"]["status"] == "driver missing"
    assert listed["postgresql"]["problem"] == "module 'asyncpg' is not installed"
    assert listed["postgresql"]["remedy"] == "pip install 'flowstore[postgres]'"
    assert listed["sqlite"]["status"] == "installed"
    assert "pip install 'flowstore[postgres]'" in flowstore("backends")[1]


def test_backends_tells_a_broken_plugin(flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowstore_core.plugins import Plugin, explain_import

    error = explain_import("mine", "mine.plugin", "mine-dist", ValueError("no; not at all"))
    broken = Plugin(name="mine", distribution="mine-dist", module="mine.plugin", error=error)
    monkeypatch.setattr("flowstore_cli.backends.load_plugins", lambda: (broken,))
    listed = json.loads(flowstore("backends", "--json")[1])[0]
    assert (listed["name"], listed["status"]) == ("mine", "broken")
    assert listed["problem"].endswith("ValueError in mine.plugin: no; not at all")
    assert listed["remedy"] == "report it to the authors of mine-dist"
    assert flowstore("backends")[0] == 0


def test_backends_tells_two_that_claim_one_scheme(
    flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flowstore_core.plugins import Plugin, load_plugins

    memory = next(plugin for plugin in load_plugins() if plugin.name == "memory")
    second = Plugin(name="other", distribution="other-dist", module="other", backends=memory.backends)
    monkeypatch.setattr("flowstore_cli.backends.load_plugins", lambda: (memory, second))
    monkeypatch.setattr("flowstore_cli.backends.load_wrappers", lambda: ())
    listed = json.loads(flowstore("backends", "--json")[1])
    assert [entry["status"] for entry in listed] == ["conflict", "conflict"]
    assert listed[0]["problem"] == (
        "scheme 'memory' is claimed by plugins 'memory' (flowstore) and 'other' (other-dist)"
    )
    assert listed[0]["remedy"] == "uninstall all but one"


def test_replay_answers_in_json(flowstore: Flowstore) -> None:
    code, out, err = flowstore("replay", "--speed", "5000", "--workers", "2", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["ok"] is True
    assert (summary["steps"], summary["steps_succeeded"], summary["attempts"]) == (10, 10, 10)
    assert {check["ok"] for check in summary["checks"]} == {True}
    assert len(summary["run_ids"]) == 1
    code, out, _ = flowstore("runs", "show", summary["run_ids"][0], "--json")
    assert json.loads(out)["run"]["status"] == "Succeeded"


def test_replay_in_plain_lines(flowstore: Flowstore) -> None:
    code, out, _ = flowstore(
        "replay", "--speed", "5000", "--workers", "2", "--fail-rate", "1", "--max-attempts", "1"
    )
    assert code == 1
    assert out.startswith("replaying 'market-day': 1 run of 10 steps, 2 workers, 5000 times as fast\nstore: ")
    assert "check      FAILED  every run succeeded\n" in out
    assert "failed: injected failure" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_extra_it_says_what_to_install(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from flowstore_cli.main import main; sys.exit(main(['backends']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"flowstore: module '{missing}' is missing; pip install 'flowstore[cli]'\n"


def on_a_terminal(*arguments: str, **environment: str) -> bytes:
    """What the command writes to a terminal of 80 columns."""
    main_end, terminal = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(terminal)
    written = b""
    # Linux ends a terminal with an error instead of an empty read.
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:
            break
        if not part:
            break
        written += part
    os.close(main_end)
    assert process.wait(60) == 0
    return written


def test_colours_are_for_terminals_that_want_them() -> None:
    assert b"\x1b[32m" in on_a_terminal("backends")
    assert b"\x1b[32m" not in on_a_terminal("backends", NO_COLOR="1")


def test_the_live_view_restores_the_terminal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    written = on_a_terminal("replay", "--speed", "1000", "--workers", "2", "--url", url)
    assert b"WORKER" in written
    assert b"of 10 steps" in written
    assert written.rindex(b"\x1b[?25h") > written.rindex(b"\x1b[?25l"), "the cursor is shown again"
    assert b"every run succeeded" in written
