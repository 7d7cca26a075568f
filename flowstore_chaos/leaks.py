"""What a process holds: threads, files, sockets and children that should be gone when a store is closed."""

from __future__ import annotations

import gc
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

SETTLE_SECONDS = 5.0
"""A thread or a child that is just ending gets so long."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """Threads by name, open files and connections, and child processes."""

    threads: frozenset[str]
    files: frozenset[str]
    connections: frozenset[str]
    children: frozenset[int]

    @classmethod
    def now(cls) -> Holdings:
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

    def leaked(self) -> list[str]:
        """What is held now and was not held then, in sentences; waits a little for what is just ending."""
        until = time.monotonic() + SETTLE_SECONDS
        while (found := self._more()) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def _more(self) -> list[str]:
        now = Holdings.now()
        return [
            *(f"thread {name} still runs" for name in sorted(now.threads - self.threads)),
            *(f"file {path} is still open" for path in sorted(now.files - self.files)),
            *(f"connection {name} is still open" for name in sorted(now.connections - self.connections)),
            *(f"process {pid} still runs" for pid in sorted(now.children - self.children)),
        ]


def kill_tree(pid: int, *, itself: bool = True) -> None:
    """End a process and all that it has started."""
    try:
        root = psutil.Process(pid)
        everyone = [*root.children(recursive=True), *[root] * itself]
    except psutil.NoSuchProcess:
        return
    for process in everyone:
        with suppress(psutil.NoSuchProcess):
            process.kill()
