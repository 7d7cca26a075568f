"""Clusters of etcd on this machine, from Debian's package etcd-server.

Run as a program, this module starts a cluster in a new directory and prints the URL of a store on it. When
stdin is closed, it stops the cluster and deletes the directory. The argument is the number of members.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

BINARY = shutil.which("etcd")
MISSING = "etcd is not installed (apt-get install etcd-server)"
START_SECONDS = 60.0


_chosen_ports: set[int] = set()


def free_port() -> int:
    """A port that this process has not chosen yet, and that no client gets by chance.

    It is below the range of the system, because the members listen later, and again after a restart.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, low)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _chosen_ports:
                _chosen_ports.add(port)
                return port


class Member:
    """One server. It keeps its ports and its data when it is started again."""

    def __init__(self, name: str, folder: Path, arguments: Sequence[str], scheme: str = "http") -> None:
        self.name = name
        self.port = free_port()
        self.peer_port = free_port()
        self.advertised_peer_port = self.peer_port
        """Others send here; a proxy may listen on it."""
        self.scheme = scheme
        self._folder = folder
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, initial_cluster: str, arguments: Sequence[str] = ()) -> None:
        client = f"{self.scheme}://127.0.0.1:{self.port}"
        assert BINARY is not None
        with (self._folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    BINARY,
                    f"--name={self.name}",
                    f"--data-dir={self._folder / self.name}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls=http://127.0.0.1:{self.peer_port}",
                    f"--initial-advertise-peer-urls=http://127.0.0.1:{self.advertised_peer_port}",
                    f"--initial-cluster={initial_cluster}",
                    "--backend-batch-interval=10ms",
                    "--logger=zap",
                    *self._arguments,
                    *arguments,
                ],
                stdout=log,
                stderr=log,
            )

    def pause(self) -> None:
        """Stop all its threads until ``resume``."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        status = Path(f"/proc/{self._process.pid}/stat")
        wait_for(lambda: status.read_text().rpartition(")")[2].split()[0] == "T", "a member is stopped")

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill it as ``kill -9`` does, and wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def processor_seconds(self) -> float:
        """The processor time that it has used since its start."""
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def call(self, method: str, timeout: float = START_SECONDS, **arguments: Any) -> Any:
        """A call of etcd's JSON gateway, such as ``maintenance/status``."""
        request = urllib.request.Request(
            f"http://{self.address}/v3/{method}", json.dumps(arguments).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return json.load(reply)

    @property
    def is_ready(self) -> bool:
        """Whether it can be reached and knows a leader."""
        try:
            return self.call("maintenance/status", timeout=5).get("leader", "0") != "0"
        except (OSError, urllib.error.URLError):
            return False

    @property
    def is_leader(self) -> bool:
        status = self.call("maintenance/status")
        return bool(status.get("leader") == status["header"]["member_id"])


class Cluster:
    """One or more members."""

    def __init__(
        self, folder: Path, size: int = 1, arguments: Sequence[str] = (), scheme: str = "http"
    ) -> None:
        self.members = [Member(f"m{number}", folder, arguments, scheme) for number in range(size)]

    @property
    def initial_cluster(self) -> str:
        return ",".join(
            f"{member.name}=http://127.0.0.1:{member.advertised_peer_port}" for member in self.members
        )

    def start(self) -> None:
        for member in self.members:
            self.start_member(member)
        if self.members[0].scheme == "http":
            wait_for(lambda: all(member.is_ready for member in self.members), "the cluster starts")

    def start_member(self, member: Member, arguments: Sequence[str] = ()) -> None:
        member.start(self.initial_cluster, arguments)

    def stop(self) -> None:
        for member in self.members:
            member.kill()

    @property
    def leader(self) -> Member:
        found: list[Member] = []

        def find() -> bool:
            found[:] = [member for member in self.members if member.is_ready and member.is_leader]
            return len(found) == 1

        wait_for(find, "the cluster has one leader")
        return found[0]

    @property
    def processor_seconds(self) -> float:
        """The processor time that the members have used."""
        return sum(member.processor_seconds for member in self.members)

    def url(self, prefix: str = "flows", options: str = "") -> str:
        return f"etcd://{','.join(member.address for member in self.members)}/{prefix}{options}"


def wait_for(condition: Callable[[], bool], what: str | Callable[[], str]) -> None:
    until = time.monotonic() + START_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError(
                f"waited {START_SECONDS:g} s until {what if isinstance(what, str) else what()}"
            )
        time.sleep(0.05)


@contextmanager
def data_folder(*, durable: bool = False) -> Iterator[Path]:
    """A new folder; in memory where that is possible, unless ``durable``: tests do not cut the power."""
    memory = "/dev/shm"
    where = None if durable or not os.access(memory, os.W_OK) else memory
    with tempfile.TemporaryDirectory(prefix="flowstore-etcd-", dir=where, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextmanager
def running_cluster(
    size: int = 1, arguments: Sequence[str] = (), *, durable: bool = False
) -> Iterator[Cluster]:
    with data_folder(durable=durable) as folder:
        cluster = Cluster(folder, size, arguments)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


def main() -> None:
    if BINARY is None:
        sys.exit(MISSING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with running_cluster(int(sys.argv[1]) if len(sys.argv) > 1 else 1, durable=True) as cluster:
        print(cluster.url(), flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()
