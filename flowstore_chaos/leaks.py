"""Detection of leaked threads, files, connections and child processes."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

SETTLE_SECONDS = 5.0
"""Grace period in seconds for threads and processes that are exiting."""


@dataclass(frozen=True, slots=True)
class ResourceSnapshot:
    """The threads, open files, connections and child processes of this process."""

    threads: frozenset[str]
    files: frozenset[str]
    connections: frozenset[str]
    children: frozenset[int]

    @classmethod
    def now(cls) -> ResourceSnapshot:
        gc.collect()
        me = psutil.Process()
        return cls(
            threads=frozenset(f"{thread.name} ({thread.ident})" for thread in threading.enumerate()),
            files=frozenset(f"{file.path} (descriptor {file.fd})" for file in me.open_files()),
            connections=frozenset(
                f"{end.type.name} {end.laddr or ''} to {end.raddr or ''} (descriptor {end.fd})"
                for end in me.net_connections("all")
            ),
            children=frozenset(child.pid for child in me.children(recursive=True)),
        )

    def leaked(self, *, in_loop: bool = False) -> list[str]:
        """The resources acquired since this snapshot and not released within SETTLE_SECONDS, as sentences.

        ``in_loop``: the event loop is still open, and keeps the threads of its executor until it is closed.
        """
        until = time.monotonic() + SETTLE_SECONDS
        while (found := self._more(in_loop=in_loop)) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _more(self, *, in_loop: bool) -> list[str]:
        now = ResourceSnapshot.now()
        threads = now.threads - self.threads
        if in_loop:
            threads = frozenset(name for name in threads if not name.startswith("asyncio_"))
        return [
            *(f"thread {name} is still running" for name in sorted(threads)),
            *(f"file {path} is still open" for path in sorted(now.files - self.files)),
            *(f"connection {name} is still open" for name in sorted(now.connections - self.connections)),
            *(f"process {pid} is still running" for pid in sorted(now.children - self.children)),
        ]


def kill_tree(pid: int, *, itself: bool = True) -> None:
    """Kill a process and all its descendants."""
    try:
        root = psutil.Process(pid)
        everyone = [*root.children(recursive=True), *[root] * itself]
    except psutil.NoSuchProcess:
        return
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
