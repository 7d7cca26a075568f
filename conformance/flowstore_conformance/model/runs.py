"""Runs: start, complete, list, page, detail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from uuid import UUID

from flowstore_conformance.model.state import Base, Run, Step
from flowstore_core import (
    FlowRunDetail,
    FlowRunRecord,
    FlowStepRecord,
    RunAlreadyExistsError,
    RunPage,
    RunPosition,
    RunStatus,
    StepStatus,
)


class Runs(Base):
    """Starting, completing and listing runs."""

    def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> FlowRunRecord:
        """Store a Running run; an id that is already stored is refused and nothing changes (RUN-1, TAG-1)."""
        if self.get(run_id).record is not None:
            raise RunAlreadyExistsError(run_id)
        record = FlowRunRecord(
            run_id=run_id,
            flow_id=flow_id,
            flow_name=flow_name,
            status=RunStatus.RUNNING,
            trigger_key=trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            started_at=self.now,
            completed_at=None,
            source_run_id=source_run_id,
            tags=tuple(sorted((tags or {}).items())),
        )
        self.at(run_id).record = record
        return record

    def complete_run(
        self, run_id: UUID, status: RunStatus, *, expected: Mapping[str, StepStatus] | None = None
    ) -> bool:
        """Move a Running run to a terminal status; the first terminal status wins (RUN-2, UNK).

        With ``expected``, only if the statuses are exactly these and no other key has a live claim or
        dispatch.
        """
        run, record = self.require(run_id)
        if record.status.is_terminal:
            return False
        if expected is not None:
            if statuses_of(run) != dict(expected):
                return False
            outside = [step for key, step in run.steps.items() if key not in expected]
            if any(step.dispatch is not None or step.held(self.now) for step in outside):
                return False
        run.record = replace(record, status=RunStatus(status), completed_at=self.now)
        return True

    def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        tags: Mapping[str, str] | None = None,
    ) -> tuple[FlowRunRecord, ...]:
        """List runs, newest first, strictly after a position (QRY-1, TAG-3)."""
        found = tuple(record for record in self._ordered(flow_id=flow_id) if _has_tags(record, tags))
        return _after(after, found)[skip : skip + take]

    def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunPage:
        """List matching runs with the count of all matches (QRY-1, QRY-2, QRY-3, TAG-3)."""
        found = tuple(
            record
            for record in self._ordered(flow_id=flow_id)
            if (status is None or record.status == status)
            and _has_tags(record, tags)
            and (not search or _matches(search, record, self.get(record.run_id)))
        )
        return RunPage(runs=_after(after, found)[skip : skip + take], total_count=len(found))

    def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        """Return a stored run, else None (QRY-3, UNK)."""
        return self.get(run_id).record

    def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        """Return the run with its steps and their attempts (QRY-3)."""
        run = self.get(run_id)
        if run.record is None:
            return None
        record = {each.name: getattr(run.record, each.name) for each in fields(FlowRunRecord)}
        return FlowRunDetail(**record, steps=tuple(step_records(run_id, run)))

    def get_run_status(self, run_id: UUID) -> RunStatus | None:
        """Return the status of a stored run, else None (UNK)."""
        record = self.get(run_id).record
        return None if record is None else record.status

    def get_active_runs(self, *, take: int | None = None) -> tuple[FlowRunRecord, ...]:
        """List every Running run in the order of QRY-1 (QRY-6)."""
        active = (record for record in self._ordered() if record.status is RunStatus.RUNNING)
        return tuple(active)[:take]

    def get_derived_runs(self, source_run_id: UUID, *, take: int | None = None) -> tuple[FlowRunRecord, ...]:
        """List the runs with this source_run_id, one generation only (QRY-6)."""
        derived = (record for record in self._ordered() if record.source_run_id == source_run_id)
        return tuple(derived)[:take]

    def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        """Return a visible step with its attempts, else None (QRY-3, UNK)."""
        steps = step_records(run_id, self.get(run_id))
        return next((step for step in steps if step.step_key == step_key), None)

    def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        """Return the status of every started step, ordered by step_key (UNK, QRY-1)."""
        return dict(sorted(statuses_of(self.get(run_id)).items()))

    def _ordered(self, flow_id: UUID | None = None) -> tuple[FlowRunRecord, ...]:
        """Runs newest first, in a total order (QRY-1)."""
        records = [run.record for run in self.state.runs.values() if run.record is not None]
        chosen = [record for record in records if flow_id in (None, record.flow_id)]
        return tuple(
            sorted(chosen, key=lambda record: (record.started_at, record.run_id.bytes), reverse=True)
        )


def _has_tags(record: FlowRunRecord, tags: Mapping[str, str] | None) -> bool:
    """Whether a run has all of these tags (TAG-3)."""
    return all(tag in record.tags for tag in (tags or {}).items())


def _after(position: RunPosition | None, records: tuple[FlowRunRecord, ...]) -> tuple[FlowRunRecord, ...]:
    """The records strictly after a position in the descending order (QRY-1)."""
    if position is None:
        return records
    key = (position.started_at, position.run_id.bytes)
    return tuple(record for record in records if (record.started_at, record.run_id.bytes) < key)


def statuses_of(run: Run) -> dict[str, StepStatus]:
    """The status of every started step; a key that was only claimed, dispatched or reset has none (RUN-2)."""
    return {key: step.status for key, step in run.steps.items() if step.status is not None}


def step_records(run_id: UUID, run: Run) -> list[FlowStepRecord]:
    """The visible steps, by started_at, then step_key (QRY-3)."""
    found = [_step_record(run_id, key, step) for key, step in run.steps.items() if step.status is not None]
    return sorted(found, key=lambda step: (step.started_at, step.step_key))


def _step_record(run_id: UUID, key: str, step: Step) -> FlowStepRecord:
    """A step as get_run_detail shows it: its newest attempt, or cleared while it is reopened (STP-6)."""
    newest = step.attempts[-1]
    assert step.status is not None
    return FlowStepRecord(
        run_id=run_id,
        step_key=key,
        step_type=newest.step_type,
        status=step.status,
        input_json=newest.input_json,
        output_json=None if step.reopened else newest.output_json,
        error_message=None if step.reopened else newest.error_message,
        job_id=newest.job_id,
        started_at=step.attempts[0].started_at,
        completed_at=newest.completed_at if step.is_terminal else None,
        attempt_count=len(step.attempts) + (1 if step.reopened else 0),
        attempts=step.attempts,
    )


def _matches(search: str, record: FlowRunRecord, run: Run) -> bool:
    """Whether a run matches a search (QRY-2).

    Compares bytes: bytes.lower() folds ASCII letters only.
    """
    needle = search.encode().lower()
    names: list[str | None] = [
        str(record.run_id),
        record.flow_name,
        record.trigger_key,
        record.status.value,
        record.job_id,
    ]
    texts: list[str | None] = []
    for key, step in run.steps.items():
        if step.status is None:
            continue
        names.append(key)
        # The step shows the texts of its newest attempt.
        for attempt in step.attempts:
            texts += [attempt.error_message, attempt.output_json]
    return _any_contains(needle, names, None) or _any_contains(needle, texts, 64 * 1024)


def _any_contains(needle: bytes, texts: Iterable[str | None], limit: int | None) -> bool:
    return any(text is not None and needle in text.encode()[:limit].lower() for text in texts)
