"""The roles and grants of docs/using-it-in-an-engine.md are sufficient as written."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import uuid4

import asyncpg
import pytest

from flowstore_core import RunStatus, StepStatus, open_store

PAGE = Path(__file__).parents[1] / "docs" / "using-it-in-an-engine.md"


def _url(url: str, database: str, user: str) -> str:
    parts = urlsplit(url)
    query = urlencode({**dict(parse_qsl(parts.query)), "user": user})
    # urllib omits the slashes of an empty host.
    return f"{parts.scheme}://{parts.netloc}/{database}?{query}"


@pytest.mark.xdist_group("roles")
async def test_the_documented_grants_suffice(postgresql_url: str) -> None:
    block = re.search(r"^```sql\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert block is not None
    before, comment, after = block[1].partition("-- after: flowstore migrate up")
    assert comment
    administrator = await asyncpg.connect(postgresql_url)
    try:
        await administrator.execute("CREATE DATABASE flows")
        try:
            await administrator.execute(before)
            async with open_store(_url(postgresql_url, "flows", "flows_owner")):
                pass
            owner = await asyncpg.connect(_url(postgresql_url, "flows", "flows_owner"))
            try:
                await owner.execute(after.partition("\n")[2])
            finally:
                await owner.close()
            await _exercise_store(_url(postgresql_url, "flows", "flows_app"))
        finally:
            await administrator.execute("DROP DATABASE flows WITH (FORCE)")
            await administrator.execute("DROP ROLE IF EXISTS flows_owner, flows_app")
    finally:
        await administrator.close()


async def _exercise_store(url: str) -> None:
    """Write and read every kind of record with a role that cannot change the schema."""
    run_id = uuid4()
    async with open_store(url, migrate=False) as store:
        await store.trigger_run(uuid4(), "orders", run_id, "manual", idempotency_key="one")
        await store.configure_run(run_id, uuid4(), "manual", timeout_at=datetime.now(UTC))
        assert len(await store.get_runs_to_stop()) == 1
        assert await store.try_record_dispatch(run_id, "a")
        assert await store.try_claim_step(run_id, "a", owner="me", lease=timedelta(seconds=30))
        assert await store.renew_step_claim(run_id, "a", "me", timedelta(seconds=60))
        attempt = await store.record_step_start(run_id, "a", "http", owner="me")
        await store.register_waiter(run_id, "a", "go")
        await store.deliver_signal(run_id, "go", "1", delivery_id="first")
        await store.reschedule_step(run_id, "a", attempt=attempt)
        assert len(await store.get_stalled_steps(as_of=datetime.now(UTC) + timedelta(hours=1))) == 1
        await store.remove_waiter(run_id, "a")
        await store.record_step_complete(run_id, "a", StepStatus.PENDING, attempt=attempt)
        await store.retry_step(run_id, "a")
        await store.record_skipped_step(run_id, "a", "http")
        await store.save_output(run_id, "total", "1")
        await store.append_event(run_id, "skipped")
        assert await store.request_cancel(run_id)
        assert await store.complete_run(run_id, RunStatus.CANCELLED)
        assert (await store.get_runs_page(search="orders")).total_count == 1
        assert (await store.get_statistics()).total_flows == 1
        assert await store.cleanup(datetime.now(UTC) + timedelta(days=1)) == 1
