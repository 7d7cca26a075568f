"""Validation of arguments, once for all backends (INP-1 to INP-4).

Each function takes the name and value of an argument and returns the value that backends get: enums as
members, datetimes in UTC, instances of str subclasses as plain str. These functions run before every call, so
their first line handles the common case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, TypeVar
from uuid import UUID

from flowstore_core.errors import InvalidArgumentError
from flowstore_core.limits import LARGEST_LIMITS
from flowstore_core.queues import MAX_PRIORITY, EndedStep, StepRequest
from flowstore_core.runs import RunPosition
from flowstore_core.status import (
    TERMINAL_RUN_STATUSES,
    TERMINAL_STEP_STATUSES,
    RunStatus,
    RunTimeseriesGranularity,
    StepStatus,
)
from flowstore_core.tags import MAX_TAGS
from flowstore_core.timeseries import (
    BUCKET_WIDTH,
    EARLIEST,
    LATEST,
    MAX_BUCKETS,
    bucket_ceil,
    bucket_floor,
)
from flowstore_core.watching import MAX_TIMEOUT

MAX_KEY = 256
MAX_JOB_ID = 1024
MAX_SEARCH = 256
MAX_TEXT_BYTES = LARGEST_LIMITS.text_bytes
MAX_TAKE = LARGEST_LIMITS.page_size
MAX_INT64 = 2**63 - 1
MAX_LEASE = timedelta(days=366)
MAX_KEYS = 100_000
"""Maximum number of step keys in one call; far above the size of any known run."""
MAX_QUEUES = 100
MAX_CLAIMS = 1000
"""Maximum number of steps that one call claims."""
MAX_REQUESTS = 1000
MAX_AFTER = 10_000
"""Maximum number of ``after`` keys in all requests of one call."""

_NO_TIME = timedelta(0)
# A text of at most this many characters is within MAX_TEXT_BYTES whatever it contains.
_SHORT = MAX_TEXT_BYTES // 4

_E = TypeVar("_E", bound=StrEnum)


def _type_name(value: object) -> str:
    # Only the type is shown: the value may be a secret.
    return "None" if value is None else type(value).__name__


def check_id(name: str, value: Any) -> UUID:
    if type(value) is UUID:
        return value
    if isinstance(value, UUID):
        # A subclass, for example that of a driver, which a backend would store and return.
        return UUID(int=value.int)
    raise InvalidArgumentError(name, "a uuid.UUID", _type_name(value))


def check_key(name: str, value: Any, limit: int = MAX_KEY) -> str:
    if type(value) is str and 0 < len(value) <= limit and value.isascii() and "\0" not in value:
        return value
    wanted = f"a str of 1 to {limit:,} characters"
    if not isinstance(value, str):
        raise InvalidArgumentError(name, wanted, _type_name(value))
    if not 0 < len(value) <= limit:
        raise InvalidArgumentError(name, wanted, f"{len(value):,} characters")
    return _check_characters(name, value)


def check_prefix(value: Any) -> str:
    wanted = f"a str of at most {MAX_KEY} characters"
    if not isinstance(value, str):
        raise InvalidArgumentError("prefix", wanted, _type_name(value))
    if len(value) > MAX_KEY:
        raise InvalidArgumentError("prefix", wanted, f"{len(value):,} characters")
    return _check_characters("prefix", value)


def check_text(name: str, value: Any) -> str:
    if type(value) is str and len(value) <= _SHORT and value.isascii() and "\0" not in value:
        return value
    if not isinstance(value, str):
        raise InvalidArgumentError(name, "a str", _type_name(value))
    # UTF-8 has at most four bytes per character, so most texts need not be encoded to know their size.
    if len(value) > _SHORT:
        size = len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        if size > MAX_TEXT_BYTES:
            raise InvalidArgumentError(name, f"at most {MAX_TEXT_BYTES:,} bytes of UTF-8", f"{size:,} bytes")
    return _check_characters(name, value)


def _check_characters(name: str, value: str) -> str:
    if "\0" in value:
        raise InvalidArgumentError(name, "free of U+0000", "one at index " + str(value.index("\0")))
    if not value.isascii():
        index = None
        try:
            value.encode()
        except UnicodeEncodeError as error:
            index = error.start
        # Raised outside the handler: the codec's error contains the whole text.
        if index is not None:
            raise InvalidArgumentError(name, "free of lone surrogates", f"one at index {index}")
    return value if type(value) is str else str.__str__(value)


def check_datetime(name: str, value: Any) -> datetime:
    if type(value) is datetime and value.tzinfo is UTC and EARLIEST <= value <= LATEST:
        return value
    if not isinstance(value, datetime):
        raise InvalidArgumentError(name, "an aware datetime", _type_name(value))
    try:
        if value.utcoffset() is None:
            raise InvalidArgumentError(name, "an aware datetime (give it a tzinfo)", "a naive one")
        moment = value.astimezone(UTC)
    except OverflowError:
        moment = None
    if moment is None or not EARLIEST <= moment <= LATEST:
        raise InvalidArgumentError(name, f"from {EARLIEST:%Y-%m-%d %H:%M} to {LATEST:%Y-%m-%d %H:%M} UTC")
    if type(moment) is not datetime:
        moment = datetime.combine(moment.date(), moment.time(), UTC)
    return moment


def check_int(name: str, value: Any, low: int, high: int) -> int:
    if type(value) is int and low <= value <= high:
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        if low <= value <= high:
            return int(value)
        raise InvalidArgumentError(name, f"an int from {low:,} to {high:,}", "one outside")
    raise InvalidArgumentError(name, f"an int from {low:,} to {high:,}", _type_name(value))


def check_bool(name: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise InvalidArgumentError(name, "a bool", _type_name(value))


def check_skip(value: Any) -> int:
    return check_int("skip", value, 0, MAX_INT64)


def check_take(value: Any) -> int:
    return check_int("take", value, 0, MAX_TAKE)


def check_position(value: Any) -> RunPosition | None:
    """The start of a page; its parts are checked like any datetime and id."""
    if value is None:
        return None
    if not isinstance(value, RunPosition):
        raise InvalidArgumentError("after", "a RunPosition (a run's .position)", _type_name(value))
    started_at = check_datetime("after", value.started_at)
    return RunPosition(started_at=started_at, run_id=check_id("after", value.run_id))


def check_lease(name: str, value: Any) -> timedelta:
    if isinstance(value, timedelta):
        if _NO_TIME < value <= MAX_LEASE:
            return value
        raise InvalidArgumentError(name, "over 0 and at most 366 days", f"{value}")
    raise InvalidArgumentError(name, "a timedelta", _type_name(value))


def check_claim_lease(owner: str | None, lease: Any) -> timedelta:
    checked = check_lease("lease", lease)
    if owner is None:
        raise InvalidArgumentError("lease", "given only with owner (new_claim_token() makes one)")
    return checked


def check_search(value: Any) -> str | None:
    """The text to search for; None if empty, which matches every run."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidArgumentError("search", f"a str of at most {MAX_SEARCH} characters", _type_name(value))
    if len(value) > MAX_SEARCH:
        raise InvalidArgumentError("search", f"a str of at most {MAX_SEARCH} characters", f"{len(value):,}")
    return _check_characters("search", value) or None


