"""Power cuts on SQLite: acknowledged writes survive any state of unsynced sectors (CON-5).

A process works on a store while a preloaded library records its writes and syncs. From the record the
scenario builds disk images as a power cut may leave them at any moment, opens each and compares it with the
writes acknowledged until then.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowstore_conformance.state_probe import difference, invoke, observe

from flowstore_chaos.context import RunContext
from flowstore_chaos.counts import Counts
from flowstore_chaos.ld_preload import build, preloaded
from flowstore_chaos.power_loss import Disk, DiskOp, Kind, read_record
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios_from_suite import ScenarioTrace, draw_scenarios
from flowstore_core import FlowStoreError, new_run_id, open_store

IMAGES_PER_RECORD = 250
"""Number of images built from one record."""
SCENARIOS = 160
CLIENTS = 4
OPENINGS = 2
"""How often a process opens the store, works on it, and closes it."""
ACK_LOG = "acknowledged"
DATABASE = "store.db"
OLD_RUNS_VERIFIED = 4
"""Number of older runs verified in each image, besides active and recent runs."""
NORMAL_SHARE = 10
"""Images with synchronous=FULL per image with NORMAL, which must lose data."""
MIN_NORMAL = 12


@dataclass(frozen=True, slots=True)
class Record:
    """The disk operations of a process, and the scenarios it executed."""

    ops: list[DiskOp]
    traces: list[ScenarioTrace]
    folder: Path


async def run(context: RunContext) -> None:
    with _memory_folder(context.folder) as folder:
        library = build("recorder", context.folder)
        normal = Counts()
        if not context.is_mutant:
            await _inject(
                context, folder, library, normal, max(MIN_NORMAL, context.planned // NORMAL_SHARE), "NORMAL"
            )
            context.counts.details["images with NORMAL"] = normal.injected
            context.counts.details["of them with losses"] = normal.lost
            context.counts.operations += normal.operations
            if not normal.lost:
                context.counts.count_wrong(
                    "synchronous=NORMAL lost nothing, so the power cuts have no effect"
                )
        synchronous = "NORMAL" if context.is_mutant else "FULL"
        await _inject(context, folder, library, context.counts, context.planned, synchronous)


@contextmanager
def _memory_folder(otherwise: Path) -> Iterator[Path]:
    # The record holds all syncs, so the files can be in memory.
    parent = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else otherwise
    with tempfile.TemporaryDirectory(prefix="flowstore-chaos-", dir=parent) as folder:
        yield Path(folder)


async def _inject(
    context: RunContext, folder: Path, library: Path, counts: Counts, planned: int, synchronous: str
) -> None:
    number = 0
    while counts.injected < planned:
        number += 1
        record = await _record(folder, library, f"{context.rng.random()}", synchronous)
        try:
            await _images(context, folder, record, counts, min(IMAGES_PER_RECORD, planned - counts.injected))
        finally:
            _empty(record.folder)


async def _record(folder: Path, library: Path, seed: str, synchronous: str) -> Record:
    """Run a process on a new store and read the record of its disk operations."""
    store_folder, log = folder / "recorded", folder / "record"
    store_folder.mkdir()
    log.unlink(missing_ok=True)
    environment = preloaded(
        library, FLOWSTORE_CHAOS_FOLDER=str(store_folder), FLOWSTORE_CHAOS_RECORD=str(log)
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(store_folder), seed, synchronous, env=environment
    )
    if await process.wait():
        raise RuntimeError(f"the recorded process ended with code {process.returncode}; see above")
    ops = read_record(log)
    _check_record(ops, store_folder)
    return Record(
        ops, [ScenarioTrace(scenario) for scenario in draw_scenarios(seed, SCENARIOS)], store_folder
    )


def _check_record(ops: list[DiskOp], folder: Path) -> None:
    """Check that the record is complete: writes that bypass the library would invalidate every image."""
    disk = Disk(folder)
    for _ in disk.replay(ops, ACK_LOG):
        pass
    actual = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ACK_LOG}
    if disk.contents() != {name: content for name, content in actual.items() if not name.endswith("-shm")}:
        raise RuntimeError("the record does not contain all writes of the process")


async def _images(context: RunContext, folder: Path, record: Record, counts: Counts, planned: int) -> None:
    """Cut the power at random moments of one record."""
    moments = _draw_moments(context.rng, record.ops, planned * 4)
    disk = Disk(record.folder)
    done = [0] * len(record.traces)
    recent: list[int] = []
    for at, mark in enumerate(disk.replay(record.ops, ACK_LOG)):
        if mark is not None:
            number = json.loads(mark)
            done[number] += 1
            recent = [number, *(each for each in recent if each != number)][: CLIENTS + 2]
        for _ in range(moments.get(at, 0)):
            if planned and not disk.is_fully_synced:
                image, dropped = disk.cut_power(context.rng)
                if dropped:
                    planned -= 1
                    await _verify_image(context, folder / "image", image, record, done, recent, counts)
                    counts.injected += 1
                    if counts is context.counts:
                        context.on_progress(counts.injected)


def _draw_moments(rng: random.Random, ops: Sequence[DiskOp], count: int) -> dict[int, int]:
    """The number of cuts after each operation, by index; a third of them during checkpoints."""
    main = next(op.file for op in ops if op.kind is Kind.CREATED and op.data.endswith(DATABASE.encode()))
    copying = [at for at, op in enumerate(ops) if op.file == main and op.kind is Kind.WRITTEN]
    moments: dict[int, int] = {}
    for _ in range(count):
        at = rng.choice(copying) if rng.random() < 1 / 3 else rng.randrange(len(ops))
        moments[at] = moments.get(at, 0) + 1
    return moments


async def _verify_image(
    context: RunContext,
    folder: Path,
    image: dict[str, bytes],
    record: Record,
    done: list[int],
    recent: list[int],
    counts: Counts,
) -> None:
    """Open an image and compare it with the acknowledged writes."""
    _fill(folder, image)
    begun = [number for number, calls in enumerate(done) if 0 < calls < len(record.traces[number].calls)]
    ended = [number for number, calls in enumerate(done) if calls]
    # The next call of each client may have taken effect without acknowledgement.
    following = [number for number, calls in enumerate(done) if not calls][:CLIENTS]
    old = context.rng.sample(ended, min(OLD_RUNS_VERIFIED, len(ended)))
    lost: list[str] = []
    try:
        async with open_store(f"sqlite:///{folder / DATABASE}?readers=1") as store:
            for number in sorted({*begun, *recent, *following, *old}):
                trace = record.traces[number]
                seen = await observe(store, trace.scenario.probes, exact_times=False)
                counts.operations += len(trace.scenario.probes)
                acknowledged = done[number]
                wanted = [trace.snapshot_after(acknowledged)]
                if acknowledged < len(trace.calls):
                    wanted.append(trace.snapshot_after(acknowledged + 1))
                if seen in wanted:
                    continue
                what = difference(trace.scenario.probes, seen, wanted)
                last = trace.calls[max(acknowledged - 1, 0)].method
                if trace.is_earlier_snapshot(seen, acknowledged):
                    lost.append(f"{last} was acknowledged before the power was cut: {what}")
                else:
                    counts.count_wrong(f"a power cut after {last} left an impossible state: {what}")
            run_id = new_run_id()
            await store.start_run(run_id, "after the cut", run_id, "manual")
            counts.operations += 1
        with closing(sqlite3.connect(folder / DATABASE)) as database:
            report = database.execute("PRAGMA integrity_check").fetchall()
        if report != [("ok",)]:
            counts.count_wrong(f"integrity_check reports {report[0][0]!r}")
    except (FlowStoreError, sqlite3.Error) as error:
        counts.count_wrong(f"the image is unusable: {type(error).__name__}: {error}")
    finally:
        _empty(folder)
    if lost:
        # Count once per image.
        counts.count_lost(lost[0])


def _fill(folder: Path, image: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in image.items():
        (folder / name).write_bytes(content)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


async def _run_recorded(folder: Path, seed: str, synchronous: str) -> None:
    """Run the recorded process: clients that log each acknowledged call."""
    # SQLite opens the folder only to sync it; opening it first tells the recorder its inode.
    os.close(os.open(folder, os.O_RDONLY))
    marks = os.open(folder / ACK_LOG, os.O_CREAT | os.O_WRONLY)
    traces = [ScenarioTrace(scenario) for scenario in draw_scenarios(seed, SCENARIOS)]
    for opening in range(OPENINGS):
        numbers = iter(
            range(SCENARIOS)[opening * SCENARIOS // OPENINGS : (opening + 1) * SCENARIOS // OPENINGS]
        )
        async with open_store(f"sqlite:///{folder / DATABASE}?synchronous={synchronous}") as store:

            async def client() -> None:
                for number in numbers:  # noqa: B023
                    for call in traces[number].calls:
                        await invoke(store, call)
                        os.write(marks, json.dumps(number).encode())

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
    os.close(marks)


SCENARIO = FaultScenario(
    number=6,
    name="power-cuts",
    fault="the power is cut: unsynced sectors are lost, kept, old or torn",
    unit="images",
    planned=2_000,
    min_faults=30,
    backends=("sqlite",),
    pass_criterion="no acknowledged write is lost, integrity_check is ok; synchronous=NORMAL loses writes",
    mutant="the store is opened with synchronous=NORMAL",
    minutes=10,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(_run_recorded(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
