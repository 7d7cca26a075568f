"""The command ``flowstore``: its output for people and for scripts, and its exit codes."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest

from flowstore_cli.failures import Failure
from flowstore_cli.main import main
from flowstore_cli.references import find_flow, find_run, parse_run
from flowstore_cli.retention import count_completed
from flowstore_core import (
    ClaimedStep,
    FlowEventRecord,
    FlowStore,
    RunStatus,
    StepRequest,
    StepStatus,
    StoreLimits,
    new_run_id,
    open_store,
)
from flowstore_core.inspection.events import last_events
from tests.virtual_clock import VirtualClock

FLOW = UUID(int=7)
READ_COMMANDS = (
    ["runs", "list"],
    ["runs", "show", str(UUID(int=1))],
    ["runs", "tree", str(UUID(int=1))],
    ["runs", "events", str(UUID(int=1))],
    ["runs", "retry", str(UUID(int=1)), "step"],
    ["runs", "cancel", str(UUID(int=1))],
    ["runs", "delete", str(UUID(int=1)), "--yes"],
    ["runs", "tag", str(UUID(int=1)), "env=live"],
    ["queues"],
    ["stats"],
    ["timeseries"],
    ["signal", "deliver", str(UUID(int=1)), "go"],
    ["cleanup", "--older-than", "30d"],
    ["ping"],
    ["doctor"],
)
COMMANDS = (
    ["backends"],
    ["migrate", "up"],
    ["migrate", "status"],
    ["migrate", "sql"],
    ["replay"],
    *READ_COMMANDS,
)

Output = tuple[int, str, str]
Flowstore = Callable[..., Output]


@pytest.fixture
def flowstore(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Flowstore:
    """Run the command in this process, in a separate directory; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLOWSTORE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Output:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def database(tmp_path: Path) -> dict[str, UUID]:
    """flowstore.db in the working directory: an old run, a failed run, and a waiting run."""

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


def test_help_is_printed_without_arguments(flowstore: Flowstore) -> None:
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


