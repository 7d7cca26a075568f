"""A disk that is full while clients work, and then is not: nothing acknowledged is lost, service resumes.

SQLite's file lies on one small disk with its log. PostgreSQL has two, because a full disk does two things
to it: tables that cannot grow are an error of one statement; a log (pg_wal) that cannot grow is a PANIC,
upon which the server restarts, over and over, or gives up where there is too little space to recover. One
that gave up is started again once there is space, as whoever supervises it would. The log's segments are
small and never used again, so that it needs space soon.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

from flowstore_chaos.line import Line
from flowstore_chaos.server import Server, make_folder, new_server
from flowstore_chaos.small_disks import SmallDisk, small_disks
from flowstore_chaos.trial import Trial
from flowstore_chaos.work import Clients
from flowstore_core import FlowStore, StoreUnavailableError, new_run_id, open_store

CLIENTS = 2
GROUPS = 2
MEGABYTES = 192
SCENARIOS = {"wal_recycle": "off", "min_wal_size": "2MB", "max_wal_size": "8MB", "shared_buffers": "8MB"}
LEFT_BYTES = (0, 600_000)
"""So much is free when something else has filled the disk; the clients use that up."""
TEXT_BYTES = 60_000
FULL_SECONDS = (0.1, 0.5)
"""How long the disk stays full after the first call was refused."""
FILL_SECONDS = 20.0
HUNG_SECONDS = 8.0
RESUME_SECONDS = 30.0
NO_SPACE = "No space left on device"
DISKS = {"sqlite": ("tables",), "postgresql": ("tables", "log")}


class Swallows:
    """A store that answers "done" when a write has failed."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name not in ("save_output", "record_step_complete", "register_waiter"):
            return method

        async def call(*arguments: Any, **named: Any) -> None:
            try:
                await method(*arguments, **named)
            except StoreUnavailableError:
                return

        return call


class Texts:
    """A client that saves long texts, which fill the disk soon, and knows which were acknowledged."""

    def __init__(self, store: Any, rng: random.Random) -> None:
        self._store = store
        self._rng = rng
        self.kept: dict[UUID, dict[str, str]] = {}
        self.saved = 0
        self.refused = 0
        self.disk_was_full = 0
        """Refusals that name the reason."""

    async def save(self, until: Callable[[], bool]) -> None:
        run_id = None
        while not until():
            try:
                if run_id is None or len(self.kept[run_id]) > 50:
                    run_id = new_run_id()
                    self.kept[run_id] = {}
                    await self._store.start_run(run_id, "disk full", run_id, "manual")
                key = f"text-{len(self.kept[run_id])}"
                text = f'"{self._rng.randbytes(TEXT_BYTES // 2).hex()}"'
                await self._store.save_output(run_id, key, text)
                self.kept[run_id][key] = text[-40:]
                self.saved += 1
                # Leave the others their share.
                await asyncio.sleep(0.005)
            except StoreUnavailableError as error:
                self.refused += 1
                self.disk_was_full += "disk is full" in str(error)
                if run_id is not None and not self.kept[run_id]:
                    run_id = None
                await asyncio.sleep(0.02)


async def run(trial: Trial) -> None:
    with ExitStack() as mounted:
        # First of all: a user namespace cannot be had once there are threads.
        disks = mounted.enter_context(
            small_disks([trial.folder / name for name in DISKS[trial.backend]], MEGABYTES)
        )
        async with _store_url(disks) as (url, server), AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(open_store(url)) for _ in range(CLIENTS)]
            stores: list[Any] = [Swallows(store) for store in opened] if trial.broken else opened
            clients = Clients(stores, trial.tally, trial.rng)
            texts = Texts(stores[0], trial.rng)
            working = [
                asyncio.create_task(clients.work(lambda: trial.done, groups=GROUPS)),
                asyncio.create_task(texts.save(lambda: trial.done)),
            ]
            try:
                while not trial.done and not any(task.done() for task in working):
                    await _cycle(trial, disks, server, texts)
            finally:
                if not trial.done:
                    for task in working:
                        task.cancel()
                await asyncio.wait(working)
            for task in working:
                task.result()
            await clients.books.verify(opened[0], trial.tally)
            await _verify_texts(trial, opened[0], texts)
            trial.tally.details["calls refused"] = clients.refused + texts.refused


