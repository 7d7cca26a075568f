"""The dashboard lets in only whom it should, shows no secrets, and never runs what a store contains."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from flowstore_cli.main import main
from flowstore_core import FlowStore, RunStatus, StepStatus, open_store
from flowstore_core.plugins import find_backend
from flowstore_core.validated_store import ValidatedStore
from flowstore_dashboard.run import STEPS
from flowstore_dashboard.security import HostNames
from flowstore_dashboard.serve import serving
from flowstore_dashboard.site import MAX_BODY
from tests.calls import FLOW, new_run
from tests.dashboard.browser import find_chromium, open_browser
from tests.dashboard.client import Client

TOKEN = "a-token-of-the-test"
CANARY = """"'><script>window.canary=1</script><img src=x onerror="window.canary=1">{{ 7*7 }}</pre>"""
# Not as a whole in the source, whose lines the log may show.
SECRET = "hunter2" + "secret"
ACTIONS = ("retry", "cancel", "signal", "delete")


@pytest.fixture
async def url() -> AsyncIterator[str]:
    async with find_backend("memory")[1].scratch("memory://") as url:
        yield url


@pytest.fixture
async def store(url: str) -> AsyncIterator[FlowStore]:
    async with open_store(url) as store:
        yield store


@pytest.fixture
async def client(store: FlowStore, url: str) -> AsyncIterator[Client]:
    async with serving(store, url) as address:
        yield Client(address)


@pytest.fixture
async def locked(store: FlowStore, url: str) -> AsyncIterator[Client]:
    """A dashboard with a token."""
    async with serving(store, url, token=TOKEN) as address:
        yield Client(address)


class Markup(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


async def write_canaries(store: FlowStore) -> UUID:
    """A run with markup in every text that a store accepts."""
    run_id = UUID(int=1)
    await store.trigger_run(
        FLOW, CANARY, run_id, CANARY, trigger_data=CANARY, job_id=CANARY, idempotency_key=CANARY
    )
    step = CANARY[:200]
    await store.try_record_dispatch(run_id, step, queue=CANARY, step_type=CANARY, input_json=CANARY)
    await store.annotate_dispatch(run_id, step, CANARY)
    await store.record_step_start(run_id, step, CANARY, input_json=CANARY, job_id=CANARY)
    await store.record_step_complete(
        run_id, step, StepStatus.FAILED, error_message=CANARY, output_json=CANARY
    )
    await store.record_step_start(run_id, f"{step}2", CANARY, job_id=CANARY)
    await store.record_skipped_step(run_id, f"{step}3", CANARY, CANARY)
    await store.register_waiter(run_id, f"{step}4", CANARY)
    await store.register_waiter(run_id, f"{step}5", f"{CANARY}5")
    await store.deliver_signal(run_id, f"{CANARY}5", '"</pre><script>window.canary=1</script>"')
    await store.append_event(run_id, CANARY, step_key=step, message=CANARY)
    await store.save_output(run_id, CANARY, CANARY)
    await store.request_cancel(run_id, CANARY)
    failed = await new_run(store, flow_name=CANARY, source_run_id=run_id)
    await store.record_step_start(failed, step, CANARY)
    await store.record_step_complete(failed, step, StepStatus.FAILED, error_message=CANARY)
    await store.complete_run(failed, RunStatus.FAILED)
    return run_id


def pages_of(run_id: UUID) -> tuple[str, ...]:
    asks = tuple(f"/runs/{run_id}/{name}" for name in ("cancel", "delete", "signal?name=%3Cscript%3E"))
    return (
        "/",
        "/?by=day",
        "/runs",
        "/runs?search=%3Cscript%3E",
        f"/runs/{run_id}",
        "/queues",
        "/health",
        *asks,
    )


def test_other_machines_are_served_only_with_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "dashboard.example"):
        assert main(["dashboard", "--url", "memory://", "--host", host]) == 2
        assert "needs --token" in capsys.readouterr().err
    assert main(["dashboard", "--url", "memory://", "--token", "short"]) == 2
    assert "--token must have 16 to 256 characters" in capsys.readouterr().err


async def test_a_login_needs_the_token(locked: Client, store: FlowStore) -> None:
    run_id = await new_run(store)
    for path in (*pages_of(run_id), "/live/", f"/live/runs/{run_id}", "/nothing"):
        refused = await locked.get(path)
        assert (refused.status, refused.headers["location"]) == (303, "/login")
    form = await locked.get("/login")
    guest = form.cookie
    assert guest is not None
    # The cookie of the form is no login, and it cannot be made into one.
    forged = guest.replace(".guest.", ".user.")
    for cookie in (guest, forged, f"{forged}0", guest.partition("=")[0] + "=x.user.y"):
        assert (await locked.get("/", cookie=cookie)).status == 303
        for name in ACTIONS:
            assert (await locked.post(f"/runs/{run_id}/{name}", {}, cookie=cookie)).status == 403
    for wrong in ("", "a-token-of-the-tesT", TOKEN + "x"):
        refused = await locked.post("/login", {"csrf": form.csrf, "token": wrong}, cookie=guest)
        assert refused.status == 403
        assert refused.cookie is None
    entered = await locked.post("/login", {"csrf": form.csrf, "token": TOKEN}, cookie=guest)
    assert entered.status == 303
    assert entered.cookie is not None
    assert entered.headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Strict")
    assert (await locked.get("/", cookie=entered.cookie)).status == 200
    # The session of before the login stays a guest.
    assert (await locked.get("/", cookie=guest)).status == 303


