"""Races for queued steps, of advances of one run, and of redispatches."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.claim_histories import CLAIM
from flowstore_conformance.history import Call, History, Returned
from flowstore_conformance.linearizability import Verdict
from flowstore_conformance.phrasing import client_words
from flowstore_conformance.race_families.family import (
    LEASE,
    RUN,
    CallMaker,
    RaceBuilder,
    RaceFamily,
    family,
)
from flowstore_conformance.races import Race
from flowstore_core import Capability, EndedStep, StepRequest, StepStatus

QUEUE, OTHER_QUEUE = "q", "r"
RUNS = (RUN, UUID(int=2), UUID(int=3))
KEYS = ("a", "b", "c")
EVERY_END = frozenset({StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED})


def claim_next(d: RaceBuilder, *queues: str, **more: Any) -> CallMaker:
    def make(client: int) -> Call:
        given = {"queues": list(queues or (QUEUE,)), "lease": LEASE, "worker": f"worker {client}"}
        return Call(method=CLAIM, arguments={**given, "limit": d.one_of(1, 1, 2, 3, 1000), **more})

    return make


def _all_left(*queues: str) -> Call:
    """A call after the race, which gets every step that is ready then."""
    return Call(method=CLAIM, arguments={"queues": list(queues or (QUEUE,)), "lease": LEASE, "limit": 1000})


def _dispatch(run_id: UUID, step_key: str, **more: Any) -> Call:
    given = {"run_id": run_id, "step_key": step_key, "queue": QUEUE, "step_type": "s", **more}
    return Call(method="try_record_dispatch", arguments=given)


def _steps_of_runs(d: RaceBuilder, count: int) -> tuple[list[UUID], list[Call]]:
    """Some runs with queued steps, some of which are due later."""
    runs = list(RUNS[:count])
    setup = [d.start_run(run_id) for run_id in runs]
    for run_id in runs:
        for key in KEYS[: d.one_of(1, 2, 3)]:
            due = d.one_of(None, None, None, d.now + timedelta(hours=1))
            setup.append(_dispatch(run_id, key, priority=d.one_of(0, 0, 9), due_at=due))
    return runs, setup


def _any_step(d: RaceBuilder, runs: list[UUID], method: str, **more: Any) -> Call:
    return d.on(method, run_id=d.one_of(*runs), step_key=d.one_of(*KEYS[:2]), **more)


def _final(d: RaceBuilder, runs: list[UUID], *queues: str) -> tuple[Call, ...]:
    return (_all_left(*queues), *(read for run_id in runs for read in d.final_reads(run_id=run_id)))


def _claims(d: RaceBuilder) -> Race:
    """Mostly claims alone; other calls touch some of the runs."""
    runs, setup = _steps_of_runs(d, d.one_of(1, 2, 3, 3))
    touched = runs[:1] if d.one_of(True, False) else runs
    changes: list[CallMaker] = [
        lambda client: _any_step(d, touched, "release_step_claim"),
        lambda client: _any_step(d, touched, "release_dispatch"),
        lambda client: _any_step(d, touched, "redispatch_step", priority=5),
        lambda client: _any_step(d, touched, "try_claim_step", owner=f"o {client}"),
        lambda client: _any_step(d, touched, "record_step_start", step_type="by hand"),
        lambda client: _any_step(d, touched, "advance_run", status="Succeeded", attempt=1),
        lambda client: _any_step(d, touched, "register_waiter", signal_name="go"),
        lambda client: _any_step(d, touched, "remove_waiter"),
        lambda client: d.on("request_cancel", run_id=d.one_of(*touched)),
        lambda client: d.on("complete_run", run_id=d.one_of(*touched), status="Cancelled"),
    ]
    claim = claim_next(d)
    makers = [claim] if d.one_of(True, False) else [claim, claim, claim, *d.generator.sample(changes, 3)]
    first = claim if d.one_of(True, True, False) else None
    return Race(
        setup=tuple(setup),
        clients=d.clients(*makers, first=first),
        final=_final(d, runs),
    )


def _ended_leases(d: RaceBuilder) -> Race:
    """The leases of the claims that the setup made end when the race begins."""
    runs, setup = _steps_of_runs(d, d.one_of(1, 1, 2))
    return Race(
        setup=(*setup, _all_left()),
        clients=d.clients(
            claim_next(d),
            claim_next(d),
            claim_next(d),
            lambda client: _any_step(d, runs, "advance_run", status="Succeeded", attempt=d.one_of(1, 1, 2)),
            lambda client: _any_step(d, runs, "record_step_complete", status="Failed", attempt=1),
            lambda client: _any_step(d, runs, "try_claim_step", owner=f"o {client}", lease=LEASE),
            lambda client: _any_step(d, runs, "record_step_start", step_type="by hand"),
            lambda client: _any_step(d, runs, "reschedule_step", attempt=1, error_message="no"),
            lambda client: _any_step(d, runs, "retry_step", attempt=1),
        ),
        final=_final(d, runs),
        clock_advance=LEASE,
    )


def _joins(d: RaceBuilder) -> Race:
    """Every client ends one of the parents of a join."""
    parents = [f"parent {number}" for number in range(d.count)]
    setup = [d.start_run()]
    setup += [d.step("record_step_start", step_key=key, step_type="s") for key in parents]
    requests = (
        StepRequest(step_key="join", step_type="s", queue=QUEUE, after=tuple(parents)),
        StepRequest(step_key="always", step_type="s", queue=QUEUE, after=tuple(parents), accept=EVERY_END),
        StepRequest(step_key="after join", step_type="s", queue=QUEUE, after=("join",)),
    )[: d.one_of(1, 1, 2, 3)]
    end = d.one_of(None, "Succeeded", "Succeeded")
    failing = d.one_of((), (), parents[:1], parents)

    together = d.one_of(False, False, True)
    """Whether advance_runs ends the steps. Races name only one, because a call is not atomic as a whole."""

    def advance(client: int) -> Call:
        key = parents[client]
        status = "Failed" if key in failing else "Succeeded"
        given = {"step_key": key, "status": status, "attempt": 1, "dispatch": requests, "complete_as": end}
        if together:
            return Call(method="advance_runs", arguments={"steps": (EndedStep(run_id=RUN, **given),)})
        return d.step("advance_run", **given)

    changes: list[CallMaker] = [
        lambda client: d.step("retry_step", step_key=parents[client], dispatch=requests),
        lambda client: d.step("retry_step", step_key=d.one_of(*parents), dispatch=requests),
        lambda client: d.step("record_step_start", step_key="join", step_type="by hand"),
        lambda client: d.step("release_dispatch", step_key="join"),
        lambda client: d.on("complete_run", status="Cancelled"),
        lambda client: d.on("get_run_detail"),
        claim_next(d),
    ]
    makers = [advance] if d.one_of(True, False) else [advance, *d.generator.sample(changes, 2)]
    return Race(
        setup=tuple(setup),
        clients=d.clients(*makers, first=advance),
        final=_final(d, [RUN]),
    )


def _last_advances(d: RaceBuilder) -> Race:
    """The last open step ends, while other clients make more work."""
    done = [
        d.step("record_step_start", step_key="done", step_type="s"),
        d.step("record_step_complete", step_key="done", status=d.one_of("Succeeded", "Failed")),
    ]

    def advance(client: int) -> Call:
        return d.step("advance_run", status="Succeeded", attempt=1, complete_as="Succeeded")

    more: tuple[CallMaker, ...] = (
        lambda client: d.step("retry_step", step_key="done"),
        lambda client: d.step("try_record_dispatch", step_key="next"),
        lambda client: d.step("try_claim_step", step_key="next", owner=f"o {client}"),
        lambda client: d.step("record_step_start", step_key="next", step_type="s"),
        lambda client: d.on("complete_run", status="Cancelled"),
        advance,
    )
    others = d.clients(*more)[1:]
    return Race(
        setup=(d.start_run(), d.step("record_step_start", step_type="s"), *done),
        clients=((advance(0),), *others),
        final=d.final_reads(),
    )


def _redispatches(d: RaceBuilder) -> Race:
    due = d.one_of(None, d.now + timedelta(hours=1))
    return Race(
        setup=(d.start_run(), _dispatch(RUN, "a", due_at=due), d.step("annotate_dispatch", job_id="j")),
        clients=d.clients(
            lambda client: d.step("redispatch_step", queue=d.one_of(None, OTHER_QUEUE), priority=client),
            lambda client: d.step("redispatch_step", due_at=d.now, priority=d.one_of(None, 9)),
            claim_next(d, QUEUE),
            claim_next(d, OTHER_QUEUE),
            lambda client: d.step("try_claim_step", owner=f"o {client}"),
            lambda client: d.step("release_step_claim"),
            lambda client: d.step("release_dispatch"),
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.step("record_step_start", step_type="s"),
            lambda client: d.on("get_dispatches"),
        ),
        final=_final(d, [RUN], QUEUE, OTHER_QUEUE),
    )


def claimed_twice(history: History) -> str | None:
    """Explain an attempt of a step that two calls received."""
    given: dict[tuple[Any, ...], list[str]] = {}
    for one in history.operations:
        if one.call.method == CLAIM and isinstance(one.outcome, Returned):
            for _, fields in one.outcome.value:
                shown = dict(fields)
                claim = (shown["step_key"], shown["attempt"], shown["run_id"])
                given.setdefault(claim, []).append(client_words(one.client))
    for (key, attempt, _), clients in given.items():
        if len(clients) > 1:
            return f"attempt {attempt} of step {key!r} was claimed by {' and by '.join(clients)}"
    return None


def lost_join(history: History) -> str | None:
    """Explain a join whose parents have all ended although no call settled its request."""
    racing = [one for one in history.operations if one.client >= 0]
    if any(one.call.method not in ("advance_run", "get_run_detail") for one in racing):
        return None
    if not racing or not all(isinstance(one.outcome, Returned) for one in racing):
        return None
    detail = next((one for one in history.operations[::-1] if one.call.method == "get_run_detail"), None)
    if detail is None or detail.client >= 0 or not isinstance(detail.outcome, Returned):
        return None
    keys = {dict(fields)["step_key"] for _, fields in dict(detail.outcome.value[1])["steps"]}
    dispatched = {
        key
        for one in racing
        if one.call.method == "advance_run" and isinstance(one.outcome, Returned)
        for key in dict(one.outcome.value[1])["dispatched"]
    }
    if "join" in keys | dispatched:
        return None
    return (
        "every parent of a join has ended, and no advance_run settled the request for it: each of them found "
        "another parent still open. Advances of one run must be serial"
    )


def _missed_step(verdict: Verdict) -> str | None:
    """QUE-2 if a call did not find a step that was ready and untouched."""
    missed = any(one.call.method == CLAIM and one.outcome == Returned(()) for one in verdict.unplaced)
    return "QUE-2" if missed else None


def _wrong_completion(verdict: Verdict) -> str | None:
    """QUE-6 if only the completion of the run is wrong."""
    for one, right in zip(verdict.unplaced, verdict.expected, strict=False):
        if not isinstance(one.outcome, Returned) or not isinstance(right, Returned):
            continue
        if one.call.method == "advance_run":
            got, wanted = dict(one.outcome.value[1]), dict(right.value[1])
            return "QUE-6" if got["dispatched"] == wanted["dispatched"] else None
        if one.call.method == "get_run_detail":
            got, wanted = dict(one.outcome.value[1]), dict(right.value[1])
            return "QUE-6" if got["status"] != wanted["status"] else None
    return None


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "queue_claims",
        "QUE-1 QUE-2 QUE-5",
        "claims of queued steps, beside other calls on some of their runs",
        _claims,
        Capability.QUEUES,
        explain=claimed_twice,
        clause_of=_missed_step,
    ),
    family(
        "ended_leases",
        "QUE-1 QUE-2 QUE-5",
        "claims of queued steps whose leases have just ended",
        _ended_leases,
        Capability.QUEUES,
        Capability.VIRTUAL_CLOCK,
        explain=claimed_twice,
        clause_of=_missed_step,
    ),
    family(
        "joins",
        "QUE-4 QUE-6",
        "advances that end the parents of one step",
        _joins,
        Capability.QUEUES,
        explain=lost_join,
        clause_of=_wrong_completion,
    ),
    family(
        "last_advances",
        "QUE-6",
        "the advance of the last open step, beside calls that make more work",
        _last_advances,
        Capability.QUEUES,
    ),
    family(
        "redispatches",
        "QUE-7",
        "redispatches and claims of one step",
        _redispatches,
        Capability.QUEUES,
        explain=claimed_twice,
        clause_of=_missed_step,
    ),
)
