"""The layout: the key of every document and index entry.

Names end with a zero byte. No name contains one (INP-2), so no two lists of names share a key, and keys
are in the order of the names by code point. Ids and numbers have a fixed length. A run's keys begin with
``r`` and its id::

    G            the gate: the run, its status, its intent. Every write to a run compares it
    T H u n/NAME ticks: versions that change with the steps, with the renewals of their claims, with the
                 outputs, and with the waiters of one signal. A write of a member puts its tick; an operation
                 that depends on all members compares it
    C            the control record
    t            the tags
    S/STEP       a step: newest attempt, claim, dispatch, waiter
    A/STEP/N     its earlier attempts
    O/STEP       a mark: the step is open, or is an unstarted key with a claim or a dispatch
    F/STEP       a mark: the step has failed
    N/NAME/D/AT/STEP  the waiters of a signal: D is 0 for undelivered, 1 for delivered
    D/ID         the result of a delivery
    m, M/NAME/N  the number of buffered signals, the buffered signals of a name
    U/KEY        an output
    e, E/N       the number of the last event, the events
    K/FLOW/TRIGGER/KEY  the idempotency keys of the run
    k            a tick of the keys that were registered before the run; absent if there are none
    B/TOKEN/N    the pieces of long texts and of staged writes

All other keys are indexes (``i``), queues (``p``) and slots of changes in progress (``z``).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from flowstore_core import RunStatus
from flowstore_core.queues import MAX_PRIORITY
from flowstore_documents.space import Range

NEVER = b"\xff" * 8
"""A time after every other."""
_MICROSECOND = timedelta(microseconds=1)
_EPOCH = datetime.min.replace(tzinfo=UTC)
_DESCENDING = bytes(range(255, -1, -1))
"""Translates bytes into those of the reverse order."""


def time_bytes(moment: datetime | None) -> bytes:
    """Eight bytes in the order of time; None is after every time."""
    return NEVER if moment is None else ((moment - _EPOCH) // _MICROSECOND).to_bytes(8)


def parse_time(data: bytes) -> datetime | None:
    return None if data == NEVER else _EPOCH + int.from_bytes(data) * _MICROSECOND


def after_time(moment: datetime) -> bytes:
    """The least bytes after all keys that continue the time."""
    return (int.from_bytes(time_bytes(moment)) + 1).to_bytes(8)


def _name(text: str) -> bytes:
    return text.encode() + b"\0"


def end_of(prefix: bytes) -> bytes:
    """The least key after all keys with a prefix."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes([head[-1] + 1])


def prefix_range(
    prefix: bytes, limit: int | None = None, *, keys_only: bool = False, count: bool = False
) -> Range:
    return Range(prefix, end_of(prefix), limit, keys_only, count)


# A run


def run_prefix(run_id: UUID) -> bytes:
    return b"r" + run_id.bytes


