"""Exceptions that reach nobody but the event loop.

A callback of a backend that raises has no caller to tell: the loop logs it and goes on, and whatever the
callback was to do is not done. A suite that looks at answers alone would not notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def capture_callback_errors() -> Iterator[list[BaseException]]:
    """Gather what callbacks of the running loop let out; the rest is left to whoever handled it before."""
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    found: list[BaseException] = []

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        # A handle is there for callbacks alone. A task whose exception nobody fetched is reported when it
        # is collected, which may be checks later.
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