@pytest.mark.parametrize("command", READ_COMMANDS, ids=" ".join)
def test_commands_that_read_create_no_database(
    command: list[str], flowstore: Flowstore, tmp_path: Path
) -> None:
    code, out, err = flowstore(*command)
    assert (code, out) == (2, "")
    assert "there is no flowstore schema at sqlite:///flowstore.db" in err
    assert "flowstore migrate up" in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["runs", "list", "--take", "lots"], 2, "see flowstore runs list --help"),
        (["runs", "show", "no-uuid"], 2, "RUN must be the id of a run"),
        (["runs", "show", "12345"], 2, "at least 6 of its first or last hexadecimal digits"),
        (
            ["runs", "show", "abc123", "--url", "memory://"],
            1,
            "begins or ends with abc123; list the runs with",
        ),
        (["runs", "list", "--status", "runing"], 2, "did you mean 'Running'?"),
        (["runs", "list", "--status", "can"], 2, "did you mean 'Cancelled'?"),
        (["runs", "list", "--flow", "x", "--url", "memory://"], 1, "no run belongs to a flow 'x'"),
        (
            ["runs", "list", "--search", "x" * 300, "--url", "memory://"],
            2,
            "--search must be text of at most 256",
        ),
        (["runs", "list", "--after", "x"], 2, "--after must be a datetime with offset"),
        (["runs", "retry", str(UUID(int=1)), "", "--url", "memory://"], 2, "STEP must be text of 1 to 256"),
        (["signal", "deliver", str(UUID(int=1)), "", "--url", "memory://"], 2, "SIGNAL must be text of 1 to"),
        (["--url", "memory://", "stats", "--url", "sqlite:///x.db"], 2, "--url is given twice"),
        (["--url", "memory://", "doctor", "memory://"], 2, "the store is given twice"),
        (["--url", "memory://", "conformance", "memory://"], 2, "conformance takes no --url"),
        (["doctor", "--grace", "900000d"], 2, "--grace reaches back before the year 1"),
        (["stats", "--url", "nonsense"], 2, "a store URL begins with scheme://"),
        (["stats", "--url", "nonsense://x"], 2, "no installed backend serves scheme 'nonsense'"),
        (["stats", "--url", "memory://x?colour=red"], 2, "has no option colour"),
        (["cleanup", "--older-than", "soon"], 2, "a duration such as 30d"),
        (["cleanup", "--older-than", "999999999w"], 2, "too long"),
        (["cleanup", "--older-than", "999999w"], 2, "before the year 1"),
        (["cleanup"], 2, "--older-than"),
        (["timeseries", "--since", "yesterday"], 2, "2025-06-01T12:00"),
        (
            ["timeseries", "--url", "memory://", "--since", "2w", "--until", "3w"],
            2,
            "--since must be at or before --until",
        ),
        (["timeseries", "--url", "memory://", "--since", "520w"], 2, "take a later --since, or --by day"),
        (["signal", "deliver", str(UUID(int=1)), "go", "{broken"], 2, "is not JSON"),
        (["replay", "missing.json"], 2, "missing.json cannot be read"),
        (["replay", "--url", "memory://"], 2, "several processes"),
        (["replay", "--approve", "nope"], 2, "no step 'nope'"),
        (["replay", "--fail-rate", "2"], 2, "--fail-rate"),
        (["runs", "show", str(UUID(int=1)), "--url", "memory://"], 1, "there is no run"),
        (["runs", "retry", str(UUID(int=1)), "s", "--url", "memory://"], 1, "there is no run"),
        (["runs", "cancel", str(UUID(int=1)), "--url", "memory://"], 1, "there is no run"),
        (["signal", "deliver", str(UUID(int=1)), "go", "--url", "memory://"], 1, "there is no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_errors_are_one_clear_line(command: list[str], code: int, message: str, flowstore: Flowstore) -> None:
    exit_code, _, err = flowstore(*command)
    assert exit_code == code, err
    assert message in err
    assert err.startswith("flowstore: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_an_unreachable_server_exits_with_3_and_its_password_is_not_shown(flowstore: Flowstore) -> None:
    url = "postgresql://user:hunter2@127.0.0.1:1/db?connect_timeout=1&retry_timeout=0"
    for command in (["ping"], ["stats"], ["migrate", "up"], ["migrate", "status"]):
        code, out, err = flowstore(*command, "--url", url)
        assert code == 3, err
        assert err.startswith("flowstore: the store is unavailable")
        assert "hunter2" not in out + err


def test_errors_about_a_store_do_not_show_its_password(flowstore: Flowstore) -> None:
    url = "sqlite://user:hunter2@host/missing.db?busy_timeout=1"
    _, out, err = flowstore("stats", "--url", url)
    assert "hunter2" not in out + err


def test_an_unexpected_error_is_one_line(flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("boom\nboom")

    monkeypatch.setattr("flowstore_cli.backends.load_plugins", broken)
    code, _, err = flowstore("backends")
    assert code == 1
    assert err.startswith("flowstore: this is a bug: RuntimeError; FLOWSTORE_DEBUG=1 shows where")
    assert err.count("\n") == 1
    monkeypatch.setenv("FLOWSTORE_DEBUG", "1")
    traceback = flowstore("backends")[2]
    assert "Traceback" in traceback
    assert "in broken" in traceback
    # The text of an unexpected error may contain secrets.
    assert "boom boom" not in err + traceback


def test_runs_list(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("runs", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:]] == [
        str(database[name]) for name in ("waiting", "failed", "old")
    ]

    assert str(database["failed"]) in flowstore("runs", "list", "--status", "failed")[1]
    assert flowstore("runs", "list", "--status", "Cancelled")[1:] == ("", "no runs\n")
    out, err = flowstore("runs", "list", "-n", "1", "--skip", "1")[1:]
    assert [line.split()[0] for line in out.splitlines()] == ["RUN", str(database["failed"])]
    assert err.startswith("2 to 2 of 3\nnext: --after ")
    cursor = err.split()[-1]
    assert str(database["old"]) in flowstore("runs", "list", "--after", cursor)[1]
    document = json.loads(flowstore("runs", "list", "-n", "2", "--json")[1])
    assert document["after"] == cursor
    assert "no runs from number 10 on; there are 3" in flowstore("runs", "list", "--skip", "9")[2]
    page = json.loads(flowstore("runs", "list", "--search", "BROKE", "--json")[1])
    assert [run["run_id"] for run in page["runs"]] == [str(database["failed"])]
    assert flowstore("runs", "list", "--flow", str(UUID(int=8)))[2] == "no runs\n"

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
        "tags",
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
    assert "step 'step' waits for signal 'approval'" in flowstore("runs", "show", str(database["waiting"]))[1]

    shown = json.loads(flowstore("runs", "show", str(database["failed"]), "--json")[1])
    assert set(shown) == {
        *("run", "control", "claims", "dispatches", "waiters", "buffered_signals", "outputs", "events")
    }
    assert shown["run"]["steps"][0]["attempts"][0]["error_message"] == "it broke\nin two lines"
    assert shown["outputs"] == {"step": '"ä"'}
    assert [event["event_type"] for event in shown["events"]] == ["note"]


LONG_NAME = "import of all orders of the northern warehouses " * 4
ERROR = "Traceback (most recent call last):\n  line 3\n" + "ValueError: no such column " * 40


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, UUID]:
    """flowstore.db in the working directory: a run with long texts, and one written by clocks that differ."""

    async def fill() -> dict[str, UUID]:
        runs = {"long": new_run_id(), "skewed": new_run_id()}
        clock = VirtualClock(datetime.now(UTC) - timedelta(hours=2))
        async with open_store(f"sqlite:///{tmp_path}/flowstore.db", clock=clock) as store:
            await store.start_run(FLOW, LONG_NAME, runs["long"], "manual", trigger_data='{"day": 1}')
            for number in range(2):
                await store.record_step_start(runs["long"], "load", "sql", input_json=f"[{number}]")
                await store.record_step_complete(runs["long"], "load", StepStatus.FAILED, error_message=ERROR)
                await store.retry_step(runs["long"], "load")
            await store.record_step_start(runs["long"], "load", "sql", input_json='{"table": "orders"}')
            output = json.dumps(["row"] * 500)
            await store.record_step_complete(runs["long"], "load", StepStatus.SUCCEEDED, output_json=output)
            await store.save_output(runs["long"], "load", output)
            await store.save_output(runs["long"], "report", '"https://example.com"')
            await store.start_run(UUID(int=9), "backup", runs["skewed"], "manual")
            clock.advance(minutes=-5)
            await store.complete_run(runs["skewed"], RunStatus.SUCCEEDED)
        return runs

    return asyncio.run(fill())


def test_piped_output_is_not_truncated(
    contents: dict[str, UUID], flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    header, *rows = flowstore("runs", "list")[1].splitlines()
    assert header.split() == ["RUN", "STATUS", "STARTED", "TOOK", "FLOW", "FLOW", "ID"]
    assert len(rows) == 2
    assert all(str(contents[name]) in row for name, row in zip(("skewed", "long"), rows, strict=True))
    assert rows[1].endswith(f"{LONG_NAME.rstrip()}   {FLOW}")
    assert datetime.fromisoformat(rows[0].split()[2]) > datetime.now(UTC) - timedelta(hours=3)
    out = flowstore("runs", "show", str(contents["long"]))[1]
    assert f"flow     {LONG_NAME.strip()}\n" in out
    assert " ".join(ERROR.split("\n")).strip() in out
    assert max(map(len, flowstore("backends")[1].splitlines())) > 300
    for command in (["runs", "list"], ["runs", "show", str(contents["long"])], ["backends"], ["timeseries"]):
        assert not set(flowstore(*command)[1]) & set("\x1b─│┃━…█")


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 120])
def test_a_narrow_terminal_truncates_names_but_not_ids(
    columns: int, contents: dict[str, UUID], flowstore: Flowstore
) -> None:
    lines = lines_on_terminal("runs", "list", columns=columns)
    assert [line.split()[0] for line in lines[1:]] == [contents[n].hex[-8:] for n in ("skewed", "long")]
    assert max(map(len, lines)) <= columns
    assert "Running" in lines[2]
    assert lines[2].endswith("…")
    shown = lines_on_terminal("runs", "show", contents["long"].hex[-8:], columns=columns)
    assert f"run      {contents['long']}" in shown


def test_runs_show_has_inputs_outputs_and_errors(contents: dict[str, UUID], flowstore: Flowstore) -> None:
    reference = contents["long"].hex[-8:]
    piped = flowstore("runs", "show", reference)[1]
    shown = "\n".join(lines_on_terminal("runs", "show", reference))
    full = "\n".join(lines_on_terminal("runs", "show", reference, "--full", columns=5000))
    for text in ('input    {"day": 1}', 'input    {"table": "orders"}', 'report  "https://example.com"'):
        assert text in shown
        assert text in piped
    assert json.dumps(["row"] * 500) in piped
    assert json.dumps(["row"] * 500) in full
    # An output that equals the output of its step is shown once.
    assert piped.count('["row"') == 1
    assert f"... ({len(ERROR):,} characters; --full)" in " ".join(shown.split())
    assert len(shown) < 3000
    # All attempts, and the lines of an error unchanged.
    assert "  input 1   [0]\n" in full
    assert "  error 2   Traceback (most recent call last):\n" in full
    assert full.count(ERROR.splitlines()[2].strip()) == 2


def test_a_run_that_completed_before_its_start(contents: dict[str, UUID], flowstore: Flowstore) -> None:
    row = flowstore("runs", "list", "--flow", "backup")[1].splitlines()[1]
    assert row.split()[3] == "?"
    shown = flowstore("runs", "show", str(contents["skewed"]))[1]
    assert "completed 5m00s before its start: two clocks differ" in shown
    assert "-300" not in flowstore("timeseries")[1]
    buckets = [line.split() for line in flowstore("timeseries")[1].splitlines()]
    assert ["?", "?"] in [bucket[-2:] for bucket in buckets]


def test_a_flow_is_selected_by_name_or_id(
    database: dict[str, UUID], flowstore: Flowstore, tmp_path: Path
) -> None:
    name = "nightly \x1b[31mred\x1b[0m import"
    for flow in (name, str(FLOW)):
        assert json.loads(flowstore("runs", "list", "--flow", flow, "--json")[1])["total_count"] == 3
        assert flowstore("timeseries", "--flow", flow)[0] == 0
    code, _, err = flowstore("runs", "list", "--flow", "nightly import")
    assert (code, "did you mean 'nightly " in err) == (1, True)

    async def start() -> None:
        async with open_store(f"sqlite:///{tmp_path}/flowstore.db") as store:
            # A name that another name contains, and a name that two flows have.
            await store.start_run(UUID(int=70), "red", new_run_id(), "manual")
            await store.start_run(UUID(int=71), "backup", new_run_id(), "manual")
            await store.start_run(UUID(int=72), "backup", new_run_id(), "manual")

    asyncio.run(start())
    assert json.loads(flowstore("runs", "list", "--flow", "red", "--json")[1])["total_count"] == 1
    code, _, err = flowstore("timeseries", "--flow", "backup")
    assert code == 1
    assert err.splitlines() == [
        "flowstore: 2 flows have the name 'backup'; give the id of one of them:",
        f"  {UUID(int=72)}  1 run",
        f"  {UUID(int=71)}  1 run",
    ]
    # Ids distinguish flows with the same name.
    assert str(UUID(int=72)) in "\n".join(lines_on_terminal("runs", "list", columns=120))


def test_a_flow_is_found_without_reading_all_of_its_runs() -> None:
    async def find() -> None:
        async with open_store("memory://") as store:
            for number in range(3000):
                flow = ("import", 1) if number != 5 else ("important", 2)
                await store.start_run(UUID(int=flow[1]), flow[0], new_run_id(), "manual")
            counted = CountingStore(store)
            assert await find_flow(counted.store, "important") == UUID(int=2)
            assert counted.rows == 1
            with pytest.raises(Failure, match="did you mean 'import'"):
                await find_flow(counted.store, "imported")
            # The older of two flows is far behind the first page.
            await store.start_run(UUID(int=3), "import", UUID(int=3), "manual")
            for _ in range(1500):
                await store.start_run(UUID(int=4), "import", new_run_id(), "manual")
            with pytest.raises(Failure) as ambiguous:
                await find_flow(store, "import")
            assert [line.split()[0] for line in ambiguous.value.details] == [
                str(UUID(int=number)) for number in (4, 3, 1)
            ]

    asyncio.run(find())


class CountingStore:
    """A wrapper that counts the runs and events read from a store."""

    def __init__(self, store: FlowStore) -> None:
        self.rows = 0
        self.calls: list[str] = []
        self.store = cast(FlowStore, self)
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not callable(method):
            return method

        async def call(*arguments: Any, **keywords: Any) -> Any:
            result = await method(*arguments, **keywords)
            self.calls.append(name)
            self.rows += len(getattr(result, "runs", result))
            return result

        return call


def test_a_run_is_selected_by_its_first_or_last_digits(
    database: dict[str, UUID], flowstore: Flowstore, tmp_path: Path
) -> None:
    run_id = database["failed"]
    # Ids created at the same time share their first digits; find the shortest prefix of only this id.
    first = next(
        str(run_id)[:size]
        for size in range(8, 37)
        if sum(str(one).startswith(str(run_id)[:size]) for one in database.values()) == 1
    )
    for text in (run_id.hex[-6:], run_id.hex[-8:].upper(), run_id.hex[-14:], first, run_id.hex, str(run_id)):
        code, out, err = flowstore("runs", "show", text, "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["run"]["run_id"] == str(run_id)
    assert json.loads(flowstore("runs", "retry", run_id.hex[-8:], "step", "--json")[1])["attempt_count"] == 2
    waiting = database["waiting"].hex[-8:]
    assert flowstore("signal", "deliver", waiting, "approval")[:2] == (0, "delivered to step 'step'\n")
    assert flowstore("runs", "cancel", waiting)[1] == f"cancel requested for run {database['waiting']}\n"

    async def start() -> list[str]:
        async with open_store(f"sqlite:///{tmp_path}/flowstore.db") as store:
            twins = [UUID(int=number << 96 | 0xABCDEF1234) for number in range(12)]
            for twin in twins:
                await store.start_run(FLOW, "twins", twin, "manual")
            # The same digits in the middle of an id, and in an output.
            await store.start_run(FLOW, "other", UUID(int=0xABCDEF12340000), "manual")
            await store.record_step_start(run_id, "step", "test")
            await store.record_step_complete(run_id, "step", StepStatus.SUCCEEDED, output_json='"abcdef1234"')
        return [str(twin) for twin in twins]

    twins = asyncio.run(start())
    code, _, err = flowstore("runs", "show", "abcdef1234")
    lines = err.splitlines()
    assert code == 1
    assert lines[0].startswith("flowstore: more than 10 runs have an id that begins or ends with abcdef1234;")
    assert len(lines) == 11
    assert all(line.split()[0] in twins and line.endswith("twins") for line in lines[1:])
    assert flowstore("runs", "show", twins[3], "--json")[0] == 0
    assert flowstore("runs", "show", "0000000000abcdef12340000", "--json")[0] == 0
    # Short ids that are not unique are not shown.
    rows = lines_on_terminal("runs", "list", columns=120)[1:]
    assert [row.split()[0] for row in rows if "twins" in row] == sorted(twins, reverse=True)


def test_a_complete_id_is_not_searched() -> None:
    async def find() -> None:
        async with open_store("memory://") as store:
            counted = CountingStore(store)
            run_id = new_run_id()
            assert await find_run(counted.store, parse_run(str(run_id))) == run_id
            assert counted.calls == []
            with pytest.raises(Failure, match="no run has an id"):
                await find_run(counted.store, parse_run(run_id.hex[-8:]))
            assert counted.calls == ["get_runs_page"]

    asyncio.run(find())


@pytest.mark.parametrize("gap", [1, 3, 1000])
@pytest.mark.parametrize("number", [0, 9, 10, 11, 37, 1000, 5000])
def test_the_last_events_are_read_without_reading_all_events(number: int, gap: int) -> None:
    class Log:
        """A run's events, in a backend whose sequences have gaps."""

        limits = StoreLimits()

        async def get_run_events(self, run_id: UUID, *, after: int = 0, take: int) -> list[FlowEventRecord]:
            first = after // gap + 1
            return [
                FlowEventRecord(
                    sequence=position * gap,
                    run_id=run_id,
                    timestamp=datetime.now(UTC),
                    event_type="note",
                    step_key=None,
                    message=None,
                )
                for position in range(first, min(first + take, number + 1))
            ]

    async def read() -> None:
        counted = CountingStore(cast(FlowStore, Log()))
        for limit in (10, 1000):
            counted.rows = 0
            events = await last_events(counted.store, UUID(int=1), limit)
            expected = [position * gap for position in range(max(number - limit, 0) + 1, number + 1)]
            assert [event.sequence for event in events] == expected
            assert counted.rows <= 4 * limit + 50

    asyncio.run(read())


def test_runs_show_shows_the_last_events(database: dict[str, UUID], flowstore: Flowstore) -> None:
    async def append() -> None:
        async with open_store("sqlite:///flowstore.db") as store:
            for number in range(60):
                await store.append_event(database["failed"], "note", message=f"event {number}")

    asyncio.run(append())
    rows = flowstore("runs", "show", str(database["failed"]))[1].splitlines()[-10:]
    assert [row.split()[-1] for row in rows] == [str(number) for number in range(50, 60)]
    assert rows[-1].split()[0] == "61"
    assert flowstore("runs", "show", str(database["failed"]), "--full")[1].count(" note ") == 61


def test_cleanup_counts_each_run_once() -> None:
    async def count() -> None:
        clock = VirtualClock()
        async with open_store("memory://", clock=clock) as store:
            for number in range(2500):
                run_id = new_run_id()
                await store.start_run(FLOW, "flow", run_id, "manual")
                clock.advance(seconds=1)
                if number % 2:
                    await store.complete_run(run_id, RunStatus.FAILED if number % 3 else RunStatus.CANCELLED)
            counted = CountingStore(store)
            cutoff = clock() - timedelta(seconds=500)
            number = await count_completed(counted.store, cutoff)
            assert counted.rows == 2500
            assert number == await store.cleanup(cutoff)

    asyncio.run(count())


def test_the_url_may_precede_the_command(database: dict[str, UUID], flowstore: Flowstore) -> None:
    url = "sqlite:///flowstore.db"
    for command in (["runs", "list"], ["stats"], ["migrate", "status"], ["ping", "--times", "1"]):
        assert flowstore("--url", "memory://", *command) != flowstore("--url", url, *command)
    expected = flowstore("runs", "list", "--url", url)
    assert flowstore("--url", url, "runs", "list") == expected
    assert flowstore("-u", url, "runs", "list", "--url", url) == expected
    code, _, err = flowstore("--url", "memory://user:hunter2@x", "runs", "list", "--url", url)
    assert (code, "hunter2" in err) == (2, False)


def complete(words: str, tmp_path: Path, shell: str = "bash") -> list[str]:
    """The completions of the last word."""
    environment = {
        **os.environ,
        "_FLOWSTORE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
        "_TYPER_COMPLETE_ARGS": words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    done = subprocess.run(
        [sys.executable, "-m", "flowstore_cli.main"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split("\n")[:-1]


def complete_from_store(words: str, tmp_path: Path, shell: str = "bash") -> list[str]:
    """The completions, once they are found in time: on a busy machine completion gives up at times."""
    for _ in range(20):
        # No completion is an empty line in some shells.
        if any(found := complete(words, tmp_path, shell)):
            return found
    raise AssertionError(f"no completions of {words!r}")


def test_completion_in_the_shell(database: dict[str, UUID], flowstore: Flowstore, tmp_path: Path) -> None:
    assert complete("flowstore runs sh", tmp_path) == ["show"]
    assert complete("flowstore runs list --status ca", tmp_path) == ["cancelled"]
    assert complete("flowstore runs list --status R", tmp_path) == ["Running"]
    assert "postgresql://" in complete("flowstore --url po", tmp_path)
    newest = [database[name].hex[-8:] for name in ("waiting", "failed", "old")]
    assert complete_from_store("flowstore runs show ", tmp_path) == newest
    assert complete_from_store("flowstore --url sqlite:///flowstore.db runs cancel ", tmp_path) == newest
    assert complete_from_store(f"flowstore runs show {str(database['old'])[:4]}", tmp_path)[-1] == str(
        database["old"]
    )
    assert complete_from_store("flowstore runs list --flow ni", tmp_path) == [
        r"nightly\ \\x1b\[31mred\\x1b\[0m\ import"
    ]
    assert "Failed, " in complete_from_store("flowstore runs show ", tmp_path, "fish")[1]
    assert newest[0] in "".join(complete_from_store("flowstore runs show ", tmp_path, "zsh"))


def test_completion_without_a_store_is_silent_and_creates_no_file(tmp_path: Path) -> None:
    for url in ("sqlite:///missing.db", "postgresql://127.0.0.1:1/x", "nonsense://x", "memory://?x=1"):
        assert complete(f"flowstore runs show --url {url} ", tmp_path) in ([], [""])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_can_be_shown_and_installed(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    program = f"{sys.executable} -m flowstore_cli.main"
    # The builtin at the end keeps the shell from replacing itself with the last program.
    shown = subprocess.run(
        [shell, "-c", f"{program} --show-completion && {program} --install-completion && true"],
        env={**os.environ, "HOME": str(tmp_path), "SHELL": shell},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"_FLOWSTORE_COMPLETE=complete_{shell}" in shown.stdout
    assert f"{shell} completion installed in {tmp_path}" in shown.stdout


def test_runs_retry(database: dict[str, UUID], flowstore: Flowstore) -> None:
    run_id = str(database["failed"])
    code, _, err = flowstore("runs", "retry", run_id, "step", "--attempt", "2")
    assert (code, "attempt 1 is the last of step 'step', not attempt 2" in err) == (1, True)
    code, out, _ = flowstore("runs", "retry", run_id, "step", "--attempt", "1", "--reset-skipped", "--json")
    assert code == 0
    assert json.loads(out) == {
        "run_id": run_id,
        "step_key": "step",
        "status": "Pending",
        "attempt_count": 2,
        "run_status": "Running",
    }
    assert "the next attempt is 2" in flowstore("runs", "retry", run_id, "step")[1]
    code, _, err = flowstore("runs", "retry", run_id, "stp")
    assert (code, "did you mean 'step'?" in err) == (1, True)


def test_runs_retry_puts_a_step_back_into_its_queue(tmp_path: Path, flowstore: Flowstore) -> None:
    run_id, url = new_run_id(), f"sqlite:///{tmp_path}/flows.db"

    async def fail() -> None:
        async with open_store(url) as store:
            request = StepRequest(step_key="step", step_type="test", input_json="1", queue="mail", priority=3)
            await store.trigger_run(run_id, "flow", run_id, "test", dispatch=[request])
            [step] = await store.claim_next_steps(["mail"], lease=timedelta(hours=1))
            await store.advance_run(
                run_id, "step", StepStatus.FAILED, attempt=step.attempt, complete_as=RunStatus.FAILED
            )

    async def claim() -> Sequence[ClaimedStep]:
        async with open_store(url) as store:
            return await store.claim_next_steps(["mail"], lease=timedelta(hours=1))

    asyncio.run(fail())
    assert flowstore("runs", "retry", str(run_id), "step", "--url", url)[0] == 0
    [step] = asyncio.run(claim())
    assert (step.step_type, step.input_json, step.priority, step.attempt) == ("test", "1", 3, 2)


def test_runs_cancel(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, _, err = flowstore("runs", "cancel", str(database["failed"]))
    assert (code, "is Failed already" in err) == (1, True)
    code, out, _ = flowstore("runs", "cancel", str(database["waiting"]), "--reason", "wrong", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["requested"], result["control"]["cancel_reason"]) == (True, "wrong")
    code, out, _ = flowstore("runs", "cancel", str(database["waiting"]))
    assert (code, out.strip()[-24:]) == (0, "already requested: wrong")


def test_runs_wait(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("runs", "wait", str(database["failed"]), "--json")
    assert (code, json.loads(out)) == (1, {"run_id": str(database["failed"]), "status": "Failed"})
    code, out, _ = flowstore("runs", "wait", str(database["waiting"]), "--timeout", "1s")
    assert (code, out) == (1, f"{database['waiting']} is still Running after 1s\n")
    code, _, err = flowstore("runs", "wait", str(UUID(int=99)))
    assert (code, "no run" in err or "not stored" in err) == (1, True)
    assert flowstore("runs", "wait", str(database["waiting"]), "--timeout", "0s")[0] == 2


def test_runs_wait_ends_with_the_run(database: dict[str, UUID], tmp_path: Path) -> None:
    run_id = database["waiting"]
    url = f"sqlite:///{tmp_path}/flowstore.db"
    command = [sys.executable, "-m", "flowstore_cli.main", "runs", "wait", str(run_id), "--url", url]

    async def complete() -> None:
        async with open_store(url) as store:
            assert await store.complete_run(run_id, RunStatus.SUCCEEDED)

    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as waiting:
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=1)
        asyncio.run(complete())
        assert waiting.communicate(timeout=60)[0] == f"{run_id} Succeeded\n"
    assert waiting.returncode == 0


def test_stats(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("stats", "--json")
    assert code == 0
    counts = json.loads(out)
    assert (counts["total_flows"], counts["active_runs"], counts["completed_today"]) == (1, 1, 0)
    assert "runs active              1\n" in flowstore("stats")[1]


def test_queues(tmp_path: Path, flowstore: Flowstore) -> None:
    url = f"sqlite:///{tmp_path}/queues.db"

    async def fill() -> None:
        async with open_store(url) as store:
            run_id = (await store.start_run(FLOW, "orders", new_run_id(), "manual")).run_id
            for key, queue in (("a", "mail"), ("b", "mail"), ("c", "print")):
                await store.try_record_dispatch(run_id, key, queue=queue, step_type="send")
            await store.claim_next_steps(["mail"], lease=timedelta(minutes=5))

    asyncio.run(fill())
    code, out, _ = flowstore("queues", "--json", "--url", url)
    assert code == 0
    mail, other = json.loads(out)
    assert (mail["queue"], mail["ready"], mail["running"]) == ("mail", 1, 1)
    assert (other["queue"], other["ready"], other["scheduled"], other["waiting"]) == ("print", 1, 0, 0)
    assert mail["oldest_ready_at"] is not None
    rows = [line.split() for line in flowstore("queues", "--url", url)[1].splitlines()]
    assert rows[0][:5] == ["QUEUE", "READY", "SCHEDULED", "WAITING", "RUNNING"]
    assert [row[:5] for row in rows[1:]] == [["mail", "1", "0", "0", "1"], ["print", "1", "0", "0", "0"]]


def test_timeseries(database: dict[str, UUID], flowstore: Flowstore) -> None:
    code, out, _ = flowstore("timeseries", "--by", "day", "--since", "45d", "--json")
    assert code == 0
    buckets = json.loads(out)
    assert len(buckets) in (45, 46, 47)
    assert [sum(b[n] for b in buckets) for n in ("total", "succeeded", "failed", "running")] == [3, 1, 1, 1]
    lines = lines_on_terminal("timeseries", "--by", "day", "--since", "45d")
    assert "in all 3 runs" in lines[-1]
    assert all(any(mark in line for line in lines[:-1]) for mark in "█▓░")
    assert max(map(len, lines)) <= 80
    # Without a terminal only the numbers are printed.
    rows = flowstore("timeseries", "--by", "day", "--since", "45d")[1].splitlines()
    assert len(rows) == len(buckets) + 1
    assert rows[-1].split()[:6] == [f"{datetime.now(UTC):%Y-%m-%dT00:00:00Z}", "2", ".", "1", ".", "1"]
    assert flowstore("timeseries", "--since", "2025-06-01", "--until", "2025-06-01T12:00")[0] == 0


def test_signal_deliver(
    database: dict[str, UUID], flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = str(database["waiting"])
    code, out, _ = flowstore("signal", "deliver", run_id, "other", "{}")
    assert (code, "no step of the run waits" in out) == (1, True)
    code, out, _ = flowstore("signal", "deliver", str(database["failed"]), "approval", "{}")
    assert (code, "the run has ended (Failed)" in out) == (1, True)
    assert "did you mean 'approval'?" in flowstore("signal", "deliver", run_id, "aproval")[1]
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
    assert (code, "already has this signal" in out) == (1, True)


def test_runs_tag(database: dict[str, UUID], flowstore: Flowstore) -> None:
    old, failed = str(database["old"]), str(database["failed"])
    code, out, _ = flowstore("runs", "tag", old, "env=live", "query=a=b", "customer=acme")
    assert (code, out) == (0, f"run {old} has the tags customer=acme, env=live, query=a=b\n")
    code, out, _ = flowstore("runs", "tag", failed[-8:], "env=live", "--json")
    assert (code, json.loads(out)) == (0, {"run_id": failed, "tags": {"env": "live"}})
    code, out, _ = flowstore("runs", "tag", old, "env=test", "--remove", "query", "--remove", "none")
    assert (code, out) == (0, f"run {old} has the tags customer=acme, env=test\n")
    assert re.search("^tags +customer=acme, env=test$", flowstore("runs", "show", old)[1], re.M)
    shown = json.loads(flowstore("runs", "show", old, "--json")[1])["run"]
    assert shown["tags"] == {"customer": "acme", "env": "test"}
    for tags, found in (
        (["env=test"], [old]),
        (["env=live"], [failed]),
        (["env=test", "customer=acme"], [old]),
        (["env=live", "customer=acme"], []),
        ([], [str(database["waiting"]), failed, old]),
    ):
        options = [word for tag in tags for word in ("--tag", tag)]
        code, out, _ = flowstore("runs", "list", *options, "--json")
        page = json.loads(out)
        assert (code, [one["run_id"] for one in page["runs"]], page["total_count"]) == (0, found, len(found))
    code, out, _ = flowstore("runs", "list", "-t", "env=test", "--status", "failed")
    assert (code, out) == (0, "")
    assert flowstore("runs", "tag", failed, "--remove", "env")[1] == f"run {failed} has no tags\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tag", "RUN"), "give tags to set, as KEY=VALUE, or to remove, with --remove"),
        (("tag", "RUN", "env"), "a tag has the form KEY=VALUE, not 'env'"),
        (("tag", "RUN", "env="), "a tag has the form KEY=VALUE, not 'env='"),
        (("tag", "RUN", "=live"), "a tag has the form KEY=VALUE, not '=live'"),
        (("tag", "RUN", "env=1", "env=2"), "tag 'env' is given twice, with two values"),
        (("tag", "RUN", "env=1", "--remove", "env"), "tag 'env' cannot be both set and removed"),
        (("tag", "RUN", "env=" + "x" * 257), "a tag must be text of 1 to 256 characters"),
        (("tag", "RUN", *(f"{n}=1" for n in range(33))), "a tag must be at most 32 keys to set"),
        (("list", "--tag", "env"), "a tag has the form KEY=VALUE, not 'env'"),
    ],
)
def test_runs_tag_names_the_mistake(
    arguments: tuple[str, ...], message: str, database: dict[str, UUID], flowstore: Flowstore
) -> None:
    words = [str(database["old"]) if word == "RUN" else word for word in arguments]
    code, out, err = flowstore("runs", *words)
    assert (code, out, message in err) == (2, "", True), err
    assert json.loads(flowstore("runs", "show", str(database["old"]), "--json")[1])["run"]["tags"] == {}


def test_runs_tag_at_the_limit(database: dict[str, UUID], flowstore: Flowstore) -> None:
    old = str(database["old"])
    assert flowstore("runs", "tag", old, *(f"{number}=1" for number in range(32)))[0] == 0
    code, out, err = flowstore("runs", "tag", old, "one more=1")
    assert (code, out, "would have 33 tags; at most 32 are allowed" in err) == (1, "", True)


def test_signal_deliver_with_buffer(database: dict[str, UUID], flowstore: Flowstore) -> None:
    run_id = str(database["waiting"])
    code, out, _ = flowstore("signal", "deliver", run_id, "early", '{"n": 1}', "--buffer")
    assert (code, "the run keeps it for the next step" in out) == (0, True)
    code, out, _ = flowstore("signal", "deliver", run_id, "early", '{"n": 2}', "--buffer", "--json")
    assert (code, json.loads(out)) == (0, {"status": "Buffered", "step_key": None, "delivered_at": None})
    out = flowstore("runs", "show", run_id)[1]
    assert [line.split() for line in out.splitlines() if "early" in line] == [
        ["early", '{"n":', "1}"],
        ["early", '{"n":', "2}"],
    ]
    shown = json.loads(flowstore("runs", "show", run_id, "--json")[1])["buffered_signals"]
    assert [one["payload_json"] for one in shown] == ['{"n": 1}', '{"n": 2}']
    assert flowstore("signal", "deliver", run_id, "approval", "{}", "--buffer")[1].startswith("delivered to")
    code, out, _ = flowstore("signal", "deliver", str(database["failed"]), "early", "{}", "--buffer")
    assert (code, "the run has ended (Failed)" in out) == (1, True)


def test_runs_delete(database: dict[str, UUID], flowstore: Flowstore) -> None:
    old, failed, waiting = (str(database[name]) for name in ("old", "failed", "waiting"))
    code, out, err = flowstore("runs", "delete", old)
    assert (code, out, "use --yes" in err) == (2, "", True)
    # Nothing is deleted if one of the runs cannot be.
    code, out, err = flowstore("runs", "delete", old, waiting, "--yes")
    assert (code, out, f"flowstore runs cancel {waiting}" in err) == (1, "", True)
    code, out, err = flowstore("runs", "delete", old, str(UUID(int=1)), "--yes")
    assert (code, out, "there is no run" in err) == (1, "", True)
    assert flowstore("runs", "show", old)[0] == 0
    assert flowstore("runs", "delete", old[-8:], "--yes") == (0, "deleted 1 run\n", "")
    assert flowstore("runs", "show", old)[0] == 1
    code, out, _ = flowstore("runs", "delete", failed, failed, "--yes", "--json")
    assert (code, json.loads(out)) == (0, {"deleted": [failed]})
    assert flowstore("runs", "show", waiting)[0] == 0


def test_runs_delete_asks(
    database: dict[str, UUID], flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = str(database["old"])
    for answer, deleted in (("n", 0), ("y", 1)):
        monkeypatch.setattr("sys.stdin", _Terminal(f"{answer}\n"))
        code, out, err = flowstore("runs", "delete", old)
        # A question ends with a blank.
        assert (code, out.lstrip()) == (0, f"deleted {deleted} run{'' if deleted else 's'}\n")
        assert f"will delete {old}  Succeeded" in err
        assert "\x1b" not in err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_cleanup(database: dict[str, UUID], flowstore: Flowstore) -> None:
    assert (
        "would delete 1 run completed before" in flowstore("cleanup", "--older-than", "30d", "--dry-run")[1]
    )
    assert "would delete 0 runs" in flowstore("cleanup", "--older-than", "41d", "--dry-run")[1]
    code, out, _ = flowstore("cleanup", "--older-than", "30d", "--json")
    result = json.loads(out)
    assert (code, result["runs"], result["dry_run"]) == (0, 1, False)
    assert datetime.fromisoformat(result["cutoff"]) < datetime.now(UTC) - timedelta(days=29)
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
    result = json.loads(out)
    assert (code, result["before"]) == (0, result["version"])
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


def test_replay_without_migrating_refuses_a_missing_schema(flowstore: Flowstore, tmp_path: Path) -> None:
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
    assert max(map(len, lines_on_terminal("backends"))) <= 80
    listed = {entry["name"]: entry for entry in json.loads(flowstore("backends", "--json")[1])}
    assert {"memory", "postgresql", "sqlite"} <= set(listed)
    assert listed["sqlite"]["status"] == "installed"
    assert "durable" in listed["sqlite"]["capabilities"]
    assert "durable" not in listed["memory"]["capabilities"]
    assert "postgres" in listed["postgresql"]["schemes"]


def test_backends_reports_a_missing_driver_with_its_remedy(
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


def test_backends_reports_a_broken_plugin(flowstore: Flowstore, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowstore_core.plugins import Plugin, load_error

    error = load_error("mine", "mine.plugin", "mine-dist", ValueError("no; not at all"))
    broken = Plugin(name="mine", distribution="mine-dist", module="mine.plugin", error=error)
    monkeypatch.setattr("flowstore_cli.backends.load_plugins", lambda: (broken,))
    listed = json.loads(flowstore("backends", "--json")[1])[0]
    assert (listed["name"], listed["status"]) == ("mine", "broken")
    assert listed["problem"].endswith("ValueError in mine.plugin: no; not at all")
    assert listed["remedy"] == "report it to the authors of mine-dist"
    assert flowstore("backends")[0] == 0


def test_backends_reports_two_plugins_that_claim_one_scheme(
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


def test_replay_prints_its_summary_as_json(flowstore: Flowstore) -> None:
    code, out, err = flowstore("replay", "--speed", "5000", "--workers", "2", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["ok"] is True
    assert (summary["steps"], summary["steps_succeeded"], summary["attempts"]) == (10, 10, 10)
    assert {check["ok"] for check in summary["checks"]} == {True}
    assert len(summary["run_ids"]) == 1
    code, out, _ = flowstore("runs", "show", summary["run_ids"][0], "--json")
    assert json.loads(out)["run"]["status"] == "Succeeded"


def test_replay_prints_plain_lines_without_a_terminal(flowstore: Flowstore) -> None:
    code, out, _ = flowstore(
        "replay", "--speed", "5000", "--workers", "2", "--fail-rate", "1", "--max-attempts", "1"
    )
    assert code == 1
    assert out.startswith("replaying 'market-day': 1 run of 10 steps, 2 workers, 5000 times as fast\nstore: ")
    assert "check      FAILED  every run succeeded\n" in out
    assert "failed: injected failure" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_reported_with_the_package_to_install(missing: str) -> None:
    program = (
        f"import sys; sys.modules[{missing!r}] = None; "
        "from flowstore_cli.main import main; sys.exit(main(['backends']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"flowstore: module '{missing}' is missing; pip install 'flowstore[cli]'\n"


def run_on_terminal(*arguments: str, **environment: str) -> bytes:
    """Run the command on a terminal of 80 columns and return its output."""
    controller, terminal = pty.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flowstore_cli.main", *arguments],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        env={**inherited, "TERM": "xterm-256color", "COLUMNS": "80", **environment},
    )
    os.close(terminal)
    output = b""
    # On Linux, reading from a closed terminal raises OSError instead of returning b"".
    while True:
        try:
            part = os.read(controller, 65536)
        except OSError:
            break
        if not part:
            break
        output += part
    os.close(controller)
    assert process.wait(60) == 0
    return output


def lines_on_terminal(*arguments: str, columns: int = 80) -> list[str]:
    """The text on a terminal of ``columns`` columns, without colours."""
    output = run_on_terminal(*arguments, COLUMNS=str(columns)).decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", output).splitlines()


def test_colours_are_used_on_terminals_without_no_color() -> None:
    assert b"\x1b[32m" in run_on_terminal("backends")
    assert b"\x1b[32m" not in run_on_terminal("backends", NO_COLOR="1")


def test_the_live_view_restores_the_terminal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    output = run_on_terminal("replay", "--speed", "1000", "--workers", "2", "--url", url)
    assert b"WORKER" in output
    assert b"of 10 steps" in output
    assert output.rindex(b"\x1b[?25h") > output.rindex(b"\x1b[?25l"), "the cursor is shown again"
    assert b"every run succeeded" in output
