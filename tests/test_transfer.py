"""Runs move between stores: every pair of backends, the JSON of archives, and ``flowstore copy``."""

from __future__ import annotations

import asyncio
import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from flowstore_conformance.archives import full_archive
from flowstore_conformance.state_probe import invoke, probe_calls
from flowstore_conformance.write_scenarios import SCENARIOS

from benchmarks.transfer import fill, round_trip
from flowstore_cli.main import main
from flowstore_core import (
    FlowStore,
    InvalidArgumentError,
    RunArchive,
    RunStatus,
    open_store,
)
from flowstore_core.archive_validation import check_archive
from flowstore_core.plugins import find_backend
from flowstore_core.transfer import is_same_run
from tests.conftest import BACKENDS

PAGE = Path(__file__).parents[1] / "docs" / "transfer.md"
GOLDEN = Path(__file__).parent / "data" / "run-archive-1.json"
RUN = UUID("01970c2e-7a86-7d3b-9a55-0c1d8a3f5b20")
RUNS = 300


@asynccontextmanager
async def _scratch(backend: str, folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """The URL of an empty namespace of a backend."""
    urls = {"memory": "memory://", "sqlite": f"sqlite:///{folder}/flows.db"}
    url = urls.get(backend) or request.getfixturevalue("postgresql_url")
    async with find_backend(backend)[1].scratch(url) as fresh:
        yield fresh


@pytest.mark.parametrize("target", BACKENDS)
@pytest.mark.parametrize("source", BACKENDS)
async def test_a_run_moves_between_every_pair_of_backends(
    source: str, target: str, memory_path: Path, request: pytest.FixtureRequest
) -> None:
    async with AsyncExitStack() as stack:
        stores: list[FlowStore] = []
        for backend in (source, target):
            url = await stack.enter_async_context(_scratch(backend, memory_path, request))
            stores.append(await stack.enter_async_context(open_store(url)))
        for name, factory in SCENARIOS.items():
            run_id, flow_id = uuid4(), uuid4()
            setup, call = factory(run_id, flow_id)
            for one in (*setup, call):
                await invoke(stores[0], one)
            archive = await stores[0].export_run(run_id)
            if archive is None:
                continue
            assert await stores[1].import_run(RunArchive.from_json(archive.to_json())), name
            assert await stores[1].export_run(run_id) == archive, name
            assert await stores[1].import_run(archive) is False, name
            for read in probe_calls(run_id, stores[0].capabilities, keys=[(flow_id, "manual", "K")]):
                if "claim" not in read.method and read.method != "export_run":
                    answers = [await invoke(store, read) for store in stores]
                    assert answers[1] == answers[0], (name, read.method)


async def test_the_example_of_the_page_moves_a_run(stores: list[str]) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    exec(code, names)
    async with open_store(stores[0]) as source, open_store(stores[1]) as target:
        runs = await source.get_runs(take=20)
        for run in [*runs, *runs]:
            await names["move"](source, target, run.run_id)
        assert await target.get_runs(take=50) == runs
        assert {run.status for run in await source.get_runs()} == {RunStatus.RUNNING}


# JSON


def test_version_1_of_the_json_is_readable() -> None:
    # A change of the JSON needs a new version; this file stays as it is.
    archive = RunArchive.from_json(GOLDEN.read_text(encoding="utf-8"))
    assert archive == full_archive(RUN)
    assert json.loads(archive.to_json()) == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_golden_archive_has_every_part() -> None:
    archive = full_archive(RUN)
    assert all(getattr(archive, field.name) for field in fields(archive))
    assert check_archive(archive) is archive


def _changed(path: str, value: object) -> str:
    """The golden JSON with another value at a path, such as ``steps.0.status``."""
    document = json.loads(GOLDEN.read_text(encoding="utf-8"))
    *parents, last = path.split(".")
    part = document
    for name in parents:
        part = part[int(name) if name.isdigit() else name]
    part[int(last) if last.isdigit() else last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("", "archive"),
        ("[]", "archive"),
        ("{}", "archive"),
        ("[" * 100_000, "archive"),
        ('{"format":1,"format":2}', "archive"),
        (_changed("format", "another"), "archive"),
        (_changed("version", 2), "archive.version"),
        (_changed("version", True), "archive.version"),
        (_changed("version", None), "archive.version"),
        (_changed("run_id", "secret"), "archive.run_id"),
        (_changed("more", "secret"), "archive"),
        (_changed("run", []), "archive.run"),
        (_changed("run.flow_id", "secret"), "archive.run.flow_id"),
        (_changed("run.status", "secret"), "archive.run.status"),
        (_changed("run.started_at", "2026-03-14T00:00:00"), "archive.run.started_at"),
        (_changed("run.started_at", 5), "archive.run.started_at"),
        (_changed("run.trigger_data", ["secret"]), "archive.run.trigger_data"),
        (_changed("run.more", "secret"), "archive.run"),
        (_changed("steps", {}), "archive.steps"),
        (_changed("steps.0", "secret"), "archive.steps[0]"),
        (_changed("steps.0.attempts.1.attempt", 2.0), "archive.steps[0].attempts[1].attempt"),
        (_changed("steps.2.rescheduled", 1), "archive.steps[2].rescheduled"),
        (_changed("outputs", [["a"]]), "archive.outputs[0]"),
        (_changed("outputs", [["a", 1]]), "archive.outputs[0]"),
    ],
)
def test_other_json_is_refused_without_its_content(text: str, argument: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        RunArchive.from_json(text)
    assert raised.value.argument == argument
    assert "secret" not in str(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


def test_a_text_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="archive must be a text"):
        RunArchive.from_json(None)  # type: ignore[arg-type]


def test_repr_hides_application_data() -> None:
    archive = full_archive(RUN)
    assert repr(archive) == f"RunArchive(run_id={RUN})"
    for part in (archive.control, *archive.idempotency_keys, *archive.steps):
        assert not {"enough", "late", "'key'", "not needed"} & set(repr(part).split())


def test_only_the_ends_of_claims_on_open_steps_may_differ() -> None:
    archive = full_archive(RUN)
    step = archive.steps[0]
    assert step.claim is not None
    ended = replace(step, claim=replace(step.claim, expires_at=None))
    assert is_same_run(archive, replace(archive, steps=(ended, *archive.steps[1:])))
    other = replace(step, claim=replace(step.claim, owner="other"))
    assert not is_same_run(archive, replace(archive, steps=(other, *archive.steps[1:])))


# The command line


async def test_a_copy_that_is_killed_continues_and_verifies(
    fresh: str, memory_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Copy a store to PostgreSQL and back, each time with kill -9 in the middle, and compare every read."""
    files = [f"sqlite:///{memory_path}/{name}.db" for name in ("first", "last")]
    await round_trip(files[0], fresh, files[1], RUNS)
    out, err = capfd.readouterr()
    assert out.count(f"; {RUNS} verified\n") == 2
    assert out.count("runs already there") == 2
    assert f"verified {RUNS} of {RUNS} runs" in err


@pytest.fixture
def stores(tmp_path: Path) -> list[str]:
    """The URLs of a store with twenty runs, and of one that does not exist yet."""
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("source", "target")]
    asyncio.run(fill(urls[0], 20))
    return urls


def test_copy_refuses_running_runs_until_engines_have_stopped(
    stores: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["copy", *stores]) == 2
    out, err = capsys.readouterr()
    assert (out, "6 runs of SOURCE are Running; stop every engine" in err) == ("", True)
    assert main(["copy", *stores, "--status", "succeeded", "-s", "failed"]) == 0
    assert capsys.readouterr().out == "copied 14 runs; 14 verified\n"
    assert main(["copy", *stores, "--engines-stopped", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"copied": 6, "present": 14, "verified": 20, "failed": []}
    assert err.splitlines()[0].startswith("copied 20 of 20 runs, ")


def test_copy_of_one_flow(stores: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flow = "00000000-0000-0000-0000-00000000000f"
    assert main(["copy", *stores, "--flow", flow]) == 0
    assert capsys.readouterr().out == "copied 0 runs; 0 verified\n"
    assert main(["copy", *stores, "--url", stores[0]]) == 2
    assert "No such option" in capsys.readouterr().err


def test_copy_reports_runs_that_differ(stores: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first, second = asyncio.run(_write_others(*stores))
    assert main(["copy", *stores, "--engines-stopped"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 runs of SOURCE could not be copied; all others are in TARGET" in err
    assert f"{first}: run {first} already exists" in err
    assert f"{second}: it differs from the run in TARGET" in err


async def _write_others(source_url: str, target_url: str) -> tuple[UUID, UUID]:
    """Store two runs in the target that differ from those in the source with their ids."""
    async with open_store(source_url) as source, open_store(target_url) as target:
        first, second = await source.get_runs(take=2)
        await target.start_run(UUID(int=1), "another", first.run_id, "manual")
        archive = await source.export_run(second.run_id)
        assert archive is not None
        assert await target.import_run(archive)
        await target.save_output(second.run_id, "another", "1")
        return first.run_id, second.run_id


def test_export_and_import_of_runs(
    stores: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    main(["runs", "list", "--url", stores[0], "--json"])
    ids = [one["run_id"] for one in json.loads(capsys.readouterr().out)["runs"][:2]]
    assert main(["runs", "export", *ids, "--url", stores[0]]) == 0
    lines = capsys.readouterr().out
    assert [RunArchive.from_json(line).run_id for line in lines.splitlines()] == [UUID(one) for one in ids]
    file = tmp_path / "runs.jsonl"
    file.write_text(f"{lines}\n", encoding="utf-8")
    into = ["--url", stores[1]]
    assert main(["runs", "import", str(file), *into]) == 2
    assert "there is no flowstore schema" in capsys.readouterr().err
    main(["migrate", "up", *into])
    capsys.readouterr()
    assert main(["runs", "import", str(file), *into]) == 0
    assert capsys.readouterr().out == "imported 2 runs\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert main(["runs", "import", *into, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"imported": 0, "present": 2}
    file.write_text(lines.replace('"version":1', '"version":9', 1), encoding="utf-8")
    assert main(["runs", "import", str(file), *into]) == 2
    assert "line 1: archive.version must be of version 1; upgrade flowstore" in capsys.readouterr().err
    changed = lines.splitlines()[1].replace('"trigger_key":"', '"trigger_key":"x')
    file.write_bytes(f"{lines.splitlines()[0]}\n{changed}\n".encode())
    assert main(["runs", "import", str(file), *into]) == 1
    assert f"line 2: run {ids[1]} already exists" in capsys.readouterr().err
    file.write_bytes(b"\xff\n")
    assert main(["runs", "import", str(file), *into]) == 2
    assert "line 1 must be UTF-8" in capsys.readouterr().err
    assert main(["runs", "import", str(tmp_path / "missing"), *into]) == 2
    assert "missing cannot be read: No such file" in capsys.readouterr().err
    assert main(["runs", "export", str(UUID(int=1)), "--url", stores[0]]) == 1
    assert "there is no run 00000000" in capsys.readouterr().err
