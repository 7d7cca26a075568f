"""LIM: what a store declares to hold it holds whole, and what is beyond a limit it refuses whole."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from uuid import UUID

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    abbreviate,
    assert_same,
    get_run,
    now,
    observe,
    start,
)
from flowstore_conformance.checks.operations import ARGUMENT_KINDS, arguments_beyond
from flowstore_conformance.checks.round_trip import expect_key_round_trip, expect_text_round_trip
from flowstore_conformance.checks.volumes import expect_items, in_groups
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    FlowStoreError,
    InvalidArgumentError,
    LimitExceededError,
    RunStatus,
    StepStatus,
)

MEBIBYTE = 2**20


@check("LIM-1", "INP-1", "INP-2", kind=Kind.VOLUME, isolated=False)
async def values_at_the_limits_are_stored_whole(context: CheckContext) -> None:
    """Texts, keys and pages of exactly their declared size, and of one less, are returned unchanged."""
    # large_texts.py stores longer ones.
    limit = min(context.limits.text_bytes, context.profile.of(MEBIBYTE // 4, MEBIBYTE, MEBIBYTE))
    digits = context.random.randbytes(limit // 2 + 1).hex()[:limit]
    wide = "\U0001f600" * (limit // 4)
    for text in (digits, digits[:-1], f"{wide}{digits[: limit % 4]}"):
        await expect_text_round_trip(context, text)
    size = context.limits.key_bytes
    wide = "\U0001f600" * (size // 4)
    for key in ("k" * 256, f"{wide}{'k' * (size % 4)}"[:256], f"{wide[:-1]}k"):
        await expect_key_round_trip(context, key, "j" * 1024)
    await _expect_largest_page(context)


async def _expect_largest_page(context: CheckContext) -> None:
    """Expect that a page of the largest size is full if there is more."""
    size = context.page_size
    if Capability.EVENTS not in context.capabilities or size > context.profile.of(200, 1_000, 1_000):
        return
    run_id = await start(context)
    await in_groups(lambda number: context.store.append_event(run_id, "event"), size + 1)
    page = await context.store.get_run_events(run_id, take=size)
    found = [event.sequence for event in page]
    expect_items(context, found, range(1, size + 1), f"a page of {size:,} events", clause="LIM-1")


@check("LIM-1", "INP-2", kind=Kind.HOSTILE, isolated=False, rotation="arguments at the limits")
async def arguments_beyond_the_limits_are_refused(context: CheckContext) -> None:
    """Every text and key that is one byte beyond its declared limit, and every such page, is refused."""
    store, run_id = context.store, await start(context)
    await store.record_step_start(run_id, "charge", "http")
    before = await observe(context, run_id)
    for operation in ARGUMENT_KINDS:
        for name, arguments in arguments_beyond(operation, context.limits):
            if "run_id" in arguments and operation not in ("start_run", "trigger_run"):
                arguments["run_id"] = run_id
            sentence = f"{operation}({name}={abbreviate(arguments[name])}), beyond a limit of the store"
            call = getattr(store, operation)(**arguments)
            error = await context.expect_error(call, InvalidArgumentError, sentence)
            named = str(getattr(error, "argument", None)).partition(".")[0]
            context.expect(named, name, f"{sentence}: the error names the argument")
    assert_same(context, await observe(context, run_id), before, "a refused call changes nothing")


@dataclass(frozen=True, slots=True)
class _Growth:
    """A call that adds a step key to a run, and what it adds."""

    name: str
    call: Callable[[UUID, str], Awaitable[object]]
    needs: Capability | None = None


def _growths(context: CheckContext) -> list[_Growth]:
    store = context.store
    every = [
        _Growth("record_step_start", lambda run, key: store.record_step_start(run, key, "http")),
        _Growth("record_skipped_step", lambda run, key: store.record_skipped_step(run, key, "http")),
        _Growth("try_claim_step", lambda run, key: store.try_claim_step(run, key, owner="me")),
        _Growth(
            "try_start_step",
            lambda run, key: store.try_start_step(run, key, "http", owner="me", lease=DAY),
            Capability.LEASES,
        ),
        _Growth("try_record_dispatch", lambda run, key: store.try_record_dispatch(run, key)),
        _Growth(
            "try_record_dispatch with a queue",
            lambda run, key: store.try_record_dispatch(run, key, queue="default", step_type="http"),
            Capability.QUEUES,
        ),
    ]
    return [one for one in every if one.needs is None or one.needs in context.capabilities]


async def _grow(context: CheckContext, growth: Awaitable[object], what: str) -> bool:
    """Make a call beyond a limit. True if it succeeded; False if it raised LimitExceededError."""
    context.assertions += 1
    try:
        await growth
    except LimitExceededError as error:
        context.expect(error.backend, context.store.backend, f"{what}: the backend that the error names")
        context.expect_that(error.limit, f"{what}: the error names the limit")
        return False
    except FlowStoreError as error:
        raise ContractViolation(
            f"{what}: expected success or LimitExceededError, got {type(error).__name__}: {error}"
        ) from error
    return True


async def _expect_usable(context: CheckContext, run_id: UUID, keys: Sequence[str]) -> None:
    """Expect that these steps of a run at its limit are claimed and end, and that it ends and is deleted."""
    store = context.store
    for key in keys:
        won = await store.try_claim_step(run_id, key, owner="me")
        context.expect(won, True, "a claim on a stored step of a run at its limit")
        await store.record_step_complete(run_id, key, StepStatus.SUCCEEDED)
        status = (await store.get_step_statuses(run_id))[key]
        context.expect(status, StepStatus.SUCCEEDED, "the status of a step of a run at its limit")
    done = await store.complete_run(run_id, RunStatus.CANCELLED)
    context.expect(done, True, "completing a run at its limit")
    await store.cleanup(now(context) + DAY)
    context.expect(await store.get_run_status(run_id), None, "the status of a deleted run at its limit")


async def _within(context: CheckContext, call: Awaitable[object], what: str) -> object:
    """Make a call within the declared limits, which must succeed."""
    context.assertions += 1
    try:
        return await call
    except FlowStoreError as error:
        raise ContractViolation(
            f"{what}, within the declared limits: expected success, got {type(error).__name__}: {error}"
        ) from error


@check("LIM-2", kind=Kind.VOLUME, rotation="steps and waiters of a run")
async def a_run_holds_the_declared_number_of_steps(context: CheckContext) -> None:
    """Up to run_steps every step key is stored; one more is stored too, or raises LimitExceededError."""
    of, declared = context.profile.of, context.limits.run_steps
    most = of(10_000, 20_000, 100_000)
    count = of(500, 2_600, 10_000) if declared is None else min(declared, most)
    store, run_id = context.store, await start(context)
    keys = [f"step {number:06}" for number in range(count)]
    what = f"a run of {count:,} steps"
    await in_groups(lambda n: _within(context, store.record_step_start(run_id, keys[n], "http"), what), count)
    expect_items(context, await store.get_step_statuses(run_id), keys, f"the steps of {what}", clause="LIM-2")
    if declared == count:
        await _grow_beyond(context, run_id, keys)
    await _expect_usable(context, run_id, keys[:2])


async def _grow_beyond(context: CheckContext, run_id: UUID, keys: Sequence[str]) -> None:
    """Add more step keys to a run at its limit: each is stored, or refused without any change."""
    before, grown = await observe(context, run_id), {*keys}
    for number, growth in enumerate(_growths(context)):
        sentence = f"{growth.name} of step key {len(keys) + 1:,} of a run"
        if await _grow(context, growth.call(run_id, f"beyond {number}"), sentence):
            grown.add(f"beyond {number}")
        found = await _step_keys(context, run_id)
        context.expect_that(
            found == grown, f"{sentence}: expected {len(grown):,} keys in the run, got {len(found):,}"
        )
    if len(grown) == len(keys):
        after = await observe(context, run_id)
        assert_same(context, after, before, "refused calls change nothing in a run at its limit")


async def _step_keys(context: CheckContext, run_id: UUID) -> set[str]:
    """The step keys of a run that are started, claimed or dispatched."""
    store = context.store
    claimed = {claim.step_key for claim in await store.get_step_claims(run_id)}
    dispatched = await store.get_dispatched_step_keys(run_id)
    return {*await store.get_step_statuses(run_id), *claimed, *dispatched}


@check("LIM-2", kind=Kind.VOLUME)
async def a_run_holds_the_declared_bytes(context: CheckContext) -> None:
    """Up to run_bytes every text is stored; more is stored whole too, or raises LimitExceededError."""
    of, declared = context.profile.of, context.limits.run_bytes
    most = of(16, 64, 256) * MEBIBYTE
    capacity = of(1, 16, 16) * MEBIBYTE if declared is None else min(declared, most)
    run_id = await start(context)
    size = context.text_size(MEBIBYTE)
    # A sixteenth of it remains for the keys, and for what the backend itself notes.
    count = max(1, capacity * 15 // 16 // size)
    texts = [_text(context, number, size) for number in range(count)]
    what = f"{count:,} texts of {size:,} bytes in one run"
    for number, text in enumerate(texts):
        await _within(context, _save(context, run_id, number, text), what)
    await _expect_texts(context, run_id, texts, what)
    if declared == capacity:
        refused = False
        while len(texts) * size < capacity * 5 // 4 and not refused:
            text = _text(context, len(texts), size)
            sentence = f"text {len(texts) + 1:,} of {size:,} bytes in one run"
            refused = not await _grow(context, _save(context, run_id, len(texts), text), sentence)
            if not refused:
                texts.append(text)
        await _expect_texts(context, run_id, texts, f"{len(texts):,} texts of {size:,} bytes in one run")
    await _expect_others(context)
    await _expect_usable(context, run_id, [])


def _text(context: CheckContext, number: int, size: int) -> str:
    """A text of this size that occurs once, and cannot be compressed by much."""
    return f"{number:06}{context.random.randbytes(size // 2).hex()}"[:size]


async def _save(context: CheckContext, run_id: UUID, number: int, text: str) -> None:
    store, key = context.store, f"text {number:06}"
    if Capability.OUTPUTS in context.capabilities:
        await store.save_output(run_id, key, text)
    else:
        await store.record_skipped_step(run_id, key, "http", text)


async def _expect_texts(context: CheckContext, run_id: UUID, texts: list[str], what: str) -> None:
    if Capability.OUTPUTS in context.capabilities:
        found = [*(await context.store.get_outputs(run_id, prefix="text ")).values()]
    else:
        found = [str(step.error_message) for step in (await get_run(context, run_id)).steps]
    context.expect_that(found == texts, f"{what}: expected all of them unchanged, in the order of their keys")


async def _expect_others(context: CheckContext) -> None:
    """Expect that a run at its limit does not concern another one."""
    other = await start(context, flow_id=FLOW)
    await _save(context, other, 0, "small")
    await _expect_texts(context, other, ["small"], "a text in another run than the one at its limit")
