"""The dashboard in a real browser: pages, live updates on every backend, actions.

The dashboard reads and writes through core, which gives the same results on every backend; see
tests/test_conformance_builtins.py.
"""

from __future__ import annotations

import json
from uuid import UUID

import pytest
import pytest_asyncio
from playwright.async_api import Page, expect

from flowstore_core import FlowStore, RunStatus, StepStatus
from tests.dashboard.conftest import NEEDS_CHROMIUM
from tests.dashboard.examples import Examples, write_examples
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


@pytest_asyncio.fixture(loop_scope="session")
async def examples(memory_store: FlowStore, clock: VirtualClock) -> Examples:
    return await write_examples(memory_store, clock)


async def test_every_page_shows_the_store(page: Page, memory_address: str, examples: Examples) -> None:
    await page.goto(memory_address)
    await expect(page).to_have_title("Overview - flowstore")
    await expect(page.locator(".tiles")).to_contain_text("Running now2")
    await expect(page.locator("[data-region=failures]")).to_contain_text("charge-card in orders")
    await expect(page.locator("[data-region=failures]")).to_contain_text("TimeoutError: POST /v1/charges")
    await expect(page.locator("[data-region=queues]")).to_contain_text("bulk")

    await page.get_by_role("link", name="Runs", exact=True).click()
    await expect(page.locator("tbody tr")).to_have_count(5)
    await page.get_by_label("Status").select_option("Failed")
    await page.get_by_label("Flow").fill("orders")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("tbody tr")).to_have_count(1)
    await page.get_by_label("Flow").fill("unknown")
    await page.get_by_role("button", name="Filter").click()
    await expect(page.locator("main")).to_contain_text("No run belongs to a flow named 'unknown'.")

    await page.get_by_role("link", name="Queues", exact=True).click()
    await expect(page.locator("[data-region=queues] tbody")).to_contain_text("bulk")
    await expect(page.locator("[data-region=running] tbody")).to_contain_text("worker-2 (host b)parse")

    await page.get_by_role("link", name="Health", exact=True).click()
    await expect(page.locator("h1")).to_have_text("Health")
    await expect(page.locator("main")).to_contain_text("2 ready steps in 1 queue: the oldest has been ready")
    await expect(page.locator(".finding").first).to_contain_text("Do")


async def test_the_page_of_a_run_explains_a_takeover(
    page: Page, memory_address: str, examples: Examples
) -> None:
    await page.goto(f"{memory_address}runs/{examples.taken_over}")
    story = page.locator("[data-region=incidents]")
    await expect(story).to_contain_text("charge-card taken over")
    await expect(story).to_contain_text("on worker-2 (host b) and never reported a result")
    await expect(story).to_contain_text(
        "The lease on its claim was not renewed and expired, so worker-3 (host c) took the step over 34.4s"
    )
    row = page.get_by_role("img", name="Step charge-card: Succeeded.")
    name = await row.get_attribute("aria-label")
    assert name is not None
    assert "attempt 1 taken over after 34.4s on worker-2 (host b)" in name
    assert "attempt 2 succeeded after 3.2s on worker-3 (host c)" in name
    assert await row.locator("rect.is-taken-over").count() == 1
    taken_over = await row.locator("rect.is-taken-over").bounding_box()
    succeeded = await row.locator("rect.is-succeeded").bounding_box()
    assert taken_over is not None
    assert succeeded is not None
    assert taken_over["width"] > 5 * succeeded["width"]
    # The name of the row leads to the step, which is open.
    await page.get_by_role("link", name="reserve-stock").click()
    await expect(page.locator("details.step", has_text="reserve-stock")).to_have_attribute("open", "")


async def test_the_page_of_a_run_shows_errors_skips_and_lineage(
    page: Page, memory_address: str, examples: Examples
) -> None:
    await page.goto(f"{memory_address}runs/{examples.failed}")
    await expect(page.locator("[data-region=incidents]")).to_contain_text(
        "Skipped: not run: charge-card is Failed"
    )
    await expect(page.locator("pre", has_text="payments.py, line 88")).to_have_count(3)
    await expect(page.locator(".greyed")).to_contain_text("send-receipt")
    await page.locator("[data-region=facts] a").click()
    await expect(page.locator(".run-id")).to_have_text(str(examples.derived))
    await expect(page.locator("[data-region=facts]")).to_contain_text("Re-run of")


async def test_pages_follow_the_store(
    page: Page, address: str, store: FlowStore, clock: VirtualClock
) -> None:
    examples = await write_examples(store, clock)
    await page.goto(f"{address}runs/{examples.running}#step-2")
    await expect(page.locator("#live")).to_have_text("live")
    await page.locator("details.step", has_text="download").locator("summary").first.click()
    await store.append_event(examples.running, "import.parsed", message="1,284 rows")
    await expect(page.locator("[data-region=events]")).to_contain_text("1,284 rows")
    # What a person has opened stays open, and the step that the address names stays marked.
    await expect(page.locator("details.step", has_text="download")).to_have_attribute("open", "")
    await store.record_step_complete(examples.running, "parse", StepStatus.SUCCEEDED)
    await expect(page.locator("#step-2")).to_contain_text("Succeeded")
    await expect(page.locator("#step-2")).not_to_have_css("box-shadow", "none")
    await expect(page.locator("#step-1")).to_have_css("box-shadow", "none")
    await store.complete_run(examples.running, RunStatus.SUCCEEDED)
    await expect(page.locator("[data-region=head]")).to_contain_text("Succeeded")

    await page.goto(f"{address}runs")
    await expect(page.locator("tbody tr")).to_have_count(5)
    await expect(page.locator("#live")).to_have_text("live")
    clock.advance(seconds=1)
    await store.start_run(UUID(int=9), "payroll", UUID(int=10), "web")
    await expect(page.locator("tbody tr")).to_have_count(6)
    await expect(page.locator("tbody tr").first).to_contain_text("payroll")


