"""Capture exceptions of event loop callbacks.

If a callback of a backend raises, the loop logs the exception and continues, and no caller notices. A suite
that checks only results of calls would miss it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def capture_callback_errors() -> Iterator[list[BaseException]]:
    """Collect exceptions of callbacks of the running loop; other errors go to the previous handler."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    found: list[BaseException] = []

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # Only callbacks have a handle. A task whose exception was never retrieved is reported when it is
        # garbage collected, possibly during a later check.
        if isinstance(error, BaseException) and "handle" in context:
            found.append(error)
        elif before is not None:
            before(loop, context)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
    try:
        yield found
    finally:
        loop.set_exception_handler(before)
