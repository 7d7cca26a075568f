"""A run within a transaction: the documents that the operation reads and changes."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from datetime import datetime
from uuid import UUID

from msgspec import structs

from flowstore_core import FlowRunRecord, RunNotFoundError, StepNotFoundError, StepStatus
from flowstore_core.steps import superseded_by
from flowstore_core.tags import RunTags, decode_tags, encode_tags
from flowstore_documents import keys
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import (
    ControlDocument,
    Intent,
    IntentKind,
    RunDocument,
    StepDocument,
    TagsDocument,
)
from flowstore_documents.indexes import control_entries, queue_entries, run_entries, step_entries, tag_entries
from flowstore_documents.space import Change, Range, View
from flowstore_documents.texts import Text, piece_keys, split
from flowstore_documents.transactions import IntentMet, Transaction

MAX_EXPECTED_STEPS = 8
"""A change that depends on more steps than this expects the ticks in their place."""

TEXT_TOKENS = b""
"""Among the staged writes of an import, the tokens of its long texts, which are deleted if it is given up."""


class RunState:
    """The documents of one run. ``flush`` writes those that have changed, and their index entries."""

    def __init__(self, transaction: Transaction, run_id: UUID) -> None:
        self.run_id = run_id
        self.run: RunDocument | None = None
        self.control: ControlDocument | None = None
        self.tags: RunTags | None = None
        """None: they are neither read nor changed."""
        self.is_renewal = False
        """Whether the changes of steps affect neither statuses nor claims, as a renewal or an annotation."""
        self.finishes_intent = False
        """Whether the transaction carries out the run's intent (intents.py)."""
        self.registering_call: str | None = None
        """The token of an import whose idempotency keys are registered one by one (intents.py)."""
        self._transaction = transaction
        self._old_run: RunDocument | None = None
        self._old_control: ControlDocument | None = None
        self._old_tags: RunTags = ()
        self._old_tags_text: Text | None = None
        self._has_control = False
        self._more: dict[bytes, bytes] = {}
        self._steps: dict[str, StepDocument] = {}
        self._old_steps: dict[str, StepDocument] = {}

    # Reading

    async def load(
        self,
        steps: Iterable[str] = (),
        *,
        control: bool = False,
        tags: bool = False,
        more: Collection[bytes] = (),
        ahead: Sequence[Range] = (),
    ) -> None:
        """Read the gate, some steps, and more documents, from one state. The commit needs them unchanged.

        The first items of the ranges ``ahead``, which are scanned later, are read with them.
        """
        tx, run_id = self._transaction, self.run_id
        gate = keys.gate(run_id)
        documents = [gate, *more]
        if tags:
            documents.append(keys.tags(run_id))
        if control:
            documents.append(keys.control(run_id))
        wanted = dict.fromkeys(steps)
        documents += [keys.step(run_id, key) for key in wanted]
        ticks = []
        if ahead or len(wanted) > MAX_EXPECTED_STEPS:
            ticks = [keys.steps_tick(run_id), keys.renewals_tick(run_id), keys.outputs_tick(run_id)]
        view = await tx.read_ahead([*documents, *ticks], ahead)
        tx.expect(*documents)
        self._read_gate(_value(view, gate))
        if control:
            self._has_control = True
            value = _value(view, keys.control(run_id))
            self.control = None if value is None else decode(ControlDocument, value)
            self._old_control = copy(self.control)
        for key in wanted:
            self._add_step(key, _value(view, keys.step(run_id, key)))
        self._more = {key: view.found[key].value for key in more if key in view.found}
        if tags:
            await self._read_tags(_value(view, keys.tags(run_id)))

    def value(self, key: bytes) -> bytes | None:
        """One of the ``more`` documents."""
        return self._more.get(key)

    async def _read_tags(self, value: bytes | None) -> None:
        stored = None if value is None else decode(TagsDocument, value).tags
        text = await self._transaction.read_texts(self.run_id, [stored])
        self.tags = self._old_tags = decode_tags(text(stored))
        self._old_tags_text = stored

    def _read_gate(self, value: bytes | None) -> None:
        self.run = None if value is None else decode(RunDocument, value)
        self._old_run = copy(self.run)
        if self.run is not None and self.run.intent is not None and not self.finishes_intent:
            raise IntentMet(self.run_id)

    def _add_step(self, step_key: str, value: bytes | None) -> None:
        step = self._steps[step_key] = StepDocument() if value is None else decode(StepDocument, value)
        if self._transaction.run is self:
            self._old_steps[step_key] = copy(step)

    def add_step(self, step_key: str, step: StepDocument) -> None:
        """Store a step of a run that is not stored yet."""
        self._old_steps[step_key] = StepDocument()
        self._steps[step_key] = step

    async def load_steps(self, step_keys: Sequence[str]) -> None:
        """Read further steps. The commit needs them unchanged."""
        if not step_keys:
            return
        view = await self._transaction.read([keys.step(self.run_id, key) for key in step_keys])
        for key in step_keys:
            self._add_step(key, _value(view, keys.step(self.run_id, key)))

    async def load_open_steps(self) -> None:
        """Read every step with an open mark. The commit then needs that no step changes."""
        self._transaction.expect(keys.steps_tick(self.run_id))
        marks = await self.open_step_keys()
        await self.load_steps([key for key in marks if key not in self._steps])

    async def open_step_keys(self, *, after: str | None = None, limit: int | None = None) -> Sequence[str]:
        """The keys that have an open mark, in order."""
        prefix = keys.open_marks(self.run_id)
        start = prefix if after is None else keys.open_mark(self.run_id, after) + b"\0"
        marks = await self._transaction.scan(Range(start, keys.end_of(prefix), limit, keys_only=True))
        return [keys.parse_last_name(key, prefix) for key, _ in marks]

    async def has_failed_step(self) -> bool:
        """Whether a step is Failed, if no step changes until the commit."""
        if any(step.status is StepStatus.FAILED for step in self._steps.values()):
            return True
        prefix = keys.failed_marks(self.run_id)
        marks = await self._transaction.scan(keys.prefix_range(prefix, keys_only=True))
        return any(keys.parse_last_name(key, prefix) not in self._steps for key, _ in marks)

    async def load_all_steps(self) -> None:
        """Read every step. The commit then needs that no step changes, and that no claim is renewed."""
        self._transaction.expect(keys.steps_tick(self.run_id))
        self._transaction.expect(keys.renewals_tick(self.run_id))
        prefix = keys.steps(self.run_id)
        for key, found in await self._transaction.scan(keys.prefix_range(prefix)):
            step_key = keys.parse_last_name(key, prefix)
            if step_key not in self._steps:
                self._add_step(step_key, found.value)

    # Documents

    @property
    def stored(self) -> RunDocument:
        """The run; RunNotFoundError if it is not stored."""
        if self.run is None:
            raise RunNotFoundError(self.run_id)
        return self.run

    def check_stored(self) -> None:
        """Raise RunNotFoundError if the run is not stored (UNK)."""
        if self.run is None:
            raise RunNotFoundError(self.run_id)

    @property
    def is_terminal(self) -> bool:
        """Whether the run has ended; RunNotFoundError if it is not stored."""
        return self.stored.is_terminal

    @property
    def is_running(self) -> bool:
        return self.run is not None and not self.run.is_terminal

    @property
    def steps(self) -> Mapping[str, StepDocument]:
        """The steps that were read, by key. A key without a document has an empty one."""
        return self._steps

    def step(self, step_key: str) -> StepDocument:
        return self._steps[step_key]

    def started_step(self, step_key: str) -> StepDocument:
        """A step; StepNotFoundError if it never started or was reset."""
        self.check_stored()
        step = self._steps[step_key]
        if step.status is None:
            raise StepNotFoundError(self.run_id, step_key)
        return step

    async def record(self) -> FlowRunRecord:
        run = self.stored
        if self.tags is None:
            key = keys.tags(self.run_id)
            await self._read_tags(_value(await self._transaction.read([key]), key))
        text = await self._transaction.read_texts(self.run_id, [run.trigger_data])
        return run.record(self.run_id, text(run.trigger_data), self.tags or ())

    # Changing

    def archive_attempt(self, step_key: str, now: datetime) -> None:
        """Close the newest attempt and copy it to the earlier ones, unless it is there already.

        Only the newest attempt of a step can be open (STP-1).
        """
        step = self._steps[step_key]
        if step.newest_attempt() is not None and step.completed_at is None:
            step.close(StepStatus.FAILED, None, superseded_by(step.attempt + 1), now)
        attempt = step.newest_attempt()
        if attempt is not None:
            self._transaction.put(keys.attempt(self.run_id, step_key, step.attempt), encode(attempt))

    def start_step(
        self, step_key: str, step_type: str, input_json: Text | None, job_id: str | None, now: datetime
    ) -> StepDocument:
        """Start the next attempt of a step; an open one is closed (STP-1)."""
        step = self._steps[step_key]
        self.archive_attempt(step_key, now)
        step.start(step_type, input_json, job_id, now)
        return step

    def skip_step(self, step_key: str, step_type: str, reason: str | None, now: datetime) -> None:
        """Record one attempt that starts and ends Skipped (STP-5)."""
        step = self.start_step(step_key, step_type, None, None, now)
        step.close(StepStatus.SKIPPED, None, self._transaction.text(reason), now)

    def flush(self) -> None:
        """Write the documents that have changed, and replace their index entries."""
        tx, run_id = self._transaction, self.run_id
        old_run = self._old_run
        entries_before: set[bytes] = set()
        entries_after: set[bytes] = set()
        if self.run != old_run:  # Few operations change the gate.
            entries_before = run_entries(run_id, old_run)
            entries_after = run_entries(run_id, self.run)
            if self.run is not None:
                tx.put(keys.gate(run_id), encode(self.run))
        if self._has_control:
            entries_before |= control_entries(run_id, old_run, self._old_control)
            entries_after |= control_entries(run_id, self.run, self.control)
            if self.control is None:
                if self._old_control is not None:
                    tx.delete(keys.control(run_id))
            elif self.control != self._old_control:
                tx.put(keys.control(run_id), encode(self.control))
        if self.tags is not None:
            entries_before |= tag_entries(run_id, old_run, self._old_tags)
            entries_after |= tag_entries(run_id, self.run, self.tags)
            if self.tags != self._old_tags:
                self._write_tags(self.tags)
        was_running, is_running = old_run is not None and not old_run.is_terminal, self.is_running
        for step_key, step in self._steps.items():
            old_step = self._old_steps[step_key]
            if step != old_step:
                entries_before |= step_entries(run_id, old_run, step_key, old_step)
                entries_after |= step_entries(run_id, self.run, step_key, step)
                self._write_step(step_key, step)
                self._put_ticks(old_step, step)
            # Only the steps of a Running run are in the queues.
            elif was_running and not is_running:
                entries_before |= queue_entries(run_id, step_key, step)
            elif is_running and not was_running:
                entries_after |= queue_entries(run_id, step_key, step)
        for entry in entries_before - entries_after:
            tx.delete(entry)
        for entry in entries_after - entries_before:
            tx.put(entry)
        steps = keys.steps(run_id)
        expected = [key for key in tx.expected if key.startswith(steps)]
        if len(expected) > MAX_EXPECTED_STEPS:
            # The ticks stand for all steps.
            tx.expected.difference_update(expected)
            tx.expected |= {keys.steps_tick(run_id), keys.renewals_tick(run_id)}

    def _write_tags(self, tags: RunTags) -> None:
        tx, key = self._transaction, keys.tags(self.run_id)
        for piece in piece_keys(self.run_id, self._old_tags_text):
            tx.delete(piece)
        encoded = encode_tags(tags)
        if encoded is None:
            tx.delete(key)
        else:
            tx.put(key, encode(TagsDocument(tx.text(encoded, owner=key))))

    def _write_step(self, step_key: str, step: StepDocument) -> None:
        key = keys.step(self.run_id, step_key)
        if step == StepDocument():
            self._transaction.delete(key)
        else:
            self._transaction.put(key, encode(step))

    def _put_ticks(self, old: StepDocument, new: StepDocument) -> None:
        tick = keys.renewals_tick if self.is_renewal else keys.steps_tick
        self._transaction.put(tick(self.run_id))
        if old.waiter != new.waiter:
            for waiter in (old.waiter, new.waiter):
                if waiter is not None:
                    self._transaction.put(keys.signal_tick(self.run_id, waiter.signal_name))

    # Changes that are too large for one commit

    @property
    def must_stage(self) -> bool:
        """Whether the change is staged however small it is."""
        return self.registering_call is not None

    def stage(self, change: Change) -> tuple[Change, Mapping[str, Sequence[bytes]]]:
        """A change that stores an intent, and the staged writes that the intent applies (intents.py).

        Keys outside of the steps that the change expects are written at once: operations that do not read
        the run depend on them.
        """
        run_id, tx = self.run_id, self._transaction
        gate = keys.gate(run_id)
        written = {*change.puts, *change.deletes} - {gate}
        now = {key for key in written & set(change.expected) if not key.startswith(keys.steps(run_id))}
        if self.registering_call is not None:
            now.clear()  # The import may be given up.
        later_puts = {key: value for key, value in change.puts.items() if key not in now}
        later_puts[gate] = encode(self.stored)
        later_deletes = [key for key in change.deletes if key not in now]
        token = secrets.token_hex(12)
        kind = IntentKind.APPLY
        if self.registering_call is not None:
            kind = IntentKind.REGISTER
            # The intent deletes replaced keys itself, each once: afterwards another run may register them.
            later_deletes = [key for key in later_deletes if not key.startswith(keys.KEYS)]
            later_puts[TEXT_TOKENS] = "\0".join(tx.text_tokens()).encode()
        parts = split(pack_writes(later_puts, later_deletes), tx.limits)
        intent = Intent(kind, token, len(parts), call=self.registering_call or "")
        puts = {key: value for key, value in change.puts.items() if key in now}
        puts[gate] = encode(structs.replace(self.stored, intent=intent))
        puts[keys.intent(run_id)] = b""
        deletes = [key for key in change.deletes if key in now]
        return replace(change, puts=puts, deletes=deletes), {token: parts}


