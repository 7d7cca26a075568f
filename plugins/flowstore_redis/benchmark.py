"""The store beside raw scripts of Redis: ``python plugins/flowstore_redis/benchmark.py``.

Without a URL it starts a server that syncs every write. plugins/space_benchmark.py explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from flowstore_redis.settings import read_settings
from flowstore_redis.space import RedisSpace

from flowstore_core import StoreConfig
from flowstore_core.urls import parse_url

sys.path.extend([str(Path(__file__).parent / "tests"), str(Path(__file__).parents[1])])

from redis_server import running_server
from space_benchmark import measure, new_parser, new_prefix


async def measure_at(url: str, arguments: argparse.Namespace) -> None:
    parts = parse_url(url)
    raw, own = (parts.with_more_options({"prefix": new_prefix(name)}) for name in ("raw", "store"))
    space = RedisSpace(read_settings(StoreConfig.from_url(raw)))
    await measure(space, own, "one server", arguments)


def main() -> None:
    arguments = new_parser(__doc__).parse_args()
    if arguments.url:
        asyncio.run(measure_at(arguments.url, arguments))
        return
    with running_server(durable=True) as server:
        asyncio.run(measure_at(server.url(), arguments))


if __name__ == "__main__":
    main()
