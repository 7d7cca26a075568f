"""Queries of ended runs, more than a search index gathers at once, and of changes after it gathered them.

A backend may build an index lazily: from runs that have ended, during a cleanup, or in batches. Queries must
not show which runs it contains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import cycle
from uuid import UUID

from flowstore_conformance.checks.compared_store import ComparedStore
from flowstore_conformance.checks.fixtures import (
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_RUN_STATUSES,
    TICK,
    new_id,
    require_clock,
)
from flowstore_conformance.checks.queries import LONG_NAMES, LONG_SEARCHES, SEARCHES, long_texts
from flowstore_conformance.context import CheckContext, Profile
from flowstore_conformance.history import Call
from flowstore_conformance.registry import Kind, check
from flowstore_core import Capability, RunStatus, StepStatus

OTHER_FLOW = UUID("f10a0000-0000-4000-8000-000000000002")
NUMBERED_SEARCHES = 9
"""The number of searches for the texts of a change, the first of its queries."""
EARLIEST = datetime(1, 1, 2, tzinfo=UTC)
"""A cleanup with this cutoff deletes nothing, but may maintain an index."""


def _on(run_id: UUID, method: str, **arguments: object) -> Call:
    return Call(method=method, arguments={"run_id": run_id, **arguments})


def _start(run_id: UUID, **given: object) -> Call:
    names = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual"}
    return _on(run_id, "start_run", **{**names, **given})


def _close(run_id: UUID, step_key: str, status: StepStatus, **texts: str) -> Call:
    return _on(run_id, "record_step_complete", step_key=step_key, status=status, **texts)


def _skip(run_id: UUID, step_key: str, reason: str) -> Call:
    return _on(run_id, "record_skipped_step", step_key=step_key, step_type="http", reason=reason)


def _end(run_id: UUID, status: RunStatus = RunStatus.SUCCEEDED) -> Call:
    return _on(run_id, "complete_run", status=status)


async def _fill(compared: ComparedStore, count: int, first: int) -> None:
    """Start and end runs, each with a step and its text, a minute apart in groups."""
    clock = require_clock(compared.context)
    for at in range(0, count, 50):
        runs = [UUID(int=first + number) for number in range(at, min(at + 50, count))]
        # Most are in another flow than the changes: without an index a search reads every run of a flow.
        flows = (OTHER_FLOW, FLOW, OTHER_FLOW)
        starts = [_start(run_id, flow_id=flows[run_id.int % 3], flow_name="filler") for run_id in runs]
        await compared.make_concurrently(starts)
        await compared.make_concurrently([_skip(run_id, "a", f"filler {run_id.int}") for run_id in runs])
        clock.advance(MINUTE)
        ends = [_end(run_id, TERMINAL_RUN_STATUSES[run_id.int % 3]) for run_id in runs]
        await compared.make_concurrently(ends)


def _texts() -> Iterator[Call]:
    """Ended runs with the texts of the other search examples in every searched field."""
    for number, (text, _, _) in enumerate(SEARCHES):
        run_id = UUID(int=10_000 + number)
        # A text that is only in one field must be found there.
        fields = ("flow_name", "trigger_key", "job_id", "step_key", "error_message", "output_json")
        field = fields[number % len(fields)]
        yield _start(run_id, **({field: text} if number % len(fields) < 3 else {}))
        step_key = text if field == "step_key" else "a"
        yield _on(run_id, "record_step_start", step_key=step_key, step_type="http")
        texts = {field: f"<{text}>"} if field in ("error_message", "output_json") else {}
        yield _close(run_id, step_key, StepStatus.FAILED, **texts)
        # The second attempt leaves the text in the first one only.
        yield _on(run_id, "record_step_start", step_key=step_key, step_type="http")
        yield _close(run_id, step_key, StepStatus.SUCCEEDED)
        yield _end(run_id)


def _long_texts(text_bytes: int) -> Iterator[Call]:
    """An ended run with texts that are longer than the searched part."""
    run_id = UUID(int=10_100)
    # In another flow than the changes, because searching long texts takes long.
    yield _start(run_id, flow_id=OTHER_FLOW, **LONG_NAMES)
    for number, (key, text) in enumerate(long_texts(text_bytes).items()):
        yield _on(run_id, "record_step_start", step_key=key, step_type="http")
        given = {"output_json": text} if number % 2 else {"error_message": text}
        yield _close(run_id, key, StepStatus.FAILED, **given)
    yield _end(run_id)


def _subject(number: int) -> UUID:
    """The run of a change."""
    return UUID(int=20_000 + number)


def _start_subject(number: int) -> list[Call]:
    """An ended run with a failed, a skipped and an open step, whose texts contain its number."""
    run_id = _subject(number)
    return [
        _start(run_id, flow_name=f"subject{number}"),
        _on(run_id, "record_step_start", step_key="failed", step_type="http"),
        _close(run_id, "failed", StepStatus.FAILED, error_message=f"error{number}", output_json="[402]"),
        _skip(run_id, f"skipped{number}", f"reason{number}"),
        _on(run_id, "record_step_start", step_key="open", step_type="http"),
        _end(run_id, RunStatus.FAILED),
    ]


def _late_completion(number: int) -> list[Call]:
    return [_close(_subject(number), "open", StepStatus.FAILED, error_message=f"late{number}")]


def _late_skip(number: int) -> list[Call]:
    return [_skip(_subject(number), f"lateskip{number}", f"late{number}")]


def _retry(number: int) -> list[Call]:
    """Reopen and end the run with another output; the reset step's texts disappear."""
    run_id = _subject(number)
    return [
        _on(run_id, "retry_step", step_key="failed", reset=[f"skipped{number}"]),
        _on(run_id, "record_step_start", step_key="failed", step_type="http"),
        _close(run_id, "failed", StepStatus.SUCCEEDED, output_json=f"late{number}"),
        _end(run_id),
    ]


