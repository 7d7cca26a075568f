"""A dashboard on an empty namespace of each backend, and a browser to see it.

The tests share a browser, which belongs to an event loop, so the fixtures and the tests that use them run in
that of the session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page

from flowstore_core import FlowStore, open_store
from flowstore_core.plugins import find_backend
from flowstore_dashboard.serve import serving
from tests.dashboard.browser import find_chromium, open_browser
from tests.dashboard.examples import clock_before_now
from tests.virtual_clock import VirtualClock

NEEDS_CHROMIUM = pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")


@pytest.fixture
def clock() -> VirtualClock:
    """The clock of the store: it starts half an hour ago, because the dashboard shows the age of runs."""
    return clock_before_now(minutes=30)


@pytest_asyncio.fixture(loop_scope="session")
async def namespace(backend: str, backend_url: str) -> AsyncIterator[str]:
    """The URL of an empty namespace of the backend, dropped after the test."""
    async with find_backend(backend)[1].scratch(backend_url) as fresh:
        yield fresh


@pytest_asyncio.fixture(loop_scope="session")
async def store(namespace: str, clock: VirtualClock) -> AsyncIterator[FlowStore]:
    async with open_store(namespace, clock=clock) as store:
        yield store


@pytest_asyncio.fixture(loop_scope="session")
async def address(store: FlowStore, namespace: str) -> AsyncIterator[str]:
    """The address of a dashboard of the store."""
    async with serving(store, namespace) as address:
        yield address


@pytest_asyncio.fixture(loop_scope="session")
async def memory_url() -> AsyncIterator[str]:
    """A store for tests of pages and actions, which are the same on every backend."""
    async with find_backend("memory")[1].scratch("memory://") as url:
        yield url


@pytest_asyncio.fixture(loop_scope="session")
async def memory_store(memory_url: str, clock: VirtualClock) -> AsyncIterator[FlowStore]:
    async with open_store(memory_url, clock=clock) as store:
        yield store


@pytest_asyncio.fixture(loop_scope="session")
async def memory_address(memory_store: FlowStore, memory_url: str) -> AsyncIterator[str]:
    async with serving(memory_store, memory_url) as address:
        yield address


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    """The browser of all tests. A test opens a context, which has its own cookies and storage."""
    async with open_browser() as browser:
        yield browser


@pytest_asyncio.fixture(loop_scope="session")
async def page(browser: Browser) -> AsyncIterator[Page]:
    """A page of a browser. At the end, none of its scripts has failed and nothing left the host."""
    context = await browser.new_context(viewport={"width": 1280, "height": 900})
    # For clicks and navigation on a loaded machine; the default is 30 seconds.
    context.set_default_timeout(120_000)
    page = await context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"script: {error}"))
    page.on(
        "console",
        # The browser reports the answers with a status from 400 on, which tests cause on purpose.
        lambda message: (
            problems.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            problems.append(f"request: {request.url}")
            if not request.url.startswith(("http://127.0.0.1:", "data:,"))
            else None
        ),
    )
    page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
    yield page
    await context.close()
    assert problems == []