def pack_writes(puts: Mapping[bytes, bytes], deletes: Collection[bytes]) -> bytes:
    """Writes as bytes."""
    packed = bytearray()
    for key, value in [*puts.items(), *((key, None) for key in deletes)]:
        packed += len(key).to_bytes(4) + key
        packed += b"\0" if value is None else b"\1" + len(value).to_bytes(4) + value
    return bytes(packed)


def unpack_writes(packed: bytes) -> tuple[dict[bytes, bytes], list[bytes]]:
    """The puts and the deletes that ``pack_writes`` packed."""
    puts: dict[bytes, bytes] = {}
    deletes = []
    at = 0

    def take() -> bytes:
        nonlocal at
        end = at + 4 + int.from_bytes(packed[at : at + 4])
        found = packed[at + 4 : end]
        at = end
        return found

    while at < len(packed):
        key = take()
        at += 1
        if packed[at - 1]:
            puts[key] = take()
        else:
            deletes.append(key)
    return puts, deletes


def _value(view: View, key: bytes) -> bytes | None:
    found = view.found.get(key)
    return None if found is None else found.value


async def change_run(
    transaction: Transaction,
    run_id: UUID,
    steps: Iterable[str] = (),
    *,
    control: bool = False,
    tags: bool = False,
    more: Collection[bytes] = (),
    ahead: Sequence[Range] = (),
) -> RunState:
    """The run that an operation changes."""
    run = transaction.run = RunState(transaction, run_id)
    await run.load(steps, control=control, tags=tags, more=more, ahead=ahead)
    return run


async def read_run(
    transaction: Transaction,
    run_id: UUID,
    steps: Iterable[str] = (),
    *,
    control: bool = False,
    tags: bool = False,
    more: Collection[bytes] = (),
    ahead: Sequence[Range] = (),
) -> RunState:
    """A run that an operation only reads."""
    run = RunState(transaction, run_id)
    await run.load(steps, control=control, tags=tags, more=more, ahead=ahead)
    return run
