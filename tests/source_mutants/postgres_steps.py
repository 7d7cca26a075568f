"""Faults of steps, attempts, retries and recovery on PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from uuid import UUID

from flowstore_core import (
    ClaimLostError,
    RunCompletedError,
    RunStatus,
    StaleAttemptError,
    StallReason,
    StepAlreadyCompletedError,
    StepStatus,
    open_store,
)
from tests.calls import new_run
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

STEPS = "flowstore_postgres/steps.py"
RETRIES = "flowstore_postgres/retries.py"
RECOVERY = "flowstore_postgres/recovery.py"
STALLED = "flowstore_postgres/stalled.py"
REQUESTS = "flowstore_postgres/requests.py"
READS = "flowstore_postgres/shared_reads.py"
ARRAYS = "flowstore_postgres/array_params.py"
LEASE = timedelta(seconds=5)
KEYS = [f"key-{n:02}" for n in range(20)]


# Starting and completing


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            STEPS,
            "first_started_at = coalesce(first_started_at, now), last_attempt = last_attempt + 1,",
            "first_started_at = now, last_attempt = last_attempt + 1,",
        )
    ],
)
async def restart_of_a_retried_step_moves_its_start(url: str) -> None:
    """The start after retry_step replaces the started_at of the step's first attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        began = clock.now
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.retry_step(run_id, "a")
        clock.advance(seconds=1)
        await store.record_step_start(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].started_at == began, "the start of the first attempt is lost"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-1", "STP-2"),
    changes=[
        (STEPS, "first_started_at = coalesce(v.first_started_at, v.now)", "first_started_at = v.now"),
    ],
)
async def second_attempt_moves_the_start_of_its_step(url: str) -> None:
    """The second attempt of a Failed step replaces the started_at of its first attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        began = clock.now
        await finish(store, run_id, "a", StepStatus.FAILED)
        clock.advance(seconds=1)
        await store.record_step_start(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].started_at == began, "the start of the first attempt is lost"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("STP-3",),
    changes=[
        (
            STEPS,
            "AND (claim_expires_at IS NULL OR claim_expires_at > now))\n",
            "AND (claim_expires_at IS NULL OR claim_expires_at >= now))\n",
        )
    ],
)
async def owner_starts_at_the_end_of_its_lease(url: str) -> None:
    """An owner whose lease ends exactly now can still start the step for the first time."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        started = await outcome(store.record_step_start(run_id, "a", "task", owner="one"))
        assert started is ClaimLostError, "the step starts without a live claim"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-4", "STP-3"),
    changes=[
        (STEPS, "AND (claim_expires_at IS NULL OR status = 'Failed'\n", "AND (claim_expires_at IS NULL\n"),
    ],
)
async def claim_of_a_failed_step_expires(url: str) -> None:
    """The owner of a claim on a Failed step cannot start it again after the lease."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        await store.record_step_start(run_id, "a", "task", owner="one")
        await store.record_step_complete(run_id, "a", StepStatus.FAILED)
        clock.advance(seconds=6)
        started = await outcome(store.record_step_start(run_id, "a", "task", owner="one"))
        assert started == 2, "the claim of a terminal step has expired"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-1",),
    changes=[
        (
            STEPS,
            "job_id, started_at, CASE status WHEN 'Running' THEN now ELSE completed_at END,",
            "job_id, started_at, now,",
        )
    ],
)
async def next_attempt_moves_the_end_of_the_last(url: str) -> None:
    """A closed attempt is archived with the start of its successor as its completed_at."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        ended = clock.now
        await finish(store, run_id, "a", StepStatus.FAILED)
        clock.advance(seconds=1)
        await store.record_step_start(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].attempts[0].completed_at == ended, "the end of an attempt has changed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-1",),
    changes=[(STEPS, "$10 || (last_attempt + 1)::text ELSE", "$10 || last_attempt::text ELSE")],
)
async def superseded_attempt_names_itself(url: str) -> None:
    """An open attempt that its successor closes names itself as the successor."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "task")
        await store.record_step_start(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        message = detail.steps[0].attempts[0].error_message
        assert message == "superseded by attempt 2", "the message names another attempt"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("STP-1", "CON-1", "CON-2"),
    changes=[
        (
            STEPS,
            "s.step_key = $4 FOR UPDATE OF s\n), locked",
            "s.step_key = $4\n), locked",
        )
    ],
)
async def concurrent_starts_read_one_attempt(url: str) -> None:
    """Concurrent starts of a Failed step read its attempt without a lock and open the same next one."""
    async with open_store(url) as store, open_store(url) as second, connection(url) as other:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        async with other.transaction():
            await other.execute("SELECT FROM steps WHERE run_id = $1 FOR UPDATE", run_id)
            starts = [
                asyncio.ensure_future(outcome(one.record_step_start(run_id, "a", "task")))
                for one in (store, second)
            ]
            await wait_until_blocked(url, other, *starts, number=2)
        assert sorted(await asyncio.gather(*starts), key=str) == [2, 3], "two starts share a number"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RUN-4", "CON-1", "STP-1"),
    changes=[
        (
            STEPS,
            "AND status = 'Running' FOR SHARE) run,\n     LATERAL",
            "AND status = 'Running') run,\n     LATERAL",
        )
    ],
)
async def start_does_not_lock_its_run(url: str) -> None:
    """A start of a claimed step succeeds while its run is being completed."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a")
        async with other.transaction():
            await other.execute(
                "UPDATE runs SET status = 'Succeeded', completed_at = now() WHERE run_id = $1", run_id
            )
            starting = asyncio.ensure_future(outcome(store.record_step_start(run_id, "a", "task")))
            await wait_until_blocked(url, other, starting)
        assert await starting is RunCompletedError, "a step starts after its run has ended"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-3", "CON-2"),
    changes=[
        (
            STEPS,
            'if row["claimed"] is False or (row["claimed"] is None and owner is not None):',
            'if row["claimed"] is False:',
        )
    ],
    hangs=True,
)
async def start_of_an_unknown_key_by_an_owner_hangs(url: str) -> None:
    """record_step_start with an owner never returns if the key is unclaimed."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        started = await outcome(store.record_step_start(run_id, "a", "task", owner="one"))
        assert started is ClaimLostError


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("STP-4",),
    changes=[
        (
            STEPS,
            "AND s.status = 'Running' AND coalesce(a.attempt, last_attempt) = last_attempt",
            "AND s.status = 'Running' AND coalesce(a.attempt, last_attempt) <= last_attempt",
        )
    ],
)
async def batch_closes_a_stale_attempt(url: str) -> None:
    """In a batch the number of an earlier attempt closes the current one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for key in KEYS:
            await store.record_step_start(run_id, key, "task")
            await store.record_step_start(run_id, key, "task")
        closed = await outcomes(
            [store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, attempt=1) for key in KEYS]
        )
        assert closed == [StaleAttemptError] * 20, "a stale attempt is closed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-4",),
    changes=[
        (STEPS, "AND error_message IS NOT DISTINCT FROM $7 AS same", "AND error_message = $7 AS same"),
    ],
)
async def same_result_without_error_is_refused(url: str) -> None:
    """Repeating a result that has no error message raises, because NULL is not equal to NULL."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", output_json="1")
        again = store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, output_json="1")
        assert await outcome(again) is None, "the same result is refused"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-4",),
    changes=[
        (
            STEPS,
            "status = $5 AND output_json IS NOT DISTINCT FROM $6\n",
            "status = $5 AND coalesce(output_json = $6, true)\n",
        )
    ],
)
async def missing_output_counts_as_the_same(url: str) -> None:
    """A result without output counts as the same as a recorded result with one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", output_json="1")
        again = await outcome(store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED))
        assert again is StepAlreadyCompletedError, "another result is a no-op"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("STP-4", "INP-2"),
    changes=[
        (
            ARRAYS,
            "(values[0] is None and values.count(None) == len(values))",
            "values[0] is None",
        )
    ],
)
async def batch_loses_a_column_that_begins_with_none(url: str) -> None:
    """A batch loses a whole column if its first call has no value for it."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await outcomes([store.record_step_start(run_id, key, "task") for key in KEYS])
        await outcomes(
            [
                store.record_step_complete(
                    run_id, key, StepStatus.SUCCEEDED, output_json=None if key == KEYS[0] else key
                )
                # The first call is sent alone, so the one without output follows it.
                for key in [KEYS[-1], *KEYS[:-1]]
            ]
        )
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        outputs = {step.step_key: step.output_json for step in detail.steps}
        assert outputs == {key: None if key == KEYS[0] else key for key in KEYS}, "outputs are lost"


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("INP-2",),
    changes=[
        (
            ARRAYS,
            "text.count(SEPARATOR) == len(values) - 1 and text.count(NULL) == nulls",
            "text.count(SEPARATOR) == len(values) - 1",
        )
    ],
)
async def batch_takes_a_control_character_for_none(url: str) -> None:
    """In a batch an output that consists of U+001E is stored as None."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await outcomes([store.record_step_start(run_id, key, "task") for key in KEYS])
        await outcomes(
            [
                store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, output_json="\x1e")
                for key in KEYS
            ]
        )
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert {step.output_json for step in detail.steps} == {"\x1e"}, "an output became None"


