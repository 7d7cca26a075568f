"""Pages without a browser: backends that lack capabilities, live streams, and the parts of pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
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
from flowstore_dashboard.health import split_remedy
from flowstore_dashboard.incidents import Incident, find_incidents
from flowstore_dashboard.live import MAX_STREAMS
from flowstore_dashboard.overview import draw_chart
from flowstore_dashboard.serve import serving
from flowstore_dashboard.timeline import Kind, Timeline, draw_timeline
from flowstore_dashboard.wording import MAX_PAGE_TEXT, MAX_TEXT, TextBudget, age
from tests.calls import new_run
from tests.dashboard.client import Client
from tests.virtual_clock import VirtualClock

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


def test_a_text_is_shown_with_indentation_and_unchanged_tokens() -> None:
    text = '{"a":1.10,"b":[1e400,{"c":"x\\"{,}"}],"d":{},"a":[]}'
    shown = TextBudget().excerpt(text)
    assert shown.text == (
        '{\n  "a": 1.10,\n  "b": [\n    1e400,\n    {\n      "c": "x\\"{,}"\n    }\n  ],\n'
        '  "d": {},\n  "a": []\n}'
    )
    for other in ("not json", "1.50", '"text"', "{", "[" * 100_000):
        assert TextBudget().excerpt(other).text == other[:MAX_TEXT]


def test_the_texts_of_a_page_are_bounded() -> None:
    budget = TextBudget()
    excerpts = [budget.excerpt("x" * 30_000) for _ in range(1000)]
    assert excerpts[0].text == "x" * MAX_TEXT
    assert (excerpts[0].length, excerpts[0].is_cut) == (30_000, True)
    assert sum(len(one.text) for one in excerpts) < MAX_PAGE_TEXT + 1000 * 201


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (NOW - timedelta(days=3), "3 d ago"),
        (NOW - timedelta(minutes=61), "1 h ago"),
        (NOW, "just now"),
        (NOW + timedelta(seconds=90), "in 1 min"),
    ],
)
def test_ages(moment: datetime, text: str) -> None:
    assert age(moment, NOW) == text


def test_remedies_are_split_into_words_and_a_command() -> None:
    assert split_remedy("flowstore doctor --fix") == ("", "flowstore doctor --fix")
    assert split_remedy("start workers; for all queues: flowstore queues") == (
        "start workers; for all queues",
        "flowstore queues",
    )
    assert split_remedy("set fsync = on") == ("set fsync = on", "")


async def test_a_chart_of_no_runs_has_no_bars(memory_store: FlowStore) -> None:
    buckets = await memory_store.get_run_timeseries("hour", NOW - timedelta(hours=2), NOW)
    chart = draw_chart(buckets, RunTimeseriesGranularity.HOUR)
    assert [column.parts for column in chart.columns] == [(), ()]
    assert (chart.most, chart.total, chart.longest_ms) == (0, 0, 0.0)
