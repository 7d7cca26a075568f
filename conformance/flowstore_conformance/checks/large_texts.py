"""INP-2: the largest text in every text argument, several in one row, and many in one batch."""

from __future__ import annotations

from collections.abc import Awaitable

from flowstore_conformance.checks.fixtures import (
    DAY,
    FLOW,
    call_at_once,
    get_control,
    get_run,
    get_step,
    get_waiter,
    new_id,
    now,
    run_step,
    single,
    start,
)
from flowstore_conformance.context import CheckContext, ContractViolation
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    FlowStepAttemptRecord,
    FlowStepRecord,
    RunStatus,
    StepAlreadyCompletedError,
    StepStatus,
)

# Every character has four bytes.
_FOUR_BYTES = {ord(digit): chr(0x1F600 + number) for number, digit in enumerate("0123456789abcdef")}


def _size(context: CheckContext) -> int:
    """The size of the largest text, in bytes of UTF-8; a part of a very large one in the profile quick."""
    limit = context.limits.text_bytes
    return context.profile.of(min(limit, 2**18), limit, limit)


def _large_text(context: CheckContext) -> str:
    """A random ASCII text of the largest size."""
    return context.random.randbytes(_size(context) // 2).hex()


def _large_wide_texts(context: CheckContext, count: int) -> list[str]:
    """Different texts of the largest size in characters of four bytes."""
    text = context.random.randbytes(_size(context) // 8).hex().translate(_FOUR_BYTES)
    return [text[shift:] + text[:shift] for shift in range(count)]


def _expect_text(context: CheckContext, found: str | None, wanted: str, what: str) -> None:
    """Compare a large text, and name the first difference without showing the whole text."""
    context.assertions += 1
    if found == wanted:
        return
    size = f"{what} of {len(wanted.encode()):,} bytes of UTF-8 is not returned whole"
    if found is None:
        raise ContractViolation(f"{size}: got None", clause="INP-2")
    same = next((at for at, pair in enumerate(zip(found, wanted, strict=False)) if len({*pair}) > 1), None)
    difference = "one is the beginning of the other" if same is None else f"they differ at character {same:,}"
    lengths = f"expected {len(wanted):,} characters, got {len(found):,}"
    raise ContractViolation(f"{size}: {lengths}; {difference}", clause="INP-2")


@check("INP-2", "LIM-1", kind=Kind.VOLUME, rotation="largest texts")
async def every_text_argument_holds_the_largest_text(context: CheckContext) -> None:
    """Data, reasons, messages, payloads and outputs of the largest size are stored and returned whole."""
    store, text, flow = context.store, _large_text(context), new_id(context)
    run_id = await start(context, flow_id=flow, trigger_data=text)
    _expect_text(context, (await get_run(context, run_id)).trigger_data, text, "trigger_data of start_run")
    listed = single(await store.get_runs(flow), "the run in get_runs of its flow")
    _expect_text(context, listed.trigger_data, text, "trigger_data in get_runs")
    await store.request_cancel(run_id, text)
    _expect_text(context, (await get_control(context, run_id)).cancel_reason, text, "the reason of a cancel")
    late = await start(context)
    await store.configure_run(late, FLOW, "manual")
    await store.mark_timed_out(late, text)
    _expect_text(context, (await get_control(context, late)).cancel_reason, text, "the reason of a time-out")
    await store.register_waiter(run_id, "wait", "go")
    await store.deliver_signal(run_id, "go", text)
    _expect_text(context, (await get_waiter(context, run_id)).payload_json, text, "the payload of a signal")
    for _ in range(2):
        # The same reason again is a no-op.
        await store.record_skipped_step(run_id, "skipped", "http", text, owner="me")
    step = await get_step(context, run_id, "skipped")
    _expect_text(context, step.error_message, text, "the reason of a skipped step")
    call = store.record_skipped_step(run_id, "skipped", "http", text[:-1] + "x", owner="me")
    what = "skipping again with a reason that differs in its last character"
    await context.expect_error(call, StepAlreadyCompletedError, what)
    if Capability.OUTPUTS in context.capabilities:
        await store.save_output(run_id, "out", text)
        _expect_text(context, await store.get_output(run_id, "out"), text, "an output")
    if Capability.EVENTS in context.capabilities:
        await store.append_event(run_id, "event", message=text)
        event = single(await store.get_run_events(run_id), "the event")
        _expect_text(context, event.message, text, "the message of an event")
    if Capability.RECOVERY in context.capabilities:
        await store.record_step_start(run_id, "poll", "http")
        await store.reschedule_step(run_id, "poll", attempt=1, output_json=text)
        step = await get_step(context, run_id, "poll")
        _expect_text(context, step.output_json, text, "the output of reschedule_step")
    if Capability.TRIGGER in context.capabilities:
        result = await store.trigger_run(FLOW, "orders", new_id(context), "manual", trigger_data=text)
        _expect_text(context, result.run.trigger_data, text, "trigger_data of trigger_run")
        triggered = await get_run(context, result.run.run_id)
        _expect_text(context, triggered.trigger_data, text, "the stored trigger_data of trigger_run")


@check("INP-2", "STP-4", "RET-1", kind=Kind.VOLUME, rotation="largest texts")
async def one_step_holds_several_of_the_largest_texts(context: CheckContext) -> None:
    """Input, output and error of the largest size are compared whole, and stay whole in earlier attempts."""
    store, run_id = context.store, await start(context)
    given, output, error = _large_wide_texts(context, 3)
    failed, next_error = StepStatus.FAILED, "the error of the next attempt"
    await store.record_step_start(run_id, "charge", "http", input_json=given)
    for _ in range(2):
        # The same result again is a no-op.
        await store.record_step_complete(run_id, "charge", failed, output_json=output, error_message=error)
    call = store.record_step_complete(run_id, "charge", failed, output_json=output, error_message=error[:-1])
    what = "another result, whose error lacks the last character"
    await context.expect_error(call, StepAlreadyCompletedError, what)
    step = await get_step(context, run_id)
    _expect_result(context, step, (given, output, error), "a step")
    _expect_result(context, step.attempts[0], (given, output, error), "an attempt")
    if Capability.DASHBOARD in context.capabilities:
        page = await store.get_runs_page(search=error[:100])
        sentence = "total_count of a search for the beginning of a large error message"
        context.expect(page.total_count, 1, sentence)
    await run_step(context, run_id, "charge", failed, error_message=next_error)
    await store.retry_step(run_id, "charge")
    first, last = (await get_step(context, run_id)).attempts
    _expect_result(context, first, (given, output, error), "an earlier attempt")
    context.expect(last.error_message, next_error, "the error of the attempt after one with large texts")
    await store.complete_run(run_id, RunStatus.FAILED)
    await store.cleanup(now(context) + DAY)
    status = await store.get_run_status(run_id)
    context.expect(status, None, "the status of a run with large texts after its cleanup")


def _expect_result(
    context: CheckContext,
    record: FlowStepRecord | FlowStepAttemptRecord,
    texts: tuple[str, str, str],
    what: str,
) -> None:
    found = (record.input_json, record.output_json, record.error_message)
    names = ("input_json", "output_json", "error_message")
    for name, text, wanted in zip(names, found, texts, strict=True):
        _expect_text(context, text, wanted, f"{name} of {what} with three such texts")


@check("INP-2", "CON-1", kind=Kind.VOLUME, rotation="largest texts")
async def a_batch_holds_many_of_the_largest_texts(context: CheckContext) -> None:
    """Concurrent writes of the largest texts, between small ones, take effect and keep their own texts."""
    store, run_id = context.store, await start(context)
    base = _large_text(context)
    texts = {
        f"step {number:02}": f"{number:08x}{base[8:]}" if number % 2 else f"small {number}"
        for number in range(context.profile.of(8, 8, 32))
    }
    keys = list(texts)
    await call_at_once(lambda n: store.record_step_start(run_id, keys[n], "http"), range(len(keys)))

    def write(number: int) -> Awaitable[object]:
        key = keys[number // 2]
        if number % 2 and Capability.OUTPUTS in context.capabilities:
            return store.save_output(run_id, key, texts[key])
        return store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, output_json=texts[key])

    outcomes = await call_at_once(write, range(2 * len(keys)))
    context.expect(outcomes, [None] * 2 * len(keys), "concurrent writes of large and small texts")
    detail = await get_run(context, run_id)
    outputs = {step.step_key: step.output_json for step in detail.steps}
    what = f"the output of one of {len(keys)} steps that concurrent calls completed"
    for key, text in texts.items():
        _expect_text(context, outputs.get(key), text, what)
        if Capability.OUTPUTS in context.capabilities:
            _expect_text(context, await store.get_output(run_id, key), text, "an output of a concurrent call")
