"""Servers on this machine, from Debian's package redis-server.

Run as a program, this module starts a server that syncs every write, in a new directory, and prints the URL
of a store on it. When stdin is closed, it stops the server and deletes the directory.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
MISSING = "redis-server is not installed (apt-get install redis-server)"
STARTS = 5
PATIENT = "&request_timeout=60&connect_timeout=60"
"""Options for a loaded machine."""
DURABLE = {"appendonly": "yes", "appendfsync": "always", "save": ""}


def free_port() -> int:
    """A port that no client gets by chance: below the range of the system."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, low)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Server:
    """One server. It keeps its port and its files when it is started again."""

    def __init__(self, folder: Path, settings: Mapping[str, str]) -> None:
        self.port = free_port()
        self.settings = dict(settings)
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._has_started = False

    def start(self) -> None:
        """Start it, and wait until it has loaded its files."""
        for _ in range(STARTS):
            if self._try_start():
                return
            if not self._has_started:
                self.port = free_port()  # Another program has taken it since.
        raise RuntimeError((self.folder / "log").read_text()[-2000:])

    def _try_start(self) -> bool:
        assert BINARY is not None
        settings = {"port": str(self.port), "bind": "127.0.0.1", "dir": str(self.folder), **self.settings}
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen([BINARY, *arguments], stdout=log, stderr=log)
        while self._process.poll() is None:
            if b"Ready to accept connections" in self._log_of(self._process.pid):
                self._has_started = True
                return True
            time.sleep(0.02)
        return False

    def _log_of(self, pid: int) -> bytes:
        lines = (self.folder / "log").read_bytes().splitlines()
        return b"\n".join(line for line in lines if line.startswith(b"%d:" % pid))

    def kill(self, *, children: bool = False) -> None:
        """Kill it as ``kill -9`` does, with ``children`` those that write files too, and wait for its end."""
        if self._process is not None:
            pid = self._process.pid
            found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if children else ()
            self._process.kill()
            self._process.wait()
            self._process = None
            for child in found:
                os.kill(int(child), signal.SIGKILL)

    def pause(self) -> None:
        """Stop all its threads until ``resume``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self._process.pid}/stat")
        while status.read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.01)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def url(self, prefix: str = "flows", options: str = PATIENT) -> str:
        return f"redis://{self.address}?prefix={prefix}{options}"


@contextmanager
def data_folder(*, durable: bool = False) -> Iterator[Path]:
    """A new folder; in memory where that is possible, unless ``durable``: tests do not cut the power."""
    memory = "/dev/shm"
    where = None if durable or not os.access(memory, os.W_OK) else memory
    with tempfile.TemporaryDirectory(
        prefix="flowstore-redis-", dir=where, ignore_cleanup_errors=True
    ) as name:
        yield Path(name)


@contextmanager
def running_server(settings: Mapping[str, str] = DURABLE, *, durable: bool = False) -> Iterator[Server]:
    with data_folder(durable=durable) as folder:
        server = Server(folder, settings)
        try:
            server.start()
            yield server
        finally:
            server.kill()


def main() -> None:
    if BINARY is None:
        sys.exit(MISSING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with running_server(durable=True) as server:
        print(server.url(), flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()
