"""Counts, totals and lists over all runs, after thousands of concurrent changes of every kind.

The expected results are computed by the model from an enumeration: the state of each run, read run by run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from datetime import datetime
from random import Random
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_RUN_STATUSES,
    advance,
    call_at_once,
    new_id,
    now,
)
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.diffing import expected_and_got
from flowstore_conformance.history import comparable
from flowstore_conformance.model import Model, Run, State
from flowstore_conformance.model.state import Control, Step
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.write_scenarios import TAGS
from flowstore_core import (
    Capability,
    ConflictError,
    FlowRunRecord,
    FlowStore,
    RunNotFoundError,
    RunStatus,
    RunTimeseriesGranularity,
    StepNotFoundError,
    StepStatus,
    StoreUnavailableError,
)

CLIENTS = 12
_FLOWS = [UUID(int=FLOW.int + number) for number in range(3)]
_STEPS = ("charge", "ship")


class _Client:
    """Changes random runs through one store, concurrently with other clients."""

    def __init__(self, context: CheckContext, store: FlowStore, runs: list[UUID]) -> None:
        self._context = context
        self._store = store
        self._runs = runs
        """Every run that a client started; shared by all clients."""
        self._random = Random(context.random.getrandbits(64))

    async def change(self, count: int) -> None:
        """Make ``count`` changes. Conflicts are expected, because clients change the same runs."""
        for _ in range(count):
            try:
                await self._change()
            except (ConflictError, RunNotFoundError, StepNotFoundError, StoreUnavailableError):
                continue

    def _change(self) -> Awaitable[object]:
        store, draw, at = self._store, self._random, now(self._context)
        run_id, key = draw.choice(self._runs), draw.choice(_STEPS)
        deadline = at + draw.randrange(-20, 20) * HOUR
        calls: list[tuple[float, Any]] = [
            (3, self._start),
            (4, lambda: store.complete_run(run_id, draw.choice(TERMINAL_RUN_STATUSES))),
            (4, lambda: store.record_step_start(run_id, key, "http")),
            (2, lambda: store.record_step_complete(run_id, key, StepStatus.FAILED, error_message="FAILED")),
            (2, lambda: store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, output_json='"done"')),
            (2, lambda: store.record_skipped_step(run_id, key, "http", "not needed")),
            (4, lambda: store.retry_step(run_id, key, reset=_STEPS)),
            (1, lambda: store.try_claim_step(run_id, key)),
            (1, lambda: store.release_step_claim(run_id, key)),
            (1, lambda: store.try_record_dispatch(run_id, key, due_at=deadline)),
            (1, lambda: store.configure_run(run_id, FLOW, "manual", timeout_at=deadline)),
            (1, lambda: store.request_cancel(run_id)),
            (1, lambda: store.mark_timed_out(run_id)),
            (0.1, lambda: store.cleanup(at - draw.randrange(30) * HOUR)),
        ]  # fmt: skip
        weights, chosen = zip(*calls, strict=True)
        (call,) = draw.choices(chosen, weights)
        made: Awaitable[object] = call()
        return made

    async def _start(self) -> None:
        draw, run_id = self._random, UUID(int=self._random.getrandbits(128), version=4)
        flow, name = draw.choice(_FLOWS), draw.choice(("orders", "invoices"))
        if Capability.TRIGGER in self._context.capabilities and draw.random() < 0.3:
            key = f"key {draw.randrange(1000)}"
            result = await self._store.trigger_run(flow, name, run_id, "timer", idempotency_key=key)
            run_id = result.run.run_id
        else:
            await self._store.start_run(flow, name, run_id, "manual", source_run_id=self._runs[0])
        self._runs.append(run_id)


@check(
    "QRY-1",
    "QRY-4",
    "QRY-5",
    "QRY-2",
    "QRY-3",
    "QRY-6",
    "CTL-3",
    "STP-8",
    kind=Kind.VOLUME,
    rotation="volume of a store",
)
async def counts_agree_with_the_runs_after_thousands_of_changes(context: CheckContext) -> None:
    """After concurrent changes by several stores every count, total, series and list agrees with the runs."""
    stores = await context.workers(3)
    runs = [new_id(context)]
    await context.store.start_run(FLOW, "orders", runs[0], "manual")
    begun = now(context)
    of = context.profile.of
    rounds, changes = of(1, 2, 12), of(60, 600, 4_000)
    for number in range(rounds):
        clients = [_Client(context, stores[index % len(stores)], runs) for index in range(CLIENTS)]
        await asyncio.gather(*(client.change(changes // CLIENTS) for client in clients))
        model = await _enumerate(context, stores[0], runs)
        reader = stores[(number + 1) % len(stores)]
        await _compare(context, reader, model, begun)
        if number == rounds - 1:
            for store in stores:
                await _compare(context, store, model, begun)
        advance(context, context.random.randrange(1, 14 * 3600) * SECOND)


async def _enumerate(context: CheckContext, store: FlowStore, runs: Sequence[UUID]) -> Model:
    """A model in the state of the store, from reads that each name one run."""

    async def read(number: int) -> Run:
        run_id = ids[number]
        detail = await store.get_run_detail(run_id)
        control = await store.get_run_control(run_id)
        claims = {claim.step_key: claim for claim in await store.get_step_claims(run_id)}
        dispatches = {dispatch.step_key: dispatch for dispatch in await store.get_dispatches(run_id)}
        started = {} if detail is None else {step.step_key: step for step in detail.steps}
        run = Run()
        if detail is not None:
            names = FlowRunRecord.__dataclass_fields__
            run.record = FlowRunRecord(**{name: getattr(detail, name) for name in names})
        for key in {*claims, *dispatches, *started}:
            step = started.get(key)
            run.steps[key] = Step(
                status=None if step is None else step.status,
                attempts=() if step is None else step.attempts,
                reopened=step is not None and step.attempt_count > len(step.attempts),
                claim=claims.get(key),
                dispatch=dispatches.get(key),
            )
        if control is not None:
            cancelled_at = control.cancel_requested_at
            run.control = Control(
                flow_id=control.flow_id,
                trigger_key=control.trigger_key,
                idempotency_key=control.idempotency_key,
                timeout_at=control.timeout_at,
                created_at=control.created_at,
                cancelled=None if cancelled_at is None else (cancelled_at, control.cancel_reason),
            )
        return run

    ids = list(dict.fromkeys(runs))
    state = State()
    for number, found in enumerate(await call_at_once(read, range(len(ids)))):
        if not isinstance(found, Run):
            raise ContractViolation(f"reading a run: expected no error, got {found!r}")
        state.runs[ids[number]] = found
    return Model(lambda: now(context), state)


def queries_of_all_runs(
    context: CheckContext, begun: datetime, source: UUID
) -> list[tuple[str, str, dict[str, Any]]]:
    """Every read over all runs since a time, as (clause, operation, arguments).

    ``source`` is the run from which others are derived.
    """
    at, can = now(context), context.capabilities
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("QRY-6", "get_active_runs", {}),
        ("QRY-6", "get_derived_runs", {"source_run_id": source}),
    ]
    calls += [("QRY-1", "get_runs", {"flow_id": flow, "take": context.page_size}) for flow in (None, *_FLOWS)]
    if Capability.DASHBOARD in can:
        days = range((at - begun) // DAY + 2)
        calls += [("QRY-4", "get_statistics", {"as_of": begun + day * DAY}) for day in days]
        for granularity in RunTimeseriesGranularity:
            for flow in (None, _FLOWS[1]):
                window = {"granularity": granularity, "since": begun - DAY, "until": at + MINUTE}
                calls.append(("QRY-5", "get_run_timeseries", {**window, "flow_id": flow}))
        for status in (None, *RunStatus):
            for search in (None, "ship", "FAILED"):
                clause = "QRY-2" if search else "QRY-3"
                calls.append(
                    (clause, "get_runs_page", {"status": status, "search": search, "take": context.page_size})
                )
    if Capability.TAGS in can:
        calls.append(("TAG-3", "get_runs", {"tags": TAGS, "take": context.page_size}))
    if {Capability.TAGS, Capability.DASHBOARD} <= can:
        for status, search in ((None, None), ("Failed", None), (None, "ship"), ("Failed", "FAILED")):
            given = {"status": status, "search": search, "tags": TAGS, "take": context.page_size}
            calls.append(("TAG-3", "get_runs_page", given))
    if Capability.DEADLINES in can:
        calls += [
            ("CTL-3", "get_runs_to_stop", {"as_of": as_of, "take": context.page_size})
            for as_of in (at - 9 * HOUR, at)
        ]
    if Capability.RECOVERY in can:
        calls += [
            ("STP-8", "get_stalled_steps", {"as_of": as_of, "take": context.page_size})
            for as_of in (at - 9 * HOUR, at)
        ]
    return calls


async def _compare(context: CheckContext, store: FlowStore, model: Model, begun: datetime) -> None:
    """Compare every read over all runs with the model."""
    source = next(iter(model.state.runs))
    for clause, operation, given in queries_of_all_runs(context, begun, source):
        context.assertions += 1
        found = comparable(await getattr(store, operation)(**given))
        wanted = comparable(getattr(model, operation)(**given))
        if found != wanted:
            arguments = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ContractViolation(
                f"{operation}({arguments}) after concurrent changes disagrees with the runs that "
                f"get_run_detail returns one by one: {expected_and_got(wanted, found)}",
                clause=clause,
            )