def check_enum(name: str, value: Any, kind: type[_E], allowed: Collection[_E]) -> _E:
    if type(value) is kind and value in allowed:
        return value
    if isinstance(value, str):
        try:
            member = kind(str.__str__(value))
        except ValueError:
            member = None
        if member is not None and member in allowed:
            return member
        names = ", ".join(allowed)
        raise InvalidArgumentError(name, f"one of {names}", "another value")
    raise InvalidArgumentError(name, f"a {kind.__name__} or its value", _type_name(value))


_COMPLETIONS = tuple(status for status in RunStatus if status in TERMINAL_RUN_STATUSES)
_TERMINAL_OUTCOMES = tuple(status for status in StepStatus if status in TERMINAL_STEP_STATUSES)
_OUTCOMES = tuple(status for status in StepStatus if status is not StepStatus.RUNNING)
# Access to a member through its class is slow in Python 3.11.
_RUNNING = StepStatus.RUNNING


def check_run_outcome(value: Any, name: str = "status") -> RunStatus:
    """A status that completes a run: any except Running."""
    return check_enum(name, value, RunStatus, _COMPLETIONS)


def check_step_outcome(value: Any) -> StepStatus:
    """A status that closes an attempt: any except Running."""
    if type(value) is StepStatus and value is not _RUNNING:
        return value
    return check_enum("status", value, StepStatus, _OUTCOMES)


def check_final_outcome(value: Any) -> StepStatus:
    """A status that ends a step: any except Running and Pending."""
    return check_enum("status", value, StepStatus, _TERMINAL_OUTCOMES)


def check_run_status(value: Any) -> RunStatus:
    return check_enum("status", value, RunStatus, tuple(RunStatus))


def check_granularity(value: Any) -> RunTimeseriesGranularity:
    return check_enum("granularity", value, RunTimeseriesGranularity, tuple(RunTimeseriesGranularity))


