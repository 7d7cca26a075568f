"""``flowstore copy``: copy runs from one store to another, and verify them."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated
from uuid import UUID

import typer

from flowstore_cli.completion import complete_run_status
from flowstore_cli.failures import NO, USAGE, Failure
from flowstore_cli.printing import clean, print_json, say
from flowstore_cli.references import Flow, find_flow, parse_status
from flowstore_cli.stores import AsJson, complete_url, existing_store, run
from flowstore_core import (
    Capability,
    ConflictError,
    FlowRunRecord,
    FlowStore,
    InvalidArgumentError,
    LimitExceededError,
    NotSupportedError,
    RunArchive,
    RunPosition,
    RunStatus,
    open_store,
)
from flowstore_core.inspection.wording import count
from flowstore_core.transfer import is_same_run

IN_FLIGHT = 256
"""Number of runs that are copied at once; the stores batch them."""
MOST_LISTED = 10
LIVE_SECONDS = 0.2
PLAIN_SECONDS = 5.0
"""Seconds between two updates of the progress, on a terminal and elsewhere."""

_URL_HELP = "such as sqlite:///flows.db or postgresql://user@host/db."
Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help=f"The URL of the store to copy from, {_URL_HELP}",
        show_default=False,
        autocompletion=complete_url,
    ),
]
Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="The URL of the store to copy to; it is created or migrated if necessary.",
        show_default=False,
        autocompletion=complete_url,
    ),
]
Statuses = Annotated[
    list[RunStatus] | None,
    typer.Option(
        "--status",
        "-s",
        metavar="STATUS",
        help=f"Only runs in this status: {', '.join(RunStatus)}. May be given several times.",
        parser=parse_status,
        autocompletion=complete_run_status,
    ),
]


@dataclass(slots=True)
class Result:
    """What a copy has done so far."""

    total: int | None = None
    """The number of runs to copy, if the source can tell."""
    copied: int = 0
    present: int = 0
    """Runs that the target had already."""
    verified: int = 0
    failures: dict[UUID, str] = field(default_factory=dict)
    """Why a run is not the same in the target."""


def copy(
    source: Source,
    target: Target,
    flow: Flow = None,
    statuses: Statuses = None,
    engines_stopped: Annotated[
        bool,
        typer.Option("--engines-stopped", help="Copy Running runs too; no engine works on SOURCE any more."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Copy runs to another store, on any backend, and compare them there.

    Each run is copied whole or not at all, with everything that belongs to it. Runs that TARGET has
    already are skipped, so a copy that was interrupted continues when the command is repeated. At the end
    every run is read from both stores and compared. SOURCE is not changed.

    A Running run may be copied only when no engine works on it; otherwise two stores would work on one
    run. In TARGET the claims of its workers have ended, so its steps are ready or stalled at once.

    \b
      flowstore copy sqlite:///flows.db postgresql://user@host/db --status succeeded --status failed
      flowstore copy sqlite:///flows.db postgresql://user@host/db --engines-stopped

    JSON: copied, present (in TARGET before), verified, failed (a list of run ids).
    """
    result = run(_copy(source, target, flow, statuses or list(RunStatus), engines_stopped=engines_stopped))
    if as_json:
        shown = {"copied": result.copied, "present": result.present, "verified": result.verified}
        print_json({**shown, "failed": list(result.failures)})
    elif not result.failures:
        there = f"; {count(result.present, 'run')} already there" if result.present else ""
        say(f"copied {count(result.copied, 'run')}{there}; {result.verified:,} verified")
    if result.failures:
        details = [f"{run_id}: {why}" for run_id, why in list(result.failures.items())[:MOST_LISTED]]
        raise Failure(
            f"{count(len(result.failures), 'run')} of SOURCE could not be copied; all others are in TARGET",
            NO,
            details,
        )


async def _copy(
    source: str, target: str, flow: str | None, statuses: Collection[RunStatus], *, engines_stopped: bool
) -> Result:
    async with existing_store(source) as origin, open_store(target) as destination:
        for store, operation in ((origin, "export_run"), (destination, "import_run")):
            if Capability.TRANSFER not in store.capabilities:
                raise NotSupportedError(store.backend, Capability.TRANSFER, operation)
        flow_id = None if flow is None else await find_flow(origin, flow)
        work = _Copy(origin, destination, flow_id, statuses, engines_stopped=engines_stopped)
        return await work.run()


