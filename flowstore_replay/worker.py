"""One worker process: ``python -m flowstore_replay.worker``, started by the replay, never by hand.

Its orders are one line of JSON on standard input, because a command line can be read by every user of
the machine and the URL may hold a password. Standard input then stays open for as long as the parent
lives: its end is how the worker learns that it is alone, and ends as well.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_core import FlowStore, FlowStoreError, StoreUnavailableError, open_store
from flowstore_replay.engine import Engine
from flowstore_replay.wfformat import Workflow
from flowstore_replay.work import RecordedWork

LONGEST_ORDERS = 1 << 28

Wrap = Callable[[FlowStore], Any]
"""Puts something around the worker's store: to listen in, or to break it."""


def as_it_is(store: FlowStore) -> FlowStore:
    return store


async def work(orders: Mapping[str, Any], parent_is_gone: asyncio.Task[Any], wrap: Wrap = as_it_is) -> None:
    """Carry out the orders until all runs are completed or the parent is gone."""
    run_ids = [UUID(run_id) for run_id in orders["run_ids"]]
    # The parent has migrated what was to be migrated.
    async with open_store(orders["url"], migrate=False) as store:
        engine = Engine(
            wrap(store),
            Workflow.from_json(orders["workflow"]),
            RecordedWork(run_ids, speed=orders["speed"], fail_rate=orders["fail_rate"], seed=orders["seed"]),
            name=orders["name"],
            lease=timedelta(seconds=orders["lease"]),
            max_attempts=orders["max_attempts"],
            approve=orders["approve"],
        )
        running = asyncio.create_task(engine.run(run_ids))
        await asyncio.wait({running, parent_is_gone}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        else:
            running.cancel()
            await asyncio.wait({running})


async def _main(wrap: Wrap) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LONGEST_ORDERS)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    orders = await reader.readline()
    if orders:
        parent_is_gone = asyncio.create_task(reader.read())
        loop.add_signal_handler(signal.SIGTERM, parent_is_gone.cancel)
        await work(json.loads(orders), parent_is_gone, wrap)
        parent_is_gone.cancel()


def main(wrap: Wrap = as_it_is) -> int:
    # The terminal's Ctrl-C is meant for the parent, which then ends its workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        asyncio.run(_main(wrap))
    except FlowStoreError as error:
        sys.stderr.write(f"{error}\n")
        return 3 if isinstance(error, StoreUnavailableError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
