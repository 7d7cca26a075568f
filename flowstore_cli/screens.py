"""The progress display of a replay: a live table, plain lines, or notes only."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from flowstore_cli.printing import cell, clean, new_table, say
from flowstore_core.inspection.wording import span
from flowstore_replay import Observer, ReplayProgress

MOST_WORKERS = 20
MOST_WAITING = 5


class Screen(Observer, Protocol):
    """An observer that displays the progress while ``on()`` is entered, and collects the notes."""

    notes: list[str]

    def on(self) -> AbstractContextManager[Any]: ...


class Quiet:
    """For --json: writes the notes to stderr."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def note(self, text: str) -> None:
        self.notes.append(text)
        sys.stderr.write(f"{clean(text)}\n")

    def show(self, progress: ReplayProgress) -> None:
        pass


class Plain:
    """For a file or a pipe: one line per note, and at most one progress line per second."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._last: tuple[int, int] | None = None
        self._said_at = 0.0
        self._began = time.monotonic()

    def on(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._say(text)

    def show(self, progress: ReplayProgress) -> None:
        state = (progress.runs_done, progress.steps_done)
        if state == self._last or time.monotonic() - self._said_at < 1:
            return
        self._last, self._said_at = state, time.monotonic()
        self._say(
            f"{progress.steps_done} of {progress.steps} steps, {progress.runs_done} of {progress.runs} runs"
        )

    def _say(self, text: str) -> None:
        say(f"{time.monotonic() - self._began:7.1f}s  {text}")
        sys.stdout.flush()


class Moving:
    """For a terminal: a live table below the notes."""

    def __init__(self, console: Console) -> None:
        self.notes: list[str] = []
        self._began = time.monotonic()
        self._live = Live(console=console, refresh_per_second=8, transient=True)

    def on(self) -> AbstractContextManager[Any]:
        return self._live

    def note(self, text: str) -> None:
        self.notes.append(text)
        # On one line, so that a command in it can be copied.
        line = cell(f"{time.monotonic() - self._began:7.1f}s  {text}")
        self._live.console.print(line, soft_wrap=True)

    def show(self, progress: ReplayProgress) -> None:
        done = Table.grid(padding=(0, 2))
        done.add_row(
            cell(span(progress.seconds)),
            ProgressBar(total=max(progress.steps, 1), completed=progress.steps_done, width=30),
            cell(f"{progress.steps_done} of {progress.steps} steps"),
            cell(f"{progress.runs_done} of {progress.runs} runs"),
            cell(f"{progress.kills_done} of {progress.kills} killed" if progress.kills else ""),
        )
        workers = new_table("WORKER", "STEP", short=("STEP",))
        for name, step in progress.held_steps[:MOST_WORKERS]:
            workers.add_row(cell(name), cell(step or "", "cyan"))
        for step in progress.waiting[:MOST_WAITING]:
            workers.add_row(cell("nobody", "dim"), cell(f"{step} (waits for a signal)", "yellow"))
        self._live.update(Group("", done, "", workers))
