"""One worker process: ``python -m flowstore_replay.worker``, started by the replay.

Its configuration is one line of JSON on standard input, because every user of the machine can read a command
line and the URL may hold a password. Standard input stays open while the parent lives; the worker exits at
its end.
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
from flowstore_replay.wfcommons import Workflow
from flowstore_replay.work import RecordedWork

MAX_CONFIG_BYTES = 1 << 28

Wrap = Callable[[FlowStore], Any]
"""Wraps the worker's store, to observe it or to inject faults."""


def unwrapped(store: FlowStore) -> FlowStore:
    return store


async def work(config: Mapping[str, Any], parent_exited: asyncio.Task[Any], wrap: Wrap = unwrapped) -> None:
    """Execute steps of the configured queue until the parent has closed its pipe or exited."""
    run_ids = [UUID(run_id) for run_id in config["run_ids"]]
    # The parent has applied migrations already.
    async with open_store(config["url"], migrate=False) as store:
        engine = Engine(
            wrap(store),
            Workflow.from_json(config["workflow"]),
            RecordedWork(run_ids, speed=config["speed"], fail_rate=config["fail_rate"], seed=config["seed"]),
            queue=config["queue"],
            name=config["name"],
            lease=timedelta(seconds=config["lease"]),
            max_attempts=config["max_attempts"],
            approval_steps=config["approval_steps"],
        )
        running = asyncio.create_task(engine.run())
        await asyncio.wait({running, parent_exited}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        else:
            running.cancel()
            await asyncio.wait({running})


async def _main(wrap: Wrap) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_CONFIG_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    config = await reader.readline()
    if config:
        parent_exited = asyncio.create_task(reader.read())
        loop.add_signal_handler(signal.SIGTERM, parent_exited.cancel)
        await work(json.loads(config), parent_exited, wrap)
        parent_exited.cancel()


def main(wrap: Wrap = unwrapped) -> int:
    # The terminal's Ctrl-C is for the parent, which then ends its workers in order.
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