async def test_every_form_needs_the_csrf_token_of_its_session(client: Client, store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "test")
    await store.register_waiter(run_id, "a", "go")
    page = await client.get(f"/runs/{run_id}/cancel")
    other = await client.get(f"/runs/{run_id}/cancel")
    assert page.cookie is not None
    assert page.headers["set-cookie"].endswith("; Path=/; HttpOnly; SameSite=Strict")
    fields = {"step": "a", "name": "go", "payload": "1"}
    for name in ("login", *(f"runs/{run_id}/{action}" for action in ACTIONS)):
        for csrf in ({}, {"csrf": ""}, {"csrf": other.csrf}):
            answer = await client.post(f"/{name}", {**fields, **csrf}, cookie=page.cookie)
            assert answer.status == 403, name
        # A form of another site cannot have another type without asking, and does not get far with one.
        for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json"):
            headers = {"cookie": page.cookie, "content-type": kind}
            body = f"csrf={page.csrf}&step=a&name=go&payload=1".encode()
            assert (await client.send("POST", f"/{name}", headers, body)).status == 415
    assert await store.get_run_control(run_id) is None
    (waiter,) = await store.get_waiters(run_id)
    assert waiter.delivered_at is None
    done = await client.post(f"/runs/{run_id}/cancel", {"csrf": page.csrf}, cookie=page.cookie)
    assert done.status == 303


async def test_a_get_changes_nothing(client: Client, store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "test")
    before = await store.get_run_detail(run_id), await store.get_run_control(run_id)
    for path in (*pages_of(run_id), f"/runs/{run_id}/retry?step=a"):
        answer = await client.get(path)
        assert answer.status == 200, path
    assert (await store.get_run_detail(run_id), await store.get_run_control(run_id)) == before
    for method in ("PUT", "DELETE", "PATCH"):
        assert (await client.send(method, f"/runs/{run_id}", {})).status == 405


async def test_only_requests_that_name_the_host_are_served(client: Client) -> None:
    for host in ("evil.example", "127.0.0.1.evil.example", "", "localhost.evil.example:80", "[::1].evil"):
        for path in ("/", "/static/x/dashboard.css", "/login", "/live/"):
            assert (await client.get(path, host=host)).status == 421
    for host in ("localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:80"):
        assert (await client.get("/", host=host)).status == 200


def test_a_server_on_every_address_accepts_addresses_and_no_other_names() -> None:
    names = HostNames("0.0.0.0")
    assert all(names.accepts(host) for host in ("192.0.2.7:8787", "[2001:db8::1]:8787", "localhost"))
    assert not any(names.accepts(host) for host in ("evil.example:8787", "192.0.2.7.evil.example", ""))


async def test_every_answer_has_a_strict_policy_and_no_page_needs_more(
    client: Client, store: FlowStore
) -> None:
    run_id = await write_canaries(store)
    for path in (*pages_of(run_id), "/login", "/nothing", f"/runs/{UUID(int=9)}", "/static/x/dashboard.js"):
        answer = await client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        if not path.startswith("/static/"):
            assert answer.headers["cache-control"] == "no-store"
            for tag, attributes in Markup(answer.text).tags:
                assert tag not in ("style", "iframe", "object", "base")
                assert "style" not in attributes
                assert not any(name.startswith("on") for name in attributes)
                if tag == "script":
                    assert (attributes["src"] or "").startswith("/static/")
                for name in ("href", "src", "action"):
                    assert (attributes.get(name) or "/").startswith(("/", "#", "data:,"))
                    assert not (attributes.get(name) or "/").startswith("//")


