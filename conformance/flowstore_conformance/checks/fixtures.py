"""Building blocks of checks: starting runs and steps, reading records, observing the whole state."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

from flowstore_conformance.context import (
    CheckContext,
    ContractViolation,
    Inconclusive,
    Profile,
    Unsupported,
    VirtualClock,
)
from flowstore_conformance.diffing import expected_and_got, plain
from flowstore_conformance.history import comparable
from flowstore_conformance.state_probe import reads_of_run
from flowstore_conformance.write_scenarios import TAGS
from flowstore_core import (
    Capability,
    FlowRunControlRecord,
    FlowRunDetail,
    FlowRunRecord,
    FlowSignalWaiter,
    FlowStepRecord,
    FlowStore,
    FlowStoreError,
    RunStatus,
    SignalDeliveryResult,
    SignalDeliveryStatus,
    StepStatus,
    StoreUnavailableError,
)

T = TypeVar("T")

FLOW = UUID("f10a0000-0000-4000-8000-000000000001")
TICK = timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
FAR_FUTURE = datetime(2100, 1, 1, tzinfo=UTC)

TERMINAL_RUN_STATUSES = (RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED)
TERMINAL_STEP_STATUSES = (StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED)
CLOSING_STATUSES = (*TERMINAL_STEP_STATUSES, StepStatus.PENDING)
"""Every status that closes an attempt."""

NOT_FOUND = SignalDeliveryResult(status=SignalDeliveryStatus.NOT_FOUND, step_key=None, delivered_at=None)
BUFFERED = SignalDeliveryResult(status=SignalDeliveryStatus.BUFFERED, step_key=None, delivered_at=None)

# Some databases treat some of these keys as equal or order them differently: case, blanks, accents,
# normalisation forms, a homoglyph, wildcards, code points beyond the first plane.
SIMILAR_KEYS = (
    "key",
    "Key",
    "KEY",
    "key ",
    " key",
    "key\n",
    "k\u0435y",
    "k\u00e9y",
    "ke\u0301y",
    "\u212aey",
    "k%y",
    "k_y",
    "stra\u00dfe",
    "strasse",
    "1",
    "01",
    "1.0",
    "\uffff",
    "\U0001f600",
)


def new_id(context: CheckContext) -> UUID:
    """A random id, determined by the seed."""
    return UUID(int=context.random.getrandbits(128), version=4)


def now(context: CheckContext) -> datetime:
    """The store's time: exact with a virtual clock, else approximate."""
    return datetime.now(UTC) if context.clock is None else context.clock()


def advance(context: CheckContext, duration: timedelta) -> datetime:
    """Advance the virtual clock, if there is one, and return the store's time."""
    if context.clock is not None:
        context.clock.advance(duration)
    return now(context)


def require_clock(context: CheckContext) -> VirtualClock:
    """Return the virtual clock, for checks that need VIRTUAL_CLOCK."""
    if context.clock is None:
        raise Inconclusive("this store has no virtual clock", retryable=False)
    return context.clock


async def second_store(context: CheckContext) -> FlowStore:
    """Return a second store on the namespace, or the context's store if the backend allows only one.

    It stays open, because later checks use it too.
    """
    return (await context.workers(2))[-1]


async def new_store(context: CheckContext, **options: Any) -> FlowStore:
    """Open a new store on the namespace; return the context's store if the backend allows only one."""
    try:
        return await context.open(**options)
    except Unsupported:
        return context.store


async def start(context: CheckContext, **given: Any) -> UUID:
    """Start a run and return its id."""
    run_id: UUID = given.pop("run_id", None) or new_id(context)
    arguments = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", **given}
    await context.store.start_run(run_id=run_id, **arguments)
    return run_id


STRANGERS = (
    ("mine", "other", "another owner"),
    ("ownerless", "me", "an owner that claimed the step after its start"),
    ("taken", "me", "an owner whose claim was taken over"),
    ("taken", "other", "an owner that has not started the step"),
    ("again", "me", "an owner that claimed the step again since its start"),
)
"""A step of ``start_as_owners``, an owner that has not started its attempt, and who that is."""


async def start_as_owners(context: CheckContext, run_id: UUID) -> None:
    """Start the steps of STRANGERS; of all of them ``me`` has started the attempt of ``mine`` alone."""
    store = context.store
    await store.record_step_start(run_id, "ownerless", "http")
    await store.try_claim_step(run_id, "ownerless", owner="me")
    for key, next_owner in (("mine", None), ("taken", "other"), ("again", "me")):
        await store.try_claim_step(run_id, key, owner="me")
        await store.record_step_start(run_id, key, "http", owner="me")
        if next_owner is not None:
            await store.release_step_claim(run_id, key)
            await store.try_claim_step(run_id, key, owner=next_owner)