def _reset(number: int) -> list[Call]:
    """Reopen and end the run without starting the reset step again."""
    run_id = _subject(number)
    return [
        _on(run_id, "retry_step", step_key="failed", reset=[f"skipped{number}"]),
        _end(run_id, RunStatus.CANCELLED),
    ]


def _supersede(number: int) -> list[Call]:
    """Reopen the run with its open attempt, which is closed, and skip that step."""
    run_id = _subject(number)
    return [
        _on(run_id, "retry_step", step_key="open"),
        _end(run_id, RunStatus.CANCELLED),
        _skip(run_id, "open", f"late{number}"),
    ]


def _replace(number: int) -> list[Call]:
    """Start another run with the id of a deleted one."""
    run_id = _subject(number)
    return [_start(run_id, flow_name=f"late{number}"), _end(run_id)]


OLDER_RUNS = 50
"""The largest number of runs that start before those that a search finds."""
REPLACED = "a run with the id of a deleted run"
CHANGES: Mapping[str, Callable[[int], list[Call]]] = {
    "a late completion": _late_completion,
    "a late skip": _late_skip,
    "a retry with another output": _retry,
    "a retry that resets a step": _reset,
    "a retry and a late skip": _supersede,
    REPLACED: _replace,
}
"""The changes of indexed runs, each of its own run, which end with the run ended again."""


