"""Exporting and importing whole runs (XFR)."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from flowstore_core import (
    ArchivedControl,
    ArchivedDelivery,
    ArchivedKey,
    ArchivedStep,
    ConflictError,
    RunAlreadyExistsError,
    RunArchive,
    SignalDeliveryStatus,
    new_claim_token,
)
from flowstore_core.transfer import is_same_run, step_at_export
from flowstore_documents import keys
from flowstore_documents.access import Access
from flowstore_documents.attempts import (
    all_attempts,
    attempt_records,
    attempt_texts,
    read_attempts,
    steps_and_attempts,
)
from flowstore_documents.claims import claim_record, dispatch_record
from flowstore_documents.codec import decode, encode
from flowstore_documents.documents import (
    AttemptDocument,
    BufferedDocument,
    Claim,
    ControlDocument,
    DeliveryDocument,
    Dispatch,
    EventDocument,
    KeyDocument,
    MailboxDocument,
    OutputDocument,
    RunDocument,
    StepDocument,
    Waiter,
)
from flowstore_documents.events import read_events
from flowstore_documents.idempotency_keys import find_key, register_key
from flowstore_documents.outputs import read_outputs
from flowstore_documents.run_state import RunState, change_run, read_run
from flowstore_documents.signals import buffered_signals, waiter_records
from flowstore_documents.space import Range
from flowstore_documents.transactions import Transaction


class Transfer(Access):
    async def export_run(self, run_id: UUID) -> RunArchive | None:
        async def export(tx: Transaction) -> RunArchive | None:
            more, ahead = _documents(run_id), _ranges(run_id)
            run = await read_run(tx, run_id, control=True, tags=True, more=more, ahead=ahead)
            return None if run.run is None else await _read_archive(tx, run)

        return await self._read("export_run", export)

    async def import_run(self, archive: RunArchive) -> bool:
        return await self._shielded.run(self._import(archive))

    async def _import(self, archive: RunArchive) -> bool:
        run_id, call = archive.run.run_id, new_claim_token()

        async def store(tx: Transaction) -> bool | None:
            # The tick changes with every key that is registered before the run.
            run = await change_run(tx, run_id, control=True, more=[keys.keys_tick(run_id)])
            if run.run is not None:
                await run.load(control=True, tags=True, more=_documents(run_id), ahead=_ranges(run_id))
                if is_same_run(await _read_archive(tx, run), archive):
                    return False
                raise RunAlreadyExistsError(run_id)
            await _store_keys(tx, run, archive)
            _store_run(tx, run, archive)
            for step in archive.steps:
                _store_step(tx, run, step)
            _store_signals(tx, run, archive)
            _store_outputs_and_events(tx, archive)
            if not _has_many_keys(tx):
                return True
            # The intent compares the keys, which are too many for one commit.
            tx.expected &= {keys.gate(run_id), keys.control(run_id), keys.keys_tick(run_id)}
            run.registering_call = call
            return None

        async def is_given_up(tx: Transaction) -> bool:
            await read_run(tx, run_id)
            mark = keys.piece(run_id, call, 0)
            return bool((await tx.read([mark])).found)

        is_imported = await self._transactions.run("import_run", store)
        if is_imported is not None:
            return is_imported
        if await self._transactions.settle("import_run", run_id, is_given_up):
            return await self._import(archive)  # Finds the other run with the key, unless it has gone.
        return True


def _has_many_keys(tx: Transaction) -> bool:
    """Whether one commit can not compare all keys that the import registers and replaces."""
    return len(tx.expected) >= tx.limits.expected


# Exporting


def _documents(run_id: UUID) -> Sequence[bytes]:
    return [keys.mailbox(run_id), keys.last_event(run_id)]


def _ranges(run_id: UUID) -> Sequence[Range]:
    """What _read_archive scans."""
    others = [keys.all_buffered, keys.outputs, keys.events, keys.deliveries, keys.keys_of_run]
    return [*steps_and_attempts(run_id), *(keys.prefix_range(prefix(run_id)) for prefix in others)]


async def _read_archive(tx: Transaction, run: RunState) -> RunArchive:
    """The archive of a run that was loaded with its control record, tags, _documents and _ranges.

    Every part but the keys has a document that was read before it and changes with it. So the state, without
    snapshots too, is that of the moment at which the keys are read, if no document changes until the end.
    """
    run_id = run.run_id
    record = await run.record()
    await run.load_all_steps()
    earlier = await read_attempts(tx, run_id)
    attempts = {key: all_attempts(step, earlier.get(key, ())) for key, step in run.steps.items()}
    inputs = [step.dispatch.input_json for step in run.steps.values() if step.dispatch is not None]
    text = await tx.read_texts(run_id, [*attempt_texts(attempts), *inputs])
    waiters = await waiter_records(tx, run)
    buffered = await buffered_signals(tx, run_id)
    outputs = await read_outputs(tx, run_id, keys.prefix_range(keys.outputs(run_id)))
    events = await read_events(tx, run_id, keys.prefix_range(keys.events(run_id)))
    control = await _archived_control(tx, run)
    deliveries = await _archived_deliveries(tx, run_id)
    idempotency_keys = await _archived_keys(tx, run_id)
    now = await tx.now()
    steps = []
    for key, step in sorted(run.steps.items()):
        archived = ArchivedStep(
            run_id=run_id,
            step_key=key,
            status=step.status,
            reopened=step.reopened,
            rescheduled=step.rescheduled_as is not None,
            started_owner=step.started_owner,
            attempts=attempt_records(run_id, key, attempts[key], text),
            claim=None if step.claim is None else claim_record(run_id, key, step.claim),
            dispatch=None if step.dispatch is None else dispatch_record(run_id, key, step.dispatch, text),
        )
        steps.append(step_at_export(archived, now))
    return RunArchive(
        run=record,
        control=control,
        idempotency_keys=idempotency_keys,
        steps=tuple(step for step in steps if step is not None),
        waiters=waiters,
        deliveries=deliveries,
        buffered=buffered,
        outputs=tuple(outputs.items()),
        events=events,
    )


async def _archived_control(tx: Transaction, run: RunState) -> ArchivedControl | None:
    control = run.control
    if control is None:
        return None
    text = await tx.read_texts(run.run_id, [control.cancel_reason, control.timeout_reason])
    return ArchivedControl(
        run_id=run.run_id,
        flow_id=control.flow_id,
        trigger_key=control.trigger_key,
        idempotency_key=control.idempotency_key,
        timeout_at=control.timeout_at,
        cancel_requested_at=control.cancelled_at,
        cancel_reason=text(control.cancel_reason),
        timed_out_at=control.timed_out_at,
        timed_out_reason=text(control.timeout_reason),
        created_at=control.created_at,
    )


async def _archived_deliveries(tx: Transaction, run_id: UUID) -> tuple[ArchivedDelivery, ...]:
    prefix = keys.deliveries(run_id)
    found = [
        (keys.parse_last_name(key, prefix), decode(DeliveryDocument, value.value))
        for key, value in await tx.scan(keys.prefix_range(prefix))
    ]
    return tuple(
        ArchivedDelivery(
            delivery_id=delivery_id, step_key=document.step_key, delivered_at=document.delivered_at
        )
        for delivery_id, document in found
    )


async def _archived_keys(tx: Transaction, run_id: UUID) -> tuple[ArchivedKey, ...]:
    prefix = keys.keys_of_run(run_id)
    found = []
    for key, value in await tx.scan(keys.prefix_range(prefix)):
        flow_id, trigger_key, idempotency_key = keys.parse_key_scope(key[len(prefix) :])
        found.append(
            ArchivedKey(
                flow_id=flow_id,
                trigger_key=trigger_key,
                idempotency_key=idempotency_key,
                created_at=decode(KeyDocument, value.value).created_at,
            )
        )
    return tuple(found)


# Importing


async def _store_keys(tx: Transaction, run: RunState, archive: RunArchive) -> None:
    """Replace the keys of a run that never started by those of the archive."""
    run_id = run.run_id
    prefix = keys.keys_of_run(run_id)
    wanted = {
        keys.key_scope(one.flow_id, one.trigger_key, one.idempotency_key): one.created_at
        for one in archive.idempotency_keys
    }
    for scope in wanted:
        if await find_key(tx, scope) not in (None, run_id):
            raise ConflictError(
                f"an idempotency key of run {run_id} is registered to another run", run_id=run_id
            )
    for key, value in await tx.scan(keys.prefix_range(prefix)):
        scope = key[len(prefix) :]
        tx.delete(keys.orphan(decode(KeyDocument, value.value).created_at, run_id, scope))
        if scope not in wanted:
            await find_key(tx, scope)
            tx.delete(key)
            tx.delete(keys.idempotency_key(scope))
    for scope, created_at in wanted.items():
        register_key(tx, run_id, scope, created_at)


def _store_run(tx: Transaction, run: RunState, archive: RunArchive) -> None:
    record, control = archive.run, archive.control
    run.run = RunDocument(
        flow_id=record.flow_id,
        flow_name=record.flow_name,
        trigger_key=record.trigger_key,
        started_at=record.started_at,
        status=record.status,
        trigger_data=tx.text(record.trigger_data),
        job_id=record.job_id,
        source_run_id=record.source_run_id,
        completed_at=record.completed_at,
    )
    run.tags = record.tags
    if run.control is not None:
        tx.delete(keys.orphan(run.control.created_at, run.run_id))
    run.control = None
    if control is not None:
        run.control = ControlDocument(
            flow_id=control.flow_id,
            trigger_key=control.trigger_key,
            created_at=control.created_at,
            idempotency_key=control.idempotency_key,
            timeout_at=control.timeout_at,
            cancelled_at=control.cancel_requested_at,
            cancel_reason=tx.text(control.cancel_reason),
            timed_out_at=control.timed_out_at,
            timeout_reason=tx.text(control.timed_out_reason),
        )


def _store_step(tx: Transaction, run: RunState, archived: ArchivedStep) -> None:
    step = StepDocument(
        status=archived.status, reopened=archived.reopened, started_owner=archived.started_owner
    )
    run.add_step(archived.step_key, step)
    earlier = list(archived.attempts)
    if archived.attempts:
        newest = archived.attempts[-1]
        step.first_started_at = archived.attempts[0].started_at
        step.attempt = newest.attempt
        step.step_type, step.job_id = newest.step_type, newest.job_id
        step.input_json = tx.text(newest.input_json)
        step.output_json, step.error_message = tx.text(newest.output_json), tx.text(newest.error_message)
        step.started_at, step.completed_at = newest.started_at, newest.completed_at
        if archived.rescheduled:
            step.rescheduled_as = newest.status
        if step.newest_attempt() is not None:
            del earlier[-1]
    for attempt in earlier:
        document = AttemptDocument(
            step_type=attempt.step_type,
            status=attempt.status,
            started_at=attempt.started_at,
            input_json=tx.text(attempt.input_json),
            output_json=tx.text(attempt.output_json),
            error_message=tx.text(attempt.error_message),
            job_id=attempt.job_id,
            completed_at=attempt.completed_at,
        )
        tx.put(keys.attempt(run.run_id, archived.step_key, attempt.attempt), encode(document))
    if (claim := archived.claim) is not None:
        step.claim = Claim(new_claim_token(), claim.claimed_at, claim.owner, claim.expires_at)
    if (dispatch := archived.dispatch) is not None:
        step.dispatch = Dispatch(
            token=new_claim_token(),
            dispatched_at=dispatch.dispatched_at,
            due_at=dispatch.due_at,
            job_id=dispatch.job_id,
            queue=dispatch.queue,
            priority=dispatch.priority,
            step_type=dispatch.step_type,
            input_json=tx.text(dispatch.input_json),
        )


def _store_signals(tx: Transaction, run: RunState, archive: RunArchive) -> None:
    run_id = run.run_id
    for waiter in archive.waiters:
        if waiter.step_key not in run.steps:
            run.add_step(waiter.step_key, StepDocument())
        run.step(waiter.step_key).waiter = Waiter(
            signal_name=waiter.signal_name,
            created_at=waiter.created_at,
            expires_at=waiter.expires_at,
            delivered_at=waiter.delivered_at,
            payload_json=tx.text(waiter.payload_json),
            expired_at=waiter.expired_at,
        )
    for delivery in archive.deliveries:
        is_buffered = delivery.step_key is None
        status = SignalDeliveryStatus.BUFFERED if is_buffered else SignalDeliveryStatus.DELIVERED
        result = DeliveryDocument(status, delivery.step_key, delivery.delivered_at)
        tx.put(keys.delivery(run_id, delivery.delivery_id), encode(result))
    for number, one in enumerate(archive.buffered, 1):
        document = BufferedDocument(tx.text(one.payload_json), one.buffered_at)
        tx.put(keys.buffered(run_id, one.signal_name, number), encode(document))
    if count := len(archive.buffered):
        tx.put(keys.mailbox(run_id), encode(MailboxDocument(count, count)))


def _store_outputs_and_events(tx: Transaction, archive: RunArchive) -> None:
    run_id = archive.run.run_id
    for key, value_json in archive.outputs:
        name = keys.output(run_id, key)
        tx.put(name, encode(OutputDocument(tx.text(value_json, owner=name))))
    for event in archive.events:
        document = EventDocument(event.timestamp, event.event_type, event.step_key, tx.text(event.message))
        tx.put(keys.event(run_id, event.sequence), encode(document))
    if archive.events:
        tx.put(keys.last_event(run_id), str(len(archive.events)).encode())
