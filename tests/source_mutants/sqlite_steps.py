"""Mutants of steps and attempts, of retries and of recovery in SQLite."""

from __future__ import annotations

from datetime import timedelta

from flowstore_core import (
    ClaimLostError,
    RunCompletedError,
    RunStatus,
    StaleAttemptError,
    StepAlreadyCompletedError,
    StepStatus,
    open_store,
)
from flowstore_core.steps import superseded_by
from tests.calls import new_run, together
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import begin, error_of, new_step, raw_connection, write_lock
from tests.virtual_clock import VirtualClock

STEPS = "flowstore_sqlite/steps.py"
RETRIES = "flowstore_sqlite/retries.py"
RECOVERY = "flowstore_sqlite/recovery.py"
STALLED = "flowstore_sqlite/stalled.py"
FIVE_SECONDS = timedelta(seconds=5)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-4",),
    changes=[
        (
            STEPS,
            "WHERE runs.run_id = steps.run_id AND runs.status = 'Running')",
            "WHERE runs.run_id = steps.run_id)",
        )
    ],
)
async def claimed_step_of_an_ended_run_starts(url: str) -> None:
    """A step that was claimed while the run was Running can start after the run has ended."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.complete_run(run_id, RunStatus.CANCELLED)
        start = store.record_step_start(run_id, "charge", "http", owner="a")
        assert await error_of(start) is RunCompletedError


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("STP-3",),
    changes=[
        (
            STEPS,
            "AND claim_owner = ? AND (expires_at IS NULL OR expires_at > ?)",
            "AND claim_owner = ? AND (expires_at IS NULL OR expires_at >= ?)",
        )
    ],
)
async def owner_starts_when_its_lease_ends(url: str) -> None:
    """The first attempt may start under a claim whose lease ends exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        start = store.record_step_start(run_id, "charge", "http", owner="a")
        assert await error_of(start) is ClaimLostError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6", "STP-1"),
    changes=[(STEPS, "AND last_attempt = 0\n", "AND status IS NULL\n")],
)
async def reset_step_starts_at_attempt_one(url: str) -> None:
    """The first attempt of a reset step gets the number 1 again."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http")
        await store.retry_step(run_id, "charge", reset=["ship"])
        assert await store.record_step_start(run_id, "ship", "http") == 2


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-1",),
    changes=[
        (
            STEPS,
            "started_at = COALESCE(started_at, :now), attempt_started_at = :now, attempt_completed_at = NULL",
            "started_at = :now, attempt_started_at = :now, attempt_completed_at = NULL",
        )
    ],
)
async def next_attempt_moves_the_start_of_the_step(url: str) -> None:
    """The started_at of a step becomes the start of its newest attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        first = clock()
        await new_step(store, run_id, status=StepStatus.FAILED)
        clock.advance(seconds=1)
        await new_step(store, run_id)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].started_at == first


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-1",),
    changes=[(STEPS, "    output_json = NULL, input_json = :input_json", "    input_json = :input_json")],
)
async def running_step_keeps_the_output_of_its_last_attempt(url: str) -> None:
    """A step that starts again shows the output of the attempt before."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING, output_json="{}")
        await store.record_step_start(run_id, "charge", "http")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].output_json is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-7",),
    changes=[
        (
            STEPS,
            "status = 'Running', last_attempt = :attempt, reopened = 0, rescheduled = 0,",
            "status = 'Running', last_attempt = :attempt, reopened = 0,",
        )
    ],
)
async def second_attempt_inherits_the_reschedule(url: str) -> None:
    """An attempt counts as rescheduled when the attempt before it was, so its dispatch is not recorded."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        await store.reschedule_step(run_id, "charge", attempt=1)
        await store.release_dispatch(run_id, "charge")
        await new_step(store, run_id, status=StepStatus.PENDING)
        await store.reschedule_step(run_id, "charge", attempt=2)
        assert await store.get_dispatched_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[(STEPS, "status = ? AND output_json IS ? AND", "status = ? AND output_json = ? AND")],
)
async def same_result_without_output_is_refused(url: str) -> None:
    """Repeating a result without output raises, because NULL equals nothing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        again = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1)
        assert await error_of(again) is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[
        (
            STEPS,
            "status = ? AND output_json IS ? AND",
            "status = ? AND COALESCE(output_json, '') = COALESCE(?, '') AND",
        )
    ],
)
async def empty_output_equals_no_output(url: str) -> None:
    """A closed attempt without output accepts an empty output as the same result."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        other = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, output_json="", attempt=1)
        assert await error_of(other) is StepAlreadyCompletedError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[
        (
            STEPS,
            "attempt not in (None, step.last_attempt)",
            "(attempt is not None and attempt < step.last_attempt)",
        )
    ],
)
async def attempt_that_never_started_is_accepted(url: str) -> None:
    """The result of an attempt with a number above the last one counts as a repeat of the last result."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        future = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=2)
        assert await error_of(future) is StaleAttemptError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[(STEPS, "if step.reopened or attempt not in", "if attempt not in")],
)
async def reopened_step_accepts_a_pending_result(url: str) -> None:
    """A reopened step takes a Pending result for a repeat instead of a stale attempt."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.retry_step(run_id, "charge")
        late = store.record_step_complete(run_id, "charge", StepStatus.PENDING, attempt=1)
        assert await error_of(late) is StaleAttemptError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-1",),
    changes=[(STEPS, "superseded_by(successor)", "superseded_by(step.last_attempt)")],
)
async def superseded_attempt_names_itself(url: str) -> None:
    """The error message of a superseded attempt names that attempt instead of its successor."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for _ in range(2):
            await store.record_step_start(run_id, "charge", "http")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].attempts[0].error_message == superseded_by(2)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-3", "STP-1"),
    changes=[
        (
            STEPS,
            "SELECT run_id, step_key, last_attempt, status, attempt_started_at,",
            "SELECT run_id, step_key, last_attempt, status, started_at,",
        )
    ],
)
async def earlier_attempts_start_with_the_step(url: str) -> None:
    """Every earlier attempt has the start of the step as its own start."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for _ in range(3):
            await new_step(store, run_id, status=StepStatus.FAILED)
            last = clock()
            clock.advance(seconds=1)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].attempts[1].started_at == last - timedelta(seconds=1)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-5",),
    changes=[(STEPS, "    output_json = NULL, input_json = NULL\n", "    output_json = NULL\n")],
)
async def skipped_step_keeps_its_input(url: str) -> None:
    """Skipping a step leaves it the input of the attempt before."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http", input_json="{}")
        await store.record_skipped_step(run_id, "charge", "http")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].input_json is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-5",),
    changes=[
        (
            STEPS,
            "owner is not None and step.started_owner == owner\n",
            "step.started_owner == owner\n",
        )
    ],
)
async def skip_without_owner_can_be_repeated(url: str) -> None:
    """Skipping a skipped step again without an owner is a no-op instead of an error."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_skipped_step(run_id, "charge", "http", "no stock")
        again = store.record_skipped_step(run_id, "charge", "http", "no stock")
        assert await error_of(again) is StepAlreadyCompletedError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-5",),
    changes=[(STEPS, "SELECT error_message IS ? FROM steps", "SELECT error_message = ? FROM steps")],
)
async def skip_without_reason_cannot_be_repeated(url: str) -> None:
    """The same owner cannot repeat a skip that had no reason, because NULL equals nothing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_skipped_step(run_id, "charge", "http", owner="a")
        assert await error_of(store.record_skipped_step(run_id, "charge", "http", owner="a")) is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-5",),
    changes=[(STEPS, "if owner is not None and not is_claimed:", "if owner is not None:")],
)
async def skip_replaces_the_live_claim_of_its_owner(url: str) -> None:
    """Skipping as the owner of a live claim replaces that claim by a new one without lease."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        before = await store.get_step_claims(run_id)
        await store.record_skipped_step(run_id, "charge", "http", owner="a")
        assert await store.get_step_claims(run_id) == before


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-5",),
    changes=[
        (
            STEPS,
            "SET claimed_at = ?, claim_owner = ?, expires_at = NULL, claim_token = NULL",
            "SET claimed_at = ?, claim_owner = ?, claim_token = NULL",
        )
    ],
)
async def skip_keeps_the_lease_of_an_expired_claim(url: str) -> None:
    """The claim of a skipped step has the lease of the expired claim that it replaced."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=9)
        await store.record_skipped_step(run_id, "charge", "http", owner="b")
        (claim,) = await store.get_step_claims(run_id)
        assert (claim.owner, claim.expires_at) == ("b", None)


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("STP-5", "CLM-6"),
    changes=[
        (STEPS, "now < self.expires_at or self.is_terminal", "now <= self.expires_at or self.is_terminal")
    ],
)
async def lease_that_ends_now_blocks_a_skip(url: str) -> None:
    """A claim whose lease ends exactly now keeps another owner from skipping the step."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        assert await error_of(store.record_skipped_step(run_id, "charge", "http", owner="b")) is None


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-4", "STP-3"),
    changes=[(STEPS, "now < self.expires_at or self.is_terminal", "now < self.expires_at")],
)
async def claim_of_a_failed_step_expires(url: str) -> None:
    """The claim of a Failed step expires, so its owner cannot start the next attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        await new_step(store, run_id, status=StepStatus.FAILED)
        clock.advance(seconds=9)
        assert await error_of(store.record_step_start(run_id, "charge", "http", owner="a")) is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-3",),
    changes=[(STEPS, "ORDER BY started_at, step_key", "ORDER BY step_key")],
)
async def steps_are_ordered_by_key(url: str) -> None:
    """get_run_detail orders steps by step_key instead of their start."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for step_key in ("ship", "charge"):
            await new_step(store, run_id, step_key)
            clock.advance(seconds=1)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert [step.step_key for step in detail.steps] == ["ship", "charge"]


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("QRY-3",),
    changes=[(STEPS, "ORDER BY started_at, step_key", "ORDER BY started_at, step_key LIMIT 1000")],
)
async def detail_shows_a_thousand_steps(url: str) -> None:
    """get_run_detail shows at most 1,000 steps."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await together(store.record_skipped_step(run_id, f"step-{number}", "map") for number in range(1001))
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert len(detail.steps) == 1001


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[(STEPS, "if is_terminal else None", "if not reopened else None")],
)
async def pending_step_has_a_completion(url: str) -> None:
    """A step whose attempt was closed as Pending shows the end of the attempt as its own."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].completed_at is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[(STEPS, "attempt_count=last_attempt + reopened", "attempt_count=last_attempt")],
)
async def retry_does_not_raise_the_attempt_count(url: str) -> None:
    """attempt_count rises when the step starts again, not when it is reopened."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.retry_step(run_id, "charge")
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].attempt_count == 2


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("INP-1",),
    changes=[(STEPS, "AND steps.step_key = ?\n", "AND steps.step_key = ? COLLATE NOCASE\n")],
)
async def step_keys_match_without_case(url: str) -> None:
    """A step is found under a key that differs in case."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, "Charge")
        assert await error_of(store.record_step_start(run_id, "charge", "http")) is None


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("INP-2",),
    changes=[
        (
            STEPS,
            "outcome = (status.value, output_json, error_message)",
            "outcome = (status.value, output_json, error_message and error_message[:65536])",
        )
    ],
)
async def long_errors_are_cut(url: str) -> None:
    """An error message is cut to the length that searches read."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED, error_message="x" * 65537)
        detail = await store.get_run_detail(run_id)
        assert detail is not None
        assert len(detail.steps[0].error_message or "") == 65537


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "    dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, dispatch_token = NULL,\n"
            "    error_message = NULL, output_json = NULL\n",
            "    error_message = NULL, output_json = NULL\n",
        )
    ],
)
async def reopened_step_keeps_its_dispatch(url: str) -> None:
    """retry_step leaves the dispatch of the step, so the step cannot be dispatched again."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        await new_step(store, run_id)
        await store.retry_step(run_id, "charge")
        assert await store.get_dispatched_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "WHERE run_id = ? AND step_key = ? AND delivered_at IS NULL",
            "WHERE run_id = ? AND step_key = ? AND delivered_at IS NULL AND expired_at IS NULL",
        )
    ],
)
async def reopened_step_keeps_an_expired_waiter(url: str) -> None:
    """retry_step leaves an expired waiter, so the step cannot wait again."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.register_waiter(run_id, "charge", "paid", expires_at=clock())
        await store.expire_waiter(run_id, "charge")
        await store.retry_step(run_id, "charge")
        assert await store.get_waiter(run_id, "charge") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6", "RET-2"),
    changes=[
        (
            RETRIES,
            "UPDATE runs SET status = 'Running', completed_at = NULL WHERE",
            "UPDATE runs SET status = 'Running' WHERE",
        )
    ],
)
async def reopened_run_keeps_its_end(url: str) -> None:
    """A run that retry_step reopens keeps its completed_at, so cleanup deletes it while it runs."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        await store.retry_step(run_id, "charge")
        await store.cleanup(clock.advance(days=1))
        assert await store.get_run_status(run_id) is RunStatus.RUNNING


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("STP-6",),
    changes=[(RETRIES, "CASE WHEN timeout_at <= ? THEN", "CASE WHEN timeout_at < ? THEN")],
)
async def retry_keeps_a_deadline_that_ends_now(url: str) -> None:
    """retry_step keeps a deadline that is exactly now, so the reopened run is stopped at once."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, run_id, "manual", timeout_at=clock())
        await new_step(store, run_id)
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "charge")
        control = await store.get_run_control(run_id)
        assert control is not None
        assert control.timeout_at is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "cancelled_at = NULL, cancel_reason = NULL, timed_out_at = NULL, timed_out_reason = NULL,",
            "cancelled_at = NULL, cancel_reason = NULL,",
        )
    ],
)
async def retry_keeps_the_time_out(url: str) -> None:
    """retry_step of a terminal run clears the user's cancel but not the time-out."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.configure_run(run_id, run_id, "manual")
        await new_step(store, run_id)
        await store.mark_timed_out(run_id)
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.retry_step(run_id, "charge")
        assert list(await store.get_runs_to_stop()) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[(RETRIES, "if step.run_is_terminal:", "if step.run_is_terminal and not step.reopened:")],
)
async def repeated_retry_leaves_the_run_ended(url: str) -> None:
    """A retry that is repeated after the run has ended again does not reopen the run."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id)
        await store.retry_step(run_id, "charge")
        await store.complete_run(run_id, RunStatus.FAILED)
        await store.retry_step(run_id, "charge")
        assert await store.get_run_status(run_id) is RunStatus.RUNNING


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "db.execute(RESET_STEP, (run_id.bytes, step_key))\n"
            "        db.execute(REMOVE_UNDELIVERED_WAITER, (run_id.bytes, step_key))\n",
            "db.execute(RESET_STEP, (run_id.bytes, step_key))\n",
        )
    ],
)
async def reset_step_keeps_its_waiter(url: str) -> None:
    """A reset step keeps its undelivered waiter, which then consumes a signal."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http")
        await store.register_waiter(run_id, "ship", "paid")
        await store.retry_step(run_id, "charge", reset=["ship"])
        assert await store.get_waiter(run_id, "ship") is None


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[(RETRIES, "if step.status == StepStatus.SKIPPED:", "if step.is_terminal:")],
)
async def reset_discards_finished_steps(url: str) -> None:
    """A Succeeded step in reset becomes unstarted, as if it were Skipped."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await new_step(store, run_id, "ship")
        await store.retry_step(run_id, "charge", reset=["ship"])
        assert "ship" in await store.get_step_statuses(run_id)


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("STP-6",),
    changes=[(RETRIES, "for key in reset:", "for key in sorted(reset)[:1000]:")],
)
async def reset_is_cut_at_a_thousand(url: str) -> None:
    """retry_step resets at most 1,000 steps."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        keys = [f"step-{number}" for number in range(1001)]
        await together(store.record_skipped_step(run_id, key, "map") for key in keys)
        await store.retry_step(run_id, "charge", reset=keys)
        assert list(await store.get_step_statuses(run_id)) == ["charge"]


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("STP-8",),
    changes=[(STALLED, "and since <= as_of:", "and since < as_of:")],
)
async def step_does_not_stall_before_its_time_has_passed(url: str) -> None:
    """get_stalled_steps omits a dispatch that is due exactly at as_of."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge", due_at=clock())
        assert len(await store.get_stalled_steps(as_of=clock())) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[(STALLED, "COALESCE(due_at, dispatched_at)", "due_at")],
)
async def dispatch_without_due_date_never_stalls(url: str) -> None:
    """get_stalled_steps omits a dispatch without due_at."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        assert len(await store.get_stalled_steps(as_of=clock.advance(hours=1))) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "OR waiters.expires_at IS NOT NULL\n        THEN MAX(",
            "OR signal_name IS NOT NULL\n        THEN MAX(",
        )
    ],
)
async def step_that_waits_for_ever_stalls(url: str) -> None:
    """A step whose waiter has no expires_at is listed as stalled."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING)
        await store.register_waiter(run_id, "charge", "paid")
        assert list(await store.get_stalled_steps(as_of=clock.advance(hours=1))) == []


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            'waiters.run_id = steps.run_id AND waiters.step_key = steps.step_key\n"""\nREAD_BOUND',
            'waiters.run_id = steps.run_id\n"""\nREAD_BOUND',
        )
    ],
)
async def waiter_of_one_step_hides_the_others(url: str) -> None:
    """No step of a run is listed as stalled while one of them waits for a signal."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING)
        await store.register_waiter(run_id, "ship", "paid")
        assert len(await store.get_stalled_steps(as_of=clock.advance(hours=1))) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[(STALLED, "COALESCE(attempt_completed_at, attempt_started_at)", "attempt_started_at")],
)
async def undispatched_step_stalls_since_its_start(url: str) -> None:
    """since of a step without dispatch is the start of its attempt instead of the end."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        attempt = await store.record_step_start(run_id, "charge", "http")
        end = clock.advance(minutes=1)
        await store.record_step_complete(run_id, "charge", StepStatus.PENDING, attempt=attempt)
        (stalled,) = await store.get_stalled_steps(as_of=clock.advance(hours=1))
        assert stalled.since == end


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[(STALLED, "stalled.sort()", "stalled.sort(key=lambda one: one[1:])")],
)
async def stalled_steps_are_ordered_by_run(url: str) -> None:
    """get_stalled_steps lists the steps of the lowest run_id first instead of the oldest stalls."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for step_key in ("ship", "charge"):
            await store.try_record_dispatch(run_id, step_key)
            clock.advance(seconds=1)
        (first,) = await store.get_stalled_steps(take=1)
        assert first.step_key == "ship"


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-7",),
    changes=[
        (RECOVERY, "dispatch = (None, None) if step.run_is_terminal else (now, due)", "dispatch = (now, due)")
    ],
)
async def step_of_an_ended_run_is_rescheduled(url: str) -> None:
    """reschedule_step records a dispatch on a terminal run too."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        await store.complete_run(run_id, RunStatus.CANCELLED)
        await store.reschedule_step(run_id, "charge", attempt=1)
        assert await store.get_dispatched_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-7",),
    changes=[
        (
            RECOVERY,
            "claim_token = NULL,\n    dispatched_at = ?, due_at = ?, dispatch_job_id = NULL,",
            "claim_token = NULL,\n    dispatched_at = ?, due_at = ?,",
        )
    ],
)
async def new_dispatch_keeps_the_old_job_id(url: str) -> None:
    """The dispatch of reschedule_step has the job_id of the dispatch that it replaced."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        await store.annotate_dispatch(run_id, "charge", "job")
        await store.record_step_start(run_id, "charge", "http")
        await store.reschedule_step(run_id, "charge", attempt=1)
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id is None


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            RECOVERY,
            "token = NULL,\n    dispatched_at = ?, due_at = ?, dispatch_job_id = NULL, dispatch_token = NULL",
            "token = NULL,\n    dispatched_at = ?, due_at = ?, dispatch_job_id = NULL",
        )
    ],
)
async def compensation_removes_a_rescheduled_dispatch(url: str) -> None:
    """A reschedule keeps the token of a cancelled dispatch, whose compensation removes the new dispatch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        with write_lock(url):
            cancelled = await begin(store.try_record_dispatch(run_id, "charge"))
            reschedule = await begin(store.reschedule_step(run_id, "charge", attempt=1))
            cancelled.cancel()
        await reschedule
    async with open_store(url) as store:
        assert await store.get_dispatched_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-7",),
    changes=[(RECOVERY, "    elif step.rescheduled:\n        return\n", "")],
)
async def repeated_reschedule_removes_a_new_claim(url: str) -> None:
    """A repeated reschedule_step applies again and removes the claim of the next worker."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        await store.reschedule_step(run_id, "charge", attempt=1)
        await store.try_claim_step(run_id, "charge", owner="b")
        await store.reschedule_step(run_id, "charge", attempt=1)
        assert await store.get_claimed_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-4",),
    changes=[
        (
            STEPS,
            "AND status = 'Running' AND last_attempt = IFNULL(?7, last_attempt)",
            "AND status IN ('Running', 'Failed') AND last_attempt = IFNULL(?7, last_attempt)",
        )
    ],
)
async def failed_attempt_can_still_succeed(url: str) -> None:
    """A second result replaces the first one of an attempt that was closed as Failed."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        late = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1)
        assert await error_of(late) is StepAlreadyCompletedError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-8",),
    changes=[
        (
            STALLED,
            "(steps.status IS NULL OR steps.status IN ('Pending', 'Running'))\nLEFT JOIN",
            "(steps.status IS NULL OR steps.status = 'Running')\nLEFT JOIN",
        )
    ],
)
async def pending_steps_never_stall(url: str) -> None:
    """get_stalled_steps omits Pending steps."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.PENDING)
        assert len(await store.get_stalled_steps(as_of=clock.advance(hours=1))) == 1


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-6",),
    changes=[
        (
            RETRIES,
            "SET status = NULL, rescheduled = 0, attempt_started_at = NULL, attempt_completed_at = NULL,\n"
            "    claimed_at = NULL, claim_owner = NULL, expires_at = NULL, claim_token = NULL, "
            "started_owner = NULL,\n",
            "SET status = NULL, rescheduled = 0, attempt_started_at = NULL, attempt_completed_at = NULL,\n"
            "    started_owner = NULL,\n",
        )
    ],
)
async def reset_step_keeps_its_claim(url: str) -> None:
    """A reset step keeps the claim of the owner that skipped it, so it cannot be claimed."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http", owner="a")
        await store.retry_step(run_id, "charge", reset=["ship"])
        assert await store.try_claim_step(run_id, "ship", owner="b")


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("STP-6", "CON-1"),
    changes=[
        (
            RETRIES,
            "            if key != step_key:\n                _reset_step(db, run_id, key, now)\n",
            "            if key != step_key:\n                _reset_step(db, run_id, key, now)\n"
            '                db.execute("COMMIT")\n                db.execute("BEGIN IMMEDIATE")\n',
        )
    ],
)
async def each_reset_is_committed(url: str) -> None:
    """retry_step commits after each step that it resets, so a failure leaves the run terminal."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        await store.record_skipped_step(run_id, "ship", "http")
        await store.complete_run(run_id, RunStatus.FAILED)
        with raw_connection(url) as db:
            # A disk that is full, for the last statements of the retry.
            db.execute(
                "CREATE TRIGGER full BEFORE UPDATE OF status ON runs BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        assert await error_of(store.retry_step(run_id, "charge", reset=["ship"])) is not None
        assert await store.get_step_statuses(run_id) == {
            "charge": StepStatus.FAILED,
            "ship": StepStatus.SKIPPED,
        }


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("STP-7", "CON-1"),
    changes=[
        (
            RECOVERY,
            "(*outcome, now, run_id.bytes, step_key, attempt, owner))\n",
            "(*outcome, now, run_id.bytes, step_key, attempt, owner))\n"
            '        db.execute("COMMIT")\n        db.execute("BEGIN IMMEDIATE")\n',
        )
    ],
)
async def reschedule_commits_the_end_first(url: str) -> None:
    """reschedule_step commits the end of the attempt before it records the dispatch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        with raw_connection(url) as db:
            db.execute(
                "CREATE TRIGGER full BEFORE UPDATE OF due_at ON steps BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        assert await error_of(store.reschedule_step(run_id, "charge", attempt=1)) is not None
        assert await store.get_step_statuses(run_id) == {"charge": StepStatus.RUNNING}


@source_mutant(
    "sqlite",
    kind="transaction",
    clauses=("STP-5", "CON-1"),
    changes=[
        (
            STEPS,
            "        db.execute(CLAIM_SKIPPED_STEP, (now, owner, run_id.bytes, step_key))\n",
            '        db.execute("COMMIT")\n        db.execute("BEGIN IMMEDIATE")\n'
            "        db.execute(CLAIM_SKIPPED_STEP, (now, owner, run_id.bytes, step_key))\n",
        )
    ],
)
async def skip_is_committed_before_its_claim(url: str) -> None:
    """record_skipped_step commits the skip before it takes the claim."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with raw_connection(url) as db:
            db.execute(
                "CREATE TRIGGER full BEFORE UPDATE OF claim_owner ON steps"
                " BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        assert await error_of(store.record_skipped_step(run_id, "charge", "http", owner="a")) is not None
        assert await store.get_step_statuses(run_id) == {}


@source_mutant(
    "sqlite",
    kind="size",
    clauses=("UNK", "QRY-1"),
    changes=[
        (
            STEPS,
            "WHERE run_id = ? AND status IS NOT NULL ORDER BY step_key\n",
            "WHERE run_id = ? AND status IS NOT NULL ORDER BY step_key LIMIT 1000\n",
        )
    ],
)
async def statuses_are_cut_at_a_thousand(url: str) -> None:
    """get_step_statuses returns at most 1,000 steps."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await together(store.record_skipped_step(run_id, f"step-{number}", "map") for number in range(1001))
        assert len(await store.get_step_statuses(run_id)) == 1001
