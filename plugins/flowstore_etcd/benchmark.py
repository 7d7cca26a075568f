"""The store beside raw transactions of etcd: ``python plugins/flowstore_etcd/benchmark.py``.

Without a URL it starts a server that syncs its files. plugins/space_benchmark.py explains the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from flowstore_etcd.settings import read_settings
from flowstore_etcd.space import EtcdSpace

from flowstore_core import StoreConfig
from flowstore_core.urls import parse_url

sys.path.extend([str(Path(__file__).parent / "tests"), str(Path(__file__).parents[1])])

from etcd_cluster import running_cluster
from space_benchmark import measure, measure_growth, new_parser, new_prefix


async def measure_at(url: str, arguments: argparse.Namespace) -> None:
    parts = parse_url(url)
    config = StoreConfig.from_url(parts.with_path(new_prefix("raw")))
    title = f"{len(parts.hosts.split(','))} members"
    await measure(EtcdSpace(read_settings(config)), parts.with_path(new_prefix("store")), title, arguments)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--members", type=int, default=1, help="of the cluster that is started")
    parser.add_argument(
        "--growth",
        type=int,
        metavar="RUNS",
        help="measure large runs, and claims beside up to so many runs, on a cluster that is started",
    )
    arguments = parser.parse_args()
    if arguments.url and arguments.growth:
        parser.error("--growth needs the processor time of servers that it starts itself: leave out the URL")
    if arguments.url:
        asyncio.run(measure_at(arguments.url, arguments))
        return
    with running_cluster(arguments.members, durable=True) as running:
        if arguments.growth:
            asyncio.run(measure_growth(running.url(), arguments.growth, lambda: running.processor_seconds))
            return
        asyncio.run(measure_at(running.url(), arguments))


if __name__ == "__main__":
    main()