@source_mutant(
    "postgresql",
    kind="encoding",
    clauses=("INP-2",),
    changes=[
        (
            ARRAYS,
            "if text and text.count(SEPARATOR) == len(values) - 1 and text.count(NULL) == nulls:",
            "if text and text.count(NULL) == nulls:",
        )
    ],
)
async def batch_splits_a_text_at_its_separator(url: str) -> None:
    """In a batch a text that contains U+001F is split, and the texts after it go to other calls."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await outcomes([store.record_step_start(run_id, key, "task") for key in KEYS])
        await outcomes(
            [
                store.record_step_complete(run_id, key, StepStatus.SUCCEEDED, output_json=f"{key}\x1f.")
                for key in KEYS
            ]
        )
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert {step.output_json for step in detail.steps} == {f"{key}\x1f." for key in KEYS}, "texts are cut"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CON-1", "CLM-2"),
    changes=[
        (
            READS,
            "return [found[key] for key in keys]",
            "return [found[key] for key in sorted(keys)]",
        )
    ],
)
async def shared_reads_go_to_the_wrong_callers(url: str) -> None:
    """Concurrent reads of several runs get each other's rows unless their ids ascend."""
    async with open_store(url) as store:
        runs = [await new_run(store, run_id=UUID(int=20 - n)) for n in range(20)]
        for n, run_id in enumerate(runs):
            await store.record_step_start(run_id, f"{n}", "task")
        found = await outcomes([store.get_step_statuses(run_id) for run_id in runs])
        assert [list(one) for one in found] == [[f"{n}"] for n in range(20)], "rows of another run"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("UNK", "CLM-2", "RUN-2", "STP-1", "CON-1"),
    changes=[
        (
            STEPS,
            "AND status IS NOT NULL\nORDER BY run_id, step_key\n",
            "AND status IS NOT NULL\nORDER BY run_id, step_key LIMIT 1000\n",
        )
    ],
)
async def statuses_beyond_a_thousand_are_cut_off(url: str) -> None:
    """get_step_statuses returns at most 1,000 steps."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await outcomes([store.record_step_start(run_id, f"{n}", "task") for n in range(1001)])
        assert len(await store.get_step_statuses(run_id)) == 1001, "steps are missing"


# Skipping


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-5",),
    changes=[(REQUESTS, "    job_id = NULL, started_at = $5,", "    started_at = $5,")],
)
async def skipped_step_keeps_its_job_id(url: str) -> None:
    """Skipping a step that has started keeps the job id of its last attempt."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "task", job_id="job-1")
        await store.record_skipped_step(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].job_id is None, "the skipped step has a job id"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-5",),
    changes=[
        (
            STEPS,
            "owner,\n                    reason,\n                ):",
            'owner,\n                    row["error_message"],\n                ):',
        )
    ],
)
async def skip_for_another_reason_is_a_no_op(url: str) -> None:
    """Skipping again with the same owner and another reason is a no-op."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_skipped_step(run_id, "a", "task", "first", owner="one")
        again = await outcome(store.record_skipped_step(run_id, "a", "task", "second", owner="one"))
        assert again is StepAlreadyCompletedError, "another reason is accepted"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("STP-5",),
    changes=[(STEPS, 'row["now"] < row["claim_expires_at"]', 'row["now"] <= row["claim_expires_at"]')],
)
async def ended_lease_prevents_a_skip(url: str) -> None:
    """A claim whose lease ends exactly now prevents another owner from skipping the step."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        skipped = await outcome(store.record_skipped_step(run_id, "a", "task", owner="two"))
        assert skipped is None, "an ended lease prevents the skip"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-5", "STP-1"),
    changes=[
        (
            STEPS,
            "            if row is not None:\n                error = superseded_by",
            '            if row is not None and row["status"] != "Pending":\n'
            "                error = superseded_by",
        )
    ],
)
async def skip_of_a_pending_step_loses_its_attempt(url: str) -> None:
    """Skipping a step that waits for its next poll loses the attempt before."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING, output_json="1")
        await store.record_skipped_step(run_id, "a", "task")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert len(detail.steps[0].attempts) == 2, "an attempt is lost"


# Retrying


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("STP-6",),
    changes=[(RETRIES, "CASE WHEN timeout_at <= $2 THEN NULL", "CASE WHEN timeout_at < $2 THEN NULL")],
)
async def retry_keeps_a_deadline_that_ends_now(url: str) -> None:
    """retry_step of a terminal run keeps a deadline that elapses exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, run_id, "manual", timeout_at=clock.now + timedelta(seconds=5))
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        clock.advance(seconds=5)
        await store.retry_step(run_id, "a")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.timeout_at is None, "the elapsed deadline is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[(RETRIES, "timed_out_at = NULL, timed_out_reason = NULL,\n", "timed_out_at = NULL,\n")],
)
async def retry_keeps_the_reason_of_a_time_out(url: str) -> None:
    """retry_step of a terminal run clears the time-out and keeps its reason."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, run_id, "manual")
        await store.mark_timed_out(run_id, "too late")
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "a")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.cancel_reason is None, "the reason of the time-out is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6", "RET-2"),
    changes=[
        (
            RETRIES,
            "SET status = 'Running', completed_at = NULL WHERE",
            "SET status = 'Running' WHERE",
        )
    ],
)
async def reopened_run_keeps_its_end(url: str) -> None:
    """A run that retry_step reopens keeps its completed_at, so cleanup deletes it."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await end(store, run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "a")
        await store.cleanup(clock.advance(days=1))
        detail = await store.get_run_detail(run_id)
        assert detail is not None, "a Running run was deleted"
        assert detail.completed_at is None, "a Running run has an end"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[(RETRIES, "run_id, [step_key, *skipped])", "run_id, [step_key])")],
)
async def reset_step_keeps_its_waiter(url: str) -> None:
    """A step that retry_step resets keeps its undelivered waiter."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.register_waiter(run_id, "b", "paid")
        await store.record_skipped_step(run_id, "b", "task")
        await store.retry_step(run_id, "a", reset=["b"])
        assert await store.get_waiter(run_id, "b") is None, "the waiter of a reset step is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            REQUESTS,
            "AND step_key = ANY($2::text[]) AND delivered_at IS NULL\n",
            "AND step_key = ANY($2::text[]) AND delivered_at IS NULL AND expired_at IS NULL\n",
        )
    ],
)
async def retried_step_keeps_an_expired_waiter(url: str) -> None:
    """retry_step keeps an expired waiter, so no other can be registered."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.register_waiter(run_id, "a", "paid", expires_at=clock.now)
        await store.expire_waiter(run_id, "a")
        await store.retry_step(run_id, "a")
        assert await store.get_waiter(run_id, "a") is None, "the expired waiter is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (RETRIES, "AND status = 'Skipped' FOR UPDATE", "AND status IN ('Skipped', 'Failed') FOR UPDATE")
    ],
)
async def retry_resets_failed_steps(url: str) -> None:
    """retry_step also resets Failed keys of ``reset``."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await finish(store, run_id, "b", StepStatus.FAILED)
        await store.retry_step(run_id, "a", reset=["b"])
        assert "b" in await store.get_step_statuses(run_id), "a Failed step was reset"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "claim_expires_at = NULL,\n    {no_dispatch}\nWHERE run_id = $1 AND step_key = $2\n",
            "claim_expires_at = NULL\nWHERE run_id = $1 AND step_key = $2\n",
        )
    ],
)
async def retried_step_keeps_its_dispatch(url: str) -> None:
    """retry_step keeps the dispatch of the step."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.retry_step(run_id, "a")
        assert await store.get_dispatches(run_id) == (), "the dispatch is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "            if status is not RunStatus.RUNNING:\n",
            '            if status is not RunStatus.RUNNING and not row["reopened"]:\n',
        )
    ],
)
async def repeated_retry_leaves_the_run_ended(url: str) -> None:
    """A repeated retry_step does not reopen a run that became terminal meanwhile."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.retry_step(run_id, "a")
        await end(store, run_id, RunStatus.CANCELLED)
        await store.retry_step(run_id, "a")
        assert await store.get_run_status(run_id) == RunStatus.RUNNING, "the run stays ended"


@source_mutant(
    "postgresql",
    kind="transaction",
    clauses=("STP-6", "CON-1"),
    changes=[
        (
            RETRIES,
            '                await self._reset(transaction, run_id, step_key, reset, row["now"])\n',
            "",
        ),
        (
            RETRIES,
            '        await self._database.transaction("retry_step", work)\n',
            "        async def reset_others(transaction: Transaction) -> None:\n"
            "            await self._reset(transaction, run_id, step_key, reset, transaction.now)\n\n"
            '        await self._database.transaction("retry_step", work)\n'
            '        await self._database.transaction("retry_step", reset_others)\n',
        ),
    ],
)
async def retry_resets_in_a_second_transaction(url: str) -> None:
    """retry_step reopens the step in one transaction and resets the other keys in the next."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        await store.record_skipped_step(run_id, "b", "task")
        async with other.transaction():
            await other.execute("SELECT FROM steps WHERE run_id = $1 AND step_key = 'b' FOR UPDATE", run_id)
            retrying = asyncio.ensure_future(store.retry_step(run_id, "a", reset=["b"]))
            await wait_until_blocked(url, other, retrying)
            statuses = await store.get_step_statuses(run_id)
        await retrying
        assert statuses["a"] == StepStatus.FAILED, "the step is reopened and the other not yet reset"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "AND status = 'Skipped' FOR UPDATE",
            "AND status = 'Skipped' ORDER BY step_key LIMIT 1000 FOR UPDATE",
        )
    ],
)
async def reset_beyond_a_thousand_is_cut_off(url: str) -> None:
    """retry_step resets at most 1,000 keys."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        keys = [f"{n}" for n in range(1001)]
        for first in range(0, len(keys), 50):
            await outcomes(
                [store.record_skipped_step(run_id, key, "task") for key in keys[first : first + 50]]
            )
        await store.retry_step(run_id, "a", reset=keys)
        assert list(await store.get_step_statuses(run_id)) == ["a"], "a Skipped key is not reset"


# Recovery


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-7",),
    changes=[(RECOVERY, '            if row["rescheduled"]:\n                return\n', "")],
)
async def repeated_reschedule_drops_a_claim(url: str) -> None:
    """Repeating reschedule_step replaces the dispatch and the claim that were made since."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        attempt = await store.record_step_start(run_id, "a", "poll")
        await store.reschedule_step(run_id, "a", attempt=attempt)
        await store.try_claim_step(run_id, "a", owner="one")
        await store.reschedule_step(run_id, "a", attempt=attempt)
        assert await store.get_claimed_step_keys(run_id) == {"a"}, "the new claim was removed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-7",),
    changes=[
        (RECOVERY, "CASE status WHEN 'Running' THEN $3 ELSE output_json END", "coalesce($3, output_json)")
    ],
)
async def reschedule_replaces_a_recorded_output(url: str) -> None:
    """reschedule_step after a completion as Pending replaces the recorded output."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING, output_json="1")
        await store.reschedule_step(run_id, "a", attempt=1, output_json="2")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].output_json == "1", "the recorded output was replaced"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-7",),
    changes=[
        (
            RECOVERY,
            "dispatched_at = CASE WHEN $6 THEN $5::timestamptz END,",
            "dispatched_at = CASE WHEN $6 THEN $5::timestamptz ELSE dispatched_at END,",
        )
    ],
)
async def reschedule_on_a_terminal_run_keeps_the_dispatch(url: str) -> None:
    """reschedule_step on a terminal run keeps the old dispatch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        attempt = await store.record_step_start(run_id, "a", "poll")
        await end(store, run_id, RunStatus.CANCELLED)
        await store.reschedule_step(run_id, "a", attempt=attempt)
        assert await store.get_dispatches(run_id) == (), "the old dispatch is kept"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("STP-8",),
    changes=[(STALLED, "FROM step, clock WHERE since <= as_of", "FROM step, clock WHERE since < as_of")],
)
async def stall_that_begins_now_is_missed(url: str) -> None:
    """A step whose stall begins exactly at as_of is not listed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        stalled = await store.get_stalled_steps(as_of=clock.now + LEASE)
        assert [one.reason for one in stalled] == [StallReason.LEASE_EXPIRED], "the stall is missed"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "w.run_id IS NOT NULL AND w.expires_at IS NULL AND w.expired_at IS NULL AS waits",
            "w.run_id IS NOT NULL AND w.expired_at IS NULL AS waits",
        )
    ],
)
async def waiter_past_its_end_hides_a_stall(url: str) -> None:
    """A step does not stall at its waiter's expires_at, but only once expire_waiter has closed the waiter."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING)
        await store.register_waiter(run_id, "a", "paid", expires_at=clock.now + timedelta(seconds=5))
        stalled = await store.get_stalled_steps(as_of=clock.now + timedelta(seconds=6))
        assert [one.step_key for one in stalled] == ["a"], "the waiter hides the step"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "ON w.run_id = s.run_id AND w.step_key = s.step_key",
            "ON w.run_id = s.run_id AND w.step_key <= s.step_key",
        )
    ],
)
async def waiter_of_another_step_hides_a_stall(url: str) -> None:
    """The waiter of another step of the run hides a stalled step."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING)
        await finish(store, run_id, "b", StepStatus.PENDING)
        await store.register_waiter(run_id, "a", "paid")
        stalled = await store.get_stalled_steps()
        assert [one.step_key for one in stalled] == ["b"], "a stalled step is hidden"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "WHEN s.status IS NOT NULL THEN coalesce(s.completed_at, s.started_at) END AS began",
            "WHEN s.status IS NOT NULL THEN s.started_at END AS began",
        )
    ],
)
async def stall_begins_at_the_start_of_the_attempt(url: str) -> None:
    """A step that was closed as Pending stalls since the start of its attempt instead of its end."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "a", "poll")
        ended = clock.advance(seconds=3)
        await store.record_step_complete(run_id, "a", StepStatus.PENDING)
        (stalled,) = await store.get_stalled_steps()
        assert stalled.since == ended, "the stall begins too early"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "FROM listed ORDER BY since, run_id, step_key)",
            "FROM listed ORDER BY run_id, since, step_key)",
        )
    ],
)
async def stalls_are_ordered_by_run(url: str) -> None:
    """get_stalled_steps lists the stalls of one run after those of another."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        runs = [await new_run(store, run_id=UUID(int=n)) for n in (2, 1)]
        for run_id in runs:
            await finish(store, run_id, "a", StepStatus.PENDING)
            clock.advance(seconds=1)
        stalled = await store.get_stalled_steps()
        assert [one.run_id for one in stalled] == runs, "a later stall comes first"
