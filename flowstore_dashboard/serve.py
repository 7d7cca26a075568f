"""The server of the dashboard: one process and one event loop, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn

from flowstore_core import FlowStore
from flowstore_dashboard.app import create_app
from flowstore_dashboard.security import MAX_HEADERS

STOP_SECONDS = 5
"""How long the server waits for requests in progress when it stops."""


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The caller decides about signals; uvicorn would raise them again at the end.
        yield


@asynccontextmanager
async def serving(
    store: FlowStore,
    url: str | None,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    read_only: bool = False,
) -> AsyncIterator[str]:
    """Serve the dashboard of an open store in this event loop; the address of its first page.

    Port 0 is any free port. Raises OSError if the address is not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    app, streams = create_app(store, url, host=host, token=token, read_only=read_only)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        # Behind a proxy on the same machine, its header must not change the client's address or scheme.
        proxy_headers=False,
        ws="none",
        # The implementation that bounds the size of headers.
        http="h11",
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_graceful_shutdown=STOP_SECONDS,
        limit_concurrency=512,
    )
    server = _Server(config)
    # Connections wait in the listener's backlog until the server accepts them.
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        name = f"[{host}]" if ":" in host else host
        yield f"http://{name}:{listener.getsockname()[1]}/"
    finally:
        streams.close()
        server.should_exit = True
        await task
        listener.close()


async def wait_for_stop() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await stop.wait()
