"""Transfer on the document toolkit: large archives, imports that die, and copies to and from SQLite."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import pytest
from flowstore_conformance.archives import full_archive

from benchmarks.transfer import fill
from flowstore_cli.main import main
from flowstore_core import (
    ArchivedKey,
    ConflictError,
    OutcomeUnknownError,
    RunArchive,
    RunStatus,
    StoreUnavailableError,
    new_run_id,
    open_store,
)
from flowstore_core.transfer import is_same_run
from flowstore_documents import DocumentStore, keys
from flowstore_documents.memory_space import Fault, MemoryData, MemorySpace
from tests.documents_backend import DIST
from tests.documents_backend.stores import CountingSpace, PausingSpace, open_on, until

RUNS = 60
KEYS = [f"key {number:02}" for number in range(30)]
"""More idempotency keys than one commit compares."""


@pytest.fixture
def documents(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The URL of a document store that lives as long as the process."""
    monkeypatch.syspath_prepend(DIST)
    return f"{request.param}://{tmp_path.name}"


def large_archive() -> RunArchive:
    """An archive of which no part fits into one change."""
    archive = full_archive(new_run_id())
    done, event = archive.steps[2], archive.events[0]
    long = "x" * 100_000
    steps = []
    for number in range(40):
        key = f"step {number:04}"
        attempts = [
            replace(attempt, step_key=key, output_json=f"{number}{long}") for attempt in done.attempts
        ]
        steps.append(replace(done, step_key=key, attempts=tuple(attempts), dispatch=None))
    return replace(
        archive,
        steps=tuple(steps),
        outputs=tuple((f"key {number:04}", long) for number in range(40)),
        events=tuple(replace(event, sequence=number + 1) for number in range(40)),
    )


def with_keys(archive: RunArchive, names: Sequence[str]) -> RunArchive:
    """The archive with other idempotency keys."""
    (key, *_) = archive.idempotency_keys
    return replace(
        archive,
        idempotency_keys=tuple(replace(key, idempotency_key=name) for name in sorted(names)),
    )


async def registered_to(store: DocumentStore, archive: RunArchive) -> list[UUID | None]:
    return [await store.find_run_id_by_idempotency_key(*_scope(key)) for key in archive.idempotency_keys]


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize("commits", [1, 2, 5, 10, 20, 40])
async def test_an_import_that_dies_is_whole_or_did_not_happen(
    commits: int, count: int, snapshots: bool
) -> None:
    """Its process dies after its first commits; others see all of the run or nothing, and can import it."""
    data, archive = MemoryData(), with_keys(large_archive(), KEYS[:count])
    run_id = archive.run_id
    space = CountingSpace(data, snapshots=snapshots)
    async with (
        open_on(MemorySpace(data, snapshots=snapshots)) as other,
        open_on(space, retry_timeout=0.1) as dying,
    ):
        importing = asyncio.create_task(dying.import_run(archive))
        await until(lambda: len(space.commits) >= commits or importing.done())
        space.arm(Fault.NOT_APPLIED, isolates=True)
        (outcome,) = await asyncio.gather(importing, return_exceptions=True)
        stored = await other.export_run(run_id)
        registered = await registered_to(other, archive)
        if isinstance(outcome, OutcomeUnknownError):
            assert registered == [run_id] * count
        elif isinstance(outcome, StoreUnavailableError):
            assert stored is None
            assert registered == [None] * count
            assert await other.get_runs() == ()
            assert await other.import_run(archive)
        else:
            assert outcome is True
            assert registered == [run_id] * count
        stored = await other.export_run(run_id)
        assert stored is not None
        assert stored.outputs == archive.outputs
        assert [step.step_key for step in stored.steps] == [step.step_key for step in archive.steps]
        assert await other.import_run(archive) is False
        await other.complete_run(run_id, RunStatus.FAILED)
        assert await other.delete_run(run_id)
        space.disarm()
    # What the process has staged in vain waits for cleanup.
    left = [key for key in data.all_keys() if not key.startswith((keys.SLOTS, keys.STAGED))]
    assert [key for key in left if key[17:18] != b"B"] == []


def _scope(key: ArchivedKey) -> tuple[UUID, str, str]:
    return key.flow_id, key.trigger_key, key.idempotency_key


@pytest.mark.parametrize("snapshots", [True, False])
async def test_an_imported_run_leaves_no_key_behind(snapshots: bool) -> None:
    """A control record and keys of the run that came before it are replaced with their entries."""
    data, archive = MemoryData(), large_archive()
    async with open_on(MemorySpace(data, snapshots=snapshots)) as store:
        flow_id, run_id = archive.run.flow_id, archive.run_id
        await store.configure_run(run_id, flow_id, "manual")
        await store.try_register_idempotency_key(flow_id, "manual", "stale", run_id)
        assert await store.import_run(archive)
        assert await store.find_run_id_by_idempotency_key(flow_id, "manual", "stale") is None
        await store.complete_run(run_id, RunStatus.FAILED)
        assert await store.delete_run(run_id)
    assert [key for key in data.all_keys() if not key.startswith(keys.SLOTS)] == []