def check_expected(value: Any) -> dict[str, StepStatus] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise InvalidArgumentError("expected", "a mapping of step_key to StepStatus", _type_name(value))
    if len(value) > MAX_KEYS:
        raise InvalidArgumentError("expected", f"at most {MAX_KEYS:,} step keys", f"{len(value):,}")
    return {
        check_key("expected", key): check_enum("expected", status, StepStatus, tuple(StepStatus))
        for key, status in value.items()
    }


def check_keys(name: str, value: Any) -> frozenset[str]:
    if isinstance(value, str) or not isinstance(value, Collection):
        raise InvalidArgumentError(name, "a collection of step keys", _type_name(value))
    if len(value) > MAX_KEYS:
        raise InvalidArgumentError(name, f"at most {MAX_KEYS:,} step keys", f"{len(value):,}")
    return frozenset(check_key(name, key) for key in value)


def check_tags(value: Any) -> dict[str, str]:
    """The tags of a new run, or those to find runs by, ordered by key."""
    return {key: check_key("tags", text) for key, text in _check_tag_keys(value, MAX_TAGS).items()}


def check_tag_changes(value: Any) -> dict[str, str | None]:
    """The tags to set, or with None to remove (TAG-2), ordered by key."""
    changes = {
        key: None if text is None else check_key("tags", text)
        for key, text in _check_tag_keys(value, 2 * MAX_TAGS).items()
    }
    removed = sum(text is None for text in changes.values())
    if max(removed, len(changes) - removed) > MAX_TAGS:
        raise InvalidArgumentError(
            "tags", f"at most {MAX_TAGS} keys to set, and {MAX_TAGS} to remove", "more"
        )
    return changes


def _check_tag_keys(value: Any, limit: int) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError("tags", "a mapping of keys to values", _type_name(value))
    if len(value) > limit:
        raise InvalidArgumentError("tags", f"at most {limit} keys", f"{len(value):,}")
    return dict(sorted((check_key("tags", key), text) for key, text in value.items()))


