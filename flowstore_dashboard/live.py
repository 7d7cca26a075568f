"""Live pages: a stream of server-sent events that says when a page has changed.

The events carry a version, not data: the script of the page then requests the page again. A stream compares
versions after every wait, which ends early where the store can watch for the change.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from typing import Protocol

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from flowstore_core import FlowStoreError, RunPage
from flowstore_core.redaction import full_repr

INTERVAL = 2.0
"""Seconds between two comparisons."""
MAX_STREAMS = 64


class LivePage(Protocol):
    """A page that can tell whether it has changed."""

    async def version(self, request: Request) -> object: ...

    async def wait(self, request: Request, seconds: float) -> None: ...


class Streams:
    """The open streams of a dashboard. Their number is limited, because each reads the store."""

    def __init__(self) -> None:
        self._open = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """End all streams, so that the server can stop."""
        self._closing.set()

    def open(self, page: LivePage, request: Request) -> Response:
        if self._open >= MAX_STREAMS:
            return PlainTextResponse("Too many live pages are open.", 503, {"retry-after": "30"})
        return StreamingResponse(self._events(page, request), media_type="text/event-stream")

    async def _events(self, page: LivePage, request: Request) -> AsyncIterator[str]:
        self._open += 1
        try:
            yield "retry: 3000\n\n"
            last = None
            while not self._closing.is_set():
                try:
                    version = _digest(await page.version(request))
                except FlowStoreError:
                    # The page itself shows the error when it is requested again.
                    version = "unavailable"
                # A comment keeps the connection, and finds out whether the browser is still there.
                yield f"data: {version}\n\n" if version != last else ": unchanged\n\n"
                last = version
                await self._wait(page, request)
        finally:
            self._open -= 1

    async def _wait(self, page: LivePage, request: Request) -> None:
        closing = asyncio.ensure_future(self._closing.wait())
        changed = asyncio.ensure_future(_wait_for_change(page, request))
        try:
            await asyncio.wait({closing, changed}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            closing.cancel()
            changed.cancel()
            await asyncio.gather(closing, changed, return_exceptions=True)


async def _wait_for_change(page: LivePage, request: Request) -> None:
    try:
        await page.wait(request, INTERVAL)
    except FlowStoreError:
        await asyncio.sleep(INTERVAL)


def _digest(version: object) -> str:
    # Named tuples are tuples to full_repr, whose order of fields is fixed.
    text = full_repr(tuple(version) if isinstance(version, RunPage) else version)
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=12).hexdigest()
