"""``flowstore conformance``: check a backend against the contract, and write reports."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flowstore_cli.failures import (
    INTERRUPTED,
    NO,
    SUCCESS,
    UNWRITTEN,
    USAGE,
    Failure,
    explain_unavailable,
)
from flowstore_cli.printing import clean, complain, new_console
from flowstore_cli.stores import run
from flowstore_core import ConfigurationError, StoreUnavailableError
from flowstore_core.inspection.wording import span
from flowstore_core.urls import redact

if TYPE_CHECKING:
    # The command imports these itself, so that the other commands work without the extra.
    from flowstore_conformance import CheckResult, Report
    from flowstore_conformance.registry import Check

SIGNALS = (signal.SIGINT, signal.SIGTERM)

TICK = 0.2
"""Seconds between two updates of the progress line."""

THREAD_SECONDS = 2.0
"""Seconds that threads may take to end after the run."""

NARROWEST, WIDEST = 60, 120
"""Minimum and maximum width of the printed report, in columns."""


def conformance(
    url: Annotated[str, typer.Argument(metavar="URL", help="A store of the backend to check.")],
    profile: Annotated[
        str, typer.Option(metavar="PROFILE", help="Amount of work: quick, standard or thorough.")
    ] = "standard",
    clause: Annotated[
        list[str] | None,
        typer.Option(metavar="ID", help="Check only this clause; repeatable.", show_default=False),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Run this check, or this example of a check, only; may be given again.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Repeat the run with this seed.", show_default=False)
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JSON.", show_default=False)
    ] = None,
    junit: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report as JUnit XML.", show_default=False)
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write the report as Markdown, for a CI summary.", show_default=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report as one HTML page.", show_default=False),
    ] = None,
    badge: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a badge, for a shields.io endpoint.", show_default=False),
    ] = None,
    programs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write the programs that reproduce failures as files.", show_default=False
        ),
    ] = None,
    waivers: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Known failures, in a TOML file.", show_default=False),
    ] = None,
    check_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Time limit of a check; a call may take half of it (default: 30 s).",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='Open stores with this variant of the backend only; "default" for the options of the URL.',
            show_default=False,
        ),
    ] = None,
    faults: Annotated[
        bool,
        typer.Option(
            "--faults",
            help="Also check the store while its requests are disturbed: by proxies before each host:port of "
            "the URL, and by the injector of its backend.",
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of processes that share the checks (default: 2, or 1 on a machine with one core).",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check whether a backend keeps every clause of the contract.

    Works only in scratch namespaces that the backend creates beside the store, and drops them. The data
    of the store itself is not touched, and a namespace that is not empty is refused.

    \b
      flowstore conformance sqlite:///flows.db --profile quick
      flowstore conformance postgresql://user@host/db --html report.html --json report.json
      flowstore conformance memory:// --clause CLM-1 --clause SIG-3 --seed 7
      flowstore conformance postgresql://user@host:5432/db --faults --clause CON-3

    \b
    Exit codes of this command:
    0  it conforms: no check failed or stayed inconclusive, and every waiver is valid
    1  it violates the contract, or conformance was not shown
    2  the suite could not run: wrong usage, a refused namespace, or a store that
       is unavailable (for which other commands exit with 3)
    4  it conforms, but the report or a file cannot be written
    130  interrupted: the report of the completed checks is written, marked as incomplete
    """
    try:
        import flowstore_conformance as suite
        from flowstore_conformance import rendering
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("flowstore_conformance", "hypothesis"):
            raise
        message = f"module {missing!r} is missing; pip install 'flowstore[conformance]'"
        raise ConfigurationError(message) from error

    forms: tuple[tuple[Path | None, Callable[[Report], str]], ...] = (
        (json, rendering.render_json),
        (junit, rendering.render_junit),
        (markdown, rendering.render_markdown),
        (html, rendering.render_page),
        (badge, rendering.render_badge),
    )
    wanted = [(path, render) for path, render in forms if path is not None]
    for path, _ in wanted:
        # Fail before the run, which may take minutes.
        if not path.parent.is_dir():
            raise Failure(f"the folder of {path} does not exist; create it first", USAGE)
    known = suite.read_waivers(waivers) if waivers is not None else ()
    _say(f"checking {redact(url)}, only in scratch namespaces beside it; its own data is not touched")
    progress = Progress(live=sys.stderr.isatty())

    async def run_checks() -> Report:
        async with progress.shown(), stopped_by_signals() as stop:
            return await suite.run_suite(
                url,
                profile=profile,
                clauses=clause or (),
                check_names=check or (),
                seed=seed,
                waivers=known,
                check_timeout=check_timeout,
                variant=variant,
                faults=faults,
                processes=processes,
                starting=progress.starting,
                progress=progress.ended,
                stop=stop,
            )

    before = threading.enumerate()
    try:
        report = run(run_checks())
    except KeyboardInterrupt:
        leave_threads(before, INTERRUPTED, "interrupted")
        raise
    except StoreUnavailableError as error:
        raise Failure(explain_unavailable(error), USAGE) from error
    except ConfigurationError as error:
        leave_threads(before, USAGE, str(error))
        raise
    unwritten = []
    if programs is not None:
        try:
            report = suite.write_programs(report, programs)
        except OSError as error:
            unwritten.append(f"{error.filename or programs} cannot be written: {error.strerror}")
    for path, render in wanted:
        try:
            path.write_text(render(report), encoding="utf-8")
        except OSError as error:
            unwritten.append(f"{path} cannot be written: {error.strerror}")
    text = rendering.render_text(
        report,
        width=max(NARROWEST, min(shutil.get_terminal_size((100, 24)).columns, WIDEST)),
        colour=new_console().color_system is not None,
        unicode="utf" in (sys.stdout.encoding or "").lower(),
    )
    sys.stdout.write(text)
    if unwritten:
        code, message = UNWRITTEN if report.conforms else NO, "; ".join(unwritten)
        code = INTERRUPTED if report.incomplete else code
        leave_threads(before, code, message)
        raise Failure(message, code)
    code = INTERRUPTED if report.incomplete else SUCCESS if report.conforms else NO
    leave_threads(before, code)
    if code:
        raise typer.Exit(code)


