"""Synchronous code, as a type checker sees it; never executed.

Each ``type: ignore`` marks an error that mypy must report: strict mode rejects an unused one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import assert_type
from uuid import UUID

from flowstore import (
    Capability,
    ClaimedStep,
    FlowRunDetail,
    FlowRunRecord,
    RunStatus,
    StepRequest,
    StepStatus,
    SyncFlowStore,
    TriggerResult,
    open_store_sync,
)


def open_stores() -> None:
    with open_store_sync("sqlite:///flows.db", migrate=False, busy_timeout=5) as store:
        assert_type(store, SyncFlowStore)
        assert_type(store.backend, str)
        assert_type(store.capabilities, frozenset[Capability])
    assert_type(open_store_sync("memory://", clock=lambda: datetime.now(UTC)), SyncFlowStore)
    open_store_sync(7)  # type: ignore[arg-type]
    open_store_sync("memory://", clock=7)  # type: ignore[arg-type]


def work_on_a_step(store: SyncFlowStore, run_id: UUID) -> None:
    assert_type(store.start_run(run_id, "orders", run_id, "manual"), FlowRunRecord)
    request = StepRequest(step_key="a", step_type="http")
    assert_type(store.trigger_run(run_id, "orders", run_id, "manual", dispatch=[request]), TriggerResult)
    assert_type(store.claim_next_steps(["default"], lease=timedelta(seconds=30)), Sequence[ClaimedStep])
    assert_type(store.try_claim_step(run_id, "a", owner="me"), bool)
    assert_type(store.record_step_start(run_id, "a", "http"), int)
    statuses = store.get_step_statuses(run_id)
    assert_type(statuses, Mapping[str, StepStatus])
    assert_type(store.complete_run(run_id, "Succeeded", expected=statuses), bool)
    assert_type(store.get_run_detail(run_id), FlowRunDetail | None)
    assert_type(store.wait_for_run(run_id, timeout=timedelta(minutes=1)), RunStatus | None)
    store.ping()
    store.close()

    store.try_claim_step(str(run_id), "a")  # type: ignore[arg-type]
    store.try_claim_step(run_id, "a", lease=30)  # type: ignore[arg-type]
    store.try_claim_step(run_id, "a", owned="me")  # type: ignore[call-arg]
    store.aclose()  # type: ignore[attr-defined]
