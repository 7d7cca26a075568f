"""Faults of runs, control records, signals, outputs, events and cleanup on PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID, uuid4

from flowstore_core import (
    RunAlreadyExistsError,
    RunStatus,
    SignalDeliveryStatus,
    StepStatus,
    open_store,
)
from tests.calls import FLOW, new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import (
    connection,
    end,
    finish,
    outcome,
    outcomes,
    wait_until_blocked,
)
from tests.virtual_clock import VirtualClock

RUNS = "flowstore_postgres/runs.py"
COMPLETION = "flowstore_postgres/run_completion.py"
CONTROLS = "flowstore_postgres/controls.py"
SIGNALS = "flowstore_postgres/signals.py"
OUTPUTS = "flowstore_postgres/outputs.py"
EVENTS = "flowstore_postgres/events.py"
RETENTION = "flowstore_postgres/retention.py"
RUNS_TO_STOP = "flowstore_postgres/migrations/0009_runs_to_stop.sql"
LEASE = timedelta(seconds=5)


# Runs


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("RUN-2",),
    changes=[
        (
            COMPLETION,
            "claim_expires_at > coalesce($5, clock_timestamp())) AS held",
            "claim_expires_at >= coalesce($5, clock_timestamp())) AS held",
        )
    ],
)
async def ended_lease_prevents_the_end_of_a_run(url: str) -> None:
    """With ``expected`` a claim whose lease ends exactly now still prevents the completion of the run."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}), "an ended lease counts"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("RUN-2",),
    changes=[
        (
            COMPLETION,
            "dispatched_at IS NOT NULL\n           OR claimed_at IS NOT NULL",
            "dispatched_at IS NOT NULL AND due_at IS NULL\n           OR claimed_at IS NOT NULL",
        )
    ],
)
async def delayed_dispatch_does_not_hold_a_run(url: str) -> None:
    """With ``expected`` a dispatch with a due_at does not prevent the completion of the run."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a", due_at=clock.now + LEASE)
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={}), "the dispatch is lost"


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("RUN-2",),
    changes=[
        (COMPLETION, 'f"{len(key)}:{key}{status.value}"', 'f"{key}{status.value}"'),
        (COMPLETION, "length(step_key) || ':' || step_key || status", "step_key || status"),
    ],
)
async def expected_statuses_are_ambiguous(url: str) -> None:
    """Two steps match an expectation of one step whose key joins theirs with a status."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a")
        await finish(store, run_id, "b")
        expected = {"aSucceededb": StepStatus.SUCCEEDED}
        assert not await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected), (
            "one step matches"
        )


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("RUN-2",),
    changes=[(COMPLETION, "length(step_key) || ':'", "octet_length(step_key) || ':'")],
)
async def expected_keys_are_measured_in_bytes(url: str) -> None:
    """A run with a step key outside of ASCII cannot be completed with ``expected``."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "prüfen")
        expected = {"prüfen": StepStatus.SUCCEEDED}
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected), (
            "the run stays Running"
        )


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("RUN-2",),
    changes=[
        (COMPLETION, "in sorted(self.expected.items()))", "in sorted(self.expected.items(), key=_order))"),
        (
            COMPLETION,
            "class _BatchRejectedError(",
            "def _order(item: tuple[str, StepStatus]) -> str:\n"
            "    return item[0].casefold()\n\n\n"
            "class _BatchRejectedError(",
        ),
    ],
)
async def expected_keys_are_sorted_without_case(url: str) -> None:
    """The keys of ``expected`` are sorted without regard to case, so keys of mixed case never match."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for key in ("a", "B"):
            await finish(store, run_id, key)
        expected = await store.get_step_statuses(run_id)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected), (
            "the run stays Running"
        )


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RUN-2", "CON-1"),
    changes=[(COMPLETION, "ORDER BY run_id, step_key FOR SHARE{wait}", "ORDER BY run_id, step_key")],
)
async def run_ends_while_a_step_changes(url: str) -> None:
    """complete_run with ``expected`` does not wait for a concurrent change of a step, and ignores it."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "task")
        expected = {"a": StepStatus.RUNNING}
        async with other.transaction():
            await other.execute(
                "UPDATE steps SET status = 'Failed', completed_at = now() WHERE run_id = $1", run_id
            )
            ending = asyncio.ensure_future(store.complete_run(run_id, RunStatus.SUCCEEDED, expected=expected))
            await wait_until_blocked(url, other, ending)
        assert not await ending, "the run ended although a step had changed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-3",),
    changes=[(RUNS, "ORDER BY s.first_started_at, s.step_key)", "ORDER BY s.started_at, s.step_key)")],
)
async def steps_are_ordered_by_their_last_start(url: str) -> None:
    """A detail lists steps by the start of their newest attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for key in ("a", "b", "a"):
            await store.record_step_start(run_id, key, "task")
            clock.advance(seconds=1)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert [step.step_key for step in detail.steps] == ["a", "b"], "a restart moves its step"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("QRY-3", "STP-1"),
    changes=[(RUNS, "ORDER BY a.step_key, a.attempt)", "ORDER BY a.step_key, a.attempt::text)")],
)
async def attempts_are_ordered_as_text(url: str) -> None:
    """A detail lists attempt 10 before attempt 2."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for _ in range(12):
            await store.record_step_start(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        numbers = [one.attempt for one in detail.steps[0].attempts]
        assert numbers == list(range(1, 13)), "the attempts are out of order"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-4", "STP-6"),
    changes=[
        (
            RUNS,
            "completed_at=row[7] if status.is_terminal else None,",
            "completed_at=None if reopened else row[7],",
        )
    ],
)
async def pending_step_has_an_end(url: str) -> None:
    """A step whose attempt was closed as Pending shows a completed_at."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].completed_at is None, "a Pending step has an end"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("QRY-6", "QRY-1"),
    changes=[
        (
            RUNS,
            "ORDER BY r.started_at DESC, r.run_id DESC LIMIT $1",
            "ORDER BY r.started_at DESC, r.run_id LIMIT $1",
        )
    ],
)
async def active_runs_of_one_time_ascend(url: str) -> None:
    """Active and derived runs that started at the same time are listed by ascending id."""
    async with open_store(url, clock=VirtualClock()) as store:
        for n in (2, 3, 1):
            await new_run(store, run_id=UUID(int=n))
        found = [run.run_id.int for run in await store.get_active_runs()]
        assert found == [3, 2, 1], "runs of one time are out of order"


