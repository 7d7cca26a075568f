"""Runs: start, complete, list, page, detail (RUN, QRY)."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from uuid import UUID

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunPage,
    RunPosition,
    RunStatus,
    StepStatus,
)
from flowstore_core.runs import fold_ascii, search_matches
from flowstore_core.status import TERMINAL_RUN_STATUSES
from flowstore_core.tags import NO_TAGS
from flowstore_memory.attempts import step_records
from flowstore_memory.state import OpenNamespace, RunState


class Runs(OpenNamespace):
    async def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> FlowRunRecord:
        if run_id.int in self._runs:
            raise RunAlreadyExistsError(run_id)
        now = self._now()
        run = RunState(run_id, flow_id, flow_name, trigger_key, trigger_data, job_id, source_run_id, now)
        if tags:
            run.tags = tuple(tags.items())
        self._runs[run_id.int] = run
        return run_record(run)

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus,
        *,
        expected: Mapping[str, StepStatus] | None = None,
    ) -> bool:
        run = self._runs[run_id.int]
        if run.status in TERMINAL_RUN_STATUSES:
            return False
        now = self._now()
        if expected is not None and not _has_statuses(run, expected, now):
            return False
        run.status = status
        run.completed_at = now
        self._namespace.wake()
        return True

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> Sequence[FlowRunRecord]:
        found = [
            run
            for run in self._runs.values()
            if (flow_id is None or run.flow_id == flow_id) and (not tags or tags.items() <= set(run.tags))
        ]
        return _page(_after_position(after, found), skip, take)

    async def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
        tags: Mapping[str, str] = NO_TAGS,
    ) -> RunPage:
        needle = None if search is None else fold_ascii(search)
        found = [
            run
            for run in self._runs.values()
            if (flow_id is None or run.flow_id == flow_id)
            and (status is None or run.status is status)
            and (not tags or tags.items() <= set(run.tags))
            and (needle is None or _matches(run, needle))
        ]
        return RunPage(runs=_page(_after_position(after, found), skip, take), total_count=len(found))

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        run = self._runs.get(run_id.int)
        return None if run is None else run_record(run)

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        run = self._runs.get(run_id.int)
        if run is None:
            return None
        return FlowRunDetail(
            run_id=run.run_id,
            flow_id=run.flow_id,
            flow_name=run.flow_name,
            status=run.status,
            trigger_key=run.trigger_key,
            trigger_data=run.trigger_data,
            job_id=run.job_id,
            started_at=run.started_at,
            completed_at=run.completed_at,
            source_run_id=run.source_run_id,
            tags=run.tags,
            steps=step_records(run),
        )

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        run = self._runs.get(run_id.int)
        return None if run is None else run.status

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        found = [run for run in self._runs.values() if run.status is RunStatus.RUNNING]
        return _page(found, 0, len(found) if take is None else take)

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        found = [run for run in self._runs.values() if run.source_run_id == source_run_id]
        return _page(found, 0, len(found) if take is None else take)


def run_record(run: RunState) -> FlowRunRecord:
    return FlowRunRecord(
        run_id=run.run_id,
        flow_id=run.flow_id,
        flow_name=run.flow_name,
        status=run.status,
        trigger_key=run.trigger_key,
        trigger_data=run.trigger_data,
        job_id=run.job_id,
        started_at=run.started_at,
        completed_at=run.completed_at,
        source_run_id=run.source_run_id,
        tags=run.tags,
    )


def _after_position(position: RunPosition | None, runs: Iterable[RunState]) -> Iterable[RunState]:
    if position is None:
        return runs
    boundary = (position.started_at, position.run_id)
    return (run for run in runs if (run.started_at, run.run_id) < boundary)


def _page(runs: Iterable[RunState], skip: int, take: int) -> tuple[FlowRunRecord, ...]:
    """A page in the order of QRY-1."""
    ordered = heapq.nlargest(skip + take, runs, key=lambda run: (run.started_at, run.run_id))
    return tuple(run_record(run) for run in ordered[skip:])


def _has_statuses(run: RunState, expected: Mapping[str, StepStatus], now: datetime) -> bool:
    """Whether the statuses equal ``expected`` and no other step is claimed or dispatched (RUN-2)."""
    started = 0
    for key, step in run.steps.items():
        if step.status is not None:
            if expected.get(key) is not step.status:
                return False
            started += 1
    return started == len(expected) and not has_unstarted_work(run, now)


def has_unstarted_work(run: RunState, now: datetime) -> bool:
    """Whether a key that is not a step has a live claim or a dispatch (RUN-2)."""
    return any(
        step.status is None and (step.dispatched_at is not None or step.has_live_claim(now))
        for step in run.steps.values()
    )


def _matches(run: RunState, needle: str) -> bool:
    """Whether the run matches the search, in the fields of get_run_detail (QRY-2)."""
    visible = [(key, step) for key, step in run.steps.items() if step.status is not None]
    short = [str(run.run_id), run.flow_name, run.trigger_key, run.status, run.job_id]
    short += [key for key, _ in visible]
    # The fields of a reopened step are those of its last attempt, which is among the earlier ones too.
    long = [
        text
        for key, step in visible
        for attempt in (step, *run.earlier.get(key, ()))
        for text in (attempt.output_json, attempt.error_message)
    ]
    return search_matches(needle, short, long)
