"""Every order, with times, ids, step keys and the order of the calls all in disagreement, and with ties.

While times, ids and keys rise together, a backend that sorts by the wrong one returns the right order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from flowstore_conformance.checks.compared_store import ComparedStore
from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_RUN_STATUSES,
    TICK,
    require_clock,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call
from flowstore_conformance.registry import check
from flowstore_core import Capability, RunStatus

T = TypeVar("T")

IDS = tuple(
    UUID(text)
    for text in (
        "00000000-0000-0000-0000-000000000001",
        "00000000-0000-0000-8000-000000000000",
        "00000000-0000-0000-7fff-ffffffffffff",
        "00000000-0000-0001-0000-000000000000",
        "00000000-0001-0000-0000-000000000000",
        "00000001-0000-0000-0000-000000000000",
        "01000000-0000-0000-0000-000000000000",
        "7fffffff-ffff-4fff-bfff-ffffffffffff",
        "80000000-0000-4000-8000-000000000000",
        "9a000000-0000-4000-8000-00000000000a",
        "a9000000-0000-4000-8000-000000000009",
        "ffffffff-0000-4000-8000-000000000000",
    )
)
"""Ids whose order differs if bytes are swapped, if numbers are signed, or if digits follow letters."""

KEYS = ("a", "B", "10", "9", "\u00e9", "Z", "_", "a b", "ab", "\uffff", "\U0001f600", "1")

OFFSETS = (timedelta(0), TICK, SECOND, SECOND - TICK, -HOUR)
"""Differences of times with and without fractions of a second: as text they do not all have one length."""


def _shuffled(context: CheckContext, values: Iterable[T]) -> list[T]:
    """The values in a random order; of three or more, neither in theirs nor in the reverse."""
    ordered = list(values)
    drawn = context.random.sample(ordered, k=len(ordered))
    while len(ordered) > 2 and drawn in (ordered, ordered[::-1]):
        drawn = context.random.sample(ordered, k=len(ordered))
    return drawn


def _times(context: CheckContext, begun: datetime, count: int) -> list[datetime]:
    """Times in a random order; with twice as many as OFFSETS, each occurs at least twice."""
    return _shuffled(context, (begun + OFFSETS[number % len(OFFSETS)] for number in range(count)))


async def _make_at(compared: ComparedStore, calls: Sequence[tuple[datetime, Call]]) -> None:
    """Make calls at given times of the virtual clock, which may step back."""
    clock = require_clock(compared.context)
    for at, call in calls:
        clock.now = at
        await compared.make([call])


def _on(run_id: UUID, method: str, **arguments: object) -> Call:
    return Call(method=method, arguments={"run_id": run_id, **arguments})


async def _start_runs(compared: ComparedStore, source: UUID, *, ending: int) -> None:
    """Start runs of every id in a random order at random times, and end some of them in another order."""
    context = compared.context
    clock = require_clock(context)
    begun = clock.now.replace(microsecond=0)
    names = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", "source_run_id": source}
    ids = _shuffled(context, IDS)
    starts = [_on(run_id, "start_run", **names) for run_id in ids]
    await _make_at(compared, list(zip(_times(context, begun, len(ids)), starts, strict=True)))
    ended = _shuffled(context, ids)[:ending]
    ends = [
        _on(run_id, "complete_run", status=TERMINAL_RUN_STATUSES[number % 2])
        for number, run_id in enumerate(ended)
    ]
    await _make_at(compared, list(zip(_times(context, begun + MINUTE, len(ended)), ends, strict=False)))
    clock.now = begun + HOUR


def _run_lists(compared: ComparedStore, source: UUID) -> Iterator[Call]:
    """Every list of runs, whole and in pages that begin and end within ties."""
    model = compared.model
    filters: list[tuple[str, dict[str, object]]] = [
        ("get_runs", {}),
        ("get_runs", {"flow_id": FLOW}),
        ("get_runs_page", {}),
        ("get_runs_page", {"flow_id": FLOW, "status": RunStatus.RUNNING}),
        ("get_runs_page", {"status": TERMINAL_RUN_STATUSES[0]}),
        ("get_runs_page", {"search": "ORDERS"}),
        ("get_runs_page", {"search": "ing"}),
    ]
    for method, given in filters:
        yield Call(method=method, arguments=given)
        yield Call(method=method, arguments={**given, "skip": 1, "take": 3})
        for position in [run.position for run in model.get_runs()][::2]:
            yield Call(method=method, arguments={**given, "after": position, "take": 3})
    for take in (None, 1, 2, 5):
        yield Call(method="get_active_runs", arguments={"take": take})
        yield Call(method="get_derived_runs", arguments={"source_run_id": source, "take": take})


@check("QRY-1", "QRY-6", needs=[Capability.VIRTUAL_CLOCK], isolated=False)
async def lists_of_runs_depend_only_on_start_and_id(context: CheckContext) -> None:
    """Neither the order of the calls nor that of the completions matters, and pages may cut ties."""
    for _ in range(context.profile.of(1, 4, 40)):
        async with context.new_namespace() as namespace:
            compared = ComparedStore.of(namespace)
            source = UUID(int=context.random.getrandbits(128))
            await _start_runs(compared, source, ending=len(IDS) // 2)
            compared.stage = "with runs whose starts, ids and calls are in different orders"
            lists = list(_run_lists(compared, source))
            await compared.make([call for call in lists if call.operation.is_offered(context.capabilities)])


@check("CTL-3", needs=[Capability.VIRTUAL_CLOCK])
async def runs_to_stop_depend_only_on_deadline_and_id(context: CheckContext) -> None:
    """Neither the start of a run nor the order of the calls matters; every length of the list is right."""
    compared = ComparedStore.of(context)
    begun = require_clock(context).now.replace(microsecond=0)
    await _start_runs(compared, IDS[0], ending=1)
    deadlines = _times(context, begun + DAY, len(IDS))
    for run_id, timeout_at in zip(_shuffled(context, IDS), deadlines, strict=True):
        names = {"flow_id": FLOW, "trigger_key": "manual", "timeout_at": timeout_at}
        await compared.make([_on(run_id, "configure_run", **names)])
    cancelled = [run.run_id for run in compared.model.get_active_runs()][:4]
    for run_id in _shuffled(context, cancelled):
        await compared.make([_on(run_id, "request_cancel")])
        if run_id in cancelled[:3]:
            # A cancelled run without a deadline comes last.
            await compared.call("configure_run", run_id=run_id, flow_id=FLOW, trigger_key="manual")
    compared.stage = "with deadlines, ids and calls in different orders"
    for as_of in (begun, begun + DAY, begun + 2 * DAY):
        for take in range(len(IDS)):
            await compared.call("get_runs_to_stop", as_of=as_of, take=take)


@check("STP-8", needs=[Capability.VIRTUAL_CLOCK])
async def stalled_steps_depend_only_on_since_run_and_key(context: CheckContext) -> None:
    """Stalls of all three reasons begin at the same times; neither their reasons nor the calls matter."""
    compared = ComparedStore.of(context)
    clock = require_clock(context)
    begun = clock.now.replace(microsecond=0)
    runs = _shuffled(context, IDS[5:9])
    for run_id in runs:
        clock.advance(SECOND)
        await compared.call(
            "start_run", flow_id=FLOW, flow_name="orders", run_id=run_id, trigger_key="manual"
        )
    places = _shuffled(context, ((run_id, key) for run_id in runs for key in KEYS[:6]))
    has_leases = Capability.LEASES in context.capabilities
    for number, ((run_id, key), since) in enumerate(
        zip(places, _times(context, begun + HOUR, len(places)), strict=True)
    ):
        clock.now = since
        match number % 3:
            case 0:
                await compared.make([_on(run_id, "record_step_start", step_key=key, step_type="http")])
            case 1 if has_leases:
                clock.now = since - MINUTE
                claim = _on(run_id, "try_claim_step", step_key=key, owner="me", lease=MINUTE)
                await compared.make([claim])
            case _:
                clock.now = since - number * MINUTE
                await compared.make([_on(run_id, "try_record_dispatch", step_key=key, due_at=since)])
    clock.now = begun + DAY
    compared.stage = "with stalls, ids, keys and calls in different orders"
    for as_of in (begun + HOUR, begun + DAY):
        for take in (0, 1, 2, 3, 5, 8, 13, len(places)):
            await compared.call("get_stalled_steps", as_of=as_of, take=take)


@check("QRY-1", "QRY-3", "EVT-1", needs=[Capability.VIRTUAL_CLOCK])
async def lists_of_one_run_depend_only_on_their_keys(context: CheckContext) -> None:
    """Steps, attempts, claims, dispatches, outputs and events of a run, written in other orders."""
    compared = ComparedStore.of(context)
    clock = require_clock(context)
    begun = clock.now.replace(microsecond=0)
    run_id, caps = IDS[-1], context.capabilities
    await compared.call("start_run", flow_id=FLOW, flow_name="orders", run_id=run_id, trigger_key="manual")
    writes: list[dict[str, object]] = [
        {"method": "try_record_dispatch"},
        {"method": "try_claim_step", "owner": "me"},
        {"method": "record_step_start", "step_type": "http"},
    ]
    for write in writes:
        method = str(write.pop("method"))
        calls = [_on(run_id, method, step_key=key, **write) for key in _shuffled(context, KEYS)]
        await _make_at(compared, list(zip(_times(context, begun, len(KEYS)), calls, strict=True)))
    # As text, attempt 10 comes before attempt 9, and so does event 10.
    for number in range(11):
        clock.now = begun - number * SECOND
        calls = [_on(run_id, "record_step_start", step_key=KEYS[number % 2], step_type="http")] * 2
        if Capability.OUTPUTS in caps:
            calls.append(_on(run_id, "save_output", key=KEYS[-number], value_json=f"{number}"))
        if Capability.EVENTS in caps:
            calls.append(_on(run_id, "append_event", event_type=f"{-number}"))
        await compared.make(calls)
    compared.stage = "with times, keys and calls in different orders"
    names = ("get_run_detail", "get_step_claims", "get_dispatches")
    await compared.make([_on(run_id, name) for name in names])
    statuses = list(await context.store.get_step_statuses(run_id))
    context.expect(statuses, sorted(KEYS), "the keys of get_step_statuses by code point")
    if Capability.OUTPUTS in caps:
        outputs = list(await context.store.get_outputs(run_id))
        context.expect(outputs, sorted(outputs), "the keys of get_outputs by code point")
    if Capability.EVENTS in caps:
        for after, take in ((0, 200), (8, 2), (9, 1), (9, 5), (1, 9)):
            await compared.call("get_run_events", run_id=run_id, after=after, take=take)


@check("SIG-2", "SIG-3", needs=[Capability.VIRTUAL_CLOCK])
async def deliveries_depend_only_on_creation_and_key(context: CheckContext) -> None:
    """A payload goes to the oldest waiter, whatever the order of the calls and of repeated registrations."""
    compared = ComparedStore.of(context)
    clock = require_clock(context)
    begun = clock.now.replace(microsecond=0)
    for run_id in IDS[: context.profile.of(2, 6, 12)]:
        clock.now = begun
        await compared.call(
            "start_run", flow_id=FLOW, flow_name="orders", run_id=run_id, trigger_key="manual"
        )
        waits = [
            _on(run_id, "register_waiter", step_key=key, signal_name="go") for key in _shuffled(context, KEYS)
        ]
        await _make_at(compared, list(zip(_times(context, begun, len(waits)), waits, strict=True)))
        clock.now = begun + HOUR
        again = [{**wait.arguments, "expires_at": begun + DAY} for wait in _shuffled(context, waits)[:6]]
        await compared.make([Call(method="register_waiter", arguments=one) for one in again])
        # Rename a waiter, so that the oldest of another name is not the oldest of all.
        await compared.make([_on(run_id, "register_waiter", step_key=KEYS[3], signal_name="stop")])
        compared.stage = "with waiters whose creations, keys and calls are in different orders"
        for number, _ in enumerate(KEYS):
            clock.now = begun + HOUR - number * SECOND
            signal = _on(run_id, "deliver_signal", signal_name="go", payload_json=f"{number}")
            await compared.make([signal])
        if Capability.WAITERS in context.capabilities:
            await compared.make([_on(run_id, "get_waiters")])