@source_mutant(
    "postgresql",
    kind="cache",
    clauses=("CLM-2", "STP-6"),
    changes=[
        (
            RUNS,
            "        row = await self._database.read_row(GET_RUN_STATUS, run_id)\n",
            '        ended = self._database.__dict__.setdefault("ended", {})\n'
            "        if run_id in ended:\n"
            "            return RunStatus(ended[run_id])\n"
            "        row = await self._database.read_row(GET_RUN_STATUS, run_id)\n"
            "        if row is not None and RunStatus(row[0]).is_terminal:\n"
            "            ended[run_id] = row[0]\n",
        )
    ],
)
async def ended_statuses_are_cached(url: str) -> None:
    """get_run_status remembers the status of an ended run, although retry_step can reopen it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        assert await store.get_run_status(run_id) == RunStatus.FAILED
        await store.retry_step(run_id, "a")
        assert await store.get_run_status(run_id) == RunStatus.RUNNING, "the status is from a cache"


# Control records and idempotency keys


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CTL-1",),
    changes=[
        (
            CONTROLS,
            "idempotency_key = excluded.idempotency_key, timeout_at = excluded.timeout_at\n",
            "idempotency_key = excluded.idempotency_key,\n"
            "    timeout_at = coalesce(excluded.timeout_at, controls.timeout_at)\n",
        )
    ],
)
async def configuring_keeps_a_deadline(url: str) -> None:
    """configure_run without a deadline keeps the earlier one."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
        await store.configure_run(run_id, FLOW, "manual")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.timeout_at is None, "the deadline is kept"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CTL-2",),
    changes=[(CONTROLS, "OR timeout_at <= $4) RETURNING run_id", "OR timeout_at < $4) RETURNING run_id")],
)
async def deadline_that_ends_now_is_not_timed_out(url: str) -> None:
    """mark_timed_out with an as_of exactly at the deadline sets no latch."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
        assert await store.mark_timed_out(run_id, as_of=clock.now), "the latch is not set"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CTL-3",),
    changes=[(CONTROLS, "ORDER BY c.timeout_at NULLS LAST", "ORDER BY c.timeout_at NULLS FIRST")],
)
async def runs_without_deadline_are_stopped_first(url: str) -> None:
    """get_runs_to_stop lists cancelled runs without a deadline before the others."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        late, cancelled = [await new_run(store) for _ in range(2)]
        await store.configure_run(late, FLOW, "manual", timeout_at=clock.now)
        await store.request_cancel(cancelled)
        found = [run.run_id for run in await store.get_runs_to_stop()]
        assert found == [late, cancelled], "the run without a deadline comes first"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CTL-3",),
    changes=[
        (
            CONTROLS,
            "WHERE (c.cancel_requested_at IS NOT NULL OR c.timed_out_at IS NOT NULL)",
            "WHERE (c.cancel_requested_at IS NOT NULL)",
        )
    ],
)
async def timed_out_run_is_not_stopped(url: str) -> None:
    """get_runs_to_stop omits a run whose time-out latch is set and whose deadline lies ahead."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now + LEASE)
        await store.mark_timed_out(run_id)
        assert len(await store.get_runs_to_stop()) == 1, "a timed-out run is not listed"


@source_mutant(
    "postgresql",
    kind="migration",
    clauses=("CTL-3",),
    changes=[(RUNS_TO_STOP, "WHEN (OLD.ended AND NEW.ended)", "WHEN (OLD.ended AND NOT NEW.ended)")],
)
async def cancel_of_a_reopened_run_is_not_listed(url: str) -> None:
    """get_runs_to_stop omits a reopened run if it was called while the run had ended."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "http")
        await store.record_step_complete(run_id, "a", StepStatus.FAILED)
        await store.request_cancel(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.get_runs_to_stop()
        await store.retry_step(run_id, "a")
        await store.request_cancel(run_id)
        assert len(await store.get_runs_to_stop()) == 1, "a run to stop is not listed"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("CTL-3",),
    changes=[(CONTROLS, "HAVING count(*) = $4 AND", "HAVING count(*) > $4 AND")],
)
async def ended_runs_hide_a_late_one(url: str) -> None:
    """get_runs_to_stop omits a run behind more than a hundred ended runs with earlier deadlines."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        for _ in range(150):
            run_id = await new_run(store)
            await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
            await store.complete_run(run_id, RunStatus.FAILED)
        late = await new_run(store)
        await store.configure_run(late, FLOW, "manual", timeout_at=clock.advance(seconds=1))
        assert len(await store.get_runs_to_stop(take=1)) == 1, "a run to stop is not listed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CTL-3",),
    changes=[(CONTROLS, "timed_out_at = NULL, timed_out_reason = NULL\n", "timed_out_at = NULL\n")],
)
async def extended_deadline_keeps_the_reason(url: str) -> None:
    """extend_deadline clears the time-out latch and keeps its reason."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, FLOW, "manual", timeout_at=clock.now)
        await store.mark_timed_out(run_id, "too late")
        await store.extend_deadline(run_id, clock.now + LEASE)
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_reason is None, "the reason is kept"


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("IDM-1", "IDM-2"),
    changes=[
        (
            CONTROLS,
            "WHERE flow_id = $1 AND trigger_key = $2 AND idempotency_key = $3\n",
            "WHERE flow_id = $1 AND trigger_key = $2 AND lower(idempotency_key) = lower($3)\n",
        )
    ],
)
async def idempotency_keys_are_found_in_any_case(url: str) -> None:
    """A lookup finds an idempotency key that differs in case."""
    async with open_store(url) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "Order-1", uuid4())
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "order-1")
        assert found is None, "another key is found"


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("IDM-3",),
    changes=[
        (
            CONTROLS,
            "            key_run_id, existed = await "
            "_register(transaction, flow_id, trigger_key, idempotency_key, run_id)\n"
            "            row = ",
            "            key_run_id, existed = registered\n            row = ",
        ),
        (
            CONTROLS,
            "        async def work(transaction: Transaction) -> TriggerResult:\n",
            "        registered = await self._database.transaction(\n"
            '            "trigger_run",\n'
            "            lambda t: _register(t, flow_id, trigger_key, idempotency_key, run_id),\n"
            "        )\n\n"
            "        async def work(transaction: Transaction) -> TriggerResult:\n",
        ),
    ],
)
async def key_is_registered_before_the_trigger(url: str) -> None:
    """trigger_run registers its key in a separate transaction, so a refused trigger keeps the key."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        refused = await outcome(store.trigger_run(FLOW, "orders", run_id, "manual", idempotency_key="k"))
        assert refused is RunAlreadyExistsError
        found = await store.find_run_id_by_idempotency_key(FLOW, "manual", "k")
        assert found is None, "the refused trigger registered its key"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("IDM-3",),
    changes=[
        (
            CONTROLS,
            '            if row["stored"] is not None:\n',
            '            if row["stored"] is not None:\n'
            "                await self.configure_run(\n"
            '                    run_id=run_record(row["stored"]).run_id, flow_id=flow_id,\n'
            "                    trigger_key=trigger_key, idempotency_key=idempotency_key,\n"
            "                    timeout_at=timeout_at,\n"
            "                )\n",
        )
    ],
)
async def repeated_trigger_configures_the_run_again(url: str) -> None:
    """trigger_run with a taken key overwrites the control record of the key's run."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        await store.trigger_run(
            FLOW, "orders", run_id, "manual", idempotency_key="k", timeout_at=clock.now + LEASE
        )
        before = await store.get_run_control(run_id)
        await store.trigger_run(FLOW, "orders", uuid4(), "manual", idempotency_key="k")
        assert await store.get_run_control(run_id) == before, "the control record has changed"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RET-1", "RET-3", "CTL-2", "CON-1"),
    changes=[
        (
            CONTROLS,
            'trigger_key FROM {schema}.runs WHERE run_id = $1 FOR SHARE"',
            'trigger_key FROM {schema}.runs WHERE run_id = $1"',
        )
    ],
)
async def cancel_survives_the_deletion_of_its_run(url: str) -> None:
    """request_cancel does not lock the run, and leaves a control record when cleanup deletes it."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("DELETE FROM runs WHERE run_id = $1", run_id)
            cancelling = asyncio.ensure_future(store.request_cancel(run_id))
            await wait_until_blocked(url, other, cancelling)
        assert not await cancelling, "a deleted run was cancelled"
        assert await store.get_run_control(run_id) is None, "a deleted run has a control record"


# Signals


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("SIG-1", "SIG-2"),
    changes=[
        (
            SIGNALS,
            "SET signal_name = excluded.signal_name, expires_at = excluded.expires_at\n",
            "SET signal_name = excluded.signal_name, expires_at = excluded.expires_at,\n"
            "        created_at = excluded.created_at\n",
        )
    ],
)
async def repeated_registration_moves_a_waiter(url: str) -> None:
    """Registering a waiter again replaces its created_at."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        created = clock.now
        await store.register_waiter(run_id, "a", "paid")
        clock.advance(seconds=1)
        await store.register_waiter(run_id, "a", "paid")
        waiter = await store.get_waiter(run_id, "a")
        assert waiter is not None
        assert waiter.created_at == created, "the waiter is newer"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("SIG-2",),
    changes=[(SIGNALS, "    ORDER BY created_at, step_key LIMIT 1)\n", "    ORDER BY step_key LIMIT 1)\n")],
)
async def signal_goes_to_the_first_key(url: str) -> None:
    """A signal is delivered to the waiter with the first step key instead of the oldest one."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for key in ("b", "a"):
            await store.register_waiter(run_id, key, "paid")
            clock.advance(seconds=1)
        result = await store.deliver_signal(run_id, "paid", "{}")
        assert result.step_key == "b", "a newer waiter got the signal"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("SIG-3",),
    changes=[
        (
            SIGNALS,
            "AND delivered_at IS NOT NULL ORDER BY created_at, step_key LIMIT 1",
            "AND delivered_at IS NOT NULL ORDER BY delivered_at, step_key LIMIT 1",
        )
    ],
)
async def already_delivered_names_the_first_delivery(url: str) -> None:
    """ALREADY_DELIVERED names the waiter that was delivered first instead of the oldest one."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "old", "other")
        clock.advance(seconds=1)
        await store.register_waiter(run_id, "new", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        clock.advance(seconds=1)
        await store.register_waiter(run_id, "old", "paid")
        await store.deliver_signal(run_id, "paid", "{}")
        result = await store.deliver_signal(run_id, "paid", "{}")
        assert result.step_key == "old", "the oldest waiter is not named"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("SIG-4",),
    changes=[
        (SIGNALS, "  AND expires_at <= coalesce($3, clock", "  AND expires_at < coalesce($3, clock"),
    ],
)
async def waiter_that_expires_now_stays_open(url: str) -> None:
    """expire_waiter does not close a waiter whose expires_at is exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "a", "paid", expires_at=clock.now)
        waiter = await store.expire_waiter(run_id, "a")
        assert waiter is not None
        assert waiter.expired_at is not None, "the waiter stays open"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("SIG-2",),
    changes=[
        (
            SIGNALS,
            "FROM {schema}.deliveries WHERE run_id = $1 AND delivery_id = $6",
            "FROM {schema}.deliveries WHERE $1::uuid IS NOT NULL AND delivery_id = $6",
        )
    ],
)
async def delivery_id_belongs_to_every_run(url: str) -> None:
    """A delivery_id that was used in one run suppresses the delivery in another."""
    async with open_store(url) as store:
        runs = [await new_run(store) for _ in range(2)]
        for run_id in runs:
            await store.register_waiter(run_id, "a", "paid")
            await store.deliver_signal(run_id, "paid", "{}", delivery_id="d")
        waiter = await store.get_waiter(runs[1], "a")
        assert waiter is not None
        assert waiter.delivered_at is not None, "the second run got no signal"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("SIG-2", "RUN-4"),
    changes=[
        (
            SIGNALS,
            "FROM {schema}.deliveries WHERE run_id = $1 AND delivery_id = $6\n",
            "FROM {schema}.deliveries WHERE run_id = $1 AND delivery_id = $6 AND $3\n",
        )
    ],
)
async def delivery_id_is_forgotten_when_the_run_ends(url: str) -> None:
    """A repeated delivery_id gets another result once the run is terminal."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "a", "paid")
        first = await store.deliver_signal(run_id, "paid", "{}", delivery_id="d")
        await end(store, run_id)
        again = await store.deliver_signal(run_id, "paid", "{}", delivery_id="d")
        assert again == first, "the repeated delivery has another result"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("SIG-2", "SIG-3", "CON-1"),
    changes=[
        (
            RUNS,
            'LOCK_RUN = "SELECT status FROM {schema}.runs WHERE run_id = $1 FOR UPDATE"',
            'LOCK_RUN = "SELECT status FROM {schema}.runs WHERE run_id = $1 FOR SHARE"',
        )
    ],
)
async def deliveries_share_the_lock_of_their_run(url: str) -> None:
    """Transactions lock their run only against completion, so two deliveries reach one waiter."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.register_waiter(run_id, "a", "paid")
        async with other.transaction():
            await other.execute("SELECT FROM waiters WHERE run_id = $1 FOR UPDATE", run_id)
            deliveries = [
                asyncio.ensure_future(store.deliver_signal(run_id, "paid", f"{n}")) for n in range(2)
            ]
            await wait_until_blocked(url, other, *deliveries, number=2)
        statuses = [one.status for one in await asyncio.gather(*deliveries)]
        assert statuses.count(SignalDeliveryStatus.DELIVERED) == 1, "one waiter was delivered twice"


# Outputs and events


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("EVT-2",),
    changes=[
        (
            OUTPUTS,
            "WHERE run_id = ANY($1::uuid[]) ORDER BY run_id, key\n",
            "WHERE run_id = ANY($1::uuid[]) ORDER BY run_id, key LIMIT 1000\n",
        )
    ],
)
async def outputs_beyond_a_thousand_are_cut_off(url: str) -> None:
    """get_outputs returns at most 1,000 outputs."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await outcomes([store.save_output(run_id, f"{n}", "1") for n in range(1001)])
        assert len(await store.get_outputs(run_id)) == 1001, "outputs are missing"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("UNK", "EVT-2", "CON-1"),
    changes=[
        (
            OUTPUTS,
            "THEN ARRAY(SELECT n FROM requested WHERE found) END AS\nsaved",
            "THEN ARRAY(SELECT row_number() OVER (ORDER BY n) FROM requested WHERE found) END AS\nsaved",
        )
    ],
)
async def unknown_run_fails_another_output(url: str) -> None:
    """In a batch with an unknown run, RunNotFoundError is raised to the last caller, not to the right one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.save_output(run_id, "first", "1")
        unknown = UUID(int=0)
        runs = [run_id, unknown, *[run_id] * 5]
        saved = await outcomes([store.save_output(one, f"{n}", "1") for n, one in enumerate(runs)])
        assert [one is None for one in saved] == [one == run_id for one in runs], (
            "another caller gets the error"
        )


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("EVT-1",),
    changes=[(EVENTS, "AND sequence > $2 ORDER BY sequence", "AND sequence >= $2 ORDER BY sequence")],
)
async def events_after_a_sequence_repeat_it(url: str) -> None:
    """get_run_events repeats the event whose sequence is ``after``."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        first = await store.append_event(run_id, "started")
        assert await store.get_run_events(run_id, after=first) == (), "a read event appears again"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("EVT-1", "CON-1", "CON-2"),
    changes=[
        (
            EVENTS,
            "    UPDATE {schema}.runs SET last_event = last_event + 1 FROM guard WHERE before_deadline AND "
            "run_id = $3\n    RETURNING last_event\n",
            "    SELECT (SELECT coalesce(max(sequence), 0) + 1 FROM {schema}.events WHERE run_id = $3) AS "
            "last_event\n    FROM {schema}.runs, guard WHERE before_deadline AND run_id = $3\n",
        )
    ],
)
async def events_are_numbered_by_their_maximum(url: str) -> None:
    """Concurrent append_event calls compute the same next sequence, and all but one fail."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("UPDATE runs SET last_event = 1 WHERE run_id = $1", run_id)
            await other.execute(
                "INSERT INTO events (run_id, sequence, timestamp, event_type, token) "
                "VALUES ($1, 1, now(), 'first', gen_random_uuid())",
                run_id,
            )
            appending = asyncio.ensure_future(outcome(store.append_event(run_id, "second")))
            await wait_until_blocked(url, other, appending)
        assert await appending == 2, "the second event fails"


# Cleanup


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("RET-1",),
    changes=[
        (RETENTION, "WHERE completed_at < $1 ORDER BY", "WHERE completed_at <= $1 ORDER BY"),
        (RETENTION, "AND completed_at < $2 AND (SELECT", "AND completed_at <= $2 AND (SELECT"),
    ],
)
async def cleanup_deletes_a_run_that_ended_at_the_cutoff(url: str) -> None:
    """cleanup deletes runs that were completed exactly at the cutoff."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await end(store, run_id)
        assert await store.cleanup(clock.now) == 0, "a run that ended at the cutoff was deleted"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("RET-1",),
    changes=[(RETENTION, '    "deliveries",\n', "")],
)
async def cleanup_keeps_delivery_ids(url: str) -> None:
    """cleanup keeps the delivery ids of a run, so a new run with its id misses signals."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        for _ in range(2):
            await new_run(store, run_id=run_id)
            await store.register_waiter(run_id, "a", "paid")
            await store.deliver_signal(run_id, "paid", "{}", delivery_id="d")
            waiter = await store.get_waiter(run_id, "a")
            assert waiter is not None
            assert waiter.delivered_at is not None, "the id of the deleted run suppresses a delivery"
            await end(store, run_id)
            assert await store.cleanup(clock.advance(seconds=1)) == 1


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "FROM {schema}.idempotency_keys i\n    WHERE created_at < $1 AND created_at <= "
            "coalesce($2, clock_timestamp()) - $3::bigint * {microsecond}",
            "FROM {schema}.idempotency_keys i\n    WHERE created_at < $1 AND created_at <= "
            "coalesce($2, clock_timestamp()) + $3::bigint * {microsecond}",
        )
    ],
)
async def cleanup_sweeps_new_keys(url: str) -> None:
    """cleanup deletes idempotency keys that are less than an hour old."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        await store.try_register_idempotency_key(FLOW, "manual", "k", uuid4())
        clock.advance(minutes=59)
        await store.cleanup(clock.now)
        assert await store.find_run_id_by_idempotency_key(FLOW, "manual", "k"), "a new key was swept"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "FROM {schema}.controls i\n    WHERE created_at < $1 AND created_at <= coalesce(",
            "FROM {schema}.controls i\n    WHERE created_at < $1 AND created_at < coalesce(",
        )
    ],
)
async def cleanup_keeps_a_control_record_of_one_hour(url: str) -> None:
    """cleanup keeps an orphaned control record that is exactly one hour old."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = uuid4()
        await store.configure_run(run_id, FLOW, "manual")
        clock.advance(hours=1)
        await store.cleanup(clock.now)
        assert await store.get_run_control(run_id) is None, "the orphan is kept"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("RET-1", "RET-3"),
    changes=[
        (
            RETENTION,
            "        while found := await self._database.read(FIND_COMPLETED, cutoff, BATCH):\n",
            "        if found := await self._database.read(FIND_COMPLETED, cutoff, BATCH):\n",
        )
    ],
)
async def cleanup_stops_after_one_batch(url: str) -> None:
    """cleanup deletes at most 500 runs."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        runs = [uuid4() for _ in range(501)]
        for first in range(0, len(runs), 100):
            await outcomes([new_run(store, run_id=run_id) for run_id in runs[first : first + 100]])
        assert all(await outcomes([store.complete_run(run_id, RunStatus.SUCCEEDED) for run_id in runs]))
        assert await store.cleanup(clock.advance(seconds=1)) == 501, "a completed run is left"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("RET-4",),
    changes=[
        (
            RETENTION,
            "            while await self._run_paced(partial(sweep, cutoff)):\n                pass\n",
            "            await self._run_paced(partial(sweep, cutoff))\n",
        )
    ],
)
async def cleanup_sweeps_one_batch_of_orphans(url: str) -> None:
    """cleanup deletes at most 500 orphaned keys."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        keys = [f"{n}" for n in range(501)]
        for first in range(0, len(keys), 100):
            await outcomes(
                [
                    store.try_register_idempotency_key(FLOW, "manual", key, uuid4())
                    for key in keys[first : first + 100]
                ]
            )
        await store.cleanup(clock.advance(days=1))
        found = [await store.find_run_id_by_idempotency_key(FLOW, "manual", key) for key in keys]
        assert found == [None] * 501, "an orphaned key is left"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RET-2",),
    changes=[
        (
            RETENTION,
            "AND completed_at < $2 AND (SELECT count(*) FROM keys)",
            "AND $2::timestamptz IS NOT NULL AND (SELECT count(*) FROM keys)",
        )
    ],
)
async def cleanup_deletes_a_run_that_is_reopened(url: str) -> None:
    """cleanup does not check a selected run again, and deletes it although it was reopened."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store, connection(url) as other:
        run_id = await new_run(store)
        await end(store, run_id)
        clock.advance(seconds=1)
        async with other.transaction():
            await other.execute(
                "UPDATE runs SET status = 'Running', completed_at = NULL WHERE run_id = $1", run_id
            )
            cleaning = asyncio.ensure_future(store.cleanup(clock.now))
            await wait_until_blocked(url, other, cleaning)
        await cleaning
        assert await store.get_run_status(run_id) == RunStatus.RUNNING, "a Running run was deleted"
