"""Validation of archives: the limits of values, and whether operations could have made the run (XFR-4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, NoReturn, get_origin
from uuid import UUID

from flowstore_core.errors import InvalidArgumentError
from flowstore_core.record_json import Field, fields_of
from flowstore_core.signals import MAX_BUFFERED_SIGNALS
from flowstore_core.status import StepStatus
from flowstore_core.tags import MAX_TAGS
from flowstore_core.transfer import ArchivedStep, RunArchive
from flowstore_core.validation import (
    MAX_INT64,
    MAX_JOB_ID,
    check_datetime,
    check_enum,
    check_id,
    check_int,
    check_key,
    check_text,
)

_KEYS = frozenset(
    {
        *("flow_name", "trigger_key", "idempotency_key", "step_key", "step_type", "owner", "started_owner"),
        *("queue", "signal_name", "delivery_id", "event_type"),
    }
)
"""The fields with the limits of a key; a text with another name is one of INP-2, or a job_id."""


def check_archive(value: Any) -> RunArchive:
    """The archive with normalised values, in the order of XFR-2. Raises InvalidArgumentError."""
    if not isinstance(value, RunArchive):
        raise InvalidArgumentError("archive", "a RunArchive, such as the result of export_run", _type(value))
    archive = _check_values(value)
    run, run_id = archive.run, archive.run.run_id
    if (run.completed_at is not None) is not run.status.is_terminal:
        _refuse("run.completed_at", "given if and only if the run is terminal")
    if len(run.tags) > MAX_TAGS:
        _refuse("run.tags", f"at most {MAX_TAGS} tags")
    _check_unique("run.tags", [key for key, _ in run.tags])
    _check_control(archive)
    keys = [(one.flow_id.bytes, one.trigger_key, one.idempotency_key) for one in archive.idempotency_keys]
    _check_unique("idempotency_keys", keys)
    for number, step in enumerate(archive.steps):
        _check_step(f"steps[{number}]", run_id, step)
    _check_unique("steps", [step.step_key for step in archive.steps])
    _check_waiters(archive)
    _check_deliveries(archive)
    _check_buffered(archive)
    _check_unique("outputs", [key for key, _ in archive.outputs])
    for number, event in enumerate(archive.events):
        _check_names(f"events[{number}]", event, run_id)
        if event.sequence != number + 1:
            _refuse(f"events[{number}].sequence", f"{number + 1:,}: events are numbered without gaps")
    if list(run.tags) != sorted(run.tags):
        archive = dataclasses.replace(archive, run=dataclasses.replace(run, tags=tuple(sorted(run.tags))))
    return _in_order(archive)


def _check_values(archive: RunArchive) -> RunArchive:
    """The archive with every value within its limits."""
    checked: RunArchive
    try:
        # Without paths, which take longer to make than everything else.
        checked = _check_record(archive, "")
    except InvalidArgumentError:
        checked = _check_record(archive, "archive")
    return checked


def _check_record(record: Any, path: str) -> Any:
    """A record whose values are within their limits; the same object if none had to be normalised."""
    changed = {}
    kind: type = type(record)
    for field in fields_of(kind):
        value = getattr(record, field.name)
        if value is None and field.optional:
            continue
        checked = _check_field(field, value, path and f"{path}.{field.name}")
        if checked is not value:
            changed[field.name] = checked
    return dataclasses.replace(record, **changed) if changed else record


def _check_field(field: Field, value: Any, path: str) -> Any:
    if field.item is None:
        return _check_value(field.kind, field.name, value, path)
    if not isinstance(value, tuple):
        raise InvalidArgumentError(path, "a tuple", _type(value))
    checked = tuple(
        _check_value(field.item, field.name, item, path and f"{path}[{number}]")
        for number, item in enumerate(value)
    )
    return value if all(map(_is, checked, value)) else checked


def _is(one: object, other: object) -> bool:
    return one is other


def _check_value(kind: Any, name: str, value: Any, path: str) -> Any:
    if kind is str:
        if name in _KEYS:
            return check_key(path, value)
        return check_key(path, value, MAX_JOB_ID) if name == "job_id" else check_text(path, value)
    if kind is datetime:
        return check_datetime(path, value)
    if kind is UUID:
        return check_id(path, value)
    if kind is int:
        return check_int(path, value, 0, 9) if name == "priority" else check_int(path, value, 1, MAX_INT64)
    if kind is bool:
        if type(value) is not bool:
            raise InvalidArgumentError(path, "True or False", _type(value))
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple) or len(value) != 2:
            raise InvalidArgumentError(path, "a tuple of a key and a value", _type(value))
        check_second = check_key if name == "tags" else check_text
        key, text = check_key(path, value[0]), check_second(path, value[1])
        return value if key is value[0] and text is value[1] else (key, text)
    if issubclass(kind, Enum):
        return check_enum(path, value, kind, tuple(kind))
    if type(value) is not kind:
        raise InvalidArgumentError(path, f"a {kind.__name__}", _type(value))
    return _check_record(value, path)


def _check_names(path: str, record: Any, run_id: UUID, step_key: str | None = None) -> None:
    """Refuse a record that names a different run or step than the archive that contains it."""
    if record.run_id != run_id:
        _refuse(f"{path}.run_id", "the id of the archive's run")
    if step_key is not None and record.step_key != step_key:
        _refuse(f"{path}.step_key", "the key of its step")


def _check_control(archive: RunArchive) -> None:
    control = archive.control
    if control is None:
        return
    _check_names("control", control, archive.run.run_id)
    if control.cancel_requested_at is None and control.cancel_reason is not None:
        _refuse("control.cancel_reason", "None without cancel_requested_at")
    if control.timed_out_at is None and control.timed_out_reason is not None:
        _refuse("control.timed_out_reason", "None without timed_out_at")


def _check_step(path: str, run_id: UUID, step: ArchivedStep) -> None:
    key = step.step_key
    _check_names(path, step, run_id)
    last = step.attempts[-1] if step.attempts else None
    for number, attempt in enumerate(step.attempts, 1):
        where = f"{path}.attempts[{number - 1}]"
        _check_names(where, attempt, run_id, key)
        if attempt.attempt != number:
            _refuse(f"{where}.attempt", f"{number:,}: attempts are numbered from 1 without gaps")
        is_open = attempt.completed_at is None
        if is_open is not (attempt.status is StepStatus.RUNNING):
            _refuse(f"{where}.completed_at", "None if and only if the attempt is Running")
        if is_open and (attempt is not last or step.status is None or step.reopened):
            _refuse(f"{where}.status", "a closed one: only the last attempt of a started step may be open")
    if step.status is None:
        if step.reopened or step.rescheduled or (step.started_owner is not None):
            _refuse(path, "without marks and started_owner while it has no status")
        if last is None and step.claim is None and step.dispatch is None:
            _refuse(path, "a step, or a key with attempts, a claim or a dispatch")
    elif last is None:
        _refuse(f"{path}.attempts", "not empty for a step with a status")
    elif step.reopened:
        if step.status is not StepStatus.PENDING or step.started_owner is not None:
            _refuse(path, "Pending and without started_owner while it is reopened")
    elif step.status is not last.status:
        _refuse(f"{path}.status", "that of its last attempt")
    if step.rescheduled and (last is None or last.status not in _RESCHEDULED):
        _refuse(f"{path}.rescheduled", "False unless the last attempt is closed as Pending or Failed")
    if step.rescheduled and step.reopened and last is not None and last.status is StepStatus.PENDING:
        _refuse(f"{path}.rescheduled", "False for a reopened step whose last attempt is Pending")
    if step.claim is not None:
        _check_names(f"{path}.claim", step.claim, run_id, key)
    if step.dispatch is not None:
        _check_dispatch(f"{path}.dispatch", run_id, step)


_RESCHEDULED = (StepStatus.PENDING, StepStatus.FAILED)


def _check_dispatch(path: str, run_id: UUID, step: ArchivedStep) -> None:
    dispatch = step.dispatch
    assert dispatch is not None
    _check_names(path, dispatch, run_id, step.step_key)
    if dispatch.queue is not None:
        if dispatch.step_type is None:
            _refuse(f"{path}.step_type", "given with queue")
    elif (dispatch.priority, dispatch.step_type, dispatch.input_json) != (0, None, None):
        _refuse(path, "without priority, step_type and input_json unless it has a queue")


def _check_waiters(archive: RunArchive) -> None:
    for number, waiter in enumerate(archive.waiters):
        path = f"waiters[{number}]"
        _check_names(path, waiter, archive.run.run_id)
        if (waiter.delivered_at is None) is not (waiter.payload_json is None):
            _refuse(f"{path}.payload_json", "given if and only if the waiter is delivered")
        if waiter.expired_at is not None and (waiter.delivered_at is not None or waiter.expires_at is None):
            _refuse(f"{path}.expired_at", "None for a delivered waiter and for one without expires_at")
    _check_unique("waiters", [waiter.step_key for waiter in archive.waiters])


def _check_deliveries(archive: RunArchive) -> None:
    for number, one in enumerate(archive.deliveries):
        if (one.step_key is None) is not (one.delivered_at is None):
            _refuse(f"deliveries[{number}].delivered_at", "given if and only if step_key is")
    _check_unique("deliveries", [one.delivery_id for one in archive.deliveries])


def _check_buffered(archive: RunArchive) -> None:
    if len(archive.buffered) > MAX_BUFFERED_SIGNALS:
        _refuse("buffered", f"at most {MAX_BUFFERED_SIGNALS:,} payloads")
    waited = {
        one.signal_name for one in archive.waiters if one.delivered_at is None and one.expired_at is None
    }
    for number, one in enumerate(archive.buffered):
        _check_names(f"buffered[{number}]", one, archive.run.run_id)
        if one.signal_name in waited:
            _refuse(f"buffered[{number}].signal_name", "no name for which a step waits")


def _check_unique(part: str, keys: Sequence[Any]) -> None:
    if len(set(keys)) < len(keys):
        _refuse(part, "without two entries for one key")


def _in_order(archive: RunArchive) -> RunArchive:
    """The archive with the parts in the order of XFR-2; the same object if they are."""
    orders: dict[str, Iterable[Any]] = {
        "idempotency_keys": sorted(
            archive.idempotency_keys,
            key=lambda one: (one.flow_id.bytes, one.trigger_key, one.idempotency_key),
        ),
        "steps": sorted(archive.steps, key=lambda one: one.step_key),
        "waiters": sorted(archive.waiters, key=lambda one: one.step_key),
        "deliveries": sorted(archive.deliveries, key=lambda one: one.delivery_id),
        "outputs": sorted(archive.outputs),
    }
    changed = {
        part: tuple(ordered)
        for part, ordered in orders.items()
        if not all(map(_is, ordered, getattr(archive, part)))
    }
    return dataclasses.replace(archive, **changed) if changed else archive  # type: ignore[arg-type]


def _refuse(path: str, limit: str) -> NoReturn:
    raise InvalidArgumentError(f"archive.{path}", limit)


def _type(value: object) -> str:
    # Only the type is shown: the value may be a secret.
    return "None" if value is None else type(value).__name__