async def test_markup_of_the_store_is_text_on_every_page(client: Client, store: FlowStore) -> None:
    run_id = await write_canaries(store)
    for path in pages_of(run_id):
        answer = await client.get(path)
        assert answer.status == 200, path
        assert "<img src=x" not in answer.text
        assert "<script>" not in answer.text
        if path not in ("/queues", "/health"):
            assert "&lt;script&gt;" in answer.text
            assert "{{ 7*7 }}" in answer.text or "search" in path


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium is installed")
async def test_markup_of_the_store_is_inert_in_a_browser(store: FlowStore, url: str) -> None:
    run_id = await write_canaries(store)
    async with serving(store, url) as address, open_browser() as browser:
        # Without the policy, so that escaping alone has to prevent it.
        context = await browser.new_context(bypass_csp=True)
        page = await context.new_page()
        for path in pages_of(run_id):
            await page.goto(address.rstrip("/") + path)
            assert await page.evaluate("window.canary") is None
            assert await page.locator("main img, main script").count() == 0
        # A live update inserts texts too.
        await page.goto(f"{address}runs/{run_id}")
        await page.locator("#live", has_text="live").wait_for()
        await store.append_event(run_id, "last", message=f"{CANARY} the last")
        await page.locator("[data-region=events]", has_text="the last").wait_for()
        assert await page.evaluate("window.canary") is None
        assert await page.locator("main img, main script").count() == 0


async def test_no_page_shows_a_secret_of_the_url(store: FlowStore) -> None:
    run_id = await write_canaries(store)
    url = "postgresql://someone:hunter2secret@db.example/flows?password=other5secret"
    async with serving(store, url) as address:
        client = Client(address)
        for path in pages_of(run_id):
            # It would connect to the server, and its findings name no secret: see test_secrets.py.
            if path == "/health":
                continue
            answer = await client.get(path)
            assert answer.status == 200
            assert "secret" not in answer.text
            assert "db.example" in answer.text


class BrokenStore:
    """A store with a bug, whose exception contains data."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def get_statistics(self, **_: object) -> None:
        raise RuntimeError(SECRET)


async def test_an_unexpected_error_shows_and_logs_no_data(
    store: FlowStore, url: str, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ValidatedStore(BrokenStore(store), "broken", store.capabilities, AsyncExitStack())
    async with serving(broken, url) as address:
        answer = await Client(address).get("/")
    assert answer.status == 500
    assert "This is a bug of the dashboard: RuntimeError." in answer.text
    assert "RuntimeError while answering /" in caplog.text
    assert SECRET not in answer.text + caplog.text


async def test_the_size_of_requests_is_bounded(client: Client, store: FlowStore) -> None:
    run_id = await new_run(store)
    page = await client.get(f"/runs/{run_id}/signal")
    assert page.cookie is not None
    fields = {"csrf": page.csrf, "name": "go", "payload": "1" * (MAX_BODY + 1)}
    answer = await client.post(f"/runs/{run_id}/signal", fields, cookie=page.cookie)
    assert answer.status == 413
    assert f"{MAX_BODY:,} bytes" in answer.text
    assert (await client.get("/runs?search=" + "x" * 600)).status == 400
    assert (await client.get("/runs?after=" + "x" * 100)).status == 400
    assert (await client.get("/runs?status=Odd")).status == 400
    assert (await client.get(f"/runs/{run_id}?page=0")).status == 400
    assert (await client.get(f"/runs/{run_id}?page=" + "9" * 100)).status == 400
    assert (await client.get("/", cookie="x" * 100_000)).status == 431


async def test_the_size_of_pages_is_bounded(client: Client, store: FlowStore) -> None:
    run_id = await new_run(store, trigger_data="t" * 1_000_000)
    for number in range(2 * STEPS):
        step = f"step-{number}"
        await store.record_step_start(run_id, step, "test", input_json="i" * 50_000)
        await store.record_step_complete(run_id, step, StepStatus.FAILED, error_message="e" * 50_000)
    for _ in range(300):
        await store.append_event(run_id, "note", message="m" * 10_000)
    for path in pages_of(run_id):
        answer = await client.get(path)
        assert answer.status == 200
        assert len(answer.text) < 3_000_000, path


async def test_a_read_only_dashboard_offers_and_does_nothing(store: FlowStore, url: str) -> None:
    run_id = await new_run(store)
    await store.record_step_start(run_id, "a", "test")
    async with serving(store, url, read_only=True) as address:
        client = Client(address)
        shown = await client.get(f"/runs/{run_id}")
        assert "read-only" in shown.text
        assert "<form" not in shown.text
        links = {attributes.get("href") for _, attributes in Markup(shown.text).tags}
        assert not links & {f"/runs/{run_id}/{name}" for name in ACTIONS}
        login = await client.get("/login")
        for name in ACTIONS:
            assert (await client.get(f"/runs/{run_id}/{name}?step=a")).status == 403
            fields = {"csrf": "x", "step": "a", "name": "go", "payload": "1"}
            answer = await client.post(f"/runs/{run_id}/{name}", fields, cookie=login.cookie or "")
            assert answer.status == 403
            assert "read-only" in answer.text
    assert await store.get_run_control(run_id) is None


def test_the_dashboard_creates_and_migrates_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path}/flows.db"
    assert main(["dashboard", "--url", url, "--port", "0"]) == 2
    assert "there is no flowstore schema" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
