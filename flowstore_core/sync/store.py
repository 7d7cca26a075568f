"""The synchronous store: the operations of FlowStore as plain methods.

Generated from the protocols by ``python -m tests.sync_source``; do not edit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from uuid import UUID

from flowstore_core.claims import StepClaim, StepDispatch
from flowstore_core.controls import FlowRunControlRecord, TriggerResult
from flowstore_core.errors import FlowStoreError
from flowstore_core.events import FlowEventRecord
from flowstore_core.queues import ClaimedStep, EndedStep, QueueStatistics, RunAdvance, StepRequest
from flowstore_core.runs import FlowRunDetail, FlowRunRecord, RunPage, RunPosition
from flowstore_core.signals import BufferedSignal, FlowSignalWaiter, SignalDeliveryResult
from flowstore_core.statistics import DashboardStatistics, RunTimeseriesBucket
from flowstore_core.status import RunStatus, RunTimeseriesGranularity, StepStatus
from flowstore_core.steps import FlowStepRecord, StalledStep
from flowstore_core.sync.base import SyncStoreBase
from flowstore_core.transfer import RunArchive


class SyncFlowStore(SyncStoreBase):
    """Every operation of the contract, for code without an event loop; open_store_sync opens it.

    Any number of threads may use it. Each call blocks its thread until it has ended; calls of several threads
    run concurrently. A method whose capability the backend lacks raises NotSupportedError.
    """

    def ping(self) -> None:
        """Make one round trip to the database. Raises StoreUnavailableError."""
        return self._thread.call(self._store.ping)

    def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> FlowRunRecord:
        """Store a new Running run and return it (RUN-1).

        ``tags`` (capability TAGS) are its first tags, at most 32 (TAG-1).

        Atomic. Raises RunAlreadyExistsError, changing nothing, if run_id is already stored.
        """
        return self._thread.call(
            self._store.start_run,
            flow_id,
            flow_name,
            run_id,
            trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            source_run_id=source_run_id,
            tags=tags,
        )

    def complete_run(
        self,
        run_id: UUID,
        status: RunStatus | str,
        *,
        expected: Mapping[str, StepStatus | str] | None = None,
    ) -> bool:
        """Set a Running run to Succeeded, Failed or Cancelled; True for the one call that did (RUN-2).

        The first terminal status wins: every later call returns False. ``expected`` maps every step_key to
        its status. With it, the call changes nothing and returns False unless the run's statuses are
        exactly these and no other key has a live claim or a dispatch: a run cannot complete while one of
        its steps was just retried or dispatched. Check and change are atomic.

        Raises RunNotFoundError.
        """
        return self._thread.call(self._store.complete_run, run_id, status, expected=expected)

    def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        tags: Mapping[str, str] | None = None,
    ) -> Sequence[FlowRunRecord]:
        """Runs, newest first: by started_at, then run_id, descending (QRY-1).

        ``flow_id`` selects the runs of one flow. ``after`` starts strictly after a position; ``skip`` counts
        from there. ``tags`` (capability TAGS) selects the runs that have all of these tags (TAG-3).
        """
        return self._thread.call(self._store.get_runs, flow_id, after=after, skip=skip, take=take, tags=tags)

    def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        """The Running runs, in the order of QRY-1, at most ``take`` (None: all) (QRY-6)."""
        return self._thread.call(self._store.get_active_runs, take=take)

    def get_derived_runs(self, source_run_id: UUID, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        """The runs with this source_run_id, one generation only, in the order of QRY-1 (QRY-6)."""
        return self._thread.call(self._store.get_derived_runs, source_run_id, take=take)

    def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | str | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> RunPage:
        """One page of the matching runs and the number of all matching runs (QRY-1, QRY-2, QRY-3, TAG-3).

        Page and number come from one snapshot. ``after`` and ``skip`` work as in get_runs and do not affect
        the number. ``tags`` works as in get_runs.

        ``search`` is a plain substring: ASCII letters match in either case, all other characters exactly.
        It is searched for in the run id (hyphenated), flow name, trigger key, status and job id of the run,
        and in the step keys, error messages and outputs of its get_run_detail; in error messages and
        outputs only within the first 64 KiB of their UTF-8. An empty search matches every run.
        """
        return self._thread.call(
            self._store.get_runs_page,
            flow_id,
            status=status,
            after=after,
            skip=skip,
            take=take,
            search=search,
            tags=tags,
        )

    def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        """A run without its steps (QRY-3); None if unknown. The cost does not grow with the run."""
        return self._thread.call(self._store.get_run, run_id)

    def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        """A run with its steps and attempts, from one snapshot (QRY-3); None if unknown."""
        return self._thread.call(self._store.get_run_detail, run_id)

    def get_run_status(self, run_id: UUID) -> RunStatus | None:
        """The status of a run; None if unknown."""
        return self._thread.call(self._store.get_run_status, run_id)

    def set_tags(self, run_id: UUID, tags: Mapping[str, str | None]) -> None:
        """Merge tags into those of a run, atomically; None removes a key, other keys stay (TAG-2).

        Sets at most 32 keys and removes at most 32. Allowed on a terminal run. A repeated call changes
        nothing.

        Raises RunNotFoundError, and ConflictError, changing nothing, if the run would have more than 32 tags.
        """
        return self._thread.call(self._store.set_tags, run_id, tags)

    def record_step_start(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        input_json: str | None = None,
        job_id: str | None = None,
        owner: str | None = None,
    ) -> int:
        """Open the next attempt and return its number, gapless from 1 under any concurrency (STP-1).

        The step becomes Running; its output, error and completion are cleared. An open attempt is closed
        as Failed with a message that names its successor. With ``owner``, that owner must hold an unexpired
        claim on the step; repeated under the same claim while the attempt is open, the call returns the
        number of that attempt and changes nothing (STP-3). Atomic.

        Raises, in this order: RunNotFoundError, RunCompletedError (RUN-4), StepAlreadyCompletedError for a
        Succeeded or Skipped step (STP-2), ClaimLostError.
        """
        return self._thread.call(
            self._store.record_step_start,
            run_id,
            step_key,
            step_type,
            input_json=input_json,
            job_id=job_id,
            owner=owner,
        )

    def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        output_json: str | None = None,
        error_message: str | None = None,
        attempt: int | None = None,
        owner: str | None = None,
    ) -> None:
        """Close an attempt (None: the last started) and record the same outcome on its step (STP-4).

        ``status`` is Succeeded, Failed, Skipped, or Pending for a poll that is not done. With ``owner``, that
        owner must have started the attempt. Repeating the same outcome is a no-op. Allowed on a terminal run.
        Step and attempt change in one transaction.

        Raises, in this order: RunNotFoundError, StepNotFoundError, StaleAttemptError for an attempt that is
        not the last one or whose step retry_step has reopened, ClaimLostError if another owner, or none,
        started the attempt, StepAlreadyCompletedError if the attempt is closed with a different outcome.
        """
        return self._thread.call(
            self._store.record_step_complete,
            run_id,
            step_key,
            status,
            output_json=output_json,
            error_message=error_message,
            attempt=attempt,
            owner=owner,
        )

    def record_skipped_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        reason: str | None = None,
        *,
        owner: str | None = None,
    ) -> None:
        """Record one attempt that starts and ends Skipped, with ``reason`` as error_message (STP-5).

        An open attempt is closed as in STP-1. With ``owner``, the same transaction claims the step;
        repeating the call with the same owner and reason is a no-op. Allowed on a terminal run. Atomic.

        Raises RunNotFoundError, StepAlreadyCompletedError for a terminal step, ClaimLostError if a different
        owner holds the claim.
        """
        return self._thread.call(
            self._store.record_skipped_step, run_id, step_key, step_type, reason, owner=owner
        )

    def retry_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int | None = None,
        reset: Collection[str] = (),
        dispatch: Sequence[StepRequest] = (),
    ) -> None:
        """Reopen a step and its run, atomically (STP-6).

        The step becomes Pending: output, error and completion are cleared, attempt_count is raised to the
        number of the next attempt, and its claim, dispatch and undelivered waiter are deleted. Its attempts
        are kept; an open one is closed as Failed. The run becomes Running; if it was terminal, its latches
        and an elapsed deadline are cleared. Skipped steps in ``reset`` become unstarted and keep their
        attempts and numbering. With ``dispatch`` (capability QUEUES) the requests are settled last, in the
        same transaction (QUE-4). Repeated before the next start, the call is a no-op, except that it reopens
        a run that has become terminal in the meantime and settles the requests.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError if ``attempt`` is given and is not the
        last one started (a double click).
        """
        return self._thread.call(
            self._store.retry_step, run_id, step_key, attempt=attempt, reset=reset, dispatch=dispatch
        )

    def get_step(self, run_id: UUID, step_key: str) -> FlowStepRecord | None:
        """One step as get_run_detail shows it, with its attempts, from one snapshot (QRY-3).

        None for an unknown run and for a key that never started or was reset by retry_step. The cost does
        not grow with the number of steps: an engine that replays a run reads one step at a time.
        """
        return self._thread.call(self._store.get_step, run_id, step_key)

    def get_step_statuses(self, run_id: UUID) -> Mapping[str, StepStatus]:
        """The status of every started step, read-only, ordered by step_key; empty for an unknown run."""
        return self._thread.call(self._store.get_step_statuses, run_id)

    def reschedule_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        attempt: int,
        output_json: str | None = None,
        error_message: str | None = None,
        due_at: datetime | None = None,
        owner: str | None = None,
    ) -> None:
        """Close the attempt as Pending, delete the claim and renew the dispatch, atomically (STP-7).

        With ``error_message`` (capability QUEUES) the attempt is closed as Failed and the step is retried,
        in the same transaction. The new dispatch keeps the queue of the old one. With ``owner``, that owner
        must have started the attempt.

        Repeated for the attempt that it closed, the call is a no-op; after record_step_complete as Pending
        it still reschedules. On a terminal run it dispatches nothing.

        Raises RunNotFoundError, StepNotFoundError, StaleAttemptError, ClaimLostError,
        StepAlreadyCompletedError, in this order.
        """
        return self._thread.call(
            self._store.reschedule_step,
            run_id,
            step_key,
            attempt=attempt,
            output_json=output_json,
            error_message=error_message,
            due_at=due_at,
            owner=owner,
        )

    def get_stalled_steps(self, *, as_of: datetime | None = None, take: int = 100) -> Sequence[StalledStep]:
        """The stalled steps of Running runs, ordered by since, run_id, step_key (STP-8).

        A step that is not terminal, or a key that was dispatched or claimed but never started, is stalled
        if its claim has expired by ``as_of`` (None: the store's now), or if it has no claim and its dispatch
        is missing or due. A step that waits for an undelivered signal is not stalled. A missing dispatch
        counts from the end of the last attempt, so pass ``as_of`` = now - grace.
        """
        return self._thread.call(self._store.get_stalled_steps, as_of=as_of, take=take)

    def try_claim_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        owner: str | None = None,
        lease: timedelta | None = None,
    ) -> bool:
        """Claim the step; True for exactly one of all concurrent distinct owners (CLM-1).

        ``owner`` is a token unique to one delivery (new_claim_token()). The owner of a live claim gets
        True again and nothing changes, so a retry of an unacknowledged claim gets the true result (CLM-5).
        Without ``owner`` every call counts as a distinct owner. With ``lease`` (capability LEASES) the
        claim is held while now < claimed_at + lease; afterwards exactly one of the next claimants wins
        (CLM-6). False on a terminal run or step, also for the owner of the claim (RUN-4).

        Losing the race never raises. Atomic. Raises RunNotFoundError.
        """
        return self._thread.call(self._store.try_claim_step, run_id, step_key, owner=owner, lease=lease)

    def release_step_claim(self, run_id: UUID, step_key: str, *, owner: str | None = None) -> None:
        """Release the claim on this key only; idempotent (CLM-3).

        With ``owner``, only a claim of that owner is released.
        """
        return self._thread.call(self._store.release_step_claim, run_id, step_key, owner=owner)

    def try_start_step(
        self,
        run_id: UUID,
        step_key: str,
        step_type: str,
        *,
        owner: str,
        lease: timedelta,
        input_json: str | None = None,
        job_id: str | None = None,
    ) -> int | None:
        """Claim the step and start its next attempt, in one atomic change (CLM-8).

        Does what try_claim_step and then record_step_start by ``owner`` would do. The number of the open
        attempt, for exactly one of all concurrent distinct owners (CLM-1); None, and nothing changes, if a
        different owner holds the claim, or the step or its run is terminal (RUN-4). get_step tells which.

        ``owner`` is a token unique to one delivery (new_claim_token()). Repeated by the owner while its claim
        is live and the attempt is open, it returns the same number and changes nothing. After the lease has
        ended, or the attempt was closed as Pending, it opens the next attempt.

        Losing the race never raises. Raises RunNotFoundError.
        """
        return self._thread.call(
            self._store.try_start_step,
            run_id,
            step_key,
            step_type,
            owner=owner,
            lease=lease,
            input_json=input_json,
            job_id=job_id,
        )

    def renew_step_claim(self, run_id: UUID, step_key: str, owner: str, lease: timedelta) -> bool:
        """Extend the owner's unexpired claim to now + lease; never shortens it (CLM-6).

        False if the claim has no lease, has expired or belongs to a different owner. The caller must then
        stop working on the step.
        """
        return self._thread.call(self._store.renew_step_claim, run_id, step_key, owner, lease)

    def renew_step_claims(self, claims: Sequence[tuple[UUID, str, str]], lease: timedelta) -> Sequence[bool]:
        """Renew several claims, of any runs; the answer of renew_step_claim for each, in their order (CLM-6).

        A claim is (run_id, step_key, owner); at most 1,000 in a call. Each is decided alone, in no common
        transaction: if the call raises StoreUnavailableError, some may have been renewed.
        """
        return self._thread.call(self._store.renew_step_claims, claims, lease)

    def get_claimed_step_keys(self, run_id: UUID) -> frozenset[str]:
        """The keys that have a live claim and no terminal step (CLM-4)."""
        return self._thread.call(self._store.get_claimed_step_keys, run_id)

    def get_step_claims(self, run_id: UUID) -> Sequence[StepClaim]:
        """Every claim of a run, ordered by step_key, including expired claims and finished steps (CLM-4)."""
        return self._thread.call(self._store.get_step_claims, run_id)

    def try_record_dispatch(
        self,
        run_id: UUID,
        step_key: str,
        *,
        due_at: datetime | None = None,
        queue: str | None = None,
        priority: int = 0,
        step_type: str | None = None,
        input_json: str | None = None,
    ) -> bool:
        """Record a dispatch of the step; True for exactly one of all concurrent callers (CLM-1).

        With ``queue`` (capability QUEUES) claim_next_steps hands out the step from ``due_at`` on, with this
        ``step_type`` and ``input_json``; a higher ``priority``, 0 to 9, comes first (QUE-7).

        False on a terminal run or step (RUN-4), and while a dispatch is recorded; losing the race never
        raises. Atomic.

        Raises RunNotFoundError.
        """
        return self._thread.call(
            self._store.try_record_dispatch,
            run_id,
            step_key,
            due_at=due_at,
            queue=queue,
            priority=priority,
            step_type=step_type,
            input_json=input_json,
        )

    def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str) -> None:
        """Store the queue's job id on an existing dispatch, on a best-effort basis (CLM-7).

        Never creates a dispatch. A missing dispatch or an unavailable store is logged, not raised.
        """
        return self._thread.call(self._store.annotate_dispatch, run_id, step_key, job_id)

    def release_dispatch(self, run_id: UUID, step_key: str) -> None:
        """Delete the dispatch of this key only; idempotent (CLM-3)."""
        return self._thread.call(self._store.release_dispatch, run_id, step_key)

    def get_dispatched_step_keys(self, run_id: UUID) -> frozenset[str]:
        """The keys of all dispatched steps of a run."""
        return self._thread.call(self._store.get_dispatched_step_keys, run_id)

    def get_dispatches(self, run_id: UUID) -> Sequence[StepDispatch]:
        """The dispatches of a run, ordered by step_key."""
        return self._thread.call(self._store.get_dispatches, run_id)

    def claim_next_steps(
        self,
        queues: Collection[str],
        *,
        lease: timedelta,
        limit: int = 1,
        worker: str | None = None,
    ) -> Sequence[ClaimedStep]:
        """Claim up to ``limit`` ready steps of these queues and open their attempts (QUE-1).

        The steps come by priority (higher first), ready_at, run_id, step_key (QUE-2). Each claim has its own
        new owner and ends after ``lease``; ``worker`` is the job_id of the attempts. Each step is claimed and
        started atomically, the set of steps need not be. Of all concurrent callers at most one gets a step.
        Fewer than ``limit`` steps: no other was ready and free at some moment of the call.

        A cancelled call gives its claims back (QUE-3).
        """
        return self._thread.call(
            self._store.claim_next_steps, queues, lease=lease, limit=limit, worker=worker
        )

    def advance_run(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus | str,
        *,
        attempt: int,
        owner: str | None = None,
        output_json: str | None = None,
        error_message: str | None = None,
        dispatch: Sequence[StepRequest] = (),
        complete_as: RunStatus | str | None = None,
        failed_as: RunStatus | str | None = RunStatus.FAILED,
    ) -> RunAdvance:
        """Record the outcome of an attempt, dispatch what it makes possible, and complete the run (QUE-4).

        In one transaction, serial with other advances of the run: close the attempt as record_step_complete
        does, with a terminal ``status``; settle the requests in their order; with ``complete_as``, complete
        the run if nothing is left to do (QUE-6), as ``failed_as`` if a step failed or a request stayed
        behind. With ``owner``, that owner must have started the attempt. On a terminal run only the outcome
        is recorded. Repeating the call records nothing again and settles what is missing.

        Raises, in this order: RunNotFoundError, StepNotFoundError, StaleAttemptError, ClaimLostError,
        StepAlreadyCompletedError for an attempt that was closed with a different outcome.
        """
        return self._thread.call(
            self._store.advance_run,
            run_id,
            step_key,
            status,
            attempt=attempt,
            owner=owner,
            output_json=output_json,
            error_message=error_message,
            dispatch=dispatch,
            complete_as=complete_as,
            failed_as=failed_as,
        )

    def advance_runs(self, steps: Sequence[EndedStep]) -> Sequence[RunAdvance | FlowStoreError]:
        """End up to 1,000 steps, each as advance_run does; their results in the same order (QUE-4).

        The result of a step is an error where advance_run would raise RunNotFoundError, StepNotFoundError,
        StaleAttemptError, ClaimLostError or StepAlreadyCompletedError. Each step is ended alone, in its own
        atomic change; steps of one run take effect in their order. So one error affects no other step.

        A cancelled call, or one that raises an error, has ended any of the steps. Repeating it is safe.
        """
        return self._thread.call(self._store.advance_runs, steps)

    def redispatch_step(
        self,
        run_id: UUID,
        step_key: str,
        *,
        queue: str | None = None,
        priority: int | None = None,
        due_at: datetime | None = None,
    ) -> bool:
        """Replace the dispatch of a queued step, for example to move it to another queue (QUE-7).

        None keeps a value of the old dispatch. False, and nothing changes, if the step is not queued, is
        terminal or has a live claim, or if its run is not Running. Atomic.
        """
        return self._thread.call(
            self._store.redispatch_step, run_id, step_key, queue=queue, priority=priority, due_at=due_at
        )

    def get_queues(self) -> Sequence[QueueStatistics]:
        """The numbers of queued steps that are not terminal, by queue, from one snapshot (QUE-8)."""
        return self._thread.call(self._store.get_queues)

    def wait_for_steps(self, queues: Collection[str], *, timeout: timedelta) -> bool:
        """Wait until a step of these queues may be ready; False at the time-out (WAT-1).

        True at once if one is ready, and when one becomes ready by a commit of any process or as time
        passes. True may be wrong, and a wake-up may be missed when a process dies or a connection breaks,
        so call claim_next_steps in either case, and pause after True and an empty claim. ``timeout`` is
        real time, more than 0 and at most an hour. A store waits with one connection or thread, however many
        calls wait (WAT-2).
        """
        return self._thread.call(self._store.wait_for_steps, queues, timeout=timeout)

    def wait_for_run(self, run_id: UUID, *, timeout: timedelta) -> RunStatus | None:
        """Wait until a run has ended, and return its terminal status; None at the time-out (WAT-1).

        None at once for an unknown run, and as soon as the run is deleted.
        """
        return self._thread.call(self._store.wait_for_run, run_id, timeout=timeout)

    def configure_run(
        self,
        run_id: UUID,
        flow_id: UUID,
        trigger_key: str,
        *,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
    ) -> None:
        """Create or overwrite the control record, None included (CTL-1).

        Keeps created_at and both latches. Registers no key. May be called before start_run.
        """
        return self._thread.call(
            self._store.configure_run,
            run_id,
            flow_id,
            trigger_key,
            idempotency_key=idempotency_key,
            timeout_at=timeout_at,
        )

    def get_run_control(self, run_id: UUID) -> FlowRunControlRecord | None:
        """The control record; None if there is none."""
        return self._thread.call(self._store.get_run_control, run_id)

    def get_run_controls(self, run_ids: Collection[UUID]) -> Mapping[UUID, FlowRunControlRecord]:
        """The control records of several runs, at one moment, by run_id, read-only (CTL-1).

        At most 1,000 ids in a call. A run without a control record is left out; the others have the order of
        ``run_ids``.
        """
        return self._thread.call(self._store.get_run_controls, run_ids)

    def request_cancel(self, run_id: UUID, reason: str | None = None) -> bool:
        """Set the user's cancel latch; True for the one call that set it (CTL-2).

        Creates the control record if only the run exists; False if neither exists.
        """
        return self._thread.call(self._store.request_cancel, run_id, reason)

    def mark_timed_out(
        self, run_id: UUID, reason: str | None = None, *, as_of: datetime | None = None
    ) -> bool:
        """Set the time-out latch; True for the one call that set it (CTL-2).

        With ``as_of``, only if timeout_at <= as_of. False if there is no control record.
        """
        return self._thread.call(self._store.mark_timed_out, run_id, reason, as_of=as_of)

    def get_runs_to_stop(self, *, as_of: datetime | None = None, take: int = 100) -> Sequence[FlowRunRecord]:
        """Running runs whose deadline has passed or whose cancellation was requested (CTL-3).

        A deadline has passed if it is at or before ``as_of`` (None: the store's now), latched or not.
        Ordered by (timeout_at, run_id), runs without a deadline last.
        """
        return self._thread.call(self._store.get_runs_to_stop, as_of=as_of, take=take)

    def extend_deadline(self, run_id: UUID, timeout_at: datetime) -> bool:
        """Set a new deadline, clear the time-out latch and keep a user's cancel (CTL-3).

        False if there is no control record.
        """
        return self._thread.call(self._store.extend_deadline, run_id, timeout_at)

    def find_run_id_by_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str
    ) -> UUID | None:
        """The run_id that the key is registered for; None if the key is free."""
        return self._thread.call(
            self._store.find_run_id_by_idempotency_key, flow_id, trigger_key, idempotency_key
        )

    def try_register_idempotency_key(
        self, flow_id: UUID, trigger_key: str, idempotency_key: str, run_id: UUID
    ) -> bool:
        """Register the key; exactly one of all concurrent run_ids wins, also when repeated (IDM-2)."""
        return self._thread.call(
            self._store.try_register_idempotency_key, flow_id, trigger_key, idempotency_key, run_id
        )

    def trigger_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
        tags: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        timeout_at: datetime | None = None,
        dispatch: Sequence[StepRequest] = (),
    ) -> TriggerResult:
        """Register the key and store the control record and the run, all or nothing (IDM-3).

        With ``dispatch`` (capability QUEUES) the same transaction dispatches these steps of the new run.
        A registered key returns its run and created=False. If that run never started, it is started under
        the registered run_id, with created=True: no crash leaves a key that blocks its triggers. With
        created=True the run has ``tags`` (capability TAGS); with created=False they are ignored (TAG-1).

        Raises RunAlreadyExistsError, registering nothing, if run_id exists and the key is new or absent.
        """
        return self._thread.call(
            self._store.trigger_run,
            flow_id,
            flow_name,
            run_id,
            trigger_key,
            trigger_data=trigger_data,
            job_id=job_id,
            source_run_id=source_run_id,
            tags=tags,
            idempotency_key=idempotency_key,
            timeout_at=timeout_at,
            dispatch=dispatch,
        )

    def register_waiter(
        self,
        run_id: UUID,
        step_key: str,
        signal_name: str,
        *,
        expires_at: datetime | None = None,
    ) -> None:
        """Register a step as waiting for a signal (SIG-1).

        Repeated on the same key, it updates signal_name and expires_at and keeps created_at and any
        delivered payload. Allowed on a terminal run (RUN-4). A waiter that is new, or gets another
        signal_name, takes the oldest buffered payload of that name in the same transaction (MBX-1);
        get_waiter then shows it as delivered.

        Raises RunNotFoundError; ConflictError if a delivered waiter has a different signal_name, or if the
        waiter is expired: remove it first.
        """
        return self._thread.call(
            self._store.register_waiter, run_id, step_key, signal_name, expires_at=expires_at
        )

    def deliver_signal(
        self,
        run_id: UUID,
        signal_name: str,
        payload_json: str,
        *,
        delivery_id: str | None = None,
        buffer: bool = False,
    ) -> SignalDeliveryResult:
        """Deliver the payload to the oldest waiter that is neither delivered nor expired (SIG-2).

        Oldest by created_at, then step_key; exactly one delivery per waiter. If only delivered waiters are
        left, the result is ALREADY_DELIVERED and names the oldest of them. NOT_FOUND only if no waiter
        matches at that moment; on a terminal run an undelivered waiter does not match, and nothing changes
        (SIG-3). A ``delivery_id`` that was DELIVERED returns the first result again as long as the run is
        stored, also on a terminal run.

        With ``buffer`` (MAILBOX), a Running run without such a waiter keeps the payload for the next waiter
        of the name, first in, first out: the result is BUFFERED (MBX-1). The delivery_id is remembered as for
        DELIVERED; without one, a repeated call buffers another payload (MBX-2).

        Raises ConflictError, changing nothing, if the run has 1,000 buffered payloads.
        """
        return self._thread.call(
            self._store.deliver_signal,
            run_id,
            signal_name,
            payload_json,
            delivery_id=delivery_id,
            buffer=buffer,
        )

    def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """The waiter of a step; None if there is none."""
        return self._thread.call(self._store.get_waiter, run_id, step_key)

    def remove_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Remove the waiter and return it with its payload; None if there was none (SIG-4)."""
        return self._thread.call(self._store.remove_waiter, run_id, step_key)

    def expire_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        """Close an undelivered waiter whose expires_at has passed, and return its new state (SIG-4).

        A waiter is either delivered or expired, permanently. A waiter that is not due is returned
        unchanged; None if there is none.
        """
        return self._thread.call(self._store.expire_waiter, run_id, step_key)

    def get_waiters(self, run_id: UUID) -> Sequence[FlowSignalWaiter]:
        """The waiters of a run, ordered by step_key."""
        return self._thread.call(self._store.get_waiters, run_id)

    def get_buffered_signals(self, run_id: UUID) -> Sequence[BufferedSignal]:
        """The payloads that no waiter has taken, in the order in which they were buffered (MBX-1)."""
        return self._thread.call(self._store.get_buffered_signals, run_id)

    def save_output(self, run_id: UUID, key: str, value_json: str) -> None:
        """Store a value under a key; the last write wins. Raises RunNotFoundError."""
        return self._thread.call(self._store.save_output, run_id, key, value_json)

    def save_outputs(self, run_id: UUID, outputs: Mapping[str, str]) -> None:
        """Store several values, by key, in one transaction: readers see all of them or none.

        As save_output for each. At most 1,000 keys, and 16 MiB of UTF-8 in all values together. Raises
        RunNotFoundError, also without outputs.
        """
        return self._thread.call(self._store.save_outputs, run_id, outputs)

    def get_output(self, run_id: UUID, key: str) -> str | None:
        """The value, unchanged; None if there is none."""
        return self._thread.call(self._store.get_output, run_id, key)

    def get_outputs(
        self, run_id: UUID, *, prefix: str = "", after: str | None = None, take: int | None = None
    ) -> Mapping[str, str]:
        """The outputs of a run, read-only, ordered by key; empty for an unknown run.

        Only those whose key begins with ``prefix`` and comes after ``after``, and the first ``take`` of them
        (None: all). The last key of a page is the ``after`` of the next.
        """
        return self._thread.call(self._store.get_outputs, run_id, prefix=prefix, after=after, take=take)

    def delete_outputs(self, run_id: UUID, *, prefix: str) -> int:
        """Delete the outputs whose key begins with ``prefix``, atomically, and return their number.

        ``""`` is a prefix of every key. 0 for an unknown run. Allowed on a terminal run.
        """
        return self._thread.call(self._store.delete_outputs, run_id, prefix=prefix)

    def append_event(
        self,
        run_id: UUID,
        event_type: str,
        *,
        step_key: str | None = None,
        message: str | None = None,
    ) -> int:
        """Append an event and return its sequence. Raises RunNotFoundError.

        An event never appears before one that was already read, so paging with ``after`` of
        get_run_events misses none.
        """
        return self._thread.call(
            self._store.append_event, run_id, event_type, step_key=step_key, message=message
        )

    def get_run_events(self, run_id: UUID, *, after: int = 0, take: int = 200) -> Sequence[FlowEventRecord]:
        """The events with sequence > ``after``, ordered by sequence, at most ``take``."""
        return self._thread.call(self._store.get_run_events, run_id, after=after, take=take)

    def export_run(self, run_id: UUID) -> RunArchive | None:
        """Everything that belongs to a run, from one snapshot; None if it is not stored (XFR-2).

        Changes nothing. In the archive, claims on steps that are not terminal end now. The archive holds the
        whole run in memory.
        """
        return self._thread.call(self._store.export_run, run_id)

    def import_run(self, archive: RunArchive) -> bool:
        """Store the run of an archive; True for the one call that did (XFR-3).

        False, changing nothing, if the same run is stored already. Afterwards every operation gives what it
        would have given in the exporting store (XFR-1). Atomic. Replaces a control record and keys of this
        run_id whose run never started.

        Raises InvalidArgumentError for an archive that no operations could have made (XFR-4);
        RunAlreadyExistsError if a different run has the id; ConflictError if one of the keys is registered to
        another run.
        """
        return self._thread.call(self._store.import_run, archive)

    def cleanup(self, cutoff: datetime) -> int:
        """Delete the runs completed strictly before ``cutoff`` and return their number.

        Deletes the steps, attempts, outputs, events, tags, claims, dispatches, controls, idempotency keys
        and waiters of each run with it (RET-1). Never touches a Running run (RET-2). Works in bounded
        batches, atomic per run: an interrupted cleanup, or one that raises, has deleted whole runs only
        (RET-3). Also deletes keys and control records older than ``cutoff`` and than one hour whose run never
        started; these are not counted (RET-4).
        """
        return self._thread.call(self._store.cleanup, cutoff)

    def delete_run(self, run_id: UUID) -> bool:
        """Delete a terminal run with everything that belongs to it; True for the one call that did (RET-5).

        False if no run with this id is stored. Atomic: a read shows all of the run or nothing. Runs derived
        from it stay, as do a control record and keys whose run never started.

        Raises RunNotCompletedError, changing nothing, for a Running run.
        """
        return self._thread.call(self._store.delete_run, run_id)

    def get_statistics(self, *, as_of: datetime | None = None) -> DashboardStatistics:
        """Count flows and runs; "today" is the UTC day of ``as_of`` (None: the store's now) (QRY-4)."""
        return self._thread.call(self._store.get_statistics, as_of=as_of)

    def get_run_timeseries(
        self,
        granularity: RunTimeseriesGranularity | str,
        since: datetime,
        until: datetime,
        flow_id: UUID | None = None,
    ) -> Sequence[RunTimeseriesBucket]:
        """Contiguous whole buckets from floor(since) to ceil(until), including empty ones (QRY-5).

        A run counts in the bucket of its started_at. No buckets if since == until. Backends get both bounds
        aligned to the bucket.
        """
        return self._thread.call(self._store.get_run_timeseries, granularity, since, until, flow_id)