class _Copy:
    """One run of the command."""

    def __init__(
        self,
        origin: FlowStore,
        destination: FlowStore,
        flow_id: UUID | None,
        statuses: Collection[RunStatus],
        *,
        engines_stopped: bool,
    ) -> None:
        self._origin = origin
        self._destination = destination
        self._flow_id = flow_id
        self._statuses = statuses
        self._engines_stopped = engines_stopped
        self._result = Result()

    async def run(self) -> Result:
        active = await self._origin.get_active_runs()
        self._refuse_running([one for one in active if self._flow_id in (None, one.flow_id)])
        result = self._result
        result.total = await self._count()
        async with _progress(lambda: self._shown("copied", result.copied + result.present)):
            present = _Records(self._destination, self._flow_id)
            async for page in self._pages():
                there = await present.until(page[-1])
                new = [one.run_id for one in page if there.get(one.run_id) != one]
                result.present += len(page) - len(new)
                await self._each(new, self._copy_run)
        async with _progress(lambda: self._shown("verified", result.verified)):
            async for page in self._pages():
                await self._each([one.run_id for one in page], self._verify_run)
        return result

    async def _count(self) -> int | None:
        if Capability.DASHBOARD not in self._origin.capabilities:
            return None
        pages = [
            await self._origin.get_runs_page(self._flow_id, status=status, take=0)
            for status in set(self._statuses)
        ]
        return sum(page.total_count for page in pages)

    async def _pages(self) -> AsyncIterator[Sequence[FlowRunRecord]]:
        """The runs to copy, the newest first."""
        position = None
        take = self._origin.limits.page_size
        while page := await self._origin.get_runs(self._flow_id, after=position, take=take):
            position = page[-1].position
            if wanted := [one for one in page if one.status in self._statuses]:
                # A run may have been reopened since the beginning.
                self._refuse_running(wanted)
                yield wanted

    def _refuse_running(self, runs: Sequence[FlowRunRecord]) -> None:
        running = [one for one in runs if one.status is RunStatus.RUNNING]
        if running and RunStatus.RUNNING in self._statuses and not self._engines_stopped:
            verb = "is" if len(running) == 1 else "are"
            raise Failure(
                f"{count(len(running), 'run')} of SOURCE {verb} Running; stop every engine that works on "
                "SOURCE and add --engines-stopped, or copy the others with "
                "--status succeeded --status failed --status cancelled",
                USAGE,
            )

    async def _each(self, run_ids: Sequence[UUID], work: Callable[[UUID], Awaitable[None]]) -> None:
        """Await ``work`` of each run, a bounded number at a time."""
        slots = asyncio.Semaphore(IN_FLIGHT)

        async def one(run_id: UUID) -> None:
            async with slots:
                await work(run_id)

        try:
            async with asyncio.TaskGroup() as tasks:
                for run_id in run_ids:
                    tasks.create_task(one(run_id))
        except ExceptionGroup as failed:
            # The others were cancelled; each run is copied whole or not at all.
            raise failed.exceptions[0] from None

    async def _copy_run(self, run_id: UUID) -> None:
        archive = await self._origin.export_run(run_id)
        # It may have been deleted since it was listed.
        if archive is not None:
            await self._import(archive)

    async def _import(self, archive: RunArchive) -> None:
        result = self._result
        try:
            imported = await self._destination.import_run(archive)
        except (ConflictError, InvalidArgumentError, LimitExceededError) as error:
            # Taken, or beyond the limits of the target (LIM-1): the other runs are copied all the same.
            result.failures[archive.run_id] = str(error).partition(";")[0]
            return
        result.copied += imported
        result.present += not imported

    async def _verify_run(self, run_id: UUID) -> None:
        wanted = await self._origin.export_run(run_id)
        found = await self._destination.export_run(run_id)
        if wanted is None or run_id in self._result.failures:
            return
        if found is None:
            # It was started since the copy began.
            await self._import(wanted)
        elif is_same_run(wanted, found):
            self._result.verified += 1
        else:
            self._result.failures[run_id] = "it differs from the run in TARGET"

    def _shown(self, verb: str, number: int) -> str:
        of = "" if self._result.total is None else f" of {self._result.total:,}"
        return f"{verb} {number:,}{of} runs"


class _Records:
    """The runs of a store in the order of QRY-1, read in step with those of another store."""

    def __init__(self, store: FlowStore, flow_id: UUID | None) -> None:
        self._store = store
        self._flow_id = flow_id
        self._ahead: list[FlowRunRecord] = []
        """Records that were read and not returned yet."""
        self._position: RunPosition | None = None
        self._is_exhausted = False

    async def until(self, last: FlowRunRecord) -> dict[UUID, FlowRunRecord]:
        """The next records, up to the position of this run, by run id."""
        end = _order(last)
        while not self._is_exhausted and not (self._ahead and _order(self._ahead[-1]) <= end):
            take = self._store.limits.page_size
            page = await self._store.get_runs(self._flow_id, after=self._position, take=take)
            self._is_exhausted = not page
            if page:
                self._position = page[-1].position
                self._ahead += page
        found = [one for one in self._ahead if _order(one) >= end]
        del self._ahead[: len(found)]
        return {one.run_id: one for one in found}


def _order(run: FlowRunRecord) -> tuple[datetime, bytes]:
    return run.started_at, run.run_id.bytes


@contextlib.asynccontextmanager
async def _progress(shown: Callable[[], str]) -> AsyncIterator[None]:
    """Progress on stderr: one line that is updated on a terminal, else a line now and then."""
    live = sys.stderr.isatty()
    began = time.monotonic()

    def draw(end: str = "") -> None:
        elapsed = time.monotonic() - began
        text = clean(f"{shown()}, {elapsed:.0f} s")
        if live:
            width = shutil.get_terminal_size((80, 24)).columns - 1
            sys.stderr.write(f"\r\x1b[2K{text[:width]}{end}")
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    async def tick() -> None:
        while True:
            await asyncio.sleep(LIVE_SECONDS if live else PLAIN_SECONDS)
            draw()

    ticking = asyncio.create_task(tick())
    try:
        yield
    finally:
        ticking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await ticking
        draw("\n")
