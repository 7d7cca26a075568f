"""The records of steps and their attempts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from uuid import UUID

from flowstore_core import FlowStepAttemptRecord, FlowStepRecord
from flowstore_documents import keys
from flowstore_documents.codec import decode
from flowstore_documents.documents import AttemptDocument, StepDocument
from flowstore_documents.space import Range
from flowstore_documents.texts import ReadText, Text
from flowstore_documents.transactions import Transaction

Attempts = Mapping[str, Sequence[AttemptDocument]]


def steps_and_attempts(run_id: UUID) -> Sequence[Range]:
    """All steps of a run, and all earlier attempts."""
    return [keys.prefix_range(keys.steps(run_id)), keys.prefix_range(keys.all_attempts(run_id))]


async def read_attempts(tx: Transaction, run_id: UUID, step_key: str | None = None) -> Attempts:
    """The earlier attempts of a step, or of all steps, by number; of a reopened step, the newest too."""
    prefix = keys.all_attempts(run_id) if step_key is None else keys.attempts(run_id, step_key)
    found: dict[str, list[AttemptDocument]] = defaultdict(list)
    for key, value in await tx.scan(keys.prefix_range(prefix)):
        found[keys.parse_attempt_step(run_id, key)].append(decode(AttemptDocument, value.value))
    return found


async def step_records(
    tx: Transaction, run_id: UUID, steps: Mapping[str, StepDocument], earlier: Attempts
) -> tuple[FlowStepRecord, ...]:
    """The visible ones of some steps, ordered by start of the first attempt, then key (QRY-3)."""
    visible = {key: step for key, step in steps.items() if step.status is not None}
    attempts = {key: all_attempts(step, earlier.get(key, ())) for key, step in visible.items()}
    text = await tx.read_texts(run_id, attempt_texts(attempts))
    records = [_record(run_id, key, step, attempts[key], text) for key, step in visible.items()]
    return tuple(sorted(records, key=lambda record: (record.started_at, record.step_key)))


def attempt_texts(attempts: Attempts) -> list[Text | None]:
    """The texts that may be long, of the attempts of several steps."""
    return [
        text
        for documents in attempts.values()
        for document in documents
        for text in (document.input_json, document.output_json, document.error_message)
    ]


def all_attempts(step: StepDocument, earlier: Sequence[AttemptDocument]) -> Sequence[AttemptDocument]:
    """All attempts of a visible step, by number."""
    newest = step.newest_attempt()
    return earlier if newest is None else [*earlier, newest]


def _record(
    run_id: UUID,
    step_key: str,
    step: StepDocument,
    attempts: Sequence[AttemptDocument],
    text: ReadText,
) -> FlowStepRecord:
    assert step.status is not None
    assert step.first_started_at is not None
    return FlowStepRecord(
        run_id=run_id,
        step_key=step_key,
        step_type=step.step_type,
        status=step.status,
        input_json=text(step.input_json),
        output_json=None if step.reopened else text(step.output_json),
        error_message=None if step.reopened else text(step.error_message),
        job_id=step.job_id,
        started_at=step.first_started_at,
        completed_at=step.completed_at if step.is_terminal else None,
        attempt_count=step.attempt + step.reopened,
        attempts=attempt_records(run_id, step_key, attempts, text),
    )


def attempt_records(
    run_id: UUID, step_key: str, attempts: Sequence[AttemptDocument], text: ReadText
) -> tuple[FlowStepAttemptRecord, ...]:
    return tuple(
        FlowStepAttemptRecord(
            run_id=run_id,
            step_key=step_key,
            attempt=number,
            step_type=attempt.step_type,
            status=attempt.status,
            input_json=text(attempt.input_json),
            output_json=text(attempt.output_json),
            error_message=text(attempt.error_message),
            job_id=attempt.job_id,
            started_at=attempt.started_at,
            completed_at=attempt.completed_at,
        )
        for number, attempt in enumerate(attempts, 1)
    )
