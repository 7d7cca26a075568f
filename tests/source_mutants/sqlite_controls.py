"""Mutants of run control, idempotency keys, the trigger and signals in SQLite."""

from __future__ import annotations

from datetime import timedelta
from uuid import uuid4

from flowstore_core import (
    ConflictError,
    RunAlreadyExistsError,
    RunStatus,
    SignalDeliveryStatus,
    StepStatus,
    open_store,
)
from tests.calls import FLOW, new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import ended_run, error_of, new_step, raw_connection
from tests.virtual_clock import VirtualClock

CONTROLS = "flowstore_sqlite/controls.py"
SIGNALS = "flowstore_sqlite/signals.py"
FIRST_SCHEMA = "flowstore_sqlite/migrations/0001_first_schema.sql"
RUNS_TO_STOP = "flowstore_sqlite/migrations/0006_runs_to_stop.sql"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-1",),
    changes=[
        (
            CONTROLS,
            "timeout_at = excluded.timeout_at\n",
            "timeout_at = COALESCE(excluded.timeout_at, timeout_at)\n",
        )
    ],
)
async def configuring_without_a_deadline_keeps_the_old_one(url: str) -> None:
    """configure_run without timeout_at leaves the deadline of an earlier call."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
        await store.configure_run(run_id, FLOW, "manual")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.timeout_at is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-1",),
    changes=[
        (
            CONTROLS,
            "INSERT INTO controls (run_id, flow_id, trigger_key, idempotency_key, timeout_at, created_at)\n"
            "VALUES (?, ?, ?, ?, ?, ?)\n"
            "ON CONFLICT (run_id) DO UPDATE SET\n"
            "    flow_id = excluded.flow_id, trigger_key = excluded.trigger_key,\n"
            "    idempotency_key = excluded.idempotency_key, timeout_at = excluded.timeout_at\n",
            "INSERT OR REPLACE INTO controls\n"
            "    (run_id, flow_id, trigger_key, idempotency_key, timeout_at, created_at)\n"
            "VALUES (?, ?, ?, ?, ?, ?)\n",
        )
    ],
)
async def configuring_again_replaces_the_record(url: str) -> None:
    """A second configure_run replaces the whole control record, so a cancel request is deleted."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.request_cancel(run_id)
        await store.configure_run(run_id, FLOW, "manual")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_requested


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-2",),
    changes=[
        (
            CONTROLS,
            "WHERE run_id = ? AND cancelled_at IS NULL",
            "WHERE run_id = ? AND cancelled_at IS NULL AND timed_out_at IS NULL",
        )
    ],
)
async def timed_out_run_cannot_be_cancelled(url: str) -> None:
    """request_cancel is False after a time-out, as if the latches were one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual")
        await store.mark_timed_out(run_id)
        assert await store.request_cancel(run_id)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-2",),
    changes=[
        (
            CONTROLS,
            "SELECT run_id, flow_id, trigger_key, ? FROM runs WHERE run_id = ?",
            "SELECT run_id, flow_id, trigger_key, ? FROM runs WHERE run_id = ? AND status = 'Running'",
        )
    ],
)
async def ended_run_cannot_be_cancelled(url: str) -> None:
    """request_cancel of a terminal run without a control record is False."""
    async with open_store(url) as store:
        assert await store.request_cancel(await ended_run(store))


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-2",),
    changes=[
        (
            CONTROLS,
            "cancel_reason=cancel_reason if is_cancelled else timed_out_reason",
            "cancel_reason=cancel_reason or timed_out_reason",
        )
    ],
)
async def cancel_without_reason_shows_that_of_the_time_out(url: str) -> None:
    """A cancel without a reason shows the reason of the time-out as the user's."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.request_cancel(run_id)
        await store.mark_timed_out(run_id, "too slow")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_reason is None


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CTL-2",),
    changes=[(CONTROLS, "OR timeout_at <= :as_of", "OR timeout_at < :as_of")],
)
async def deadline_that_ends_now_does_not_time_out(url: str) -> None:
    """mark_timed_out with the deadline itself as as_of is False."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
        assert await store.mark_timed_out(run_id, as_of=clock())


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CTL-3",),
    changes=[(CONTROLS, "AND timeout_at <= :as_of AND", "AND timeout_at < :as_of AND")],
)
async def run_whose_deadline_ends_now_is_not_stopped(url: str) -> None:
    """get_runs_to_stop omits a run whose deadline is exactly as_of."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
        assert len(await store.get_runs_to_stop(as_of=clock())) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "AND (cancelled_at IS NOT NULL OR timed_out_at IS NOT NULL)",
            "AND cancelled_at IS NOT NULL",
        )
    ],
)
async def run_marked_before_its_deadline_is_not_stopped(url: str) -> None:
    """get_runs_to_stop omits a run that was marked as timed out before its deadline."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual")
        await store.mark_timed_out(run_id)
        assert len(await store.get_runs_to_stop()) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "ORDER BY timeout_at NULLS LAST, run_id\n",
            "ORDER BY timeout_at, run_id\n",
        )
    ],
)
async def runs_without_deadline_are_stopped_first(url: str) -> None:
    """get_runs_to_stop lists runs without a deadline first, because NULL sorts first."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        cancelled, late = await new_run(store), await new_run(store)
        await store.request_cancel(cancelled)
        await store.configure_run(late, FLOW, "manual", timeout_at=clock())
        assert [run.run_id for run in await store.get_runs_to_stop()] == [late, cancelled]


