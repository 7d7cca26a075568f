"""Building blocks of tests: start a run, and make calls concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any, TypeVar
from uuid import UUID, uuid4

from flowstore_core import FlowStore

T = TypeVar("T")

FLOW = UUID("f10a0000-0000-4000-8000-000000000001")


async def new_run(store: FlowStore, **overrides: Any) -> UUID:
    """Start a run and return its id."""
    run_id: UUID = overrides.pop("run_id", None) or uuid4()
    arguments = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", **overrides}
    await store.start_run(run_id=run_id, **arguments)
    return run_id


async def together(calls: Iterable[Awaitable[T]]) -> list[T]:
    """Make calls concurrently and return their results; raises the first error."""
    return list(await asyncio.gather(*calls))
