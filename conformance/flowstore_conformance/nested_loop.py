"""Run a second event loop inside the running one, as notebooks do."""

from __future__ import annotations

import asyncio
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_nested(work: Coroutine[Any, Any, T]) -> T:
    """Run work to completion in a new event loop, while the calling task and its loop are blocked."""
    outer, task = asyncio.get_running_loop(), asyncio.current_task()
    if task is None:
        raise RuntimeError("run_nested is for tasks")
    _leave_task(outer, task)
    asyncio._set_running_loop(None)
    try:
        with asyncio.Runner() as runner:
            return runner.run(work)
    finally:
        asyncio._set_running_loop(outer)
        _enter_task(outer, task)
