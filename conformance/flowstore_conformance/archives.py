"""Archives as arguments of calls: with other ids, and without owners that only one store knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_conformance.claim_tokens import comparable_owner
from flowstore_core import FlowRunRecord, RunArchive, RunStatus

Change = Callable[[Any], Any]
"""Returns the replacement of an id or a text, or the same value."""


def with_changed_values(value: Any, change: Change) -> Any:
    """An archive, or a part of one, in which each id and each text is replaced."""
    if isinstance(value, tuple):
        return tuple(with_changed_values(item, change) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            field.name: with_changed_values(getattr(value, field.name), change)
            for field in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)
    return change(value) if isinstance(value, (UUID, str)) else value


def under_another_id(archive: RunArchive, run_id: UUID) -> RunArchive:
    """The same run under another id."""
    old = archive.run.run_id
    changed: RunArchive = with_changed_values(archive, lambda value: run_id if value == old else value)
    return changed


def ids_in(value: Any) -> list[UUID]:
    """The ids in an argument of a call: the argument itself, or those of an archive."""
    found = [value] if isinstance(value, UUID) else []
    if isinstance(value, RunArchive):

        def note(each: Any) -> Any:
            found.extend([each] if isinstance(each, UUID) else [])
            return each

        with_changed_values(value, note)
    return found


def with_queues(archive: RunArchive, change: Callable[[str], str]) -> RunArchive:
    """The archive with other queues."""
    steps = []
    for step in archive.steps:
        dispatch = step.dispatch
        if dispatch is not None and dispatch.queue is not None:
            dispatch = dataclasses.replace(dispatch, queue=change(dispatch.queue))
        steps.append(dataclasses.replace(step, dispatch=dispatch))
    return dataclasses.replace(archive, steps=tuple(steps))


def with_known_owners(archive: RunArchive, owner: str) -> RunArchive:
    """The archive with another owner in place of those that claim_next_steps made, which differ by store."""
    steps = []
    for step in archive.steps:
        claim = step.claim
        if claim is not None and comparable_owner(claim.owner) != claim.owner:
            claim = dataclasses.replace(claim, owner=owner)
        started = step.started_owner
        if started is not None and comparable_owner(started) != started:
            started = owner
        steps.append(dataclasses.replace(step, claim=claim, started_owner=started))
    return dataclasses.replace(archive, steps=tuple(steps))


def new_archive(run_id: UUID, flow_id: UUID, started_at: datetime) -> RunArchive:
    """An archive of a run that has only been started."""
    return RunArchive(
        run=FlowRunRecord(
            run_id=run_id,
            flow_id=flow_id,
            flow_name="Flow",
            status=RunStatus.RUNNING,
            trigger_key="t",
            trigger_data=None,
            job_id=None,
            started_at=started_at,
            completed_at=None,
            source_run_id=None,
        )
    )


def archive_source(archive: RunArchive, names: Mapping[UUID, str]) -> str:
    """The archive as a Python expression. ``names`` maps ids to expressions."""
    text = archive.to_json()
    source = repr(text)
    for number, name in names.items():
        for shown, made in ((str(number), f"str({name})"), (number.hex, f"{name}.hex")):
            if shown in text:
                source += f".replace({shown!r}, {made})"
    return f"RunArchive.from_json({source})"