async def run_step(
    context: CheckContext,
    run_id: UUID,
    step_key: str = "charge",
    status: StepStatus = StepStatus.SUCCEEDED,
    *,
    output_json: str | None = None,
    error_message: str | None = None,
) -> int:
    """Start a step, close the attempt and return its number."""
    attempt = await context.store.record_step_start(run_id, step_key, "http")
    await context.store.record_step_complete(
        run_id, step_key, status, output_json=output_json, error_message=error_message, attempt=attempt
    )
    return attempt


async def skip_steps(context: CheckContext, run_id: UUID, *step_keys: str) -> None:
    for step_key in step_keys:
        await context.store.record_skipped_step(run_id, step_key, "http", "not needed")


# Required records: a missing one is a violation of the store, not an error of the suite


def expect_present(value: T | None, what: str) -> T:
    """Return a record, or raise ContractViolation for None."""
    if value is None:
        raise ContractViolation(f"{what}: expected a record, got None")
    return value


def single(values: Iterable[T], what: str) -> T:
    """Return the only value, or raise ContractViolation."""
    found = list(values)
    if len(found) != 1:
        raise ContractViolation(
            f"{what}: expected one value, got {len(found)}: {plain(comparable(found))[:300]}"
        )
    return found[0]


async def get_run(context: CheckContext, run_id: UUID) -> FlowRunDetail:
    return expect_present(await context.store.get_run_detail(run_id), "get_run_detail of a stored run")


async def get_step(context: CheckContext, run_id: UUID, step_key: str = "charge") -> FlowStepRecord:
    """Return a step of get_run_detail."""
    detail = await get_run(context, run_id)
    steps = [step for step in detail.steps if step.step_key == step_key]
    step = single(steps, f"step {step_key!r} in get_run_detail")
    if not step.attempts:
        raise ContractViolation(
            f"step {step_key!r} in get_run_detail: expected at least one attempt, got none"
        )
    return step


async def get_control(context: CheckContext, run_id: UUID) -> FlowRunControlRecord:
    return expect_present(await context.store.get_run_control(run_id), "get_run_control")


async def get_waiter(context: CheckContext, run_id: UUID, step_key: str = "wait") -> FlowSignalWaiter:
    return expect_present(await context.store.get_waiter(run_id, step_key), f"get_waiter of {step_key!r}")


def fields_of(record: object, *names: str) -> dict[str, Any]:
    """Some fields of a record by name, for comparison with a mapping."""
    return {name: getattr(record, name, "<no such field>") for name in names}


def expect_fields(context: CheckContext, record: object, sentence: str, **wanted: object) -> None:
    """Compare some fields of a record, or attributes of an error, with their expected values."""
    context.expect(fields_of(record, *wanted), wanted, sentence)


def run_numbers(runs: Sequence[FlowRunRecord]) -> list[int]:
    """The ids of runs as integers."""
    return [run.run_id.int for run in runs]


def abbreviate(value: object) -> str:
    """A short form of a value for a message."""
    # Truncate first: the repr of a long text is long too.
    text = repr(value[:60]) if isinstance(value, str) else repr(value)
    size = len(value) if isinstance(value, str) else len(text)
    return text if size < 60 else f"{text[:50]}... of {size:,}"


async def outcome_of(call: Awaitable[object]) -> object:
    """Await a call and return its result, or the name of its error if no error is allowed."""
    try:
        return await call
    except FlowStoreError as error:
        return f"<{type(error).__name__} raised>"


MAX_REFUSALS = 20
"""Repetitions of calls that an overloaded store refuses."""


async def call_at_once(call: Callable[[int], Awaitable[object]], numbers: Sequence[int]) -> list[object]:
    """Make a call for each number concurrently, and return the result or contract error of each.

    StoreUnavailableError means that a call did not happen, because the store or the machine did not keep up
    with the others. Such calls are repeated; if the store keeps refusing them, raises Inconclusive.
    """
    outcomes: dict[int, object] = {}
    left = list(numbers)
    for _ in range(MAX_REFUSALS):
        found = await asyncio.gather(*(call(number) for number in left), return_exceptions=True)
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, FlowStoreError):
                raise ContractViolation(
                    f"a concurrent call: expected a contract error, got {type(outcome).__name__}",
                    clause="CON-2",
                ) from outcome
        outcomes |= zip(left, found, strict=True)
        left = [number for number in left if type(outcomes[number]) is StoreUnavailableError]
        if not left:
            return [outcomes[number] for number in numbers]
    raise Inconclusive(
        f"the store refused {len(left):,} of {len(numbers):,} concurrent calls: {outcomes[left[0]]}"
    )


