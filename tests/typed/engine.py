"""The code of an engine, as a type checker sees it; never executed.

Each ``type: ignore`` marks an error that mypy must report: strict mode rejects an unused one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import assert_type
from uuid import UUID

from flowstore import (
    BufferedSignal,
    Capability,
    FlowRunDetail,
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepRecord,
    FlowStore,
    RunPage,
    RunPosition,
    RunStatus,
    RunTimeseriesBucket,
    RunTimeseriesGranularity,
    SignalDeliveryStatus,
    StepStatus,
    TriggerResult,
    new_claim_token,
    new_run_id,
    open_store,
)


async def open_stores() -> None:
    async with open_store("sqlite:///flows.db", migrate=False, busy_timeout=5) as store:
        assert_type(store, FlowStore)
        assert_type(store.capabilities, frozenset[Capability])
    async with open_store("memory://", clock=lambda: datetime.now(UTC)):
        pass
    open_store(7)  # type: ignore[arg-type]
    open_store("memory://", clock=7)  # type: ignore[arg-type]


async def unpack_pages(store: FlowStore) -> None:
    page = await store.get_runs_page(status="Running", search="orders")
    assert_type(page, RunPage)
    runs, total = page
    assert_type(runs, tuple[FlowRunRecord, ...])
    assert_type(total, int)
    assert_type(page.runs, tuple[FlowRunRecord, ...])
    assert_type(page.total_count, int)
    assert_type(runs[-1].position, RunPosition)
    runs, total, _more = page  # type: ignore[misc]
    page.total_count = 0  # type: ignore[misc]


async def pass_statuses(store: FlowStore, run_id: UUID) -> None:
    """Operations accept a member of an enum or its value."""
    await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED)
    await store.record_step_complete(run_id, "a", "Succeeded", output_json="{}")
    statuses = await store.get_step_statuses(run_id)
    assert_type(statuses, Mapping[str, StepStatus])
    assert_type(await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=statuses), bool)
    values: dict[str, str] = {"a": "Succeeded"}
    await store.complete_run(run_id, "Succeeded", expected=values)
    await store.get_runs_page(status=RunStatus.FAILED)
    now = datetime.now(UTC)
    buckets = await store.get_run_timeseries("hour", now, now)
    assert_type(buckets, Sequence[RunTimeseriesBucket])
    await store.get_run_timeseries(RunTimeseriesGranularity.DAY, now, now)
    # Records hold the member.
    assert_type(await store.get_run_status(run_id), RunStatus | None)

    await store.complete_run(run_id, 1)  # type: ignore[arg-type]
    await store.complete_run(run_id, "Succeeded", expected={"a": 1})  # type: ignore[dict-item]
    await store.get_runs_page(status=b"Failed")  # type: ignore[arg-type]
    await store.get_run_timeseries(3600, now, now)  # type: ignore[arg-type]


async def work_on_a_step(store: FlowStore) -> None:
    run_id = new_run_id()
    assert_type(run_id, UUID)
    assert_type(await store.start_run(run_id, "orders", run_id, "manual"), FlowRunRecord)
    assert_type(await store.trigger_run(run_id, "orders", run_id, "manual"), TriggerResult)
    token = new_claim_token()
    won = await store.try_claim_step(run_id, "a", owner=token, lease=timedelta(seconds=30))
    assert_type(won, bool)
    assert_type(await store.record_step_start(run_id, "a", "http", owner=token), int)
    assert_type(await store.get_run(run_id), FlowRunRecord | None)
    assert_type(await store.get_run_detail(run_id), FlowRunDetail | None)
    assert_type(await store.get_step(run_id, "a"), FlowStepRecord | None)
    assert_type(await store.get_waiter(run_id, "a"), FlowSignalWaiter | None)
    delivered = await store.deliver_signal(run_id, "approved", "{}")
    assert_type(delivered.status, SignalDeliveryStatus)
    assert_type(await store.get_buffered_signals(run_id), Sequence[BufferedSignal])

    await store.try_claim_step(str(run_id), "a")  # type: ignore[arg-type]
    await store.try_claim_step(run_id, "a", owner=token, lease=30)  # type: ignore[arg-type]
