"""Texts that a backend may confuse when it joins them into one, parses them, or stores None as a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, product
from uuid import UUID

from flowstore_conformance.checks.compared_store import ComparedStore
from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import SIMILAR_KEYS, new_id
from flowstore_conformance.checks.indexed_queries import EARLIEST
from flowstore_conformance.context import CheckContext
from flowstore_conformance.history import Call
from flowstore_conformance.state_probe import probe_calls
from flowstore_core import Capability, RunStatus, StepStatus

COMMON_SEPARATORS = ("", *"/:|,.-\x1f")
RARE_SEPARATORS = (*";_#@=&+~!* \t\n\x01\x1e\u2028\\%", "::", "//", ", ", "','", '","', "\\\\", "%2F", "}:{")
SEPARATORS = (*COMMON_SEPARATORS, *RARE_SEPARATORS)
"""Texts between the parts of a joined key."""

_EMPTY = r'None null NULL nil undefined \N - 0 false [] {} ""'
_VALUES = "Running running Succeeded Pending Skipped Lease true True NaN 1e0 +1 0x1 1_0 -1 2026-03-14"
_SYNTAX = (
    r"""' '' " ` \ \\ \' a\ % %% _ ? :name $1 $$ @p {0} \x41 %41 &lt; & -- /* ; # ( ) [ ] [a] { } < * ^"""
)
_PATHS = ". .. ~ a/b a//b ../a a|b a,b"

NONE_LIKE = ("", *_EMPTY.split())
"""Texts that a backend may store in the place of None."""

LITERALS = (
    *(*_EMPTY.split(), *_VALUES.split(), *_SYNTAX.split(), *_PATHS.split()),
    *("1 ", "a\x1fb", "a\tb", "a\nb", "a\r\nb", "\r"),
    # Right-to-left, invisible, decomposed and compatible characters.
    *("\u05d0", "\u05d0\u200f", "a\u200b", "a\u00ad", "\ufeffa", "\ufb01", "fi", "\u2460", "\u00bd"),
    *("\u0130", "i\u0307", "A\u030a", "\u00c5", "\u212b", "\u2764", "\u2764\ufe0f", "\u0661"),
    *("\U0001f468", "\U0001f468\u200d\U0001f469"),
)
"""Keys that a parser, a pattern, a comparison of numbers or a normalisation may change or equate."""


def _odd_keys(context: CheckContext) -> list[str]:
    """The keys of this profile; the quick one draws some of the literals."""
    drawn = context.random.sample(LITERALS, k=context.profile.of(15, len(LITERALS), len(LITERALS)))
    return list(dict.fromkeys((*SIMILAR_KEYS, *drawn)))


def _separators(context: CheckContext) -> list[str]:
    """The separators of this profile; the quick one draws some of the rare ones."""
    count = context.profile.of(4, len(RARE_SEPARATORS), len(RARE_SEPARATORS))
    return [*COMMON_SEPARATORS, *context.random.sample(RARE_SEPARATORS, k=count)]


def _on(run_id: UUID, method: str, **arguments: object) -> Call:
    return Call(method=method, arguments={"run_id": run_id, **arguments})


def _start(run_id: UUID, flow_id: UUID, **given: object) -> Call:
    return _on(run_id, "start_run", flow_id=flow_id, flow_name="orders", **{"trigger_key": "manual", **given})


def _reads(context: CheckContext, run_id: UUID) -> list[Call]:
    return list(probe_calls(run_id, context.capabilities))


