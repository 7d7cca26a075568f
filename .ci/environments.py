"""Run the conformance suite against an older PostgreSQL server: with other settings, and behind PgBouncer.

.ci/lowest_versions.py runs it on the newest version with other settings.

``python .ci/environments.py [NAME...]`` needs Debian's packages postgresql-15, pgbouncer and util-linux, and
root, to start the servers as the user postgres. Each environment is a new server on a socket in a temporary
directory. Exits with 1 if the suite does not pass in every environment.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql/15/bin")
USER = "postgres"
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """A server and the way to it."""

    name: str
    initdb: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    """Server settings, which are the defaults of every session."""
    trigrams: bool = True
    """Whether the extension pg_trgm is installed."""
    pooler: bool = False
    """Whether PgBouncer stands before the server, in transaction mode."""


ENVIRONMENTS = (
    Environment(
        name="15-repeatable-read-new-york-german",
        initdb=("--locale-provider=icu", "--icu-locale=de-DE"),
        settings={
            "default_transaction_isolation": "repeatable read",
            "TimeZone": "America/New_York",
            "DateStyle": "German, DMY",
            "IntervalStyle": "sql_standard",
        },
        trigrams=False,
    ),
    Environment(name="15-pgbouncer", initdb=("--locale=C",), pooler=True),
)


def main(names: list[str]) -> int:
    known = {one.name: one for one in ENVIRONMENTS}
    if unknown := set(names) - known.keys():
        sys.stderr.write(f"no environment {', '.join(sorted(unknown))}; there are {', '.join(known)}\n")
        return 2
    failed = []
    for environment in [known[name] for name in names] or ENVIRONMENTS:
        sys.stdout.write(f"\n==> {environment.name}\n")
        sys.stdout.flush()
        with served(environment) as url:
            command = [Path(sys.executable).with_name("flowstore"), "conformance", url, "--profile", "quick"]
            if subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
                failed.append(environment.name)
    if failed:
        sys.stdout.write(f"\nthe suite did not pass in: {', '.join(failed)}\n")
    return 1 if failed else 0


@contextmanager
def served(environment: Environment) -> Iterator[str]:
    """Start the server, and yield the URL of a database on it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="flowstore-env-")))
        shutil.chown(folder, USER)
        port = _free_port()
        _run(
            DEBIAN / "initdb",
            "--auth=trust",
            "-D",
            folder / "data",
            "-U",
            USER,
            "-E",
            "UTF8",
            *environment.initdb,
        )
        settings = {"port": str(port), "listen_addresses": "", "fsync": "off", **environment.settings}
        settings["unix_socket_directories"] = str(folder)
        options = [f"-c{name}={value}" for name, value in settings.items()]
        stack.enter_context(_running(DEBIAN / "postgres", "-D", folder / "data", *options))
        _wait_for_server(folder, port)
        url = f"postgresql:///postgres?host={folder}&port={port}&user={USER}"
        if environment.trigrams:
            client = ("-h", folder, "-p", str(port), "-U", USER, "-d", "postgres")
            _run(DEBIAN / "psql", *client, "-c", "CREATE EXTENSION pg_trgm")
        if environment.pooler:
            pooler_port = _free_port()
            config = folder / "pgbouncer.ini"
            config.write_text(POOLER.format(folder=folder, port=port, pooler_port=pooler_port, user=USER))
            stack.enter_context(_running(Path("/usr/sbin/pgbouncer"), config))
            _wait_for(folder / f".s.PGSQL.{pooler_port}")
            url = f"postgresql:///postgres?host={folder}&port={pooler_port}&user={USER}&pgbouncer=true"
            # The claim of a cancelled call may stay so long, and the suite waits 10 seconds for it.
            url += "&statement_timeout=2"
        yield url


POOLER = """\
[databases]
* = host={folder} port={port} user={user}
[pgbouncer]
pool_mode = transaction
auth_type = any
listen_addr =
listen_port = {pooler_port}
unix_socket_dir = {folder}
max_client_conn = 500
default_pool_size = 20
"""


def _run(*command: object) -> None:
    subprocess.run(
        ["runuser", "-u", USER, "--", *map(str, command)], check=True, stdout=subprocess.DEVNULL, cwd="/"
    )


@contextmanager
def _running(*command: object) -> Iterator[None]:
    process = subprocess.Popen(
        ["runuser", "-u", USER, "--", *map(str, command)], stderr=subprocess.DEVNULL, cwd="/"
    )
    try:
        yield
    finally:
        # runuser passes SIGTERM on, with which postgres waits for its clients; there are none any more.
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=START_SECONDS)


def _wait_for_server(folder: Path, port: int) -> None:
    # The socket exists before the server accepts connections.
    until = time.monotonic() + START_SECONDS
    is_ready = [DEBIAN / "pg_isready", "-q", "-h", folder, "-p", str(port)]
    while subprocess.run(is_ready, check=False).returncode:
        if time.monotonic() > until:
            raise TimeoutError(f"the server at {folder} does not accept connections")
        time.sleep(0.1)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while True:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except OSError:
                if time.monotonic() > until:
                    raise
            else:
                return
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
