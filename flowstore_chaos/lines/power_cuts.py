"""Power cuts on SQLite: what was acknowledged is there, whatever became of unsynced sectors (CON-5).

A process works on a store while a library writes down what it writes to its files and what it syncs.
From that record disks are made as a power cut may leave them at any moment, and each is opened and
compared with what had been acknowledged until then.
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

from flowstore_chaos.disk import Act, Disk, Kind, read_record
from flowstore_chaos.line import Line
from flowstore_chaos.preloading import build, preloaded
from flowstore_chaos.scenes import CallProfile, draw_scenes
from flowstore_chaos.tally import Tally
from flowstore_chaos.trial import Trial
from flowstore_core import FlowStoreError, new_run_id, open_store

RECORDED = 250
"""Images that are made from one record."""
SCENES = 160
CLIENTS = 4
OPENINGS = 2
"""So often a process opens the store, works on it, and closes it."""
MARKS = "acknowledged"
DATABASE = "store.db"
LOOKED_AT = 4
"""How many runs that were long done are looked at in each image, besides those under way and just done."""
FASTER_SHARE = 10
"""For so many images with synchronous=FULL one is made with NORMAL, to see that it loses."""
LEAST_FASTER = 12


@dataclass(frozen=True, slots=True)
class Record:
    """What a process did, and on which scenes it worked."""

    acts: list[Act]
    scenes: list[CallProfile]
    folder: Path


async def run(trial: Trial) -> None:
    with _quick_folder(trial.folder) as folder:
        library = build("recorder", trial.folder)
        faster = Tally()
        if not trial.broken:
            await _cut(
                trial, folder, library, faster, max(LEAST_FASTER, trial.planned // FASTER_SHARE), "NORMAL"
            )
            trial.tally.details["images with NORMAL"] = faster.landed
            trial.tally.details["of these lost"] = faster.lost
            trial.tally.operations += faster.operations
            if not faster.lost:
                trial.tally.mistrust("synchronous=NORMAL lost nothing, so these power cuts take nothing")
        setting = "NORMAL" if trial.broken else "FULL"
        await _cut(trial, folder, library, trial.tally, trial.planned, setting)


@contextmanager
def _quick_folder(otherwise: Path) -> Iterator[Path]:
    # What is synced is written down, so the files may as well be in memory.
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else otherwise
    with tempfile.TemporaryDirectory(prefix="flowstore-chaos-", dir=place) as folder:
        yield Path(folder)


async def _cut(trial: Trial, folder: Path, library: Path, tally: Tally, planned: int, setting: str) -> None:
    number = 0
    while tally.landed < planned:
        number += 1
        record = await _record(folder, library, f"{trial.rng.random()}", setting)
        try:
            await _images(trial, folder, record, tally, min(RECORDED, planned - tally.landed))
        finally:
            _empty(record.folder)


async def _record(folder: Path, library: Path, seed: str, setting: str) -> Record:
    """Let a process work on a new store, and read what it did."""
    where, log = folder / "recorded", folder / "record"
    where.mkdir()
    log.unlink(missing_ok=True)
    environment = preloaded(library, FLOWSTORE_CHAOS_FOLDER=str(where), FLOWSTORE_CHAOS_RECORD=str(log))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, str(where), seed, setting, env=environment
    )
    if await process.wait():
        raise RuntimeError(f"the recorded process ended with code {process.returncode}; see above")
    acts = read_record(log)
    _check_record(acts, where)
    return Record(acts, [CallProfile(scenario) for scenario in draw_scenes(seed, SCENES)], where)


def _check_record(acts: list[Act], folder: Path) -> None:
    """What was written by a way that the library does not see would make every image worthless."""
    disk = Disk(folder)
    for _ in disk.replay(acts, MARKS):
        pass
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MARKS}
    if disk.contents() != {name: content for name, content in there.items() if not name.endswith("-shm")}:
        raise RuntimeError("the record is not all that the process did to its files")


async def _images(trial: Trial, folder: Path, record: Record, tally: Tally, planned: int) -> None:
    """Cut the power at drawn moments of one record."""
    moments = _draw_moments(trial.rng, record.acts, planned * 4)
    disk = Disk(record.folder)
    done = [0] * len(record.scenes)
    recent: list[int] = []
    for at, mark in enumerate(disk.replay(record.acts, MARKS)):
        if mark is not None:
            number = json.loads(mark)
            done[number] += 1
            recent = [number, *(each for each in recent if each != number)][: CLIENTS + 2]
        for _ in range(moments.get(at, 0)):
            if planned and not disk.is_quiet:
                image, dropped = disk.cut_power(trial.rng)
                if dropped:
                    planned -= 1
                    await _look(trial, folder / "image", image, record, done, recent, tally)
                    tally.landed += 1
                    if tally is trial.tally:
                        trial.say(tally.landed)


def _draw_moments(rng: random.Random, acts: Sequence[Act], count: int) -> dict[int, int]:
    """After which acts the power is cut, how often; a third while the log is copied into the database."""
    main = next(act.file for act in acts if act.kind is Kind.MADE and act.data.endswith(DATABASE.encode()))
    copying = [at for at, act in enumerate(acts) if act.file == main and act.kind is Kind.WRITTEN]
    moments: dict[int, int] = {}
    for _ in range(count):
        at = rng.choice(copying) if rng.random() < 1 / 3 else rng.randrange(len(acts))
        moments[at] = moments.get(at, 0) + 1
    return moments


async def _look(
    trial: Trial,
    folder: Path,
    image: dict[str, bytes],
    record: Record,
    done: list[int],
    recent: list[int],
    tally: Tally,
) -> None:
    """Open the disk as it was left, and compare it with what had been acknowledged."""
    _fill(folder, image)
    begun = [number for number, calls in enumerate(done) if 0 < calls < len(record.scenes[number].calls)]
    ended = [number for number, calls in enumerate(done) if calls]
    # The next of each client may have begun, and nobody was told.
    following = [number for number, calls in enumerate(done) if not calls][:CLIENTS]
    old = trial.rng.sample(ended, min(LOOKED_AT, len(ended)))
    lost: list[str] = []
    try:
        async with open_store(f"sqlite:///{folder / DATABASE}?readers=1") as store:
            for number in sorted({*begun, *recent, *following, *old}):
                course = record.scenes[number]
                seen = await observe(store, course.scenario.probes, exact_times=False)
                tally.operations += len(course.scenario.probes)
                acknowledged = done[number]
                wanted = [course.sight(acknowledged)]
                if acknowledged < len(course.calls):
                    wanted.append(course.sight(acknowledged + 1))
                if seen in wanted:
                    continue
                what = difference(course.scenario.probes, seen, wanted)
                last = course.calls[max(acknowledged - 1, 0)].method
                if course.earlier(seen, acknowledged):
                    lost.append(f"{last} was acknowledged before the power was cut: {what}")
                else:
                    tally.mistrust(f"a power cut after {last} left neither what was nor what is: {what}")
            run_id = new_run_id()
            await store.start_run(run_id, "after the cut", run_id, "manual")
            tally.operations += 1
        with closing(sqlite3.connect(folder / DATABASE)) as database:
            said = database.execute("PRAGMA integrity_check").fetchall()
        if said != [("ok",)]:
            tally.mistrust(f"integrity_check says {said[0][0]!r}")
    except (FlowStoreError, sqlite3.Error) as error:
        tally.mistrust(f"what a power cut left cannot be used: {type(error).__name__}: {error}")
    finally:
        _empty(folder)
    if lost:
        # Once for each image, as its share is what is asked for.
        tally.lose(lost[0])


def _fill(folder: Path, image: dict[str, bytes]) -> None:
    folder.mkdir()
    for name, content in image.items():
        (folder / name).write_bytes(content)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


async def _work(folder: Path, seed: str, setting: str) -> None:
    """The recorded process: clients that say of each call that it was acknowledged."""
    # SQLite opens the folder itself to sync it; so that the record knows it, it is opened here too.
    os.close(os.open(folder, os.O_RDONLY))
    marks = os.open(folder / MARKS, os.O_CREAT | os.O_WRONLY)
    courses = [CallProfile(scenario) for scenario in draw_scenes(seed, SCENES)]
    for opening in range(OPENINGS):
        numbers = iter(range(SCENES)[opening * SCENES // OPENINGS : (opening + 1) * SCENES // OPENINGS])
        async with open_store(f"sqlite:///{folder / DATABASE}?synchronous={setting}") as store:

            async def client() -> None:
                for number in numbers:  # noqa: B023
                    for call in courses[number].calls:
                        await invoke(store, call)
                        os.write(marks, json.dumps(number).encode())

            await asyncio.gather(*(client() for _ in range(CLIENTS)))
    os.close(marks)


LINE = Line(
    number=6,
    name="power-cuts",
    fault="the power is cut: unsynced sectors are lost, kept, old or torn",
    unit="images",
    planned=2_000,
    least=30,
    backends=("sqlite",),
    passes_when="nothing acknowledged is lost, integrity_check says ok; with synchronous=NORMAL much is lost",
    broken="the store is opened with synchronous=NORMAL",
    minutes=10,
    run=run,
)

if __name__ == "__main__":
    asyncio.run(_work(Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