@example("INP-1")
async def odd_keys_are_distinct(context: CheckContext) -> None:
    """Keys compare exactly: nothing is folded, trimmed, normalised, parsed or treated as a pattern.

    Every part of a step is written under every key; then half of the keys change, and the others keep theirs.
    """
    compared, run_id = ComparedStore.of(context), new_id(context)
    keys = _odd_keys(context)
    compared.stage = "with many similar and odd keys"
    await compared.make([_start(run_id, new_id(context))])
    # The owner and the signal name of a key differ from it and are keys too.
    owners = dict(zip(keys, (*keys[1:], keys[0]), strict=True))
    claims = [_on(run_id, "try_claim_step", step_key=key, owner=owners[key]) for key in keys]
    await compared.make_concurrently(claims)
    await compared.make_concurrently([_on(run_id, "try_record_dispatch", step_key=key) for key in keys])
    starts = [
        _on(run_id, "record_step_start", step_key=key, step_type=key, owner=owners[key]) for key in keys
    ]
    await compared.make_concurrently(starts)
    waits = [_on(run_id, "register_waiter", step_key=key, signal_name=owners[key]) for key in keys]
    await compared.make_concurrently(waits)
    if Capability.OUTPUTS in context.capabilities:
        saves = [_on(run_id, "save_output", key=key, value_json=owners[key]) for key in keys]
        await compared.make_concurrently(saves)
    await compared.make(_reads(context, run_id))
    compared.stage = "after changes of every second of many similar and odd keys"
    changed = keys[::2]
    changes = [
        [_on(run_id, "release_step_claim", step_key=key, owner=owners[key]) for key in changed],
        [_on(run_id, "annotate_dispatch", step_key=key, job_id=key) for key in changed[::2]],
        [_on(run_id, "release_dispatch", step_key=key) for key in changed[1::2]],
        [_on(run_id, "record_step_complete", step_key=key, status=StepStatus.SUCCEEDED) for key in changed],
        [
            _on(run_id, "deliver_signal", signal_name=owners[key], payload_json=key, delivery_id=key)
            for key in changed
        ],
        # A remembered delivery_id under another name.
        [
            _on(run_id, "deliver_signal", signal_name="other", payload_json="", delivery_id=key)
            for key in keys
        ],
        [_on(run_id, "remove_waiter", step_key=key) for key in changed[::2]],
    ]
    if Capability.OUTPUTS in context.capabilities:
        changes.append([_on(run_id, "save_output", key=key, value_json="changed") for key in changed])
    for calls in changes:
        await compared.make_concurrently(calls)
    await compared.make(_reads(context, run_id))
    expected = compared.model.get_step_statuses(run_id)
    await compared.make([_on(run_id, "complete_run", status=RunStatus.FAILED, expected=expected)])


@example("INP-1")
async def similar_keys_have_their_own_states(context: CheckContext) -> None:
    """A key is new although the steps of similar keys are finished, and its changes do not concern them."""
    compared, run_id = ComparedStore.of(context), new_id(context)
    keys = _odd_keys(context)
    finished, new = keys[::2], keys[1::2]
    await compared.make([_start(run_id, new_id(context))])
    compared.stage = "with odd keys, of which every second is finished"
    http = {"step_type": "http"}
    await compared.make_concurrently(
        [_on(run_id, "record_skipped_step", step_key=key, reason=key, owner="me", **http) for key in finished]
    )
    firsts: tuple[Callable[[str], Call], ...] = (
        lambda key: _on(run_id, "record_step_start", step_key=key, **http),
        lambda key: _on(run_id, "try_claim_step", step_key=key, owner="me"),
        lambda key: _on(run_id, "try_record_dispatch", step_key=key),
        lambda key: _on(run_id, "record_step_complete", step_key=key, status=StepStatus.SKIPPED),
    )
    for first in firsts[:3]:
        await compared.make_concurrently([first(key) for key in finished])
    # Each kind of call is the first on some of the new keys.
    await compared.make_concurrently([firsts[number % 4](key) for number, key in enumerate(new)])
    await compared.make_concurrently([firsts[0](key) for key in new])
    await compared.make(_reads(context, run_id))
    retried, *others = new
    await compared.make([_on(run_id, "retry_step", step_key=retried, reset=finished[::2])])
    await compared.make([_on(run_id, "release_step_claim", step_key=key) for key in others[::2]])
    await compared.make(_reads(context, run_id))


@example("INP-1")
async def joined_keys_are_distinct(context: CheckContext) -> None:
    """("a/b", "c") and ("a", "b/c") differ, for every separator and every two keys that belong together."""
    compared, flow_id = ComparedStore.of(context), new_id(context)
    runs = {separator: new_id(context) for separator in _separators(context)}
    compared.stage = "with keys that are equal when joined"
    await compared.make_concurrently([_start(run_id, flow_id) for run_id in runs.values()])
    phases = zip(*(list(_joined_calls(run_id, separator)) for separator, run_id in runs.items()), strict=True)
    for calls in phases:
        await compared.make_concurrently(
            [call for call in calls if call.operation.is_offered(context.capabilities)]
        )
    reads = [read for run_id in runs.values() for read in _reads(context, run_id)]
    await compared.make_concurrently(reads)
    compared.stage = "after changes of one of two keys that are equal when joined"
    for run_id in runs.values():
        await compared.make([_on(run_id, "retry_step", step_key="a")])
    await compared.make_concurrently(reads)