@source_mutant(
    "sqlite",
    kind="migration",
    clauses=("CTL-3",),
    changes=[(RUNS_TO_STOP, "WHEN 'Running' THEN ended\n", "WHEN 'Running' THEN 0\n")],
)
async def cancel_of_a_reopened_run_is_not_listed(url: str) -> None:
    """get_runs_to_stop omits a run that was cancelled, ended and reopened."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "http")
        await store.record_step_complete(run_id, "a", StepStatus.FAILED)
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.retry_step(run_id, "a")
        await store.request_cancel(run_id)
        assert len(await store.get_runs_to_stop()) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[(CONTROLS, "AND timeout_at <= :as_of AND status = 'Running'", "AND timeout_at <= :as_of")],
)
async def ended_run_with_a_new_deadline_is_listed(url: str) -> None:
    """get_runs_to_stop lists an ended run whose control record was stored after its end."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock())
        assert list(await store.get_runs_to_stop()) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "SET timeout_at = ?, timed_out_at = NULL, timed_out_reason = NULL",
            "SET timeout_at = ?, timed_out_at = NULL, timed_out_reason = NULL, cancelled_at = NULL",
        )
    ],
)
async def longer_deadline_clears_a_cancel(url: str) -> None:
    """extend_deadline clears the user's cancel together with the time-out."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.request_cancel(run_id)
        await store.extend_deadline(run_id, clock() + timedelta(hours=1))
        assert len(await store.get_runs_to_stop()) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "SET timeout_at = ?, timed_out_at = NULL, timed_out_reason = NULL",
            "SET timeout_at = ?, timed_out_at = NULL",
        )
    ],
)
async def longer_deadline_keeps_the_reason_of_the_time_out(url: str) -> None:
    """extend_deadline clears the time-out but not its reason."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual")
        await store.mark_timed_out(run_id, "too slow")
        await store.extend_deadline(run_id, clock())
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_reason is None


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("IDM-1",),
    changes=[
        (
            FIRST_SCHEMA,
            "    idempotency_key TEXT NOT NULL,\n",
            "    idempotency_key TEXT NOT NULL COLLATE NOCASE,\n",
        )
    ],
)
async def idempotency_keys_match_without_case(url: str) -> None:
    """Two idempotency keys that differ in case are one."""
    async with open_store(url) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "order-a", uuid4())
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order-A") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("IDM-1",),
    changes=[
        (
            FIRST_SCHEMA,
            "PRIMARY KEY (flow_id, trigger_key, idempotency_key)",
            "PRIMARY KEY (flow_id, idempotency_key)",
        ),
        (
            CONTROLS,
            "ON CONFLICT (flow_id, trigger_key, idempotency_key) DO NOTHING",
            "ON CONFLICT (flow_id, idempotency_key) DO NOTHING",
        ),
    ],
)
async def idempotency_keys_ignore_the_trigger(url: str) -> None:
    """An idempotency key that one trigger of a flow took is taken for its other triggers."""
    async with open_store(url) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "order", uuid4())
        assert await store.try_register_idempotency_key(FLOW, "webhook", "order", uuid4())


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("IDM-3",),
    changes=[
        (
            CONTROLS,
            "                flow_name,\n                chosen,",
            "                flow_name,\n                run_id,",
        )
    ],
)
async def registered_run_starts_under_another_id(url: str) -> None:
    """A trigger whose key is registered starts the run under its own id, not the registered one."""
    async with open_store(url) as store:
        registered = uuid4()
        await store.try_register_idempotency_key(FLOW, "manual", "order", registered)
        result = await store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="order")
        assert result.run.run_id == registered


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-1",),
    changes=[
        (
            SIGNALS,
            "signal_name = excluded.signal_name, expires_at = excluded.expires_at\n",
            "signal_name = excluded.signal_name, expires_at = excluded.expires_at,\n"
            "    created_at = excluded.created_at\n",
        )
    ],
)
async def waiting_again_moves_the_waiter_to_the_end(url: str) -> None:
    """Registering a waiter again sets created_at, so younger waiters get the signal before it."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for step_key in ("charge", "ship", "charge"):
            await store.register_waiter(run_id, step_key, "paid")
            clock.advance(seconds=1)
        assert (await store.deliver_signal(run_id, "paid", "{}")).step_key == "charge"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-1",),
    changes=[
        (
            SIGNALS,
            "INSERT INTO waiters (run_id, step_key, signal_name, expires_at, created_at) VALUES "
            "(?, ?, ?, ?, ?)\n"
            "ON CONFLICT (run_id, step_key) DO UPDATE SET\n"
            "    signal_name = excluded.signal_name, expires_at = excluded.expires_at\n",
            "INSERT OR REPLACE INTO waiters (run_id, step_key, signal_name, expires_at, created_at)\n"
            "VALUES (?, ?, ?, ?, ?)\n",
        )
    ],
)
async def waiting_again_discards_the_payload(url: str) -> None:
    """Registering a delivered waiter again replaces the row, so the payload is lost."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        await store.register_waiter(run_id, "charge", "paid")
        waiter = await store.get_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.payload_json == "{}"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-1",),
    changes=[
        (
            SIGNALS,
            "waiter.delivered_at is not None and waiter.signal_name != signal_name:",
            "waiter.delivered_at is not None and waiter.signal_name == signal_name:",
        )
    ],
)
async def delivered_waiter_takes_another_name(url: str) -> None:
    """A delivered waiter can be registered under another signal name, and only under another."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        assert await error_of(store.register_waiter(run_id, "charge", "refunded")) is ConflictError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-2",),
    changes=[
        (
            SIGNALS,
            "FROM deliveries WHERE run_id = ? AND delivery_id = ?",
            "FROM deliveries WHERE ? IS NOT NULL AND delivery_id = ?",
        )
    ],
)
async def delivery_ids_are_shared_by_all_runs(url: str) -> None:
    """A delivery_id of one run deduplicates deliveries to other runs."""
    async with open_store(url) as store:
        for run_id in (await new_run(store), await new_run(store)):
            await store.register_waiter(run_id, "charge", "paid")
            await store.deliver_signal(run_id, "paid", "{}", delivery_id="1")
        waiter = await store.get_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.payload_json == "{}"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-2",),
    changes=[
        (
            SIGNALS,
            "SELECT step_key, delivered_at FROM deliveries WHERE",
            "SELECT step_key, deliveries.delivered_at FROM deliveries JOIN waiters USING (run_id, "
            "step_key) WHERE",
        )
    ],
)
async def delivery_id_is_forgotten_with_its_waiter(url: str) -> None:
    """A repeated delivery_id is not recognised after the waiter was removed."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        first = await store.deliver_signal(run_id, "paid", "{}", delivery_id="1")
        await store.remove_waiter(run_id, "charge")
        assert await store.deliver_signal(run_id, "paid", "{}", delivery_id="1") == first


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("SIG-2",),
    changes=[
        (
            FIRST_SCHEMA,
            "    delivery_id  TEXT NOT NULL,\n"
            "    step_key     TEXT NOT NULL,\n"
            "    delivered_at INTEGER NOT NULL,\n"
            "    PRIMARY KEY (run_id, delivery_id)\n"
            ") STRICT, WITHOUT ROWID",
            "    delivery_id  STRING NOT NULL,\n"
            "    step_key     TEXT NOT NULL,\n"
            "    delivered_at INTEGER NOT NULL,\n"
            "    PRIMARY KEY (run_id, delivery_id)\n"
            ") WITHOUT ROWID",
        )
    ],
)
async def delivery_ids_are_compared_as_numbers(url: str) -> None:
    """The type STRING has numeric affinity, so the delivery ids 1 and 01 are one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for step_key, delivery_id in (("charge", "1"), ("ship", "01")):
            await store.register_waiter(run_id, step_key, "paid")
            result = await store.deliver_signal(run_id, "paid", "{}", delivery_id=delivery_id)
            assert result.step_key == step_key


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-2",),
    changes=[
        (
            SIGNALS,
            "expired_at IS NULL\nORDER BY created_at, step_key LIMIT 1",
            "expired_at IS NULL\nORDER BY step_key LIMIT 1",
        )
    ],
)
async def signal_goes_to_the_first_key(url: str) -> None:
    """A signal is delivered to the waiter with the lowest step_key instead of the oldest."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for step_key in ("ship", "charge"):
            await store.register_waiter(run_id, step_key, "paid")
            clock.advance(seconds=1)
        assert (await store.deliver_signal(run_id, "paid", "{}")).step_key == "ship"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-3",),
    changes=[
        (
            SIGNALS,
            "delivered_at IS NOT NULL\nORDER BY created_at, step_key LIMIT 1",
            "delivered_at IS NOT NULL\nORDER BY delivered_at, step_key LIMIT 1",
        )
    ],
)
async def already_delivered_names_the_first_delivery(url: str) -> None:
    """ALREADY_DELIVERED names the waiter that was delivered to first instead of the oldest."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "ship", "other")
        clock.advance(seconds=1)
        await store.register_waiter(run_id, "charge", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        clock.advance(seconds=1)
        await store.register_waiter(run_id, "ship", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        assert (await store.deliver_signal(run_id, "paid", "{}")).step_key == "ship"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-4",),
    changes=[
        (
            SIGNALS,
            "delivered_at IS NULL AND expired_at IS NULL\nORDER BY",
            "delivered_at IS NULL\nORDER BY",
        )
    ],
)
async def signal_reaches_an_expired_waiter(url: str) -> None:
    """A signal is delivered to a waiter that expire_waiter has closed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid", expires_at=clock())
        await store.expire_waiter(run_id, "charge")
        result = await store.deliver_signal(run_id, "paid", "{}")
        assert result.status is SignalDeliveryStatus.NOT_FOUND


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-3", "RUN-4"),
    changes=[
        (SIGNALS, "AND status = 'Running' AND signal_name", "AND status <> 'Cancelled' AND signal_name")
    ],
)
async def signal_reaches_a_finished_run(url: str) -> None:
    """A signal is delivered to a run that Succeeded or Failed; only a cancelled run refuses it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        await store.complete_run(run_id, RunStatus.FAILED)
        result = await store.deliver_signal(run_id, "paid", "{}")
        assert result.status is SignalDeliveryStatus.NOT_FOUND


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("SIG-4",),
    changes=[(SIGNALS, "AND expires_at <= :now", "AND expires_at < :now")],
)
async def waiter_does_not_expire_at_its_time(url: str) -> None:
    """expire_waiter leaves a waiter open whose expires_at is exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid", expires_at=clock())
        waiter = await store.expire_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.expired_at == clock()


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("SIG-4",),
    changes=[
        (
            SIGNALS,
            "AND delivered_at IS NULL AND expired_at IS NULL\n    AND expires_at",
            "AND expired_at IS NULL\n    AND expires_at",
        )
    ],
)
async def delivered_waiter_expires(url: str) -> None:
    """expire_waiter closes a waiter that has its signal already."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid", expires_at=clock())
        await store.deliver_signal(run_id, "paid", "{}")
        waiter = await store.expire_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.expired_at is None


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-2",),
    changes=[(SIGNALS, "payload_json=payload_json,", "payload_json=payload_json or None,")],
)
async def empty_payload_becomes_none(url: str) -> None:
    """An empty payload is read as None, as if nothing had been delivered."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        await store.deliver_signal(run_id, "paid", "")
        waiter = await store.get_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.payload_json == ""


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("IDM-3",),
    changes=[
        (
            CONTROLS,
            "return TriggerResult(run=existing, created=False)",
            "return TriggerResult(run=existing, created=existing.run_id == run_id)",
        )
    ],
)
async def repeated_trigger_creates_again(url: str) -> None:
    """A trigger that is repeated with its own run_id reports a created run each time."""
    async with open_store(url) as store:
        run_id = uuid4()
        await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order")
        again = await store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order")
        assert not again.created


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-1",),
    changes=[
        (
            CONTROLS,
            "    row = (run_id.bytes, flow_id.bytes, trigger_key, idempotency_key, timeout, now)\n",
            "    if idempotency_key is not None:\n"
            "        key = (flow_id.bytes, trigger_key, idempotency_key, run_id.bytes, now)\n"
            "        db.execute(TRY_REGISTER_IDEMPOTENCY_KEY, key)\n"
            "    row = (run_id.bytes, flow_id.bytes, trigger_key, idempotency_key, timeout, now)\n",
        )
    ],
)
async def configuring_registers_the_key(url: str) -> None:
    """configure_run registers the idempotency key that it records."""
    async with open_store(url) as store:
        await store.configure_run(uuid4(), FLOW, "manual", idempotency_key="order")
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "timed_out_at = NULL, timed_out_reason = NULL WHERE run_id = ?",
            "timed_out_at = NULL, timed_out_reason = NULL\n"
            "WHERE run_id = ? AND EXISTS (SELECT 1 FROM runs WHERE runs.run_id = controls.run_id)",
        )
    ],
)
async def deadline_of_a_run_that_has_not_started_is_not_extended(url: str) -> None:
    """extend_deadline is False for a run that was configured and has not started."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        await store.configure_run(run_id, FLOW, "manual")
        assert await store.extend_deadline(run_id, clock())


@source_mutant(
    "sqlite",
    kind="concurrency",
    clauses=("CTL-2", "CON-1"),
    changes=[
        (
            CONTROLS,
            "UPDATE controls SET cancelled_at = ?, cancel_reason = ? WHERE run_id = ? AND "
            "cancelled_at IS NULL\n",
            "UPDATE controls SET cancelled_at = COALESCE(cancelled_at, ?), cancel_reason = ? "
            "WHERE run_id = ?\n",
        )
    ],
)
async def every_cancel_sets_the_latch(url: str) -> None:
    """Each of several concurrent cancels returns True, and the reason is that of the last."""
    async with open_store(url) as store, open_store(url) as other_process:
        run_id = await new_run(store)
        set_by = await together(one.request_cancel(run_id) for one in (store, other_process))
        assert sorted(set_by) == [False, True]


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-1", "IDM-1"),
    changes=[
        (
            FIRST_SCHEMA,
            "    idempotency_key TEXT NOT NULL,\n",
            "    idempotency_key TEXT NOT NULL COLLATE RTRIM,\n",
        )
    ],
)
async def idempotency_keys_match_without_trailing_blanks(url: str) -> None:
    """Two idempotency keys that differ in blanks at the end are one."""
    async with open_store(url) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "order", uuid4())
        assert await store.try_register_idempotency_key(FLOW, "manual", "order ", uuid4())


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("IDM-4",),
    changes=[
        (
            CONTROLS,
            "    row = (flow_id.bytes, trigger_key, idempotency_key)\n"
            "    found = db.execute(FIND_RUN_ID_BY_IDEMPOTENCY_KEY, row).fetchone()\n",
            "    row = (flow_id.bytes, trigger_key, idempotency_key)\n"
            "    if (found := _found.get(row)) is None:\n"
            "        found = db.execute(FIND_RUN_ID_BY_IDEMPOTENCY_KEY, row).fetchone()\n"
            "        if found is not None:\n            _found[row] = found\n",
        ),
        (
            CONTROLS,
            "class Controls",
            "_found: dict[tuple[bytes, str, str], tuple[bytes]] = {}\n\n\nclass Controls",
        ),
    ],
)
async def idempotency_keys_are_cached(url: str) -> None:
    """A process remembers the run of an idempotency key after cleanup has deleted both."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        result = await store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="order")
        await store.find_run_id_by_idempotency_key(FLOW, "manual", "order")
        await store.complete_run(result.run.run_id, RunStatus.SUCCEEDED)
        await store.cleanup(clock.advance(days=1))
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("CTL-2", "STP-6"),
    changes=[
        (
            CONTROLS,
            "            db.execute(CONTROL_CANCELLED_RUN, (now, run_id.bytes))\n",
            "            if run_id in _cancelled:\n"
            "                return False\n            _cancelled.add(run_id)\n"
            "            db.execute(CONTROL_CANCELLED_RUN, (now, run_id.bytes))\n",
        ),
        (CONTROLS, "class Controls", "_cancelled: set[UUID] = set()\n\n\nclass Controls"),
    ],
)
async def cancels_are_remembered(url: str) -> None:
    """A process remembers the runs that it cancelled, and does not cancel one again after a retry."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.retry_step(run_id, "charge")
        assert await store.request_cancel(run_id)


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("IDM-3", "CON-1"),
    changes=[
        (
            CONTROLS,
            "            run = new_run(\n",
            '            db.execute("COMMIT")\n            db.execute("BEGIN IMMEDIATE")\n'
            "            run = new_run(\n",
        )
    ],
)
async def trigger_commits_its_key_first(url: str) -> None:
    """trigger_run commits the idempotency key before it starts the run, so a failed start keeps the key."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        trigger = store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="order")
        assert await error_of(trigger) is RunAlreadyExistsError
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "order") is None


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("SIG-2", "CON-1"),
    changes=[
        (
            SIGNALS,
            "                db.execute(DELIVER_SIGNAL, (now, payload_json, run_id.bytes, step_key))\n",
            "                db.execute(DELIVER_SIGNAL, (now, payload_json, run_id.bytes, step_key))\n"
            '                db.execute("COMMIT")\n                db.execute("BEGIN IMMEDIATE")\n',
        )
    ],
)
async def delivery_is_committed_before_its_id(url: str) -> None:
    """deliver_signal commits the payload before it records the delivery_id, so a failure loses the id."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "charge", "paid")
        with raw_connection(url) as db:
            db.execute(
                "CREATE TRIGGER full BEFORE INSERT ON deliveries BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        assert await error_of(store.deliver_signal(run_id, "paid", "{}", delivery_id="1")) is not None
        waiter = await store.get_waiter(run_id, "charge")
        assert waiter is not None
        assert waiter.delivered_at is None
