"""Pages without a browser: backends that lack capabilities, live streams, and the parts of pages."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlencode
from uuid import UUID

import pytest

from flowstore_core import (
    Capability,
    FlowStore,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
    new_claim_token,
    open_store,
)
from flowstore_core.validated_store import ValidatedStore
from flowstore_dashboard.export import export_run
from flowstore_dashboard.incidents import Incident, find_incidents
from flowstore_dashboard.live import MAX_STREAMS
from flowstore_dashboard.overview import draw_chart
from flowstore_dashboard.run import BUFFERED
from flowstore_dashboard.serve import serving
from flowstore_dashboard.timeline import Kind, Timeline, draw_timeline
from tests.calls import new_run
from tests.dashboard.client import Client
from tests.virtual_clock import VirtualClock

# The loop of the fixtures.
pytestmark = pytest.mark.asyncio(loop_scope="session")

NOW = datetime(2026, 3, 14, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)


async def timeline_of(store: FlowStore, run_id: UUID, now: datetime) -> Timeline:
    run = await store.get_run_detail(run_id)
    assert run is not None
    steps = list(enumerate(run.steps, 1))
    dispatches, waiters = await store.get_dispatches(run_id), await store.get_waiters(run_id)
    return draw_timeline(run, steps, dispatches, waiters, await store.get_step_claims(run_id), now)


async def incidents_of(store: FlowStore, run_id: UUID, now: datetime) -> list[Incident]:
    run = await store.get_run_detail(run_id)
    assert run is not None
    return find_incidents(
        run,
        await store.get_run_control(run_id),
        await store.get_step_claims(run_id),
        await store.get_waiters(run_id),
        await store.get_run_events(run_id),
        now,
    )


@asynccontextmanager
async def lacking(store: FlowStore, *capabilities: Capability) -> AsyncIterator[Client]:
    """A dashboard of a store whose backend lacks capabilities."""
    async with open_store("memory://") as inner:
        offered = inner.capabilities - set(capabilities)
        limited = ValidatedStore(store, "limited", offered, AsyncExitStack())
        async with serving(limited, "memory://") as address:
            yield Client(address)


def shown_runs(page: str) -> set[UUID]:
    """The runs of the table of a page."""
    return {UUID(text) for text in re.findall(r'<td class="id"><a class="mono" href="/runs/([^"]+)"', page)}


# Pages


async def test_pages_say_what_a_backend_lacks(memory_store: FlowStore) -> None:
    run_id = await new_run(memory_store)
    await memory_store.record_step_start(run_id, "a", "test", job_id="worker-1")
    optional = (
        Capability.DASHBOARD,
        Capability.QUEUES,
        Capability.WATCH,
        Capability.WAITERS,
        Capability.EVENTS,
        Capability.OUTPUTS,
        Capability.DELETION,
        Capability.RECOVERY,
        Capability.DEADLINES,
        Capability.TAGS,
    )
    async with lacking(memory_store, *optional) as client:
        overview = await client.get("/")
        assert overview.status == 200
        assert "needs capability <code>dashboard</code>" in overview.text
        runs = await client.get("/runs")
        assert str(run_id) in runs.text
        assert "Filter the runs" not in runs.text
        queues = await client.get("/queues")
        assert "lacks capability <code>queues</code>" in queues.text
        assert "worker-1" in queues.text
        assert (await client.get("/health")).status == 200
        assert "no event log" in (await client.get(f"/runs/{run_id}")).text
        await memory_store.complete_run(run_id, RunStatus.FAILED)
        shown = await client.get(f"/runs/{run_id}")
        assert f"/runs/{run_id}/delete" not in shown.text


async def test_the_runs_are_paged_by_position(memory_store: FlowStore, memory_address: str) -> None:
    client = Client(memory_address)
    ids = [await new_run(memory_store, run_id=UUID(int=number)) for number in range(1, 121)]
    seen: list[str] = []
    path: str | None = "/runs?flow=orders"
    pages = 0
    while path is not None:
        answer = await client.get(path)
        links = [part.partition('"')[0] for part in answer.text.split('href="')[1:]]
        seen += [link.removeprefix("/runs/") for link in links if link.startswith("/runs/")][::2]
        onward = [link for link in links if "after=" in link]
        path = onward[0].replace("&amp;", "&") if onward else None
        pages += 1
    assert seen == [str(run_id) for run_id in reversed(ids)]
    assert pages == 3


async def test_runs_are_filtered_by_tags(memory_store: FlowStore, memory_address: str) -> None:
    client = Client(memory_address)
    acme = await new_run(memory_store, tags={"customer": "acme & sons", "env": "live"})
    test = await new_run(memory_store, tags={"customer": "acme & sons", "env": "test"})
    other = await new_run(memory_store, tags={"customer": "globex"})
    untagged = await new_run(memory_store)
    everything = await client.get("/runs")
    assert shown_runs(everything.text) == {acme, test, other, untagged}
    # A label adds its tag to the filters.
    customer = "tag=customer%3Dacme%20%26%20sons"
    assert f'href="/runs?{customer}"' in everything.text
    by_customer = await client.get(f"/runs?{customer}&status=Running&tag=")
    assert shown_runs(by_customer.text) == {acme, test}
    filters = "status=Running&amp;tag=customer%3Dacme+%26+sons"
    assert f'href="/runs?{filters}&amp;tag=env%3Dlive"' in by_customer.text
    assert 'type="hidden" name="tag" value="customer=acme &amp; sons"' in by_customer.text
    by_both = await client.get(f"/runs?{customer}&tag=env%3Dlive")
    assert shown_runs(by_both.text) == {acme}
    # Each chosen tag leads to the list without it.
    removal = 'title="Remove this filter"'
    assert f'href="/runs?tag=customer%3Dacme+%26+sons" {removal}' in by_both.text
    assert f'href="/runs?tag=env%3Dlive" {removal}' in by_both.text
    assert f'href="/runs" {removal}' in (await client.get("/runs?tag=env%3Dlive")).text
    assert "No run matches" in (await client.get("/runs?tag=env%3Dnone")).text


async def test_pages_of_filtered_runs_keep_the_tags(memory_store: FlowStore, memory_address: str) -> None:
    client = Client(memory_address)
    for number in range(1, 121):
        await new_run(memory_store, run_id=UUID(int=number), tags={"a": "1", "b": str(number % 2)})
    first = await client.get("/runs?tag=a%3D1&tag=b%3D1")
    link = re.search(r'href="(/runs\?[^"]*)" rel="next"', first.text)
    assert link is not None
    second = await client.get(link[1].replace("&amp;", "&"))
    assert shown_runs(first.text) | shown_runs(second.text) == {UUID(int=n) for n in range(1, 121, 2)}


@pytest.mark.parametrize(
    ("tags", "problem", "field"),
    [
        (["customer"], "A tag has the form KEY=VALUE, not &#39;customer&#39;.", "customer"),
        (["=acme"], "A tag has the form KEY=VALUE, not &#39;=acme&#39;.", "=acme"),
        (["a=1", "a=2"], "Tag &#39;a&#39; is given twice, with two values.", "a=2"),
    ],
)
async def test_a_malformed_tag_is_explained_at_the_form(
    memory_store: FlowStore, memory_address: str, tags: list[str], problem: str, field: str
) -> None:
    run_id = await new_run(memory_store, tags={"a": "1"})
    answer = await Client(memory_address).get("/runs?" + urlencode({"tag": tags}, doseq=True))
    assert answer.status == 200
    assert f'<p id="problem">{problem}</p>' in answer.text
    assert f'value="{field}"' in answer.text
    assert 'aria-invalid="true" aria-describedby="problem"' in answer.text
    assert str(run_id) not in answer.text


async def test_tags_beyond_the_limits_are_refused(memory_address: str) -> None:
    client = Client(memory_address)
    too_long = await client.get(f"/runs?tag=a%3D{'x' * 512}")
    assert too_long.status == 400
    assert "tag must have at most 513 characters; got 514" in too_long.text
    longest = f"{'k' * 256}%3D{'v' * 256}"
    assert (await client.get(f"/runs?tag={longest}")).status == 200
    many = await client.get("/runs?" + "&".join(f"tag=k{number}%3Dv" for number in range(33)))
    assert many.status == 400
    assert "at most 32 keys" in many.text


async def test_labels_of_tags_are_few_and_lead_only_where_the_address_can(
    memory_store: FlowStore, memory_address: str
) -> None:
    client = Client(memory_address)
    tags = {"a": "1", "b=c": "2", "d": "3", "e": "4", "f": "5"}
    run_id = await new_run(memory_store, tags=tags)
    runs, run = await client.get("/runs"), await client.get(f"/runs/{run_id}")
    assert [text for text in ("a=1", "d=3", "e=4") if f">{text}</a>" in runs.text] == ["a=1", "d=3"]
    assert f'<a class="tag" href="/runs/{run_id}">2 more</a>' in runs.text
    for text in ("a=1", "d=3", "e=4", "f=5"):
        assert f'href="/runs?tag={text.replace("=", "%3D")}" title="{text}">{text}</a>' in run.text
    # As KEY=VALUE it would be another tag: b with the value c=2.
    assert all('<span class="tag" title="b=c=2">b=c=2</span>' in page.text for page in (runs, run))
    assert ">e=4</span>" in await export_run(memory_store, run_id, "memory://")


async def test_without_the_capabilities_there_are_no_tags_and_no_buffer(memory_store: FlowStore) -> None:
    run_id = await new_run(memory_store)
    missing = (Capability.TAGS, Capability.MAILBOX, Capability.TRANSFER)
    async with lacking(memory_store, *missing) as client:
        runs = await client.get("/runs")
        assert 'name="search"' in runs.text
        assert 'name="tag"' not in runs.text
        refused = await client.get("/runs?tag=a%3D1")
        assert refused.status == 404
        assert "tags" in refused.text
        assert "Buffer a signal" not in (await client.get(f"/runs/{run_id}")).text
        form = await client.get(f"/runs/{run_id}/signal?buffer=1")
        assert 'name="buffer"' not in form.text
        fields = {"csrf": form.csrf, "name": "go", "payload": "1", "buffer": "1"}
        answer = await client.post(f"/runs/{run_id}/signal", fields, cookie=form.cookie or "")
        assert answer.status == 404
        assert "mailbox" in answer.text
    async with lacking(memory_store, Capability.DASHBOARD) as client:
        await memory_store.set_tags(run_id, {"a": "1"})
        other = await new_run(memory_store)
        assert shown_runs((await client.get("/runs")).text) == {run_id, other}
        filtered = await client.get("/runs?tag=a%3D1")
        assert shown_runs(filtered.text) == {run_id}
        assert 'name="search"' not in filtered.text


async def test_a_signal_is_buffered_only_when_asked_for(memory_store: FlowStore, memory_address: str) -> None:
    client = Client(memory_address)
    run_id = await new_run(memory_store)
    path = f"/runs/{run_id}/signal"
    form = await client.get(path)
    assert 'name="buffer" value="1">' in form.text
    fields = {"csrf": form.csrf, "name": "go", "payload": '{"day":1}', "delivery_id": "one"}
    cookie = form.cookie or ""

    async def deliver(**more: str) -> str:
        assert (await client.post(path, {**fields, **more}, cookie=cookie)).status == 303
        return (await client.get(f"/runs/{run_id}", cookie=cookie)).text

    assert "Nothing was delivered." in await deliver()
    assert len(await memory_store.get_buffered_signals(run_id)) == 0
    # A form that is sent twice buffers once.
    for _ in range(2):
        shown = await deliver(buffer="1")
        assert "No step waits for signal go yet. The run keeps it" in shown
        assert "1 signal for which no step has waited yet" in shown
        assert "&#34;day&#34;: 1" in shown
    assert len(await memory_store.get_buffered_signals(run_id)) == 1
    assert "of buffered go" in await export_run(memory_store, run_id, "memory://")
    await memory_store.register_waiter(run_id, "a", "go")
    taken = (await client.get(f"/runs/{run_id}")).text
    assert "Payload of go for a" in taken
    assert "of buffered go" not in taken
    await memory_store.complete_run(run_id, RunStatus.SUCCEEDED)
    assert 'name="buffer"' not in (await client.get(path)).text
    assert "Buffer a signal" not in (await client.get(f"/runs/{run_id}")).text


async def test_a_page_shows_the_oldest_buffered_signals(memory_store: FlowStore, memory_address: str) -> None:
    run_id = await new_run(memory_store)
    for number in range(BUFFERED + 5):
        await memory_store.deliver_signal(run_id, f"signal-{number:03}", "null", buffer=True)
    shown = (await Client(memory_address).get(f"/runs/{run_id}")).text
    assert f"{BUFFERED + 5} signals for which no step has waited yet; the oldest {BUFFERED}." in shown
    assert f">signal-{BUFFERED - 1:03}<" in shown
    assert f"signal-{BUFFERED:03}" not in shown


async def test_streams_are_limited_and_end_when_the_server_stops(
    memory_store: FlowStore, memory_url: str
) -> None:
    async with serving(memory_store, memory_url) as address:
        host, _, port = address.removeprefix("http://").rstrip("/").partition(":")
        opened = [await asyncio.open_connection(host, int(port)) for _ in range(MAX_STREAMS)]
        for reader, writer in opened:
            writer.write(b"GET /live/runs HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await reader.readuntil(b"data: ")
        refused = await Client(address).get("/live/runs")
        assert refused.status == 503
        # A stream that a browser leaves makes room.
        opened[0][1].close()
        for _ in range(300):
            if await _stream_starts(host, int(port)):
                break
            await asyncio.sleep(0.2)
        else:
            pytest.fail("a closed stream still counts")
    for reader, writer in opened[1:]:
        await reader.read()
        writer.close()


async def _stream_starts(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /live/runs HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return b"200" in await reader.readline()
    finally:
        writer.close()


# Parts of pages


async def test_the_timeline_shows_waits_attempts_and_takeovers(
    memory_store: FlowStore, clock: VirtualClock
) -> None:
    store = memory_store
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "a")
    clock.advance(seconds=10)
    await store.try_claim_step(run_id, "a", owner=new_claim_token(), lease=30 * SECOND)
    await store.record_step_start(run_id, "a", "test", job_id="first")
    clock.advance(seconds=40)
    await store.try_claim_step(run_id, "a", owner=new_claim_token(), lease=30 * SECOND)
    await store.record_step_start(run_id, "a", "test", job_id="second")
    clock.advance(seconds=50)
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED)
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    # Long after: the axis ends with the run.
    timeline = await timeline_of(store, run_id, clock.advance(hours=9))
    (row,) = timeline.rows
    assert [(bar.kind, bar.left, bar.width) for bar in row.bars] == [
        (Kind.QUEUED, 0.0, 10.0),
        (Kind.TAKEN_OVER, 10.0, 40.0),
        (Kind.SUCCEEDED, 50.0, 50.0),
    ]
    assert [tick.label for tick in timeline.ticks] == ["0", "30s", "1m", "1m 30s"]
    (incident,) = await incidents_of(store, run_id, clock.now)
    assert incident.kind is Kind.TAKEN_OVER
    assert "second took the step over 40.0s after the start, as attempt 2" in incident.sentences[0]


async def test_a_step_that_a_person_retried_is_not_taken_over(
    memory_store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(memory_store)
    await memory_store.record_step_start(run_id, "a", "test")
    clock.advance(seconds=5)
    await memory_store.record_step_complete(run_id, "a", StepStatus.FAILED, error_message="broke")
    clock.advance(seconds=5)
    await memory_store.retry_step(run_id, "a")
    clock.advance(seconds=10)
    timeline = await timeline_of(memory_store, run_id, clock.now)
    assert [bar.kind for bar in timeline.rows[0].bars] == [Kind.FAILED, Kind.BETWEEN]
    (incident,) = await incidents_of(memory_store, run_id, clock.now)
    assert incident.sentences[-1] == "The next attempt, number 2, has not started."


async def test_incidents_name_expired_leases_waits_and_cancellation(
    memory_store: FlowStore, clock: VirtualClock
) -> None:
    store = memory_store
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "a", owner="x", lease=10 * SECOND)
    await store.record_step_start(run_id, "a", "test", job_id="worker-1", owner="x")
    await store.record_step_start(run_id, "b", "test")
    await store.record_step_complete(run_id, "b", StepStatus.PENDING)
    await store.register_waiter(run_id, "b", "go")
    await store.request_cancel(run_id, "changed my mind")
    found = {one.title: one.sentences for one in await incidents_of(store, run_id, clock.advance(seconds=30))}
    assert found["a"] == (
        "The lease of worker-1 expired 20.0s ago, and no worker has taken the step over yet.",
    )
    assert found["b"] == ("Waiting for signal 'go' for 30.0s.",)
    (text,) = found["Cancellation"]
    assert text.endswith("with the reason: changed my mind. The engine has not completed the run yet.")


async def test_a_run_without_trouble_has_no_incidents(memory_store: FlowStore) -> None:
    run_id = await new_run(memory_store)
    await memory_store.record_step_start(run_id, "a", "test")
    await memory_store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED)
    assert await incidents_of(memory_store, run_id, NOW) == []


async def test_a_chart_of_no_runs_has_no_bars(memory_store: FlowStore) -> None:
    buckets = await memory_store.get_run_timeseries("hour", NOW - timedelta(hours=2), NOW)
    chart = draw_chart(buckets, RunTimeseriesGranularity.HOUR)
    assert [column.parts for column in chart.columns] == [(), ()]
    assert (chart.most, chart.total, chart.longest_ms) == (0, 0, 0.0)
