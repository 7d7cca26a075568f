"""Archives that no operations could have made (XFR-4)."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import LATER, full_archive
from flowstore_core import ArchivedStep, RunStatus, StepStatus


def _changed(record: Any, **given: Any) -> Any:
    """The record with values of any type."""
    return replace(record, **given)


def impossible_archives(run_id: UUID) -> list[Any]:
    """Values that import_run refuses, each with one mistake."""
    archive = full_archive(run_id)
    run, control = archive.run, archive.control
    assert control is not None
    keys, deliveries, events = archive.idempotency_keys, archive.deliveries, archive.events
    waiting, expired, delivered = archive.waiters
    _, held, poll, reset, retried = archive.steps

    def with_run(**given: Any) -> Any:
        return _changed(archive, run=_changed(run, **given))

    def with_control(**given: Any) -> Any:
        return _changed(archive, control=_changed(control, **given))

    def with_step(step: ArchivedStep, **given: Any) -> Any:
        changed = _changed(step, **given)
        return _changed(archive, steps=tuple(changed if one is step else one for one in archive.steps))

    def with_attempt(step: ArchivedStep, **given: Any) -> Any:
        return with_step(step, attempts=(*step.attempts[:-1], _changed(step.attempts[-1], **given)))

    charge = archive.steps[0]
    first, second = charge.attempts
    claim, dispatch = charge.claim, charge.dispatch
    assert claim is not None
    assert dispatch is not None
    other = UUID(int=9)
    waiters, early = archive.waiters, archive.buffered[0]
    return [
        *("archive", b"{}", 1, True, [], object(), archive.to_json(), {"run": run}, run),
        # Values out of their limits, at each depth.
        *(with_run(**{name: value}) for name in ("run_id", "flow_id") for value in (None, str(other), 1)),
        *(with_run(flow_name=value) for value in (None, "", "x" * 257, "a\0", "\ud800", 1)),
        *(with_run(trigger_data=value) for value in (1, "a\0", "\ud800", "x" * (16 * 1024 * 1024 + 1))),
        *(with_run(job_id=value) for value in ("", "x" * 1025, 1)),
        *(with_run(started_at=value) for value in (None, 1, datetime(2026, 3, 14), datetime.max)),  # noqa: DTZ001, DTZ901
        *(with_run(status=value) for value in (None, "running", "Pending", StepStatus.SKIPPED)),
        *(with_control(created_at=value) for value in (None, datetime.max.replace(tzinfo=UTC))),
        _changed(archive, run=None),
        _changed(archive, control=run),
        *(_changed(archive, steps=value) for value in (None, list(archive.steps), (None,), ("charge",))),
        *(_changed(archive, outputs=value) for value in ({"a": "1"}, (("a",),), (("a", None),), ((1, "1"),))),
        *(_changed(archive, outputs=((value, "1"),)) for value in ("", "x" * 257, "a\0")),
        *(with_attempt(charge, attempt=value) for value in (None, 0, True, 2**63, "2")),
        *(with_step(charge, reopened=value) for value in (None, 0, "False")),
        *(with_step(charge, claim=_changed(claim, owner=value)) for value in ("", "x" * 257, 1)),
        *(with_step(charge, dispatch=_changed(dispatch, priority=value)) for value in (-1, 10, True, None)),
        # Runs that no operations could have made.
        with_run(completed_at=LATER),
        with_run(status=RunStatus.FAILED),
        with_control(run_id=other),
        with_control(cancel_requested_at=None),
        with_control(timed_out_at=None),
        _changed(archive, idempotency_keys=(*keys, keys[0])),
        _changed(archive, steps=(*archive.steps, charge)),
        with_step(charge, run_id=other),
        with_step(held, claim=None),
        with_step(held, reopened=True),
        with_step(held, rescheduled=True),
        with_step(held, started_owner="me"),
        with_step(held, status=StepStatus.PENDING),
        with_step(charge, status=StepStatus.PENDING),
        with_step(charge, status=None, started_owner=None),
        with_step(charge, attempts=(second,)),
        with_step(charge, attempts=(second, first)),
        with_step(charge, attempts=(first,)),
        with_step(charge, rescheduled=True),
        with_step(charge, claim=_changed(claim, step_key="ship")),
        with_step(charge, claim=_changed(claim, run_id=other)),
        with_step(charge, dispatch=_changed(dispatch, run_id=other)),
        with_step(charge, dispatch=_changed(dispatch, step_key="ship")),
        with_step(charge, dispatch=_changed(dispatch, step_type=None)),
        with_step(charge, dispatch=_changed(dispatch, queue=None)),
        with_attempt(charge, attempt=3),
        with_attempt(charge, run_id=other),
        with_attempt(charge, step_key="ship"),
        with_attempt(charge, completed_at=LATER),
        with_attempt(reset, status=StepStatus.RUNNING, completed_at=None),
        with_attempt(retried, status=StepStatus.RUNNING, completed_at=None),
        with_attempt(retried, status=StepStatus.PENDING),
        with_attempt(poll, completed_at=None),
        with_step(retried, status=StepStatus.FAILED),
        with_step(retried, started_owner="me"),
        with_step(poll, status=StepStatus.SUCCEEDED),
        _changed(archive, waiters=(*waiters, waiting)),
        _changed(archive, waiters=(_changed(waiting, run_id=other),)),
        _changed(archive, waiters=(_changed(waiting, payload_json="{ }"),)),
        _changed(archive, waiters=(_changed(delivered, payload_json=None),)),
        _changed(archive, waiters=(_changed(delivered, expired_at=LATER),)),
        _changed(archive, waiters=(_changed(expired, expires_at=None),)),
        _changed(archive, deliveries=(*deliveries, deliveries[0])),
        _changed(archive, deliveries=(_changed(deliveries[0], step_key=None),)),
        _changed(archive, deliveries=(_changed(deliveries[0], delivered_at=None),)),
        _changed(archive, buffered=(_changed(early, run_id=other),)),
        _changed(archive, buffered=(_changed(early, signal_name=waiting.signal_name),)),
        _changed(archive, buffered=(_changed(early, payload_json=None),)),
        _changed(archive, buffered=(early,) * 1001),
        with_run(tags=(("a", "1"), ("a", "2"))),
        with_run(tags=tuple((f"{number}", "1") for number in range(33))),
        *(
            with_run(tags=((key, value),))
            for key, value in (("", "1"), ("a", ""), ("a", None), ("a", "x" * 257))
        ),
        _changed(archive, outputs=(("a", "1"), ("a", "2"))),
        _changed(archive, events=events[1:]),
        _changed(archive, events=(events[0], _changed(events[1], sequence=3))),
        _changed(archive, events=(_changed(events[0], run_id=other),)),
    ]
