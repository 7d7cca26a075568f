"""Take the screenshots of the documentation: ``python -m tests.dashboard.screenshots``.

A store is filled with examples, and a headless Chromium shows its pages, light and dark, wide and narrow. The
files go to docs/dashboard.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from playwright.async_api import Browser

from flowstore_core import FlowStore, open_store
from flowstore_dashboard.serve import serving
from tests.dashboard.browser import open_browser
from tests.dashboard.examples import Examples, write_examples, write_history, write_long_run
from tests.virtual_clock import VirtualClock

FOLDER = Path(__file__).parents[2] / "docs" / "dashboard"
URL = "sqlite:///flows.db"
LONG = 1200
WIDE, NARROW = (1280, 800), (400, 800)


async def _fill(store: FlowStore, clock: VirtualClock) -> tuple[Examples, UUID]:
    """The examples, and the id of a long run."""
    await write_history(store, clock, hours=23)
    clock.advance(minutes=10)
    long_run = await write_long_run(store, clock, steps=1000)
    return await write_examples(store, clock), long_run


async def _take(browser: Browser, address: str, folder: Path, pages: dict[str, str]) -> None:
    for scheme, (width, height) in (("light", WIDE), ("dark", WIDE), ("narrow", NARROW)):
        context = await browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light",
            viewport={"width": width, "height": height},
        )
        page = await context.new_page()
        for name, path in pages.items():
            if scheme == "narrow" and name in ("failed-run", "long-run"):
                continue
            tall = name == "long-run"
            await page.set_viewport_size({"width": width, "height": LONG if tall else height})
            await page.goto(address + path)
            # Of the other pages the beginning shows enough.
            whole = name == "overview" and width == WIDE[0]
            await page.screenshot(path=folder / f"{name}-{scheme}.png", full_page=whole)
        await context.close()


async def take_screenshots(folder: Path) -> None:
    # The examples take about a quarter of an hour; runs in progress began a few minutes ago.
    clock = VirtualClock(datetime.now(UTC) - timedelta(hours=23, minutes=36))
    async with open_store(URL, clock=clock) as store:
        examples, long_run = await _fill(store, clock)
    pages = {
        "overview": "",
        "runs": "runs",
        "run": f"runs/{examples.taken_over}",
        "failed-run": f"runs/{examples.failed}",
        "long-run": f"runs/{long_run}",
        "queues": "queues",
        "health": "health",
    }
    async with (
        open_store(URL, migrate=False) as store,
        serving(store, URL) as address,
        open_browser() as browser,
    ):
        await _take(browser, address, folder, pages)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--folder", type=Path, default=FOLDER, help="for the files (docs/dashboard)")
    folder = options.parse_args().folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="flowstore-") as data:
        # The pages show the path of the store, which would differ each time.
        os.chdir(data)
        asyncio.run(take_screenshots(folder))


if __name__ == "__main__":
    main()