@asynccontextmanager
async def _store_url(disks: Sequence[SmallDisk]) -> AsyncIterator[tuple[str, Server | None]]:
    if len(disks) == 1:
        yield f"sqlite:///{disks[0].folder}/store.db", None
    else:
        tables, log = disks
        make_folder(log.folder)
        initdb = ("--wal-segsize=1", "--waldir", str(log.folder))
        async with new_server(tables.folder, SCENARIOS, initdb) as server:
            yield server.url(schema="chaos"), server


async def _cycle(trial: Trial, disks: Sequence[SmallDisk], server: Server | None, texts: Texts) -> None:
    """Fill a disk, wait until the store is refused space, free it, and wait until it serves again."""
    tally, rng = trial.tally, trial.rng
    # Each in turn at first, so that small rows meet both.
    disk = disks[tally.landed] if tally.landed < len(disks) else rng.choice(disks)
    said, panics = _times_said(server, texts), _panics(server)
    disk.fill(rng.randrange(*LEFT_BYTES))
    began = time.monotonic()
    while (was_full := _times_said(server, texts) > said) is False:
        if time.monotonic() - began > FILL_SECONDS:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(rng.uniform(*FULL_SECONDS))
    disk.free()
    began, served, saved = time.monotonic(), tally.operations, texts.saved
    while tally.operations == served or texts.saved == saved:
        if server is not None and await _supervise(trial, server, began):
            began = time.monotonic()
        if time.monotonic() - began > RESUME_SECONDS:
            tally.mistrust(f"no write was served within {RESUME_SECONDS:.0f} s after there was space")
            break
        await asyncio.sleep(0.01)
    longest = float(tally.details.get("longest until served again, s", 0))
    tally.details["longest until served again, s"] = max(longest, round(time.monotonic() - began, 2))
    if was_full:
        tally.add(f"{disk.folder.name} full")
        if server is not None:
            tally.add("PANICs", _panics(server) - panics)
        trial.landed()


async def _supervise(trial: Trial, server: Server, since: float) -> bool:
    """Start a server again that gave up, or that takes no connections though it has space."""
    if server.runs:
        if time.monotonic() - since < HUNG_SECONDS:
            return False
        try:
            await server.psql("SELECT 1")
            return False
        except RuntimeError:
            # PostgreSQL 18 was seen so: its recovery had failed, and its first process did not notice.
            trial.tally.add("servers that hung")
            await server.kill()
    else:
        trial.tally.add("servers that gave up")
    await server.start()
    return True


def _times_said(server: Server | None, texts: Texts) -> int:
    """How often somebody was told that the disk is full."""
    return texts.disk_was_full if server is None else server.log.count(NO_SPACE)


def _panics(server: Server | None) -> int:
    return 0 if server is None else server.log.count("PANIC:")


async def _verify_texts(trial: Trial, store: FlowStore, texts: Texts) -> None:
    trial.tally.operations += texts.saved
    for run_id, kept in texts.kept.items():
        if not kept:
            continue
        found = await store.get_outputs(run_id)
        for key, end in kept.items():
            if not found.get(key, "").endswith(end):
                trial.tally.lose(f"text {key!r} of run {run_id} was saved, and is not there")


LINE = Line(
    number=11,
    name="disk-full",
    fault="the disk of the store is full while clients work, then there is space again",
    unit="cycles",
    planned=20,
    least=2,
    backends=("sqlite", "postgresql"),
    passes_when="calls get StoreUnavailableError, nothing acknowledged is lost, and writes are served again",
    broken="writes that fail are answered as done",
    minutes=6,
    run=run,
)