def check_ids(name: str, value: Any) -> tuple[UUID, ...]:
    """The ids without duplicates, in their order."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise InvalidArgumentError(name, "a collection of uuid.UUID", _type_name(value))
    _check_number(name, value)
    return tuple(dict.fromkeys(check_id(name, one) for one in value))


def check_claims(value: Any) -> tuple[tuple[UUID, str, str], ...]:
    wanted = "a sequence of (run_id, step_key, owner)"
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidArgumentError("claims", wanted, _type_name(value))
    _check_number("claims", value)
    claims = []
    for one in value:
        if not isinstance(one, tuple) or len(one) != 3:
            raise InvalidArgumentError("claims", wanted, f"one with {_type_name(one)}")
        run_id, step_key, owner = one
        claims.append((check_id("claims", run_id), check_key("claims", step_key), check_key("claims", owner)))
    return tuple(claims)


def check_outputs(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise InvalidArgumentError("outputs", "a mapping of key to JSON text", _type_name(value))
    _check_number("outputs", value)
    outputs = {check_key("outputs", key): check_text("outputs", text) for key, text in value.items()}
    if sum(map(len, outputs.values())) > _SHORT:
        size = sum(len(text.encode()) for text in outputs.values())
        if size > MAX_TEXT_BYTES:
            wanted = f"at most {MAX_TEXT_BYTES:,} bytes of UTF-8 in all values together"
            raise InvalidArgumentError("outputs", wanted, f"{size:,} bytes")
    return outputs


def _check_number(name: str, value: Collection[Any]) -> None:
    if len(value) > MAX_TAKE:
        raise InvalidArgumentError(name, f"at most {MAX_TAKE:,} in a call", f"{len(value):,}")


def check_timeout(value: Any) -> timedelta:
    if not isinstance(value, timedelta):
        raise InvalidArgumentError("timeout", "a timedelta", _type_name(value))
    if not _NO_TIME < value <= MAX_TIMEOUT:
        raise InvalidArgumentError("timeout", "over 0 and at most 1 hour", f"{value}")
    return value


def check_priority(name: str, value: Any) -> int:
    return check_int(name, value, 0, MAX_PRIORITY)


def check_queues(value: Any) -> tuple[str, ...]:
    """The names of queues without duplicates, in the order of code points."""
    if isinstance(value, str) or not isinstance(value, Collection):
        raise InvalidArgumentError("queues", "a collection of names of queues", _type_name(value))
    names = sorted({check_key("queues", name) for name in value})
    if not 0 < len(names) <= MAX_QUEUES:
        raise InvalidArgumentError("queues", f"1 to {MAX_QUEUES} names", f"{len(names):,}")
    return tuple(names)


def check_requests(
    value: Any, *, advanced: str | None = None, allow_after: bool = True
) -> tuple[StepRequest, ...]:
    """The requests of one call (QUE-4); ``advanced`` is the step that the call ends."""
    if type(value) is tuple and not value:
        return value
    if type(value) not in (list, tuple) and (isinstance(value, str) or not isinstance(value, Sequence)):
        raise InvalidArgumentError("dispatch", "a sequence of StepRequest", _type_name(value))
    if len(value) > MAX_REQUESTS:
        raise InvalidArgumentError("dispatch", f"at most {MAX_REQUESTS:,} requests", f"{len(value):,}")
    requests = tuple([_check_request(request) for request in value])
    keys = {request.step_key for request in requests}
    if len(keys) < len(requests):
        raise InvalidArgumentError("dispatch", "at most one request for each step_key", "two for one")
    if advanced in keys:
        raise InvalidArgumentError("dispatch", "without the step that the call ends", "a request for it")
    count = sum([len(request.after) for request in requests])
    if count > MAX_AFTER:
        raise InvalidArgumentError("dispatch", f"at most {MAX_AFTER:,} keys in after", f"{count:,}")
    if count and not allow_after:
        raise InvalidArgumentError("dispatch", "without after, because no step of a new run has ended")
    return requests


_DEFAULT_ACCEPT = StepRequest(step_key="any", step_type="any").accept


def _check_request(request: Any) -> StepRequest:
    if not isinstance(request, StepRequest):
        raise InvalidArgumentError("dispatch", "a sequence of StepRequest", _type_name(request))
    step_key = check_key("dispatch.step_key", request.step_key)
    keys = _check_after(request.after)
    if step_key in keys or (len(keys) > 1 and len(set(keys)) < len(keys)):
        raise InvalidArgumentError("dispatch.after", "distinct keys of other steps", "a repeated key")
    return StepRequest(
        step_key=step_key,
        step_type=check_key("dispatch.step_type", request.step_type),
        input_json=None
        if request.input_json is None
        else check_text("dispatch.input_json", request.input_json),
        queue=check_key("dispatch.queue", request.queue),
        priority=check_priority("dispatch.priority", request.priority),
        due_at=None if request.due_at is None else check_datetime("dispatch.due_at", request.due_at),
        after=keys,
        accept=request.accept if request.accept is _DEFAULT_ACCEPT else _check_accept(request.accept),
    )


def _check_after(value: Any) -> tuple[str, ...]:
    if type(value) is tuple and len(value) <= 1:
        # As in most requests.
        return (check_key("dispatch.after", value[0]),) if value else value
    if isinstance(value, str) or not isinstance(value, Collection):
        raise InvalidArgumentError("dispatch.after", "a collection of step keys", _type_name(value))
    # A step may wait for thousands of others, and each of them carries its request.
    if type(value) is tuple and set(map(type, value)) == {str}:
        text = "".join(value)
        if text.isascii() and "\0" not in text and all(value) and max(map(len, value)) <= MAX_KEY:
            return value
    return tuple(check_key("dispatch.after", key) for key in value)


def _check_accept(value: Any) -> frozenset[StepStatus]:
    name = "dispatch.accept"
    if isinstance(value, str) or not isinstance(value, Collection) or not value:
        raise InvalidArgumentError(name, "a collection of terminal statuses, not empty", _type_name(value))
    return frozenset(check_enum(name, status, StepStatus, _TERMINAL_OUTCOMES) for status in value)


def check_ended_steps(value: Any) -> tuple[EndedStep, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidArgumentError("steps", "a sequence of EndedStep", _type_name(value))
    _check_number("steps", value)
    steps = tuple(value)
    if _are_plain(steps):
        return steps
    try:
        return tuple([_check_ended_step(step) for step in steps])
    except InvalidArgumentError as error:
        error.argument = f"steps.{error.argument}"
        error.args = (f"steps.{error}",)
        raise


def _are_plain(steps: tuple[Any, ...]) -> bool:
    """Whether ended steps, each with one simple request at most, pass every check unchanged.

    It checks all values of a field at once, which takes a quarter of the time.
    """
    if {*map(type, steps)} != {EndedStep} or any(type(step.dispatch) is not tuple for step in steps):
        return False
    pairs = [(step, request) for step in steps for request in step.dispatch]
    if len(pairs) > sum([1 for step in steps if step.dispatch]):
        return False
    requests = [request for _, request in pairs]
    if {*map(type, requests)} - {StepRequest}:
        return False
    owners = [step.owner for step in steps if step.owner is not None]
    keys = [step.step_key for step in steps] + owners
    texts = [text for step in steps for text in (step.output_json, step.error_message) if text is not None]
    for request in requests:
        keys += (request.step_key, request.step_type, request.queue)
        texts += () if request.input_json is None else (request.input_json,)
    ends = [end for step in steps for end in (step.complete_as, step.failed_as) if end is not None]
    return (
        {*map(type, keys), *map(type, texts)} == {str}
        and 0 < min(map(len, keys)) <= max(map(len, keys)) <= MAX_KEY
        and sum(map(len, texts)) <= _SHORT
        and (joined := "".join(keys + texts)).isascii()
        and "\0" not in joined
        and {type(step.run_id) for step in steps} == {UUID}
        and {type(step.attempt) for step in steps} | {type(request.priority) for request in requests} == {int}
        and all(1 <= step.attempt <= MAX_INT64 for step in steps)
        and all(0 <= request.priority <= MAX_PRIORITY for request in requests)
        and {type(step.status) for step in steps} == {StepStatus}
        and {step.status for step in steps} <= set(_TERMINAL_OUTCOMES)
        and {*map(type, ends)} <= {RunStatus}
        and set(ends) <= set(_COMPLETIONS)
        and all(
            request.step_key != step.step_key
            and request.due_at is None
            and request.accept is _DEFAULT_ACCEPT
            and type(request.after) is tuple
            and {*map(type, request.after)} <= {str}
            and request.after in ((), (step.step_key,))
            for step, request in pairs
        )
    )


def _check_ended_step(step: Any) -> EndedStep:
    """The limits of a field are those of the argument of advance_run."""
    if not isinstance(step, EndedStep):
        raise InvalidArgumentError("item", "an EndedStep", _type_name(step))
    owner, output_json, error_message = step.owner, step.output_json, step.error_message
    complete_as, failed_as = step.complete_as, step.failed_as
    return EndedStep(
        run_id=check_id("run_id", step.run_id),
        step_key=check_key("step_key", step.step_key),
        status=check_final_outcome(step.status),
        attempt=check_int("attempt", step.attempt, 1, MAX_INT64),
        owner=None if owner is None else check_key("owner", owner),
        output_json=None if output_json is None else check_text("output_json", output_json),
        error_message=None if error_message is None else check_text("error_message", error_message),
        dispatch=check_requests(step.dispatch, advanced=step.step_key),
        complete_as=None if complete_as is None else check_run_outcome(complete_as, "complete_as"),
        failed_as=None if failed_as is None else check_run_outcome(failed_as, "failed_as"),
    )


def check_queue_arguments(
    queue: Any, priority: Any, step_type: Any, input_json: Any
) -> tuple[str | None, int, str | None, str | None]:
    """The queue of a dispatch and its companions, which are given only together with it (QUE-7)."""
    checked = check_priority("priority", priority)
    if queue is None:
        given = {
            "priority": checked != 0,
            "step_type": step_type is not None,
            "input_json": input_json is not None,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise InvalidArgumentError(name, "given only with queue")
        return None, 0, None, None
    name = check_key("queue", queue)
    if step_type is None:
        raise InvalidArgumentError("step_type", "given with queue: claim_next_steps starts attempts of it")
    text = None if input_json is None else check_text("input_json", input_json)
    return name, checked, check_key("step_type", step_type), text


def check_window(
    granularity: RunTimeseriesGranularity, since: datetime, until: datetime
) -> tuple[datetime, datetime]:
    """Extend a window to whole buckets (QRY-5); empty if since == until."""
    if since > until:
        raise InvalidArgumentError("since", "at or before until")
    first = bucket_floor(since, granularity)
    end = first if since == until else bucket_ceil(until, granularity)
    count = (end - first) // BUCKET_WIDTH[granularity]
    if count > MAX_BUCKETS:
        raise InvalidArgumentError(
            "until",
            f"at most {MAX_BUCKETS:,} buckets of one {granularity} after since",
            f"{count:,}",
        )
    return first, end


def check_clock(clock: Any) -> Callable[[], datetime] | None:
    """Wrap a clock so that every reading is checked: aware, converted to UTC, within the limits of INP-3."""
    if clock is None:
        return None
    if not callable(clock):
        raise InvalidArgumentError(
            "clock", "a callable without arguments that returns an aware datetime", _type_name(clock)
        )

    def now() -> datetime:
        return check_datetime("clock", clock())

    return now
