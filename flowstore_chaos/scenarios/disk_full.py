"""A disk that fills up while clients work and is freed later: no acknowledged write is lost, service resumes.

SQLite has its file and its log on one small disk. PostgreSQL has two disks, because a full disk has two
effects: if tables cannot grow, one statement fails; if the log (pg_wal) cannot grow, the server panics and
restarts repeatedly, or exits if there is too little space to recover. The scenario restarts an exited server
once there is space, as a supervisor would. The log's segments are small and not recycled, so that the log
needs space soon.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from typing import Any
from uuid import UUID

from flowstore_chaos.clients import ClientGroup
from flowstore_chaos.context import RunContext
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.server import Server, make_folder, new_server
from flowstore_chaos.tmpfs import SmallDisk, mount_tmpfs
from flowstore_core import FlowStore, StoreUnavailableError, new_run_id, open_store

CLIENTS = 2
GROUPS = 2
MEGABYTES = 192
SETTINGS = {"wal_recycle": "off", "min_wal_size": "2MB", "max_wal_size": "8MB", "shared_buffers": "8MB"}
FREE_BYTES = (0, 600_000)
"""Space left free by the ballast, in bytes; the clients use it up."""
TEXT_BYTES = 60_000
FULL_SECONDS = (0.1, 0.5)
"""Seconds for which the disk stays full after the first refused call."""
FILL_SECONDS = 20.0
HANG_TIMEOUT = 8.0
RESUME_SECONDS = 30.0
NO_SPACE = "No space left on device"
DISKS = {"sqlite": ("tables",), "postgresql": ("tables", "log")}


class SwallowErrorsMutant:
    """A store that reports failed writes as successful."""

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


class TextWriter:
    """A client that saves long texts, which fill the disk soon, and records the acknowledged ones."""

    def __init__(self, store: Any, rng: random.Random) -> None:
        self._store = store
        self._rng = rng
        self.kept: dict[UUID, dict[str, str]] = {}
        self.saved = 0
        self.refused = 0
        self.disk_was_full = 0
        """Errors that name the full disk."""

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
                # Leave space for the other clients.
                await asyncio.sleep(0.005)
            except StoreUnavailableError as error:
                self.refused += 1
                self.disk_was_full += "disk is full" in str(error)
                if run_id is not None and not self.kept[run_id]:
                    run_id = None
                await asyncio.sleep(0.02)


async def run(context: RunContext) -> None:
    with ExitStack() as mounted:
        # First: a process with threads cannot create a user namespace.
        disks = mounted.enter_context(
            mount_tmpfs([context.folder / name for name in DISKS[context.backend]], MEGABYTES)
        )
        async with _store_url(disks) as (url, server), AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(open_store(url)) for _ in range(CLIENTS)]
            stores: list[Any] = (
                [SwallowErrorsMutant(store) for store in opened] if context.is_mutant else opened
            )
            clients = ClientGroup(stores, context.counts, context.rng)
            texts = TextWriter(stores[0], context.rng)
            working = [
                asyncio.create_task(clients.run(lambda: context.done, groups=GROUPS)),
                asyncio.create_task(texts.save(lambda: context.done)),
            ]
            try:
                while not context.done and not any(task.done() for task in working):
                    await _run_cycle(context, disks, server, texts)
            finally:
                if not context.done:
                    for task in working:
                        task.cancel()
                await asyncio.wait(working)
            for task in working:
                task.result()
            await clients.ledger.verify(opened[0], context.counts)
            await _verify_texts(context, opened[0], texts)
            context.counts.details["calls refused"] = clients.refused + texts.refused


@asynccontextmanager
async def _store_url(disks: Sequence[SmallDisk]) -> AsyncIterator[tuple[str, Server | None]]:
    if len(disks) == 1:
        yield f"sqlite:///{disks[0].folder}/store.db", None
    else:
        tables, log = disks
        make_folder(log.folder)
        initdb = ("--wal-segsize=1", "--waldir", str(log.folder))
        async with new_server(tables.folder, SETTINGS, initdb) as server:
            yield server.url(schema="chaos"), server


async def _run_cycle(
    context: RunContext, disks: Sequence[SmallDisk], server: Server | None, texts: TextWriter
) -> None:
    """Fill a disk, wait for an error, free it, and wait until the store serves again."""
    counts, rng = context.counts, context.rng
    # Each disk once first, so that short rows cover both.
    disk = disks[counts.injected] if counts.injected < len(disks) else rng.choice(disks)
    errors_before, panics = _disk_full_errors(server, texts), _panics(server)
    disk.fill(rng.randrange(*FREE_BYTES))
    started_at = time.monotonic()
    while (was_full := _disk_full_errors(server, texts) > errors_before) is False:
        if time.monotonic() - started_at > FILL_SECONDS:
            break
        await asyncio.sleep(0.01)
    await asyncio.sleep(rng.uniform(*FULL_SECONDS))
    disk.free()
    started_at, served, saved = time.monotonic(), counts.operations, texts.saved
    while counts.operations == served or texts.saved == saved:
        if server is not None and await _supervise(context, server, started_at):
            started_at = time.monotonic()
        if time.monotonic() - started_at > RESUME_SECONDS:
            counts.count_wrong(f"no write succeeded within {RESUME_SECONDS:.0f} s after the disk was freed")
            break
        await asyncio.sleep(0.01)
    longest = float(counts.details.get("longest time to recovery, s", 0))
    counts.details["longest time to recovery, s"] = max(longest, round(time.monotonic() - started_at, 2))
    if was_full:
        counts.add_detail(f"{disk.folder.name} full")
        if server is not None:
            counts.add_detail("PANICs", _panics(server) - panics)
        context.record_faults()


async def _supervise(context: RunContext, server: Server, since: float) -> bool:
    """Restart a server that exited, or that accepts no connections although it has space."""
    if server.is_running:
        if time.monotonic() - since < HANG_TIMEOUT:
            return False
        try:
            await server.psql("SELECT 1")
            return False
        except RuntimeError:
            # Seen with PostgreSQL 18: its recovery had failed, and its first process did not notice.
            context.counts.add_detail("hung servers")
            await server.kill()
    else:
        context.counts.add_detail("exited servers")
    await server.start()
    return True


def _disk_full_errors(server: Server | None, texts: TextWriter) -> int:
    """Number of errors so far that report a full disk."""
    return texts.disk_was_full if server is None else server.log.count(NO_SPACE)


def _panics(server: Server | None) -> int:
    return 0 if server is None else server.log.count("PANIC:")


async def _verify_texts(context: RunContext, store: FlowStore, texts: TextWriter) -> None:
    context.counts.operations += texts.saved
    for run_id, kept in texts.kept.items():
        if not kept:
            continue
        found = await store.get_outputs(run_id)
        for key, end in kept.items():
            if not found.get(key, "").endswith(end):
                context.counts.count_lost(f"text {key!r} of run {run_id} was saved and does not exist")


SCENARIO = FaultScenario(
    number=11,
    name="disk-full",
    fault="the store's disk fills up while clients work, and is freed again",
    unit="cycles",
    planned=20,
    min_faults=2,
    backends=("sqlite", "postgresql"),
    pass_criterion="calls raise StoreUnavailableError, no acknowledged write is lost, writes succeed again",
    mutant="failed writes are reported as successful",
    minutes=6,
    run=run,
)
