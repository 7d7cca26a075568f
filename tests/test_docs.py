"""The documentation agrees with the code: clause ids, signatures, records, errors, links, examples."""

from __future__ import annotations

import asyncio
import builtins
import dataclasses
import enum
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
import typer.main
from flowstore_conformance.registry import all_checks

import flowstore_core
from flowstore_cli.app import app
from flowstore_core import (
    CRASH_SAFE,
    Capability,
    FlowStore,
    FlowStoreError,
    RunStatus,
    StepStatus,
    StoreConfig,
    batching,
    open_store,
)
from flowstore_core.batching import thread_worker
from flowstore_core.operations import CAPABILITY_METHODS
from flowstore_core.plugins import Backend, Hooks, find_backend
from tests.virtual_clock import VirtualClock

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()
CONTRACT = (ROOT / "docs" / "contract.md").read_text()
ENGINE = (ROOT / "docs" / "using-it-in-an-engine.md").read_text()
WRITING = (ROOT / "docs" / "writing-a-backend.md").read_text()
TOOLKIT = (ROOT / "docs" / "document-toolkit.md").read_text()

CLAUSE = re.compile(r"\b(?:INP|RUN|STP|CLM|CTL|IDM|SIG|RET|QRY|EVT|CON)-\d+\b")


# Folders of tools and environments, which are not part of the project.
IGNORED = {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")}


def _files(*suffixes: str) -> Iterator[Path]:
    """The files that git tracks; without git, as in an unpacked sdist, all files outside of IGNORED."""
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    paths = [ROOT / name for name in listed.split("\0") if name] or sorted(ROOT.rglob("*"))
    for path in paths:
        included = not any(part in IGNORED or part == ".git" for part in path.relative_to(ROOT).parts)
        if included and path.is_file() and (not suffixes or path.suffix in suffixes):
            yield path


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.M | re.S)


def _prose(page: str) -> str:
    return re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)


def _table(page: str, header: str) -> list[list[str]]:
    """The rows of the table whose header row begins with ``header``."""
    lines = page.partition(f"\n| {header} ")[2].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, f"no table with header {header!r}"
    return rows


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Clauses


def _clauses() -> set[str]:
    return {match[1].upper() for match in re.finditer(r'<a id="([a-z]{3}-\d+)"></a>', CONTRACT)}


def test_every_clause_has_an_anchor_before_its_text() -> None:
    for clause in _clauses():
        assert f'<a id="{clause.lower()}"></a>\n**{clause}. ' in CONTRACT
    assert len(re.findall(r"^\*\*[A-Z]{3}-\d+\. ", CONTRACT, re.M)) == len(_clauses()) == 76


def test_every_clause_that_is_cited_exists() -> None:
    unknown = {
        (str(path.relative_to(ROOT)), clause)
        for path in _files(".py", ".md", ".sql")
        for clause in CLAUSE.findall(path.read_text())
        if clause not in _clauses()
    }
    assert not unknown


def test_every_clause_has_a_check_under_its_name() -> None:
    cited = {clause for check in all_checks() for clause in check.clauses}
    assert cited == {*_clauses(), "UNK"}


# Signatures, records, errors


def _operations() -> dict[str, Any]:
    operations = dict(inspect.getmembers(FlowStore, inspect.iscoroutinefunction))
    assert len(operations) >= 50
    return operations


def _signature(name: str, method: Any) -> str:
    parameters = []
    starred = False
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parameters.append("*")
            starred = True
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        parameters.append(parameter.name + default)
    return f"{name}({', '.join(parameters)}) -> {inspect.signature(method).return_annotation}"