async def test_an_empty_store_shows_the_first_run(
    page: Page, memory_address: str, memory_store: FlowStore
) -> None:
    await page.goto(memory_address)
    await expect(page.locator("main")).to_contain_text("No runs yet")
    await expect(page.locator("#live")).to_have_text("live")
    await memory_store.start_run(UUID(int=9), "payroll", UUID(int=10), "web")
    await expect(page.locator(".tiles")).to_contain_text("Running now1")


async def test_each_action_asks_back_and_acts(
    page: Page, memory_address: str, memory_store: FlowStore, examples: Examples
) -> None:
    await page.goto(f"{memory_address}runs/{examples.failed}")
    step = page.locator("details.step", has_text="charge-card")
    await step.get_by_role("link", name="Retry step").click()
    await expect(page.locator("h1")).to_have_text("Retry this step?")
    assert await memory_store.get_run_status(examples.failed) is RunStatus.FAILED
    await page.get_by_role("button", name="Retry step").click()
    await expect(page.locator(".notice-good")).to_contain_text("charge-card is reopened")
    assert await memory_store.get_run_status(examples.failed) is RunStatus.RUNNING
    assert await memory_store.get_step(examples.failed, "send-receipt") is None
    # It goes back into its queue.
    assert [
        one.queue
        for one in await memory_store.get_dispatches(examples.failed)
        if one.step_key == "charge-card"
    ] == ["default"]

    await page.goto(f"{memory_address}runs/{examples.waiting}")
    await page.get_by_role("link", name="Deliver signal").click()
    await page.get_by_label("Payload").fill('{"approved": ')
    await page.get_by_role("button", name="Deliver signal").click()
    await expect(page.locator("main")).to_contain_text("The payload must be JSON")
    await page.go_back()
    await page.get_by_label("Payload").fill('{"approved": true}')
    await page.get_by_role("button", name="Deliver signal").click()
    await expect(page.locator(".notice-good")).to_have_text("Signal approval delivered to step approve.")
    (waiter,) = await memory_store.get_waiters(examples.waiting)
    assert json.loads(waiter.payload_json or "") == {"approved": True}

    await page.goto(f"{memory_address}runs/{examples.running}")
    await page.get_by_role("link", name="Cancel run").click()
    await page.get_by_label("Reason").fill("wrong file")
    await page.get_by_role("button", name="Cancel run").click()
    await expect(page.locator(".notice-good")).to_contain_text("Cancellation requested")
    await expect(page.locator("[data-region=incidents]")).to_contain_text("with the reason: wrong file")
    control = await memory_store.get_run_control(examples.running)
    assert control is not None
    assert control.cancel_reason == "wrong file"

    await page.goto(f"{memory_address}runs/{examples.taken_over}")
    await page.get_by_role("link", name="Delete run").click()
    await page.get_by_role("link", name="Back").click()
    assert await memory_store.get_run(examples.taken_over) is not None
    await page.get_by_role("link", name="Delete run").click()
    await page.get_by_role("button", name="Delete run").click()
    await expect(page.locator(".notice-good")).to_contain_text(f"Run {examples.taken_over}")
    assert await memory_store.get_run(examples.taken_over) is None


async def test_tags_filter_runs_and_a_signal_is_buffered(
    page: Page, memory_address: str, memory_store: FlowStore, examples: Examples
) -> None:
    await page.goto(f"{memory_address}runs/{examples.failed}")
    await page.get_by_label("Tags").get_by_role("link", name="env=live").click()
    rows = page.locator("tbody tr")
    field = page.get_by_label("Tag", exact=True)

    async def filter_by(text: str) -> None:
        await field.fill(text)
        await page.get_by_role("button", name="Filter").click()

    await expect(rows).to_have_count(3)
    await filter_by("customer")
    await expect(page.locator("#problem")).to_have_text("A tag has the form KEY=VALUE, not 'customer'.")
    await expect(field).to_have_value("customer")
    await filter_by("customer=none")
    await expect(page.locator("main")).to_contain_text("No run matches")
    await page.get_by_role("link", name="Remove the filter customer=none").click()
    await expect(rows).to_have_count(3)
    # Of two values for one key, the chosen one stays.
    await filter_by("env=test")
    await expect(page.locator("#problem")).to_have_text("Tag 'env' is given twice, with two values.")
    await expect(field).to_have_value("env=test")
    await filter_by("")
    await expect(rows).to_have_count(3)
    # The list follows the tags of the store.
    await expect(page.locator("#live")).to_have_text("live")
    await memory_store.set_tags(examples.running, {"env": "live"})
    await expect(rows).to_have_count(4)

    await page.goto(f"{memory_address}runs/{examples.running}")
    await expect(page.locator("[data-region=head]")).to_contain_text("env=live")
    await page.get_by_role("link", name="Buffer a signal").click()
    await page.get_by_label("Signal", exact=True).fill("pause")
    await expect(page.get_by_label("If no step waits for it")).to_be_checked()
    await page.get_by_role("button", name="Deliver signal").click()
    await expect(page.locator(".notice-good")).to_contain_text("No step waits for signal pause yet.")
    await expect(page.locator("[data-region=waiters]")).to_contain_text("pause")
    # The page follows tags and buffered signals.
    await expect(page.locator("#live")).to_have_text("live")
    await memory_store.set_tags(examples.running, {"env": None, "owner": "ada"})
    await expect(page.locator("[data-region=head]")).to_contain_text("owner=ada")
    await memory_store.deliver_signal(examples.running, "resume", "null", buffer=True)
    await expect(page.locator("[data-region=waiters]")).to_contain_text("resume")
