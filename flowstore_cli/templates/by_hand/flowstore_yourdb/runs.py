"""Runs (RUN, QRY)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from uuid import UUID

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunPosition,
    RunStatus,
    StepStatus,
)

from flowstore_yourdb.data import OpenData, Run
from flowstore_yourdb.steps import step_record


class Runs(OpenData):
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
    ) -> FlowRunRecord:
        if run_id in self._data.runs:
            raise RunAlreadyExistsError(run_id)
        record = FlowRunRecord(
            run_id=run_id,
            flow_id=flow_id,
            flow_name=flow_name,
            status=RunStatus.RUNNING,
            trigger_key=trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            started_at=self._now(),
            completed_at=None,
            source_run_id=source_run_id,
        )
        self._data.runs[run_id] = Run(record)
        return record

    async def complete_run(
        self, run_id: UUID, status: RunStatus, *, expected: Mapping[str, StepStatus] | None = None
    ) -> bool:
        run = self._run(run_id)
        if run.record.status.is_terminal:
            return False
        if expected is not None and not _has_statuses(run, expected):
            return False
        run.record = replace(run.record, status=status, completed_at=self._now())
        return True

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        run = self._data.runs.get(run_id)
        return None if run is None else run.record

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        run = self._data.runs.get(run_id)
        return None if run is None else run.record.status

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        run = self._data.runs.get(run_id)
        if run is None:
            return None
        steps = [step_record(run_id, key, step) for key, step in run.steps.items() if step.status]
        steps.sort(key=lambda step: (step.started_at, step.step_key))
        one = run.record
        return FlowRunDetail(
            run_id=one.run_id,
            flow_id=one.flow_id,
            flow_name=one.flow_name,
            status=one.status,
            trigger_key=one.trigger_key,
            trigger_data=one.trigger_data,
            job_id=one.job_id,
            started_at=one.started_at,
            completed_at=one.completed_at,
            source_run_id=one.source_run_id,
            steps=tuple(steps),
        )

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
    ) -> Sequence[FlowRunRecord]:
        found = self._list(lambda run: flow_id is None or run.flow_id == flow_id)
        if after is not None:
            end = (after.started_at, after.run_id)
            found = tuple(run for run in found if (run.started_at, run.run_id) < end)
        return found[skip : skip + take]

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        return self._list(lambda run: run.status is RunStatus.RUNNING)[:take]

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        return self._list(lambda run: run.source_run_id == source_run_id)[:take]

    def _list(self, matches: Callable[[FlowRunRecord], bool]) -> tuple[FlowRunRecord, ...]:
        """The records of the runs that match, newest first (QRY-1)."""
        found = [run.record for run in self._data.runs.values() if matches(run.record)]
        return tuple(sorted(found, key=lambda run: (run.started_at, run.run_id), reverse=True))


def _has_statuses(run: Run, expected: Mapping[str, StepStatus]) -> bool:
    """Whether the statuses are these, and no other key is claimed or dispatched (RUN-2)."""
    if {key: step.status for key, step in run.steps.items() if step.status} != expected:
        return False
    return not any(step.claim or step.dispatch for step in run.steps.values() if not step.status)