def _joined_calls(run_id: UUID, s: str) -> Iterator[Call]:
    """Calls on steps and signals whose keys are equal when they are joined by a separator."""
    # Step and owner.
    yield _on(run_id, "try_claim_step", step_key=f"a{s}b", owner="c")
    yield _on(run_id, "try_claim_step", step_key="a", owner=f"b{s}c")
    yield _on(run_id, "try_claim_step", step_key=f"a{s}b{s}c", owner=f"b{s}c")
    # Step and number of the attempt; run and step.
    for step_key in ("a", f"a{s}1", f"a{s}b", f"1{s}a", f"{run_id}{s}a"):
        yield _on(run_id, "record_step_start", step_key=step_key, step_type=f"{s}{step_key}")
    yield _on(run_id, "record_step_start", step_key="a", step_type=f"a{s}2")
    yield _on(run_id, "record_step_complete", step_key=f"a{s}1", status="Failed", output_json=f"1{s}2")
    # Output and error: the same outcome again, and outcomes that are equal when joined.
    texts = ((f"1{s}2", "3"), ("1", f"2{s}3"), (f"1{s}2{s}3", None), (None, f"1{s}2{s}3"), (f"1{s}2", "3"))
    for output_json, error_message in texts:
        given = {"output_json": output_json, "error_message": error_message, "attempt": 1}
        yield _on(run_id, "record_step_complete", step_key=f"a{s}b", status="Failed", **given)
    # Step and signal, signal and delivery id.
    waits = ((f"a{s}b", "c"), ("a", f"b{s}c"), ("d", f"x{s}y"), ("e", "x"))
    for step_key, signal_name in waits:
        yield _on(run_id, "register_waiter", step_key=step_key, signal_name=signal_name)
    for signal_name, delivery_id in (
        (f"b{s}c", f"a{s}b{s}c"),
        (f"x{s}y", "z"),
        ("x", f"y{s}z"),
        (f"a{s}b{s}c", "c"),
    ):
        given = {"signal_name": signal_name, "delivery_id": delivery_id, "payload_json": f"{s}{signal_name}"}
        yield _on(run_id, "deliver_signal", **given)
    yield _on(run_id, "save_output", key=f"a{s}b", value_json="c")
    yield _on(run_id, "save_output", key="a", value_json=f"b{s}c")
    yield _on(run_id, "append_event", event_type=f"a{s}b", step_key="c", message="d")
    yield _on(run_id, "append_event", event_type="a", step_key=f"b{s}c", message=f"{s}d")


@example("RUN-2")
async def expected_is_not_compared_as_a_joined_text(context: CheckContext) -> None:
    """A step key that contains a whole pair of another key and its status is one key."""
    compared, flow_id = ComparedStore.of(context), new_id(context)
    compared.stage = "with a step key that contains two steps with their statuses as text"
    pairs = [*product((":", "=", "/", " ", "\t", ""), (",", ";", "&", "\n", "")), ("\x1f", "\x1e")]
    pairs += [('": "', '", "'), ('":"', '","'), ('"=>"', '", "'), ("': '", "', '"), (",", "),(")]
    runs = [(f"a{inner}Succeeded{outer}b", new_id(context)) for inner, outer in pairs]
    two = {"a": StepStatus.SUCCEEDED, "b": StepStatus.FAILED}
    await compared.make_concurrently([_start(run_id, flow_id) for _, run_id in runs])
    for key, run_id in runs:
        start = _on(run_id, "record_step_start", step_key=key, step_type="http")
        close = _on(run_id, "record_step_complete", step_key=key, status=StepStatus.FAILED)
        await compared.make([start, close])
    for expected in (two, None):
        await compared.make_concurrently(
            [
                _on(run_id, "complete_run", status="Failed", expected=expected or {key: StepStatus.FAILED})
                for key, run_id in runs
            ]
        )


@example("STP-6")
async def reset_is_not_a_joined_text(context: CheckContext) -> None:
    """A key in reset with the form of a list or a pattern of keys resets the step of that name only."""
    compared, run_id = ComparedStore.of(context), new_id(context)
    plain = ("a", "b", "ab", "a b")
    odd = [key for separator in SEPARATORS if (key := f"a{separator}b") not in plain]
    odd += ["{a,b}", '{"a","b"}', '["a", "b"]', "('a', 'b')", "a%", "a*", "a.*", "[ab]", "(a|b)", "%", "NULL"]
    await compared.make([_start(run_id, new_id(context))])
    skips = [
        _on(run_id, "record_skipped_step", step_key=key, step_type="http") for key in ("charge", *plain, *odd)
    ]
    await compared.make_concurrently(skips)
    compared.stage = "after a retry that resets keys with the form of lists of other keys"
    await compared.make([_on(run_id, "retry_step", step_key="charge", reset=odd)])
    await compared.make(_reads(context, run_id))
    compared.stage = "after a retry that resets the other keys"
    await compared.make([_on(run_id, "record_step_start", step_key="charge", step_type="http")])
    await compared.make([_on(run_id, "record_skipped_step", step_key=odd[0], step_type="http")])
    await compared.make([_on(run_id, "retry_step", step_key="charge", reset=plain)])
    await compared.make(_reads(context, run_id))


