"""Mutants of queues: claims of the next steps, advances of runs, requests, statistics."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any
from uuid import UUID

from flowstore_core import Capability, FlowStoreError, RunAdvance, RunStatus, StepRequest, StepStatus
from flowstore_core.claims import lease_end
from flowstore_core.status import TERMINAL_STEP_STATUSES
from flowstore_memory.queue_index import index_step, ready_at, take_ready_steps
from flowstore_memory.queues import _is_finished
from flowstore_memory.store import CAPABILITIES
from tests.mutants import mutant

EVERY_END = frozenset(TERMINAL_STEP_STATUSES)


def _ready(store: Any, queues: Any) -> list[Any]:
    """The run, key and state of every ready step of some queues; they stay in the index."""
    found = list(take_ready_steps(store._namespace, queues, store._now()))
    for run, key, step in found:
        index_step(store._namespace, run, key, step)
    return found


def _claim(store: Any, steps: Iterable[Any], given: Any) -> tuple[Any, ...]:
    """Claim these steps, whatever their state."""
    now = store._now()
    expires_at = lease_end(now, given["lease"])
    return tuple(store._claim(run, key, step, expires_at, given["worker"], now) for run, key, step in steps)


def _forget(store: Any, run_id: Any, step_key: str | None = None) -> None:
    """Remove the steps of a run, or one of them, from the index, which does not notice."""
    for heap in store._namespace.queue_index.values():
        heap[:] = [
            entry
            for entry in heap
            if entry.run_id != run_id or (step_key is not None and entry.step_key != step_key)
        ]
    for level in [level for level, heap in store._namespace.queue_index.items() if not heap]:
        del store._namespace.queue_index[level]


def _statuses(store: Any, run_id: Any) -> dict[str, StepStatus]:
    run = store._runs.get(run_id.int)
    steps = {} if run is None else run.steps
    return {key: step.status for key, step in steps.items() if step.status in TERMINAL_STEP_STATUSES}


# QUE-1


@mutant("memory", "QUE-1")
class WorkerNameAsOwner:
    """Claims queued steps for the name of the worker instead of a new token."""

    async def claim_next_steps(self, **given: Any) -> Any:
        owner = given.get("worker") or "worker"
        claimed = await super().claim_next_steps(**given)
        for each in claimed:
            step = self._runs[each.run_id.int].steps[each.step_key]
            step.owner = step.started_owner = owner
        return tuple(replace(each, owner=owner) for each in claimed)


@mutant("memory", "QUE-1", concurrent=True)
class NextStepsReadThenClaimed:
    """Reads the ready steps in one transaction and claims them in the next: two callers get one step."""

    async def claim_next_steps(self, **given: Any) -> Any:
        chosen = _ready(self, given["queues"])[: given["limit"]]
        await asyncio.sleep(0)
        return _claim(self, chosen, given)


@mutant("memory", "QUE-1")
class StepsOfCancelledRunsHidden:
    """Hides the steps of runs whose cancel is requested, so that no compensation runs."""

    async def claim_next_steps(self, **given: Any) -> Any:
        controls = self._namespace.controls
        chosen = [
            found
            for found in _ready(self, given["queues"])
            if (control := controls.get(found[0].run_id)) is None or not control.is_stopped
        ]
        return _claim(self, chosen[: given["limit"]], given)


@mutant("memory", "QUE-1")
class OpenAttemptHoldsQueuedStep:
    """Regards a Running step as taken, although no claim protects its attempt."""

    async def claim_next_steps(self, **given: Any) -> Any:
        ready = _ready(self, given["queues"])
        chosen = [found for found in ready if found[2].status is not StepStatus.RUNNING or found[2].owner]
        return _claim(self, chosen[: given["limit"]], given)


@mutant("memory", "QUE-1")
class StartedOwnerNotKept:
    """Does not record that the owner of the claim started the attempt."""

    async def claim_next_steps(self, **given: Any) -> Any:
        claimed = await super().claim_next_steps(**given)
        for each in claimed:
            self._runs[each.run_id.int].steps[each.step_key].started_owner = None
        return claimed


# QUE-2


@mutant("memory", "QUE-2")
class OldestStepFirst:
    """Orders queued steps by time alone; the priority is ignored."""

    async def claim_next_steps(self, **given: Any) -> Any:
        ready = _ready(self, given["queues"])
        ready.sort(key=lambda found: (ready_at(found[2], found[0].waiters.get(found[1])), found[0].run_id))
        return _claim(self, ready[: given["limit"]], given)


@mutant("memory", "QUE-2")
class QueueByQueue:
    """Takes everything from the first queue before it looks at the next."""

    async def claim_next_steps(self, **given: Any) -> Any:
        claimed: list[Any] = []
        for queue in given["queues"]:
            if left := given["limit"] - len(claimed):
                claimed += await super().claim_next_steps(**{**given, "queues": (queue,), "limit": left})
        return tuple(claimed)


@mutant("memory", "QUE-2")
class FirstPageOfSleepers:
    """Reads the first 100 steps of the highest priorities, due or not, and claims the ready ones of them."""

    async def claim_next_steps(self, **given: Any) -> Any:
        queued = [
            (-step.queued.priority, step.due_at or step.dispatched_at, run.run_id, key)
            for run in self._runs.values()
            for key, step in run.steps.items()
            if step.queued is not None and step.queued.queue in given["queues"]
        ]
        page = {(run_id, key) for _, _, run_id, key in sorted(queued)[:100]}
        chosen = [found for found in _ready(self, given["queues"]) if (found[0].run_id, found[1]) in page]
        return _claim(self, chosen[: given["limit"]], given)


@mutant("memory", "QUE-2", concurrent=True)
class OneClaimAtATime:
    """Returns nothing while another call of claim_next_steps holds an advisory lock."""

    _is_claiming = False

    async def claim_next_steps(self, **given: Any) -> Any:
        if self._is_claiming:
            return ()
        self._is_claiming = True
        try:
            await asyncio.sleep(0)
            return await super().claim_next_steps(**given)
        finally:
            self._is_claiming = False


@mutant("memory", "QUE-2", concurrent=True)
class SkippedCandidatesNotReplaced:
    """Chooses ``limit`` candidates, drops those that another call has claimed, and looks for no others."""

    async def claim_next_steps(self, **given: Any) -> Any:
        chosen = _ready(self, given["queues"])[: given["limit"]]
        await asyncio.sleep(0)
        now = self._now()
        free = [found for found in chosen if not found[2].has_live_claim(now)]
        return _claim(self, free, given)


# QUE-3


@mutant("memory", "QUE-3")
class CancelledClaimKeepsItsSteps:
    """A call that is cancelled after its commit leaves its claims to their leases."""

    async def claim_next_steps(self, **given: Any) -> Any:
        claimed = await super().claim_next_steps(**given)
        await asyncio.sleep(0)
        return claimed


# QUE-4


@mutant("memory", "QUE-4", concurrent=True)
class JoinReadsAnOldSnapshot:
    """Reads the other steps before it locks the run: two parents that end at once see each other open."""

    async def advance_run(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        steps = {} if run is None else run.steps
        still_open = {key for key, step in steps.items() if step.status is StepStatus.RUNNING}
        still_open.discard(given["step_key"])
        await asyncio.sleep(0)
        requests = [each for each in given["dispatch"] if not still_open & set(each.after)]
        return await super().advance_run(**{**given, "dispatch": requests})


@mutant("memory", "QUE-4")
class RequestsSeeNoSkips:
    """Settles all requests by the state before them: a skip does not spread in one call."""

    async def advance_run(self, **given: Any) -> Any:
        asked = {each.step_key for each in given["dispatch"]}
        ended = _statuses(self, given["run_id"])
        requests = [each for each in given["dispatch"] if not (set(each.after) & asked - set(ended))]
        return await super().advance_run(**{**given, "dispatch": requests})


@mutant("memory", "QUE-4")
class UnmetRequestsDropped:
    """Drops a request whose condition is not met, instead of skipping its step."""

    async def advance_run(self, **given: Any) -> Any:
        ends = {**_statuses(self, given["run_id"]), given["step_key"]: given["status"]}
        requests = [
            each
            for each in given["dispatch"]
            if not set(each.after) <= set(ends) or all(ends[key] in each.accept for key in each.after)
        ]
        return await super().advance_run(**{**given, "dispatch": requests})


@mutant("memory", "QUE-4")
class OneAcceptedParentIsEnough:
    """Dispatches a step if the status of one of the steps before it is accepted."""

    async def advance_run(self, **given: Any) -> Any:
        ends = {**_statuses(self, given["run_id"]), given["step_key"]: given["status"]}
        requests = [
            replace(each, accept=EVERY_END)
            if any(ends.get(key) in each.accept for key in each.after)
            else each
            for each in given["dispatch"]
        ]
        return await super().advance_run(**{**given, "dispatch": requests})


@mutant("memory", "QUE-4")
class AttemptNumberFencesAlone:
    """Ignores the owner: the worker of a deleted run may end the attempt of its successor."""

    async def advance_run(self, **given: Any) -> Any:
        return await super().advance_run(**{**given, "owner": None})


@mutant("memory", "QUE-4")
class HolderMayAdvance:
    """Accepts the holder of the claim, although it has not started the attempt."""

    async def advance_run(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is not None and step.owner == given["owner"]:
            given["owner"] = None
        return await super().advance_run(**given)


@mutant("memory", "QUE-4")
class RepeatedAdvanceIsANoOp:
    """Does nothing for an attempt that has ended, so a dispatch that was lost stays lost."""

    async def advance_run(self, **given: Any) -> Any:
        run = self._runs[given["run_id"].int]
        step = run.steps.get(given["step_key"])
        had_ended = step is not None and step.status in TERMINAL_STEP_STATUSES
        more = {"dispatch": (), "complete_as": None} if had_ended else {}
        return await super().advance_run(**{**given, **more})


@mutant("memory", "QUE-4")
class AdvanceDispatchesInEndedRuns:
    """Settles requests on a terminal run too."""

    async def advance_run(self, **given: Any) -> Any:
        run = self._runs[given["run_id"].int]
        status, run.status = run.status, RunStatus.RUNNING
        try:
            return await super().advance_run(
                **given if status is RunStatus.RUNNING else {**given, "complete_as": None}
            )
        finally:
            if status is not RunStatus.RUNNING:
                run.status = status


# QUE-5


@mutant("memory", "QUE-5")
class ReopenedRunStaysUnindexed:
    """Removes the queued steps of a run that ends from the index, and does not restore them."""

    async def retry_step(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        was_terminal = run.status is not RunStatus.RUNNING
        await super().retry_step(**given)
        if was_terminal:
            _forget(self, run.run_id)


@mutant("memory", "QUE-5")
class RemovedWaiterWakesNobody:
    """Removes a waiter without making its step ready."""

    async def remove_waiter(self, **given: Any) -> Any:
        removed = await super().remove_waiter(**given)
        _forget(self, given["run_id"], given["step_key"])
        return removed


@mutant("memory", "QUE-5")
class ReleasedClaimWakesNobody:
    """Releases a claim, but the index keeps the end of its lease."""

    async def release_step_claim(self, **given: Any) -> None:
        await super().release_step_claim(**given)
        _forget(self, given["run_id"], given["step_key"])


@mutant("memory", "QUE-4")
class AdvancesEndAtFirstError:
    """Ends no step after the first one with an error, and returns that error for the others."""

    async def advance_runs(self, **given: Any) -> Any:
        results: list[Any] = []
        for step in given["steps"]:
            if results and isinstance(results[-1], FlowStoreError):
                results.append(results[-1])
            else:
                results += await super().advance_runs(steps=[step])
        return tuple(results)


@mutant("memory", "QUE-4")
class AdvancesOfARunOutOfOrder:
    """Ends the last steps first."""

    async def advance_runs(self, **given: Any) -> Any:
        return (await super().advance_runs(steps=given["steps"][::-1]))[::-1]


@mutant("memory", "QUE-4")
class AdvancesRaiseTheFirstError:
    """Raises the error of a step, which hides the results of the others."""

    async def advance_runs(self, **given: Any) -> Any:
        results = await super().advance_runs(**given)
        for result in results:
            if isinstance(result, FlowStoreError):
                raise result
        return results


# QUE-6


@mutant("memory", "QUE-6")
class LastStepDecidesTheRun:
    """Completes the run by the status of the last step to end, whatever the others were."""

    async def advance_run(self, **given: Any) -> Any:
        if given["status"] is not StepStatus.FAILED:
            given["failed_as"] = None
        return await super().advance_run(**given)


@mutant("memory", "QUE-6")
class CompletesBesideDispatches:
    """Completes a run whose steps have all ended, although another key is dispatched or claimed."""

    async def advance_run(self, **given: Any) -> Any:
        done = await super().advance_run(**given)
        run = self._runs[given["run_id"].int]
        started = [step.status for step in run.steps.values() if step.status is not None]
        if given["complete_as"] and not done.run_completed and set(started) <= EVERY_END:
            completed = await self.complete_run(run_id=run.run_id, status=given["complete_as"])
            return RunAdvance(dispatched=done.dispatched, run_completed=completed)
        return done


@mutant("memory", "QUE-6", concurrent=True)
class CompletionInASecondTransaction:
    """Advances in one transaction and completes in the next, by the statuses that it read in the first."""

    async def advance_run(self, **given: Any) -> Any:
        complete_as, given["complete_as"] = given["complete_as"], None
        done = await super().advance_run(**given)
        run = self._runs[given["run_id"].int]
        if complete_as is None or not _is_finished(run, self._now()):
            return done
        failed = any(step.status is StepStatus.FAILED for step in run.steps.values())
        is_behind = any(each.step_key not in run.steps for each in given["dispatch"])
        await asyncio.sleep(0)
        status = given["failed_as"] or complete_as if failed or is_behind else complete_as
        completed = await self.complete_run(run_id=run.run_id, status=status)
        return RunAdvance(dispatched=done.dispatched, run_completed=completed)


# QUE-7


@mutant("memory", "QUE-7")
class SecondDispatchMovesTheStep:
    """Returns False for a second dispatch, but takes over its queue."""

    async def try_record_dispatch(self, **given: Any) -> Any:
        won = await super().try_record_dispatch(**given)
        step = self._runs[given["run_id"].int].steps.get(given["step_key"])
        if not won and given.get("queue") and step is not None and step.queued is not None:
            step.queued.queue = given["queue"]
        return won


@mutant("memory", "QUE-7")
class RedispatchDropsTheDueTime:
    """Regards due_at=None of redispatch_step as "at once" instead of as "unchanged"."""

    async def redispatch_step(self, **given: Any) -> Any:
        replaced = await super().redispatch_step(**given)
        if replaced and given["due_at"] is None:
            run = self._runs[given["run_id"].int]
            step = run.steps[given["step_key"]]
            step.due_at = None
            index_step(self._namespace, run, given["step_key"], step)
        return replaced


@mutant("memory", "QUE-7")
class RedispatchOfClaimedSteps:
    """Replaces the dispatch of a step although a worker has claimed it."""

    async def redispatch_step(self, **given: Any) -> Any:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is None:
            return False
        claim = step.claimed_at, step.owner, step.expires_at
        step.clear_claim()
        try:
            return await super().redispatch_step(**given)
        finally:
            step.claimed_at, step.owner, step.expires_at = claim


# QUE-8


@mutant("memory", "QUE-8")
class ClaimedStepsCountAsReady:
    """Counts claimed steps as ready too."""

    async def get_queues(self) -> Any:
        return tuple(replace(each, ready=each.ready + each.running) for each in await super().get_queues())


@mutant("memory", "QUE-8")
class EmptyQueuesListed:
    """Lists a queue as long as a step of it exists, also if every step has ended."""

    async def get_queues(self) -> Any:
        found = {each.queue: each for each in await super().get_queues()}
        for run in self._runs.values():
            for step in run.steps.values():
                if step.queued is not None and found:
                    first = next(iter(found.values()))
                    none = dict.fromkeys(("ready", "scheduled", "waiting", "running"), 0)
                    found.setdefault(
                        step.queued.queue,
                        replace(first, queue=step.queued.queue, oldest_ready_at=None, **none),
                    )
        return tuple(found[queue] for queue in sorted(found))


# The clauses of other operations


@mutant("memory", "CON-2")
class QueuesWithoutWaiters:
    """Declares QUEUES but not WAITERS, which it needs."""

    capabilities = CAPABILITIES - {Capability.WAITERS}


@mutant("memory", "STP-6")
class RetryDispatchesOnlyOnce:
    """Settles the requests of retry_step only where it reopens the step."""

    async def retry_step(self, **given: Any) -> None:
        run = self._runs.get(given["run_id"].int)
        step = None if run is None else run.steps.get(given["step_key"])
        if step is not None and step.reopened:
            given["dispatch"] = ()
        await super().retry_step(**given)


@mutant("memory", "STP-7")
class RescheduleLosesTheQueue:
    """Dispatches a rescheduled step anew without its queue, so no worker gets it."""

    async def reschedule_step(self, **given: Any) -> None:
        await super().reschedule_step(**given)
        self._runs[given["run_id"].int].steps[given["step_key"]].queued = None


@mutant("memory", "STP-7")
class FailureRetriedOnEndedRuns:
    """Reopens a step whose failed attempt is rescheduled although its run has ended."""

    async def reschedule_step(self, **given: Any) -> None:
        run = self._runs[given["run_id"].int]
        status, run.status = run.status, RunStatus.RUNNING
        try:
            if given.get("error_message") is None:
                run.status = status
            await super().reschedule_step(**given)
        finally:
            run.status = status


@mutant("memory", "STP-8")
class StallsBeforeTheDueTime:
    """Lists a step whose lease has ended although it is due, or waits, until later."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        at: datetime = given["as_of"] or self._now()
        hidden = []
        for run in self._runs.values():
            for step in run.steps.values():
                if step.expires_at is not None and step.expires_at <= at:
                    hidden.append((step, step.due_at))
                    step.due_at = step.expires_at if step.due_at is not None else None
        try:
            return await super().get_stalled_steps(**given)
        finally:
            for step, due_at in hidden:
                step.due_at = due_at


async def dispatch_one_by_one(store: Any, run_id: UUID, requests: Sequence[StepRequest]) -> None:
    """Dispatch each requested step in a transaction of its own."""
    for each in requests:
        await store.try_record_dispatch(
            run_id=run_id,
            step_key=each.step_key,
            queue=each.queue,
            priority=each.priority,
            step_type=each.step_type,
            input_json=each.input_json,
            due_at=each.due_at,
        )


@mutant("memory", "IDM-3")
class EveryTriggerDispatches:
    """Dispatches the requested steps also in a run that an earlier trigger started."""

    async def trigger_run(self, **given: Any) -> Any:
        result = await super().trigger_run(**given)
        if not result.created:
            await dispatch_one_by_one(self, result.run.run_id, given.get("dispatch", ()))
        return result