@contextlib.asynccontextmanager
async def stopped_by_signals() -> AsyncIterator[asyncio.Event]:
    """Set an event on the first Ctrl-C or SIGTERM; a second one ends the command without a report."""
    loop, task, stop = asyncio.get_running_loop(), asyncio.current_task(), asyncio.Event()
    assert task is not None

    def interrupt() -> None:
        if stop.is_set():
            task.cancel()
        else:
            _say("interrupted: dropping the scratch namespaces, then reporting the completed checks")
            stop.set()

    for number in SIGNALS:
        loop.add_signal_handler(number, interrupt)
    try:
        yield stop
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


def leave_threads(before: Collection[threading.Thread], code: int, message: str = "") -> None:
    """End the process if a thread of the backend hangs; the interpreter would wait for it forever."""
    until = time.monotonic() + THREAD_SECONDS
    for one in set(threading.enumerate()).difference(before):
        one.join(max(until - time.monotonic(), 0.0))
    if set(threading.enumerate()).difference(before):
        if message:
            complain(message, code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Progress:
    """Progress on stderr: one line that is updated on a terminal, else one line per check."""

    def __init__(self, *, live: bool) -> None:
        self._live = live
        self._line = "inspecting the backend"
        self._since = time.monotonic()
        self._bad = 0

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncIterator[None]:
        """Update the progress line while checks run, and clear it at the end."""
        if not self._live:
            yield
            return
        ticking = asyncio.create_task(self._tick())
        try:
            yield
        finally:
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            self._draw("")

    def starting(self, check: Check, number: int, count: int) -> None:
        self._line, self._since = f"[{number:>{len(str(count))}}/{count}] {check.id}", time.monotonic()
        if self._live:
            self._draw(self._line)

    def ended(self, result: CheckResult, number: int, count: int) -> None:
        self._bad += result.status in ("FAIL", "INCONCLUSIVE")
        if not self._live:
            _say(f"{self._line}: {result.status}, {result.assertions:,} assertions in {span(result.seconds)}")

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            bad = f", {self._bad} not passed" if self._bad else ""
            self._draw(f"{self._line}, {span(time.monotonic() - self._since)}{bad}")

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size((80, 24)).columns - 1
        sys.stderr.write(f"\r\x1b[2K{clean(text)[:width]}")
        sys.stderr.flush()


def _say(text: str) -> None:
    sys.stderr.write(f"{clean(text)}\n")
    sys.stderr.flush()
