"""Histories with claim_next_steps, as calls on one run each.

claim_next_steps is atomic for each step, not for the set of its steps, and it may pass over a step that
another call is changing (QUE-1, QUE-2). So a concurrent call of it is judged as several calls on single runs:

- one for each step that it returned;
- if it returned fewer steps than its limit, one for each run that no other call touched meanwhile, which
  finds no further ready step in that run;
- if it has no answer, one for each queued step, which may have been claimed or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Returned

CLAIM = "claim_next_steps"


def by_run(history: History) -> History:
    """The history with each claim_next_steps split into calls on one run."""
    operations = history.operations
    if all(one.call.method != CLAIM for one in operations):
        return history
    steps = list(dict.fromkeys(step for one in operations for step in _queued_steps(one)))
    split = [each for one in operations for each in _split(one, operations, steps)]
    return History.of(split)


def _split(
    one: Operation, operations: Sequence[Operation], steps: Iterable[tuple[UUID, str]]
) -> Iterator[Operation]:
    if one.call.method != CLAIM or not (isinstance(one.outcome, Returned) or one.outcome is UNKNOWN):
        yield one
        return
    if one.outcome is UNKNOWN:
        for run_id, step_key in steps:
            yield _on(one, run_id, step_key=step_key)
        return
    assert isinstance(one.outcome, Returned)
    claimed = [dict(fields) for _, fields in one.outcome.value]
    for fields, record in zip(claimed, one.outcome.value, strict=True):
        narrowed = _on(one, fields["run_id"], step_key=fields["step_key"])
        yield replace(narrowed, outcome=Returned((record,)))
    if len(claimed) >= one.call.arguments.get("limit", 1):
        return
    beside = [other for other in operations if other is not one and _overlap(one, other)]
    touched = {run_id for other in beside for run_id in _runs(other)}
    if None in touched:
        return
    # Follows the claims of this call itself, and precedes every later call.
    end = math.nextafter(one.returned, math.inf)
    for run_id in dict.fromkeys(run_id for run_id, _ in steps):
        if run_id not in touched:
            found_none = replace(_on(one, run_id), outcome=Returned(()))
            yield replace(found_none, invoked=end, returned=end)


def _on(one: Operation, run_id: UUID, **more: Any) -> Operation:
    """The call on one run or step; the model accepts these arguments."""
    arguments = {**one.call.arguments, "limit": 1, "run_id": run_id, **more}
    return replace(one, call=Call(method=CLAIM, arguments=arguments))


def _overlap(one: Operation, other: Operation) -> bool:
    return one.invoked <= other.returned and other.invoked <= one.returned


def _runs(one: Operation) -> Iterator[UUID | None]:
    """The runs that a call may change; None if it may change any run."""
    if one.call.method == CLAIM:
        if one.outcome is UNKNOWN:
            yield None
        for _, fields in one.outcome.value if isinstance(one.outcome, Returned) else ():
            yield dict(fields)["run_id"]
    elif one.call.method in ("trigger_run", "cleanup"):
        # The one may start the run that is registered under its key, the other lock a run that it leaves.
        yield None
    elif "run_id" in one.call.arguments:
        yield one.call.arguments["run_id"]
    elif "archive" in one.call.arguments:
        yield one.call.arguments["archive"].run_id
    elif one.call.method == "advance_runs":
        yield from (step.run_id for step in one.call.arguments["steps"])
    elif one.call.method == "renew_step_claims":
        yield from (run_id for run_id, _, _ in one.call.arguments["claims"])


def _queued_steps(one: Operation) -> Iterator[tuple[UUID, str]]:
    """The steps that a call may put into a queue."""
    given: Mapping[str, Any] = one.call.arguments
    if "run_id" in given:
        run_id = given["run_id"]
        if one.call.method == "trigger_run" and isinstance(one.outcome, Returned):
            run_id = dict(dict(one.outcome.value[1])["run"][1])["run_id"]
        if given.get("queue") is not None:
            yield run_id, given["step_key"]
        for request in given.get("dispatch", ()):
            yield run_id, request.step_key
    for ended in given.get("steps", ()):
        for request in ended.dispatch:
            yield ended.run_id, request.step_key
    if "archive" in given:
        for step in given["archive"].steps:
            if step.dispatch is not None and step.dispatch.queue is not None:
                yield step.run_id, step.step_key