def _questions(number: int, at: datetime) -> Iterator[Call]:
    """The queries that one of the changes may affect: first the searches for its texts."""
    words = ("subject", "error", "skipped", "reason", "late", "lateskip")
    for search in (*(f"{word}{number}" for word in words), f"{_subject(number)}", "superseded"):
        yield Call(method="get_runs_page", arguments={"flow_id": FLOW, "search": search})
    yield Call(method="get_runs_page", arguments={"search": f"late{number}"})
    for status in RunStatus:
        yield Call(method="get_runs_page", arguments={"status": status, "take": 2})
        for search in ("SUBJECT", status[:-1]):
            given = {"flow_id": FLOW, "status": status, "search": search, "take": 2}
            yield Call(method="get_runs_page", arguments=given)
    for flow_id in (None, FLOW, OTHER_FLOW):
        yield Call(method="get_runs_page", arguments={"flow_id": flow_id, "skip": 1, "take": 2})
        window = {"granularity": "hour", "since": at - HOUR, "until": at + HOUR, "flow_id": flow_id}
        yield Call(method="get_run_timeseries", arguments=window)
    yield Call(method="get_statistics", arguments={"as_of": at})
    yield Call(method="get_active_runs")


@check(
    "QRY-2",
    "QRY-1",
    "QRY-4",
    "QRY-5",
    needs=[Capability.DASHBOARD, Capability.VIRTUAL_CLOCK],
    kind=Kind.MODEL,
)
async def queries_do_not_depend_on_an_index(context: CheckContext) -> None:
    """Queries agree with the model for many ended runs, after a cleanup, and after changes of ended runs."""
    if context.profile is Profile.STANDARD:
        # A search of more than a thousand runs is slow: half are made, before or after the cleanup.
        async with context.new_namespace() as namespace:
            await _search_ended_runs(ComparedStore.of(namespace), 1_100, every=4)
    compared = ComparedStore.of(context)
    clock = require_clock(context)
    begun = clock.now
    searches = await _search_ended_runs(compared, context.profile.of(70, 70, 5_000))
    replaced = list(CHANGES).index(REPLACED)
    for number, (name, make_calls) in enumerate(CHANGES.items()):
        questions = list(_questions(number, begun))
        if number == replaced:
            await compared.call("cleanup", cutoff=begun + TICK)
            compared.stage = "after a cleanup that deleted an indexed run"
            await compared.make(questions)
        halves = cycle([questions])
        if context.profile is not Profile.THOROUGH:
            searches_of_change, others = questions[:NUMBERED_SEARCHES], questions[NUMBERED_SEARCHES:]
            halves = cycle([searches_of_change + others[::2], searches_of_change + others[1::2]])
        calls = make_calls(number)
        for call in calls:
            await compared.make([call])
            if call is calls[-1] or context.profile is not Profile.QUICK:
                compared.stage = f"after {name} ({call.method} of an indexed run)"
                await compared.make(next(halves))
        await _index(compared)
        compared.stage = f"after {name} of an indexed run and a cleanup that deleted none"
        await compared.make(next(halves))
        clock.advance(SECOND)
    await compared.make(searches)


