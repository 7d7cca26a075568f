"""Serve until stdin is closed, and print the URL of a store."""

import asyncio
import sys

from tests.network_backend.server import serve


async def main() -> None:
    async with serve() as port:
        sys.stdout.write(f"network://127.0.0.1:{port}/flows\n")
        sys.stdout.flush()
        await asyncio.to_thread(sys.stdin.read)


asyncio.run(main())