@example("INP-2")
async def none_is_distinct_from_every_text(context: CheckContext) -> None:
    """None, "" and texts that name nothing differ, in results and where a repeated call is compared."""
    compared, flow_id = ComparedStore.of(context), new_id(context)
    compared.stage = "with texts that stand for None elsewhere"
    for text in (None, *NONE_LIKE):
        run_id = new_id(context)
        name = text or None
        await compared.make([_start(run_id, flow_id, trigger_data=text, job_id=name)])
        start = _on(run_id, "record_step_start", step_key="a", step_type="http", input_json=text, job_id=name)
        close = {"step_key": "a", "status": "Failed"}
        skip = {"step_key": "b", "step_type": "http", "owner": "me"}
        calls = [
            start,
            _on(run_id, "record_step_complete", **close, output_json=text, error_message=text),
            # Another outcome: refused, unless the text is None.
            _on(run_id, "record_step_complete", **close, error_message=text),
            _on(run_id, "record_step_complete", **close, output_json=text),
            _on(run_id, "record_step_complete", **close, output_json=text, error_message=text),
            _on(run_id, "record_skipped_step", **skip, reason=text),
            _on(run_id, "record_skipped_step", **skip),
            _on(run_id, "record_skipped_step", **skip, reason=text),
            # A claim without owner belongs to no name.
            _on(run_id, "try_claim_step", step_key="c"),
            _on(run_id, "try_claim_step", step_key="c", owner=name),
            _on(run_id, "record_step_start", step_key="c", step_type="http", owner=name),
            _on(run_id, "request_cancel", reason=text),
            *_reads(context, run_id),
        ]
        if name is not None:
            calls.append(_on(run_id, "release_step_claim", step_key="c", owner=name))
            calls.append(_on(run_id, "get_step_claims"))
        if Capability.EVENTS in context.capabilities:
            calls.append(_on(run_id, "append_event", event_type="e", step_key=name, message=text))
            calls.append(_on(run_id, "get_run_events"))
        await compared.make(calls)


@example("IDM-1")
async def scopes_are_not_joined_texts(context: CheckContext) -> None:
    """Three parts that are equal when joined, or odd texts, are different keys."""
    compared, flow_id = ComparedStore.of(context), new_id(context)
    compared.stage = "with odd keys and keys that are equal when joined"
    keys = _odd_keys(context)
    scopes = [("manual", key) for key in keys] + [(key, "manual") for key in keys]
    for s in _separators(context):
        scopes += [(f"a{s}b", "c"), ("a", f"b{s}c"), (f"{flow_id}{s}a", "b"), (f"a{s}b{s}c", "d")]
        scopes += [("a", f"b{s}c{s}d"), (f"a{s}", f"{s}b"), (f"a{s}{s}", "b"), ("a", f"{s}{s}b")]
    calls = [
        {"flow_id": flow_id, "trigger_key": trigger_key, "idempotency_key": key}
        for trigger_key, key in dict.fromkeys(scopes)
    ]
    registrations = [
        Call(method="try_register_idempotency_key", arguments={**call, "run_id": new_id(context)})
        for call in calls
    ]
    await compared.make_concurrently(registrations)
    finds = [Call(method="find_run_id_by_idempotency_key", arguments=call) for call in calls]
    await compared.make_concurrently(finds)


@example("QRY-2")
async def search_does_not_match_between_texts(context: CheckContext) -> None:
    """No separator, name of a field or text for None can be found, neither before nor after the run's end."""
    compared, run_id, flow_id = ComparedStore.of(context), UUID(int=0xABCDEF << 96), new_id(context)
    await compared.make(
        [
            _start(run_id, flow_id, trigger_key="trigger"),
            _on(run_id, "record_step_start", step_key="step", step_type="http"),
            _on(run_id, "record_step_complete", step_key="step", status="Failed", error_message="error"),
            _on(run_id, "record_skipped_step", step_key="other", step_type="http"),
        ]
    )
    texts = ("orders", "trigger", "Running", "step", "error", "Failed")
    needles = [text for text in (*SEPARATORS, *NONE_LIKE) if text and text not in "-0"]
    needles += [f"{one}{s}{two}" for one, two in pairwise(texts) for s in ("", " ", "\n")]
    needles += ["flow_name", "output", "message", "job"]
    for stage in ("of a Running run", "of a terminal run"):
        compared.stage = f"in a search {stage} for a text that none of its fields contains"
        await compared.make_concurrently(
            [
                Call(method="get_runs_page", arguments={"flow_id": flow_id, "search": needle})
                for needle in needles
            ]
        )
        await compared.make([_on(run_id, "complete_run", status=RunStatus.SUCCEEDED)])
        await compared.call("cleanup", cutoff=EARLIEST)
