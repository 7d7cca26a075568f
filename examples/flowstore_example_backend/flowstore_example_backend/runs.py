"""Runs: start, complete, list, detail (RUN, QRY)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from uuid import UUID

from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    RunAlreadyExistsError,
    RunPosition,
    RunStatus,
    StepStatus,
)
from flowstore_example_backend.document import Document
from flowstore_example_backend.folder import Folder
from flowstore_example_backend.steps import step_record


class Runs(Folder):
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
        def start(document: Document) -> FlowRunRecord:
            if document.run is not None:
                raise RunAlreadyExistsError(run_id)
            document.run = FlowRunRecord(
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
            return document.run

        return await self._change(run_id, start)

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus,
        *,
        expected: Mapping[str, StepStatus] | None = None,
    ) -> bool:
        def complete(document: Document) -> bool:
            run = document.existing_run(run_id)
            if run.status.is_terminal:
                return False
            if expected is not None:
                # Without LEASES every stored claim is live.
                busy = document.claims.keys() | document.dispatches.keys()
                if document.statuses() != expected or busy - expected.keys():
                    return False
            document.run = replace(run, status=status, completed_at=self._now())
            return True

        return await self._change(run_id, complete)

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
    ) -> Sequence[FlowRunRecord]:
        runs = self._list(lambda run: flow_id is None or run.flow_id == flow_id)
        if after is not None:
            position = (after.started_at, after.run_id)
            runs = tuple(run for run in runs if (run.started_at, run.run_id) < position)
        return runs[skip : skip + take]

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        document = self._documents.get(run_id)
        return None if document is None else document.run

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        document = self._documents.get(run_id)
        if document is None or document.run is None:
            return None
        steps = [
            step_record(run_id, key, step, step.status)
            for key, step in document.steps.items()
            if step.status is not None
        ]
        steps.sort(key=lambda record: (record.started_at, record.step_key))
        run = {f.name: getattr(document.run, f.name) for f in fields(FlowRunRecord)}
        return FlowRunDetail(**run, steps=tuple(steps))

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        document = self._documents.get(run_id)
        return None if document is None or document.run is None else document.run.status

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        return self._list(lambda run: not run.status.is_terminal)[:take]

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        return self._list(lambda run: run.source_run_id == source_run_id)[:take]

    def _list(self, matches: Callable[[FlowRunRecord], bool]) -> tuple[FlowRunRecord, ...]:
        """The runs that match, newest first (QRY-1)."""
        runs = [doc.run for doc in self._documents.values() if doc.run is not None and matches(doc.run)]
        return tuple(sorted(runs, key=lambda run: (run.started_at, run.run_id), reverse=True))