@pytest.mark.parametrize("snapshots", [True, False])
@pytest.mark.parametrize("taken", [0, 15, 29])
async def test_an_import_whose_key_is_taken_meanwhile_is_undone(taken: int, snapshots: bool) -> None:
    """Another run gets a key after the import has begun: nothing of the import is left."""
    data, archive = MemoryData(), with_keys(large_archive(), KEYS)
    run_id, rival = archive.run_id, new_run_id()
    scopes = [_scope(key) for key in archive.idempotency_keys]
    space = PausingSpace(data, snapshots=snapshots)
    async with open_on(space) as store, open_on(MemorySpace(data, snapshots=snapshots)) as other:
        await other.configure_run(run_id, archive.run.flow_id, "before")
        for name, old_run in ((scopes[3], run_id), ((archive.run.flow_id, "manual", "older"), run_id)):
            assert await other.try_register_idempotency_key(*name, old_run)
        waits, goes_on = space.pause(keys.intent(run_id))
        async with asyncio.timeout(60):
            importing = asyncio.create_task(store.import_run(archive))
            await waits.wait()
            assert await other.try_register_idempotency_key(*scopes[taken], rival)
            goes_on.set()
            with pytest.raises(ConflictError):
                await importing
        found = await registered_to(other, archive)
        assert found == [{3: run_id, taken: rival}.get(number) for number in range(len(KEYS))]
        control = await other.get_run_control(run_id)
        assert control is not None
        assert control.trigger_key == "before"
        assert await other.find_run_id_by_idempotency_key(archive.run.flow_id, "manual", "older") == run_id
        assert await other.export_run(run_id) is None
        assert await other.get_runs() == ()
        later = await space.clock() + timedelta(days=2)
        data.clock = lambda: later  # type: ignore[method-assign]
        async with open_on(MemorySpace(data)) as last:
            await last.cleanup(later)
    assert [key for key in data.all_keys() if not key.startswith(keys.SLOTS)] == []


@pytest.mark.parametrize("had_keys", [False, True])
@pytest.mark.parametrize("seed", range(5))
async def test_imports_that_share_keys_register_all_of_their_keys_or_none(seed: int, had_keys: bool) -> None:
    """Runs with overlapping keys are imported at once from three stores; some had one of the keys before."""
    data, rng = MemoryData(), random.Random(seed)
    archives = [with_keys(full_archive(new_run_id()), rng.sample(KEYS, 15)) for _ in range(9)]
    before: dict[ArchivedKey, UUID] = {}
    async with AsyncExitStack() as stack:
        stores = [await stack.enter_async_context(open_on(MemorySpace(data))) for _ in range(3)]
        for archive in archives[: 3 if had_keys else 0]:
            key = rng.choice(archive.idempotency_keys)
            if await stores[0].try_register_idempotency_key(*_scope(key), archive.run_id):
                before[key] = archive.run_id
        async with asyncio.timeout(60):
            outcomes = await asyncio.gather(
                *(stores[number % 3].import_run(archive) for number, archive in enumerate(archives)),
                return_exceptions=True,
            )
        stored = {run.run_id for run in await stores[0].get_runs()}
        assert stored or had_keys
        for archive, outcome in zip(archives, outcomes, strict=True):
            run_id = archive.run_id
            assert outcome is True if run_id in stored else isinstance(outcome, ConflictError)
            for key, found in zip(
                archive.idempotency_keys, await registered_to(stores[1], archive), strict=True
            ):
                assert found == run_id if run_id in stored else found in (None, before.get(key), *stored)
    assert not [key for key in data.all_keys() if key.startswith(keys.INTENTS)]


async def test_a_replaced_key_is_deleted_once() -> None:
    """Another run may register it before the import has been applied."""
    space, archive = PausingSpace(MemoryData()), with_keys(large_archive(), KEYS)
    older = archive.run.flow_id, "manual", "older"
    async with open_on(space) as store, open_on(MemorySpace(space.data)) as other:
        rival = new_run_id()
        await store.try_register_idempotency_key(*older, archive.run_id)
        async with asyncio.timeout(60):
            waits, goes_on = space.pause(keys.idempotency_key(keys.key_scope(*older)))
            importing = asyncio.create_task(store.import_run(archive))
            await waits.wait()
            again = space.pause(keys.idempotency_key(keys.key_scope(*older)))[0]
            goes_on.set()
            assert await importing
        assert not again.is_set()
        assert await other.try_register_idempotency_key(*older, rival)
        assert await other.find_run_id_by_idempotency_key(*older) == rival


@pytest.mark.parametrize("documents", ["documents", "documents-without-snapshots"], indirect=True)
def test_a_copy_to_documents_and_back_keeps_every_run(
    documents: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """flowstore copy verifies each copy, and the last store exports the same runs as the first."""
    first, last = (f"sqlite:///{tmp_path}/{name}.db" for name in ("first", "last"))
    asyncio.run(fill(first, RUNS))
    for source, target in ((first, documents), (documents, last)):
        assert main(["copy", source, target, "--engines-stopped"]) == 0
        assert capsys.readouterr().out == f"copied {RUNS} runs; {RUNS} verified\n"
        assert main(["copy", source, target, "--engines-stopped"]) == 0
        assert f"copied 0 runs; {RUNS} runs already there" in capsys.readouterr().out
    asyncio.run(_compare(first, last))


async def _compare(one_url: str, other_url: str) -> None:
    """Compare the runs of two stores; only the times at which claims end may differ."""
    async with open_store(one_url) as one, open_store(other_url) as other:
        runs = await one.get_runs(take=1_000)
        assert await other.get_runs(take=1_000) == runs
        for run in runs:
            archives = [await store.export_run(run.run_id) for store in (one, other)]
            assert archives[0] is not None
            assert archives[1] is not None
            assert is_same_run(archives[0], archives[1])