def _default(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    return f'"{value}"' if isinstance(value, str) else str(value)


def test_the_contract_lists_every_operation_with_its_signature() -> None:
    listed = re.findall(r"^- `(\w+\(.*?\) -> [^`]+)`", CONTRACT, re.M)
    assert sorted(listed) == sorted(_signature(name, method) for name, method in _operations().items())


def test_the_contract_names_the_capability_of_every_operation() -> None:
    for capability, methods in CAPABILITY_METHODS.items():
        for method in methods:
            (line,) = re.findall(rf"^- `{method}\(.*$", CONTRACT, re.M)
            assert line.endswith(f"; {capability.name}")


def test_the_table_of_capabilities_is_complete() -> None:
    rows = {row[0]: row for row in _table(CONTRACT, "capability")}
    assert list(rows) == [capability.name for capability in Capability]
    for capability in Capability:
        assert _code(rows[capability.name][1]) == [capability.value]
        assert all(name in rows[capability.name][2] for name in CAPABILITY_METHODS.get(capability, ()))


def test_the_contract_lists_every_record_with_its_fields() -> None:
    records = {
        name: member
        for name in flowstore_core.__all__
        if dataclasses.is_dataclass(member := getattr(flowstore_core, name)) and member is not StoreConfig
    }
    records["RunPage"] = flowstore_core.RunPage
    rows = {_code(row[0])[0]: row[1] for row in _table(CONTRACT, "record")}
    assert rows.keys() == records.keys()
    for name, record in records.items():
        if name == "FlowRunDetail":
            fields = {field.name for field in dataclasses.fields(record)}
            run = {field.name for field in dataclasses.fields(flowstore_core.FlowRunRecord)}
            assert fields - run == {"steps"}
            continue
        fields = record._fields if name == "RunPage" else [f.name for f in dataclasses.fields(record)]
        assert rows[name] == ", ".join(fields)


def test_the_contract_lists_every_enum_with_its_values() -> None:
    rows = {_code(row[0])[0]: row[1] for row in _table(CONTRACT, "enum")}
    enums = {
        name: member
        for name in flowstore_core.__all__
        if isinstance(member := getattr(flowstore_core, name), type) and issubclass(member, enum.StrEnum)
    }
    assert rows.keys() == enums.keys()
    for name, kind in enums.items():
        if kind is not Capability:
            assert rows[name].startswith(", ".join(kind))


def _errors() -> dict[str, type[FlowStoreError]]:
    return {
        name: member
        for name in flowstore_core.__all__
        if isinstance(member := getattr(flowstore_core, name), type) and issubclass(member, FlowStoreError)
    }


def test_the_tree_of_errors_is_correct() -> None:
    (tree,) = _blocks(CONTRACT, "text")
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in tree.splitlines():
        name = re.search(r"\w+", line)
        assert name is not None
        depth = name.start() // 4
        path[depth:] = [name[0]]
        if depth:
            parents[name[0]] = path[depth - 1]
        for builtin in re.findall(r"also a (\w+)", line):
            assert issubclass(_errors()[name[0]], getattr(builtins, builtin))
    assert parents == {
        name: kind.__bases__[0].__name__ for name, kind in _errors().items() if kind is not FlowStoreError
    }


def test_both_tables_of_errors_are_complete() -> None:
    rows = {_code(row[0])[0]: row[1] for row in _table(CONTRACT, "error")}
    assert rows.keys() == _errors().keys() - {"FlowStoreError"}
    for name, attributes in rows.items():
        source = inspect.getsource(flowstore_core.errors)
        for attribute in filter(None, attributes.split(", ")):
            assert f"self.{attribute} = " in source, (name, attribute)
    advice = {_code(row[0])[0] for row in _table(ENGINE, "error")}
    assert advice == rows.keys() - {"UnknownBackendError"}


# Every public name is documented


def test_every_public_name_is_documented() -> None:
    pages = "\n".join([README, CONTRACT, ENGINE, WRITING])
    missing = [name for name in flowstore_core.__all__ if not re.search(rf"\b{name}\b", pages)]
    assert not missing


def test_every_hook_and_every_member_of_a_backend_is_documented() -> None:
    hooks = [name for name in vars(Hooks) if name.startswith("flowstore_")]
    assert len(hooks) == 2
    for hook in hooks:
        parameters = list(inspect.signature(getattr(Hooks, hook)).parameters)[1:]
        assert f"`{hook}({', '.join(parameters)})`" in CONTRACT
        assert f"def {hook}(" in CONTRACT + TOOLKIT
    members = [name for name in vars(Backend) if not name.startswith("_")]
    documented = [_code(row[0])[0].partition("(")[0] for row in _table(CONTRACT, "member")]
    assert documented == members


def test_every_attribute_of_the_configuration_is_documented() -> None:
    (listed,) = re.findall(r"^`StoreConfig` is frozen: (.*?)\. Its", CONTRACT, re.M | re.S)
    assert set(_code(listed)) == {*(field.name for field in dataclasses.fields(StoreConfig)), "parts"}
    for name, _ in inspect.getmembers(StoreConfig, inspect.isfunction):
        assert name.startswith("_") or f"`config.{name}`" in WRITING


def test_the_order_of_work_for_a_backend_covers_every_operation() -> None:
    tables = "".join(" ".join(row) for row in _table(WRITING, "step"))
    tables += "".join(" ".join(row) for row in _table(WRITING.partition("level **base**")[2], "step"))
    missing = [name for name in _operations() if name not in tables]
    # The two abbreviated rows name the first operation of OUTPUTS and of EVENTS.
    assert set(missing) == {"get_output", "get_outputs", "get_run_events"}


@pytest.mark.parametrize("name", ["postgresql", "sqlite"])
def test_every_option_of_a_backend_is_documented(name: str) -> None:
    section = ENGINE.partition({"postgresql": "\n## PostgreSQL\n", "sqlite": "\n## SQLite\n"}[name])[2]
    documented = {_code(row[0])[0] for row in _table(section, "option")}
    options = find_backend(name)[1].options
    if name == "postgresql":
        from flowstore_postgres.driver_options import DRIVER_OPTIONS

        assert documented == options - DRIVER_OPTIONS
    else:
        assert documented == options


def test_every_command_is_documented() -> None:
    rows = [_code(row[0])[0] for row in _table(ENGINE, "command")]
    assert sorted(rows) == sorted(_commands(typer.main.get_command(app), "flowstore"))


def _commands(command: Any, path: str) -> Iterator[str]:
    """The full name of every command, without groups."""
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield path
    else:
        for name, one in subcommands.items():
            yield from _commands(one, f"{path} {name}")


def test_the_capabilities_in_the_readme_are_those_of_the_descriptors() -> None:
    header = re.search(r"^\| capability \|(.*)\|$", README, re.M)
    assert header is not None
    schemes = [_code(cell)[0].partition(":")[0] for cell in header[1].split("|")]
    assert schemes == ["postgresql", "sqlite", "memory"]
    rows = {row[0]: row[1:] for row in _table(README, "capability")}
    assert list(rows) == [capability.name for capability in Capability]
    for column, scheme in enumerate(schemes):
        offered = {Capability[name] for name, cells in rows.items() if cells[column] == "yes"}
        assert {cells[column] for cells in rows.values()} <= {"yes", "no"}
        assert offered == find_backend(scheme)[1].capabilities
        assert offered >= CRASH_SAFE


# Links


def _slug(heading: str) -> str:
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def _anchors(page: Path) -> set[str]:
    text = page.read_text()
    headings = re.findall(r"^#+ (.+)$", _prose(text), re.M)
    return set(re.findall(r'<a id="([^"]+)">', text)) | {_slug(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", _prose(page.read_text())):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        target_path = (page.parent / path).resolve() if path else page
        assert target_path.exists(), target
        assert not anchor or anchor in _anchors(target_path), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page: Path) -> None:
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != ".")
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", page.read_text()):
        assert (ROOT / name.partition("#")[0]).exists(), name


# Examples


def test_the_code_of_the_readme_runs(tmp_path: Path) -> None:
    (code,) = _blocks(README, "python")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == _blocks(README.partition(code)[2], "text")[0]


def test_the_readme_shows_checks_of_the_replay() -> None:
    verify = (ROOT / "flowstore_replay" / "verify.py").read_text()
    checks = re.findall(r"^check +ok +(.+)$", README, re.M)
    assert len(checks) >= 3
    for check in checks:
        assert check in verify


async def test_the_worker_of_the_engine_page_survives_a_crash(tmp_path: Path) -> None:
    worker = _worker()
    clock = VirtualClock()
    keys = ["fetch", "charge", "ship"]
    async with open_store(f"sqlite:///{tmp_path}/flows.db", clock=clock) as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")

        async def cancel(*_: object) -> str:
            raise asyncio.CancelledError

        async def work(_: object, key: str) -> str:
            return f'"{key}"'

        with pytest.raises(asyncio.CancelledError):
            await worker["execute"](store, run_id, "fetch", cancel)
        assert await store.get_step_statuses(run_id) == {"fetch": StepStatus.RUNNING}

        # The page uses datetime.now; the test replaces it with the virtual clock.
        worker["datetime"] = SimpleNamespace(now=lambda zone: clock())
        await worker["recover"](store, work)
        assert await store.get_step_statuses(run_id) == {"fetch": StepStatus.RUNNING}
        clock.advance(seconds=60)
        await worker["recover"](store, work)
        for _ in range(2):
            await worker["advance"](store, run_id, keys, work)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.status is RunStatus.SUCCEEDED
        assert [step.output_json for step in detail.steps] == ['"fetch"', '"charge"', '"ship"']
        assert [step.attempt_count for step in detail.steps] == [2, 1, 1]


async def test_the_worker_of_the_engine_page_completes_a_failed_run() -> None:
    worker = _worker()

    async def fail(*_: object) -> str:
        raise OSError("no network")

    async with open_store("memory://") as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")
        for _ in range(2):
            await worker["advance"](store, run_id, ["fetch"], fail)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.status is RunStatus.FAILED
        assert detail.steps[0].error_message == "no network"


async def test_a_replay_of_the_engine_page_executes_each_step_once() -> None:
    call_once = _names_of("async def call_once")["call_once"]
    calls = 0

    async def charge() -> list[int]:
        nonlocal calls
        calls += 1
        return [calls]

    async with open_store("memory://") as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")
        assert [await call_once(store, run_id, "a", charge) for _ in range(2)] == [[1], [1]]


async def test_the_checkpoints_of_the_engine_page_skip_finished_items() -> None:
    work_through = _names_of("async def work_through")["work_through"]
    applied: list[str] = []

    async def apply(item: str) -> str:
        applied.append(item)
        return item

    async with open_store("memory://") as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")
        await store.save_output(run_id, "item/a", '"a"')
        found = await work_through(store, run_id, ["a", "b", "c"], apply)
        assert applied == ["b", "c"]
        assert found == {"item/a": '"a"', "item/b": '"b"', "item/c": '"c"'}


async def test_the_tags_of_the_engine_page_find_and_move_runs() -> None:
    names = _names_of("async def find_all")
    async with open_store("memory://") as store:
        customers = ["acme", "acme", "other"] * 80
        for customer in customers:
            await store.start_run(uuid4(), "orders", uuid4(), "manual", tags={"customer": customer})
        found = [run async for run in names["find_all"](store, customer="acme")]
        assert found == [run for run in await store.get_runs(take=1000) if ("customer", "acme") in run.tags]
        await names["move_customer"](store, "acme", "other")
        moved = await store.get_runs(tags={"customer": "other", "moved_from": "acme"}, take=1000)
        assert {run.run_id for run in moved} == {run.run_id for run in found}


async def test_the_early_signals_of_the_engine_page_reach_a_later_step() -> None:
    names = _names_of("async def payment_arrived")
    async with open_store("memory://") as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")
        for _ in range(2):
            await names["payment_arrived"](store, run_id, {"id": "p1", "amount": 5})
        assert await names["payment_of"](store, run_id, "charge") == {"id": "p1", "amount": 5}
        assert await names["payment_of"](store, run_id, "other") is None


async def test_the_erasure_of_the_engine_page_deletes_derived_and_running_runs() -> None:
    erase = _names_of("async def erase")["erase"]
    async with open_store("memory://") as store:
        source, derived, other = uuid4(), uuid4(), uuid4()
        for run_id, source_id in ((source, None), (derived, source), (other, None)):
            await store.start_run(uuid4(), "orders", run_id, "manual", source_run_id=source_id)
        await store.complete_run(source, RunStatus.FAILED)
        await erase(store, [source])
        assert [run.run_id for run in await store.get_runs()] == [other]


async def test_the_receiver_of_the_engine_page_executes_a_message_once() -> None:
    names, executed = _worker(), list[str]()
    code = next(block for block in _blocks(ENGINE, "python") if "async def receive" in block)
    exec(compile(code, "using-it-in-an-engine.md", "exec"), names)

    async def work(run_id: UUID, step_key: str) -> str:
        # A second delivery while the step is running.
        assert not await names["receive"](store, SimpleNamespace(**vars(message), id="2"), work)
        executed.append(step_key)
        return "1"

    async with open_store("memory://") as store:
        run_id = uuid4()
        await store.start_run(uuid4(), "orders", run_id, "manual")
        message = SimpleNamespace(run_id=run_id, step_key="charge")
        for number in ("1", "3"):
            assert await names["receive"](store, SimpleNamespace(**vars(message), id=number), work)
        step = await store.get_step(run_id, "charge")
        assert step is not None
        assert (step.output_json, step.job_id, executed) == ("1", "1", ["charge"])
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        late = SimpleNamespace(run_id=run_id, step_key="ship", id="4")
        assert await names["receive"](store, late, work)
    assert executed == ["charge"]


def _worker() -> dict[str, Any]:
    return _names_of("async def execute")


def _names_of(line: str) -> dict[str, Any]:
    """The names that the code block with a line defines."""
    (code,) = [block for block in _blocks(ENGINE, "python") if line in block]
    names: dict[str, Any] = {"json": json}
    exec(compile(code, "using-it-in-an-engine.md", "exec"), names)
    return names


@pytest.mark.parametrize("page", [CONTRACT, ENGINE], ids=["contract", "engine"])
def test_code_in_pages_compiles(page: str) -> None:
    for block in _blocks(page, "python"):
        wrapped = "async def page():\n" + "".join(f"    {line}\n" for line in block.splitlines())
        compile(wrapped, "page", "exec")


def _example(module: ModuleType) -> dict[str, Any]:
    """The names that the example in a module's docstring defines."""
    indented = re.search(r"::\n\n((?: {4}.*\n|\n)+)", inspect.getdoc(module) or "")
    assert indented is not None
    names: dict[str, Any] = {}
    exec(compile(dedent(indented[1]), module.__name__, "exec"), names)
    return names


class _FakeDatabase:
    """A database that claims a set of rows in one statement, for the example of batching."""

    class RowRefused(Exception):  # noqa: N818 - the name used on the page
        pass

    def __init__(self) -> None:
        self.holders: dict[Any, str] = {}
        self.batches: list[Any] = []
        self.free = asyncio.Event()
        self.free.set()

    async def claim(self, rows: list[Any]) -> set[Any]:
        self.batches.append(rows)
        assert rows == sorted(rows)
        await self.free.wait()
        if any(key == "refused" for _, key, _, _ in rows):
            raise self.RowRefused
        for run_id, key, token, _ in rows:
            self.holders.setdefault((run_id, key), token)
        return {row[:3] for row in rows if self.holders[row[:2]] == row[2]}

    async def release(self, run_id: Any, key: str, token: str) -> None:
        if self.holders.get((run_id, key)) == token:
            del self.holders[run_id, key]


async def test_the_example_of_batching_runs() -> None:
    database = _FakeDatabase()
    claims = _example(batching)["Claims"](database)

    def claim(key: str, owner: str | None = None) -> asyncio.Task[bool]:
        call = claims.try_claim_step(run_id="run", step_key=key, owner=owner, lease=None)
        return asyncio.ensure_future(call)

    assert await asyncio.gather(*(claim(f"step {n % 3}") for n in range(9))) == [True] * 3 + [False] * 6
    assert [len(batch) for batch in database.batches] == [3]
    assert await asyncio.gather(*(claim("owned", owner) for owner in "aab")) == [True, True, False]
    refused = await asyncio.gather(claim("good"), claim("refused"), return_exceptions=True)
    assert refused[0] is True
    assert "refused" in str(refused[1])
    database.free.clear()
    cancelled = claim("cancelled")
    for _ in range(5):
        await asyncio.sleep(0)
    assert database.batches[-1][0][1] == "cancelled"
    cancelled.cancel()
    database.free.set()
    await claims.aclose()
    assert cancelled.cancelled()
    assert ("run", "cancelled") not in database.holders


async def test_the_example_of_a_thread_worker_runs(tmp_path: Path) -> None:
    writing = _example(thread_worker)["Writing"](tmp_path / "example.db")
    await writing.write(lambda db: db.execute("CREATE TABLE numbers (number INTEGER PRIMARY KEY)"))

    def add(number: int) -> Any:
        return writing.write(lambda db: db.execute("INSERT INTO numbers VALUES (?)", (number,)).lastrowid)

    results = await asyncio.gather(*(add(number % 50) for number in range(51)), return_exceptions=True)
    assert sorted(result for result in results if isinstance(result, int)) == [*range(50)]
    (refused,) = [result for result in results if not isinstance(result, int)]
    assert "UNIQUE" in str(refused)
    await writing.aclose()


# Hygiene


def test_commands_of_the_readme_are_single_lines() -> None:
    for heading in ("Quick start", "Run the tests"):
        section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
        (command,) = _blocks(section, "bash")
        assert command.count("\n") == 1


def test_files_name_no_registry_and_no_local_path() -> None:
    # Concatenated, so that this file does not contain the words.
    words = ["pypi" + ".org", "python" + "hosted", "npmjs" + ".", "/ro" + "ot/", "/wo" + "rk/"]
    occurrences = [
        (str(path.relative_to(ROOT)), word)
        for path in _files()
        for word in words
        if word.encode() in path.read_bytes()
    ]
    assert not occurrences


def test_constraints_are_names_and_versions() -> None:
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", line)
