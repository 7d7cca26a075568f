"""``flowstore runs tree``, ``runs events`` and ``runs watch``: lineage, and runs as they go on."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import pytest

from flowstore_core import FlowStore, RunStatus, StepStatus, new_run_id, open_store
from tests.test_cli import FLOW, Flowstore, flowstore, lines_on_terminal

__all__ = ["flowstore"]

SECONDS = 60.0


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/flowstore.db"


@pytest.fixture
def family(url: str) -> list[UUID]:
    """0 has the derived runs 1 and 2, and 1 has 3; 4 was derived from a run that is not stored."""
    ids = [new_run_id() for _ in range(5)]
    sources = (None, ids[0], ids[0], ids[1], new_run_id())

    async def fill() -> None:
        async with open_store(url) as store:
            for number, (run_id, source) in enumerate(zip(ids, sources, strict=True)):
                await store.start_run(FLOW, f"flow {number}", run_id, "manual", source_run_id=source)

    asyncio.run(fill())
    return ids


def test_the_tree_of_a_run_begins_with_its_earliest_source(family: list[UUID], flowstore: Flowstore) -> None:
    code, out, err = flowstore("runs", "tree", str(family[3]))
    assert (code, err) == (0, "")
    lines = out.splitlines()
    starts = [f"{family[0]}  ", f"├─ {family[1]}  ", f"│  └─ {family[3]}  ", f"└─ {family[2]}  "]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 4
    assert [line.endswith("<- this run") for line in lines] == [False, False, True, False]


def test_the_tree_as_json(family: list[UUID], flowstore: Flowstore) -> None:
    document = json.loads(flowstore("runs", "tree", str(family[1]), "--json")[1])
    assert (document["root"], document["complete"]) == (str(family[0]), True)
    assert [one["run_id"] for one in document["runs"]] == [*map(str, family[:4])]
    document = json.loads(flowstore("runs", "tree", str(family[1]), "--json", "--take", "2")[1])
    assert [one["run_id"] for one in document["runs"]] == [*map(str, family[:2])]
    assert not document["complete"]


def test_a_tree_is_cut_with_a_remark(family: list[UUID], flowstore: Flowstore) -> None:
    code, out, err = flowstore("runs", "tree", str(family[0]), "--take", "3")
    assert (code, len(out.splitlines()), err) == (0, 3, "stopped at 3 runs; show more with --take\n")


def test_a_run_whose_source_is_gone_is_its_own_tree(family: list[UUID], flowstore: Flowstore) -> None:
    (line,) = flowstore("runs", "tree", str(family[4]))[1].splitlines()
    assert line.startswith(str(family[4]))
    assert "this run" not in line


def test_runs_derived_from_each_other(url: str, flowstore: Flowstore) -> None:
    first, second = new_run_id(), new_run_id()

    async def fill() -> None:
        async with open_store(url) as store:
            await store.start_run(FLOW, "flow", first, "manual", source_run_id=second)
            await store.start_run(FLOW, "flow", second, "manual", source_run_id=first)

    asyncio.run(fill())
    code, out, _ = flowstore("runs", "tree", str(first))
    assert (code, len(out.splitlines())) == (0, 2)


def test_a_long_chain_of_runs(url: str, flowstore: Flowstore) -> None:
    ids = [new_run_id() for _ in range(500)]

    async def fill() -> None:
        async with open_store(url) as store:
            for source, run_id in zip([None, *ids], ids, strict=False):
                await store.start_run(FLOW, "flow", run_id, "manual", source_run_id=source)

    asyncio.run(fill())
    code, out, _ = flowstore("runs", "tree", str(ids[400]), "--take", "1000", "--json")
    assert (code, json.loads(out)["root"]) == (0, str(ids[0]))
    assert len(flowstore("runs", "tree", str(ids[400]), "--take", "1000")[1].splitlines()) == 500


@pytest.mark.parametrize("command", ["tree", "events", "watch"])
def test_an_unknown_run(command: str, family: list[UUID], flowstore: Flowstore) -> None:
    code, out, err = flowstore("runs", command, str(UUID(int=99)))
    assert (code, out) == (1, "")
    assert str(UUID(int=99)) in err


@pytest.fixture
def running(url: str) -> UUID:
    """A Running run with a Running step and three events."""
    run_id = new_run_id()

    async def fill() -> None:
        async with open_store(url) as store:
            await store.start_run(FLOW, "orders", run_id, "manual")
            await store.record_step_start(run_id, "charge", "http")
            for number in range(3):
                await store.append_event(
                    run_id, "note", step_key="charge", message=f"line\n{number} \x1b[31m"
                )

    asyncio.run(fill())
    return run_id


def test_events_are_lines(running: UUID, flowstore: Flowstore) -> None:
    code, out, _ = flowstore("runs", "events", str(running), "--after", "1")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["2", "3"]
    assert all(line.endswith("\\x1b[31m") for line in out.splitlines()), "control characters are escaped"
    found = [json.loads(line) for line in flowstore("runs", "events", str(running), "--json")[1].splitlines()]
    assert [one["message"] for one in found] == [f"line\n{number} \x1b[31m" for number in range(3)]


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The running command; it is killed if the test fails."""
    program = [sys.executable, "-m", "flowstore_cli.main", *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def _finish(store: FlowStore, run_id: UUID, status: RunStatus) -> None:
    await store.record_step_complete(run_id, "charge", StepStatus(status))
    await store.append_event(run_id, "last")
    assert await store.complete_run(run_id, status)


def finish(url: str, run_id: UUID, status: RunStatus) -> None:
    async def change() -> None:
        async with open_store(url) as store:
            await _finish(store, run_id, status)

    asyncio.run(change())


def read_lines(process: subprocess.Popen[str], number: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(number)]


def test_events_are_followed_until_the_run_has_ended(running: UUID, url: str) -> None:
    with command("runs", "events", str(running), "--follow", "--url", url) as process:
        assert [line.split()[0] for line in read_lines(process, 3)] == ["1", "2", "3"]
        finish(url, running, RunStatus.FAILED)
        out, _ = process.communicate(timeout=SECONDS)
    assert [line.split()[2] for line in out.splitlines()] == ["last"]
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("status", "code"), [(RunStatus.SUCCEEDED, 0), (RunStatus.FAILED, 1)], ids=["succeeds", "fails"]
)
def test_a_watched_run(running: UUID, url: str, status: RunStatus, code: int) -> None:
    with command("runs", "watch", str(running), "--url", url) as process:
        (line,) = read_lines(process, 1)
        assert line.split()[1:] == ["charge", "Running", "attempt", "1"]
        finish(url, running, status)
        out, _ = process.communicate(timeout=SECONDS)
    change, end = out.splitlines()
    assert change.split()[1:] == ["charge", status, "attempt", "1"]
    assert end == f"{running} {status}"
    assert process.returncode == code


def test_a_watched_run_on_a_terminal(running: UUID, url: str) -> None:
    finish(url, running, RunStatus.SUCCEEDED)
    lines = lines_on_terminal("runs", "watch", str(running), "--url", url)
    assert "orders: 1 of 1 step ended" in " ".join(lines)
    assert lines[-1] == f"{running} Succeeded"
    assert lines[-2].split()[:2] == ["charge", "Succeeded"]