# The whole state

LISTS_OF_RUNS = (
    "get_active_runs",
    "get_runs with tags",
    "get_runs_page",
    "get_statistics",
    "get_stalled_steps",
    "get_queues",
    "get_runs_to_stop",
)
"""The reads across runs of which an observation of the quick profile has some, beside get_runs."""
PARTS_OF_READS = (
    "get_run_status",
    "get_step_statuses",
    "get_claimed_step_keys",
    "get_dispatched_step_keys",
    "get_derived_runs",
)
"""The reads of a run that show a part of its other reads, or runs; of these the quick profile has one."""
SAMPLED_LISTS = 3

_Reads = dict[str, Callable[[], Awaitable[Any]]]


async def observe_all(
    context: CheckContext, *run_ids: UUID, store: FlowStore | None = None
) -> dict[str, Any]:
    """Read the state of some runs and every global list; equal observations mean equal state.

    In the quick profile the seed of the check selects some of the reads; see ``observe``.
    """
    store = store or context.store
    can, take = context.capabilities, context.page_size
    # Without a virtual clock use a fixed time, so that two observations compare equal.
    as_of = FAR_FUTURE if context.clock is None else context.clock()
    reads: _Reads = {"get_runs": lambda: store.get_runs(take=take), "get_active_runs": store.get_active_runs}
    if Capability.TAGS in can:
        reads["get_runs with tags"] = lambda: store.get_runs(take=take, tags=TAGS)
    if Capability.DASHBOARD in can:
        reads["get_runs_page"] = lambda: store.get_runs_page(take=take)
        reads["get_statistics"] = lambda: store.get_statistics(as_of=as_of)
    if Capability.RECOVERY in can:
        reads["get_stalled_steps"] = lambda: store.get_stalled_steps(as_of=as_of, take=take)
    if Capability.QUEUES in can and context.clock is not None:
        reads["get_queues"] = store.get_queues
    if Capability.DEADLINES in can:
        reads["get_runs_to_stop"] = lambda: store.get_runs_to_stop(as_of=as_of, take=take)
    shown = await _read(context, reads, LISTS_OF_RUNS, SAMPLED_LISTS)
    for run_id in run_ids:
        for read, value in (await observe(context, run_id, store=store)).items():
            shown[f"{read} of {run_id}"] = value
    return shown


async def observe(context: CheckContext, run_id: UUID, *, store: FlowStore | None = None) -> dict[str, Any]:
    """Read the whole state of one run.

    In the quick profile without most reads that show a part of others: the seed of the check selects them,
    so all observations of a context have the same ones.
    """
    store = store or context.store
    can = context.capabilities
    names = [*reads_of_run(can), "get_derived_runs"]
    reads: _Reads = {name: partial(getattr(store, name), run_id) for name in names}
    if Capability.EVENTS in can:
        reads["get_run_events"] = lambda: store.get_run_events(run_id, take=context.page_size)
    return await _read(context, reads, PARTS_OF_READS, 1)


async def _read(context: CheckContext, reads: _Reads, optional: Sequence[str], count: int) -> dict[str, Any]:
    """The results of some reads; the quick profile makes only ``count`` of the ``optional`` ones."""
    left_out: set[str] = set()
    if context.profile is Profile.QUICK:
        offered = [name for name in optional if name in reads]
        kept = random.Random(f"{context.seed}/reads").sample(offered, min(count, len(offered)))
        left_out = set(offered).difference(kept)
    made = {name: read() for name, read in reads.items() if name not in left_out}
    # At once, because stores may answer concurrent reads with one request.
    values = await asyncio.gather(*made.values())
    return {
        name: dict(value) if isinstance(value, Mapping) else value
        for name, value in zip(made, values, strict=True)
    }


def assert_same(
    context: CheckContext,
    after: Mapping[str, Any],
    before: Mapping[str, Any],
    sentence: str,
    *,
    clause: str | None = None,
) -> None:
    """Compare two observations, times to the microsecond, and report the first difference."""
    context.assertions += 1
    for read, was in before.items():
        if after[read] == was:
            continue
        want, got = comparable(was), comparable(after[read])
        if got != want:
            raise ContractViolation(f"{sentence}: {read}: {expected_and_got(want, got)}", clause=clause)


def thread_count() -> int:
    """The number of threads, without those that the event loop keeps for its default executor."""
    return sum(not thread.name.startswith("asyncio_") for thread in threading.enumerate())