async def _search_ended_runs(compared: ComparedStore, count: int, *, every: int = 1) -> list[Call]:
    """Fill a namespace with ended runs, search it before and after a cleanup, and return the searches.

    Before the cleanup it makes the first of ``every`` searches, after it the last.
    """
    context, replaced = compared.context, list(CHANGES).index(REPLACED)
    await compared.make(_start_subject(replaced))
    require_clock(context).advance(MINUTE)
    # Most of the runs start after those that a search finds: it may not stop at the newest thousand.
    older = min(count // 2, OLDER_RUNS)
    await _fill(compared, older, first=1)
    for number in range(len(CHANGES)):
        if number != replaced:
            await compared.make(_start_subject(number))
    await compared.make([*_texts(), *_long_texts(context.limits.text_bytes)])
    await _fill(compared, count - older, first=1 + older)
    needles = [needle for _, matching, others in SEARCHES for needle in (*matching[-1:], *others[:1])]
    needles += LONG_SEARCHES
    searches = [Call(method="get_runs_page", arguments={"search": needle}) for needle in needles]
    if context.profile is not Profile.QUICK:
        compared.stage = f"with {count} ended runs"
        await compared.make(searches[::every])
    await _index(compared)
    compared.stage = f"with {count} ended runs after a cleanup that deleted none"
    await compared.make(searches[every - 1 :: every])
    return searches


def _open(run_id: UUID, step_key: str = "a") -> Call:
    return _on(run_id, "record_step_start", step_key=step_key, step_type="http")


def _retry_failed(run_id: UUID, step_key: str, *reset: str) -> list[Call]:
    """Let a step fail and reopen it."""
    failed = [_open(run_id, step_key), _close(run_id, step_key, StepStatus.FAILED)]
    return [*failed, _on(run_id, "retry_step", step_key=step_key, reset=reset)]


STATES: Mapping[str, Callable[[UUID], list[Call]]] = {
    "a new key": lambda run_id: [],
    "a claimed key": lambda run_id: [_on(run_id, "try_claim_step", step_key="a", owner="me")],
    "a dispatched key": lambda run_id: [_on(run_id, "try_record_dispatch", step_key="a")],
    "a key with a waiter": lambda run_id: [_on(run_id, "register_waiter", step_key="a", signal_name="go")],
    "a Running step": lambda run_id: [_open(run_id)],
    "a step that runs again": lambda run_id: [
        _open(run_id),
        _close(run_id, "a", StepStatus.FAILED),
        _open(run_id),
    ],
    "a Pending step": lambda run_id: [_open(run_id), _close(run_id, "a", StepStatus.PENDING)],
    "a reopened step": lambda run_id: _retry_failed(run_id, "a"),
    "a reset step": lambda run_id: [_skip(run_id, "a", "first"), *_retry_failed(run_id, "b", "a")],
}
"""The calls that bring a step into a state in which its run may end and its result may come later."""


def _late_calls(state: str, run_id: UUID, text: str) -> list[Call]:
    """The calls that may write the text into a step of a terminal run, each to be made alone."""
    calls = [_skip(run_id, "a", text)]
    if "run" in state.lower():
        calls += [
            _close(run_id, "a", StepStatus.FAILED, error_message=text),
            _close(run_id, "a", StepStatus.PENDING, output_json=text),
            _on(
                run_id,
                "reschedule_step",
                step_key="a",
                attempt=2 if "again" in state else 1,
                output_json=text,
            ),
        ]
    return calls


@check("QRY-2", needs=[Capability.DASHBOARD], isolated=False)
async def late_results_of_ended_runs_are_found(context: CheckContext) -> None:
    """A search finds a result that follows the end and the indexing of its run, whatever the step was."""
    compared = ComparedStore.of(context)
    # A flow of its own, because searching the runs of other checks may take long.
    flow_id = new_id(context)
    writes: dict[UUID, Call] = {}
    texts: dict[UUID, str] = {}

    def search(text: str) -> Call:
        return Call(method="get_runs_page", arguments={"flow_id": flow_id, "search": text})

    for state in STATES:
        for number in range(len(_late_calls(state, UUID(int=0), ""))):
            run_id = new_id(context)
            text = f"result of {state} {run_id.hex}"
            call = _late_calls(state, run_id, text)[number]
            if call.operation.is_offered(context.capabilities):
                writes[run_id], texts[run_id] = call, text
                begin = [_start(run_id, flow_id=flow_id), *STATES[state](run_id)]
                await compared.make([*begin, _end(run_id, RunStatus.FAILED)])
    await context.store.cleanup(EARLIEST)
    compared.stage = "after a late result of an ended run, which a cleanup may have indexed"
    for run_id, text in texts.items():
        await compared.make([writes[run_id], search(text)])
    await context.store.cleanup(EARLIEST)
    for run_id, text in texts.items():
        await compared.make([search(text.upper())])
        if compared.model.get_step_statuses(run_id)["a"] is StepStatus.PENDING:
            await compared.make([_skip(run_id, "a", f"second {text}"), search(f"second {text}")])


async def _index(compared: ComparedStore) -> None:
    """Let the backend maintain its indexes."""
    await compared.call("cleanup", cutoff=EARLIEST)
