"""The appearance of the dashboard: screens, dark mode, accessibility, long runs, and the file of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, expect

from flowstore_core import FlowStore
from flowstore_dashboard.export import export_run
from tests.dashboard.axe import load_axe
from tests.dashboard.conftest import NEEDS_CHROMIUM
from tests.dashboard.examples import Examples, write_examples, write_long_run
from tests.virtual_clock import VirtualClock

pytestmark = [
    NEEDS_CHROMIUM,
    pytest.mark.timeout(300),
    pytest.mark.asyncio(loop_scope="session"),
    # One worker starts the browser.
    pytest.mark.xdist_group("browser"),
]

# A loaded machine may take long to show a page; an update that never comes still fails.
expect.set_options(timeout=60_000)

# The schemes differ only in colours.
AXE_OPTIONS = {
    "light": {"resultTypes": ["violations"]},
    "dark": {"runOnly": ["color-contrast", "link-in-text-block"]},
}


@pytest_asyncio.fixture(loop_scope="session")
async def examples(memory_store: FlowStore, clock: VirtualClock) -> Examples:
    return await write_examples(memory_store, clock)


async def test_pages_work_without_scripts(browser: Browser, memory_address: str, examples: Examples) -> None:
    context = await browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(memory_address)
    await page.get_by_role("link", name="All runs").click()
    await page.locator("tbody tr", has_text="Failed").locator("a").first.click()
    await expect(page.locator("[data-region=incidents]")).to_contain_text("charge-card")
    await page.locator("details.step", has_text="charge-card").get_by_role("link", name="Retry step").click()
    await page.get_by_role("button", name="Retry step").click()
    await expect(page.locator(".notice-good")).to_contain_text("is reopened")
    await context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_pages_fit_narrow_and_wide_screens(
    browser: Browser, memory_address: str, examples: Examples, scheme: str
) -> None:
    for width in (400, 2560):
        context = await browser.new_context(
            color_scheme="dark" if scheme == "dark" else "light", viewport={"width": width, "height": 900}
        )
        page = await context.new_page()
        for path in (
            "",
            "runs",
            f"runs/{examples.failed}",
            "queues",
            "health",
            f"runs/{examples.failed}/delete",
        ):
            await page.goto(memory_address + path)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width, path
            ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            red = int(ground.partition("(")[2].partition(",")[0])
            assert (red < 40) == (scheme == "dark")
        await context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_axe_finds_nothing_serious(
    browser: Browser, memory_address: str, examples: Examples, scheme: str, pytestconfig: pytest.Config
) -> None:
    axe = load_axe(pytestconfig)
    # Its script may run in spite of the policy of the pages.
    context = await browser.new_context(color_scheme="dark" if scheme == "dark" else "light", bypass_csp=True)
    page = await context.new_page()
    for path in (
        "",
        "?by=day",
        "runs",
        "runs?status=Failed",
        f"runs/{examples.failed}",
        f"runs/{examples.taken_over}",
        f"runs/{examples.waiting}",
        "queues",
        "health",
        f"runs/{examples.failed}/retry?step=charge-card",
        f"runs/{examples.waiting}/signal?name=approval",
        "nothing-here",
    ):
        await page.goto(memory_address + path)
        await page.add_script_tag(content=axe)
        found = await page.evaluate("options => axe.run(document, options)", AXE_OPTIONS[scheme])
        serious = [
            (path, one["id"], [node["target"] for node in one["nodes"]][:3])
            for one in found["violations"]
            if one["impact"] in ("serious", "critical")
        ]
        assert serious == []
        passed = {one["id"] for one in found["passes"]}
        assert "color-contrast" in passed
        assert scheme == "dark" or len(passed) > 10
    await context.close()


async def test_a_run_of_a_thousand_steps_is_readable(
    page: Page, memory_address: str, memory_store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await write_long_run(memory_store, clock, steps=1000)
    await page.goto(f"{memory_address}runs/{run_id}")
    # A page of steps, the way to the unusual ones, and the course of all.
    await expect(page.locator("ol > .gantt-row")).to_have_count(200)
    label = await page.locator(".activity svg").get_attribute("aria-label")
    assert label is not None
    assert re.fullmatch("Number of attempts in progress over the run, at most 1[0-2].", label)
    retried = page.locator(".choices").get_by_role("link", name="Retried")
    number = int((await retried.inner_text()).split()[-1])
    assert 20 < number < 80
    await retried.click()
    await expect(page.locator("ol > .gantt-row")).to_have_count(number)
    # An incident leads to the page of its step.
    await page.locator("#more-incidents > summary").click()
    link = page.locator("#more-incidents .incident a").last
    key = await link.inner_text()
    await link.click()
    await expect(page.locator("details.step.is-target")).to_contain_text(key)
    await page.goto(f"{memory_address}runs/{run_id}?page=5")
    await expect(page.locator("ol > .gantt-row")).to_have_count(200)
    await expect(page.locator("main")).to_contain_text("Steps 801 to 1000 of 1,000")


async def test_the_file_of_a_run_needs_nothing_else(
    browser: Browser, memory_store: FlowStore, examples: Examples, tmp_path: Path
) -> None:
    file = tmp_path / "run.html"
    file.write_text(await export_run(memory_store, examples.taken_over, "memory://"), encoding="utf-8")
    page = await browser.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    await page.goto(file.as_uri())
    await expect(page.locator("[data-region=incidents]")).to_contain_text(
        "worker-3 (host c) took the step over"
    )
    assert await page.locator("rect.is-taken-over").count() > 1
    assert await page.evaluate("getComputedStyle(document.querySelector('.panel')).borderRadius") == "12px"
    assert [url for url in requests if not url.startswith("data:,")] == [file.as_uri()]
    assert await page.locator("form, script, a[href^='/']").count() == 0
    await page.close()