def gate(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"G"


def steps_tick(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"T"


def renewals_tick(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"H"


def outputs_tick(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"u"


def signal_tick(run_id: UUID, signal_name: str) -> bytes:
    return run_prefix(run_id) + b"n" + _name(signal_name)


def gate_of_tick(key: bytes) -> bytes | None:
    """The gate of the run, if a key is the tick of its steps or of its renewals."""
    return key[:17] + b"G" if len(key) == 18 and key[:1] == b"r" and key[17:] in (b"T", b"H") else None


def control(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"C"


def tags(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"t"


def steps(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"S"


def step(run_id: UUID, step_key: str) -> bytes:
    return steps(run_id) + _name(step_key)


def parse_last_name(key: bytes, prefix: bytes) -> str:
    """The name with which a key ends, after a prefix."""
    return key[len(prefix) : -1].decode()


def all_attempts(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"A"


def attempts(run_id: UUID, step_key: str) -> bytes:
    return all_attempts(run_id) + _name(step_key)


def attempt(run_id: UUID, step_key: str, number: int) -> bytes:
    return attempts(run_id, step_key) + number.to_bytes(8)


def parse_attempt_step(run_id: UUID, key: bytes) -> str:
    return key[len(all_attempts(run_id)) : -9].decode()


def open_marks(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"O"


def open_mark(run_id: UUID, step_key: str) -> bytes:
    return open_marks(run_id) + _name(step_key)


def failed_marks(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"F"


def failed_mark(run_id: UUID, step_key: str) -> bytes:
    return failed_marks(run_id) + _name(step_key)


def waiters_of_signal(run_id: UUID, signal_name: str, *, delivered: bool) -> bytes:
    return run_prefix(run_id) + b"N" + _name(signal_name) + (b"1" if delivered else b"0")


def waiter_of_signal(
    run_id: UUID, signal_name: str, created_at: datetime, step_key: str, *, delivered: bool
) -> bytes:
    prefix = waiters_of_signal(run_id, signal_name, delivered=delivered)
    return prefix + time_bytes(created_at) + _name(step_key)


def parse_waiter_step(key: bytes, prefix: bytes) -> str:
    return key[len(prefix) + 8 : -1].decode()


def deliveries(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"D"


def delivery(run_id: UUID, delivery_id: str) -> bytes:
    return deliveries(run_id) + _name(delivery_id)


def mailbox(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"m"


def all_buffered(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"M"


def buffered_of_signal(run_id: UUID, signal_name: str) -> bytes:
    return all_buffered(run_id) + _name(signal_name)


def buffered(run_id: UUID, signal_name: str, number: int) -> bytes:
    return buffered_of_signal(run_id, signal_name) + number.to_bytes(8)


def parse_buffered(run_id: UUID, key: bytes) -> tuple[int, str]:
    """The number and the signal name of a buffered signal."""
    return int.from_bytes(key[-8:]), key[len(all_buffered(run_id)) : -9].decode()


def outputs(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"U"


def output(run_id: UUID, key: str) -> bytes:
    return outputs(run_id) + _name(key)


def last_event(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"e"


def events(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"E"


def event(run_id: UUID, sequence: int) -> bytes:
    return events(run_id) + sequence.to_bytes(8)


def keys_of_run(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"K"


def key_of_run(run_id: UUID, scope: bytes) -> bytes:
    return keys_of_run(run_id) + scope


def keys_tick(run_id: UUID) -> bytes:
    return run_prefix(run_id) + b"k"


def pieces(run_id: UUID, token: str) -> bytes:
    return run_prefix(run_id) + b"B" + _name(token)


def piece(run_id: UUID, token: str, number: int) -> bytes:
    return pieces(run_id, token) + number.to_bytes(4)


# Idempotency keys


def key_scope(flow_id: UUID, trigger_key: str, idempotency_key: str) -> bytes:
    return flow_id.bytes + _name(trigger_key) + _name(idempotency_key)


def parse_key_scope(scope: bytes) -> tuple[UUID, str, str]:
    trigger_key, idempotency_key, _ = scope[16:].split(b"\0")
    return UUID(bytes=scope[:16]), trigger_key.decode(), idempotency_key.decode()


KEYS = b"ik"


def idempotency_key(scope: bytes) -> bytes:
    return KEYS + scope


# Indexes of runs. Their order is that of QRY-1: the newest first


def position(started_at: datetime, run_id: UUID) -> bytes:
    """The place of a run in the order of QRY-1."""
    return (time_bytes(started_at) + run_id.bytes).translate(_DESCENDING)


def parse_position(key: bytes) -> UUID:
    """The run of a key that ends with a position."""
    return UUID(bytes=key[-16:].translate(_DESCENDING))


def before_position(moment: datetime) -> bytes:
    """The least bytes of the positions of all runs that started before a time."""
    earlier = max(int.from_bytes(time_bytes(moment)) - 1, 0).to_bytes(8)
    return earlier.translate(_DESCENDING)


RUNS = b"is"
FLOWS = b"if"


def runs_of(flow_id: UUID | None = None, status: RunStatus | None = None) -> bytes:
    """The index of all runs, or of those of a flow, of a status, or of both."""
    if status is None:
        return RUNS if flow_id is None else FLOWS + flow_id.bytes
    return b"it" + _name(status) if flow_id is None else b"iu" + flow_id.bytes + _name(status)


def runs_with_tag(key: str, value: str) -> bytes:
    return b"ig" + _name(key) + _name(value)


def derived_runs(source_run_id: UUID) -> bytes:
    return b"io" + source_run_id.bytes


COMPLETED = b"ic"


def completed_runs(status: RunStatus) -> bytes:
    return COMPLETED + _name(status)


def completed_run(status: RunStatus, completed_at: datetime, run_id: UUID) -> bytes:
    return completed_runs(status) + time_bytes(completed_at) + run_id.bytes


DEADLINES = b"id"
"""Running runs with a deadline and without a latch, by deadline."""
LATCHED = b"il"
"""Running runs with a latch, by deadline."""


def deadline(timeout_at: datetime | None, run_id: UUID, *, latched: bool) -> bytes:
    return (LATCHED if latched else DEADLINES) + time_bytes(timeout_at) + run_id.bytes


def parse_run(key: bytes) -> UUID:
    """The run of a key that ends with its id."""
    return UUID(bytes=key[-16:])


# Work that others must finish or sweep

INTENTS = b"ii"
"""Runs with an intent."""


def intent(run_id: UUID) -> bytes:
    return INTENTS + run_id.bytes


STAGED = b"ix"
"""Marks of pieces whose commit may never come, by time; the value lists their tokens."""


def staged(at: datetime, run_id: UUID, token: str) -> bytes:
    """The mark of some pieces; the token is one of theirs."""
    return STAGED + time_bytes(at) + run_id.bytes + _name(token)


def parse_staged(key: bytes) -> UUID:
    start = len(STAGED) + 8
    return UUID(bytes=key[start : start + 16])


ORPHANS = b"ip"
"""Idempotency keys and control records that were made before their run, by time."""


def orphan(created_at: datetime, run_id: UUID, scope: bytes = b"") -> bytes:
    """The entry of an idempotency key, or of the control record."""
    return ORPHANS + time_bytes(created_at) + run_id.bytes + scope


def parse_orphan(key: bytes) -> tuple[UUID, bytes]:
    start = len(ORPHANS) + 8
    return UUID(bytes=key[start : start + 16]), key[start + 16 :]


# Queues. Steps whose dispatch names no queue are in the queue "", for get_stalled_steps

QUEUES = b"p"


def queue(name: str) -> bytes:
    return QUEUES + _name(name)


def queue_level(name: str, priority: int) -> bytes:
    return queue(name) + bytes([MAX_PRIORITY - priority])


def queued_step(name: str, priority: int, ready_at: datetime | None, run_id: UUID, step_key: str) -> bytes:
    return queue_level(name, priority) + time_bytes(ready_at) + run_id.bytes + _name(step_key)


def parse_queued_step(key: bytes) -> tuple[bytes, bytes, UUID, str]:
    """The level, the time, the run and the step key of an entry."""
    level = key.index(b"\0") + 2
    run_id = UUID(bytes=key[level + 8 : level + 24])
    return key[:level], key[level : level + 8], run_id, key[level + 24 : -1].decode()


# Slots

SLOTS = b"z"


def slot(opened: bytes, number: int) -> bytes:
    return SLOTS + opened + number.to_bytes(4)
