"""The clauses of the contract: a sentence for each and the capability that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from flowstore_core import CRASH_SAFE, PROPERTIES, Capability


class Level(StrEnum):
    """A conformance level, granted if every required clause ran and passed."""

    BASE = "base"
    CRASH_SAFE = "crash-safe"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One clause of the contract."""

    id: str
    sentence: str
    needs: Capability | None = None
    """The capability without which the clause does not apply."""

    @property
    def level(self) -> Level:
        """The lowest level that requires the clause."""
        if self.needs is None or self.needs in PROPERTIES:
            return Level.BASE
        return Level.CRASH_SAFE if self.needs in CRASH_SAFE else Level.FULL


def _clause(id: str, sentence: str, needs: Capability | None = None) -> Clause:  # noqa: A002
    return Clause(id=id, sentence=sentence, needs=needs)


CLAUSES: dict[str, Clause] = {
    clause.id: clause
    for clause in (
        _clause("INP-1", "Ids are UUIDs; keys and names have 1 to 256 characters, job ids 1 to 1,024."),
        _clause("INP-2", "Text round-trips exactly; U+0000, lone surrogates and longer texts are refused."),
        _clause("INP-3", "Datetimes are aware and within range; any zone is accepted and normalised."),
        _clause(
            "INP-4", "Wrong types and values outside their limits raise an error that names the argument."
        ),
        _clause(
            "LIM-1", "Texts, keys and pages at their declared limits are stored whole, longer ones refused."
        ),
        _clause(
            "LIM-2", "Beyond its declared steps or bytes a run takes a call whole, or LimitExceededError."
        ),
        _clause(
            "CLK-1",
            "Once a time has passed for one process it has for all, however wrong their clocks are.",
            Capability.SHARED_CLOCK,
        ),
        _clause("UNK", "Writing an unknown run raises RunNotFoundError; reads are empty, latches False."),
        _clause("RUN-1", "start_run stores a Running run; an id that exists is refused and nothing changes."),
        _clause(
            "RUN-2",
            "The first terminal status wins; with expected, only if the steps are exactly as expected.",
        ),
        _clause("RUN-3", "A returned record is a snapshot; later operations never change it."),
        _clause(
            "RUN-4",
            "A terminal run accepts no claim, dispatch, start or delivery; closing stays allowed.",
        ),
        _clause(
            "TAG-1",
            "A run keeps the tags that start_run or trigger_run gave it; records order them by key.",
            Capability.TAGS,
        ),
        _clause(
            "TAG-2",
            "set_tags merges atomically, removes with None, and refuses more than 32 tags.",
            Capability.TAGS,
        ),
        _clause(
            "TAG-3",
            "With tags, a list has exactly the runs with all of these tags, in the order of QRY-1.",
            Capability.TAGS,
        ),
        _clause(
            "STP-1", "Attempts are numbered 1, 2, ... without gaps; at most one is open, and it is the last."
        ),
        _clause("STP-2", "A Succeeded or Skipped step does not start again; a Failed or Pending one may."),
        _clause(
            "STP-3", "With owner, starting needs that owner's unexpired claim, and is repeatable under it."
        ),
        _clause("STP-4", "Completing closes the last attempt and the step alike; a stale result is refused."),
        _clause("STP-5", "A skip is one attempt that starts and ends Skipped, taking the claim with owner."),
        _clause(
            "STP-6",
            "retry_step atomically reopens the step and its run, and resets the skipped keys of reset.",
        ),
        _clause(
            "STP-7",
            "reschedule_step atomically closes the attempt, removes the claim and dispatches anew.",
            Capability.RECOVERY,
        ),
        _clause(
            "STP-8",
            "get_stalled_steps lists exactly the work that nothing else will resume.",
            Capability.RECOVERY,
        ),
        _clause(
            "CLM-1", "Of any number of claimants, or dispatchers, exactly one wins until it is released."
        ),
        _clause("CLM-2", "The effect of a returned operation is visible to every later read by any client."),
        _clause("CLM-3", "Releasing is idempotent, frees that key alone, and lets the next attempt win."),
        _clause("CLM-4", "A terminal step keeps its claim, which does not expire."),
        _clause("CLM-5", "The owner of a live claim gets True again; every other caller gets False."),
        _clause(
            "CLM-6", "A lease ends on time; renewing extends it, and never shortens it.", Capability.LEASES
        ),
        _clause(
            "CLM-7", "annotate_dispatch stores a job id on an existing record; a missing record is no error."
        ),
        _clause(
            "CLM-8",
            "try_start_step claims a step and starts its attempt at once; repeated, it gives its number.",
            Capability.LEASES,
        ),
        _clause(
            "QUE-1",
            "claim_next_steps claims and starts ready steps; of concurrent callers at most one gets a step.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-2",
            "Steps come by priority, then ready_at, run_id, step_key; none that is ready and free is missed.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-3",
            "A repeated call claims nothing more; a cancelled one gives its claims back.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-4",
            "advance_run records an outcome and settles its requests, in one transaction, each exactly once.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-5",
            "Whether a step is ready depends on the state and on now, whichever operations made the state.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-6",
            "With complete_as, the advance that leaves nothing to do also completes the run.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-7",
            "A dispatch keeps its queue, priority and input; redispatch_step replaces it.",
            Capability.QUEUES,
        ),
        _clause(
            "QUE-8",
            "get_queues counts each queued open step once: ready, scheduled, waiting or running.",
            Capability.QUEUES,
        ),
        _clause(
            "WAT-1",
            "Commits of any store and the passing of time wake the calls that wait for steps or runs.",
            Capability.WATCH,
        ),
        _clause(
            "WAT-2",
            "Waiting calls share one thread or connection; cancelling and closing leave nothing behind.",
            Capability.WATCH,
        ),
        _clause(
            "CTL-1", "configure_run overwrites, keeps created_at and both latches, and registers no key."
        ),
        _clause(
            "CTL-2", "Each latch returns True to the one call that sets it; a user's reason takes precedence."
        ),
        _clause(
            "CTL-3",
            "Runs to stop are listed in order; extending a deadline clears the time-out.",
            Capability.DEADLINES,
        ),
        _clause("IDM-1", "An idempotency key is scoped by flow and trigger and compared exactly."),
        _clause("IDM-2", "Of many registrations of a key one run id wins; find returns it to every caller."),
        _clause(
            "IDM-3",
            "trigger_run registers key, control record and run in one transaction.",
            Capability.TRIGGER,
        ),
        _clause("IDM-4", "Deleting a run ends its deduplication."),
        _clause("SIG-1", "A waiter may be registered again; an expired one must be removed first."),
        _clause("SIG-2", "A payload goes to the oldest open waiter, exactly once."),
        _clause("SIG-3", "While the run is Running, a waiter that exists throughout never yields NOT_FOUND."),
        _clause("SIG-4", "A waiter ends either delivered or expired, permanently.", Capability.WAITERS),
        _clause(
            "MBX-1",
            "A signal without an open waiter is buffered; the next waiter of its name takes it, once.",
            Capability.MAILBOX,
        ),
        _clause(
            "MBX-2",
            "The delivery_id of a buffered signal is remembered; a run buffers at most 1,000.",
            Capability.MAILBOX,
        ),
        _clause(
            "RET-1", "cleanup deletes runs completed before the cutoff and everything that belongs to them."
        ),
        _clause(
            "RET-2", "Running runs are never deleted; a run reopened meanwhile is kept or deleted whole."
        ),
        _clause("RET-3", "cleanup is atomic per run, and does not block writers for long."),
        _clause("RET-4", "Old keys and control records whose run never started are deleted."),
        _clause(
            "RET-5",
            "delete_run deletes one terminal run whole, at one moment, and refuses a Running one.",
            Capability.DELETION,
        ),
        _clause("XFR-1", "An imported run is the same in every read and operation.", Capability.TRANSFER),
        _clause(
            "XFR-2",
            "An export is everything of a run, from one snapshot, with open claims ended.",
            Capability.TRANSFER,
        ),
        _clause(
            "XFR-3",
            "An import is atomic, happens once, and replaces no run and no key of another.",
            Capability.TRANSFER,
        ),
        _clause("XFR-4", "An impossible archive is refused; a version stays readable.", Capability.TRANSFER),
        _clause(
            "QRY-1", "Runs are ordered by started_at and run_id, descending: pages neither repeat nor skip."
        ),
        _clause(
            "QRY-2", "search is a plain substring match that folds only ASCII letters.", Capability.DASHBOARD
        ),
        _clause("QRY-3", "A page and its count, a run and its steps, come from one snapshot."),
        _clause(
            "QRY-4",
            "Statistics count flows, active runs and the completions of a UTC day.",
            Capability.DASHBOARD,
        ),
        _clause(
            "QRY-5",
            "A timeseries has whole, contiguous buckets and type 7 percentiles.",
            Capability.DASHBOARD,
        ),
        _clause("QRY-6", "Active and derived runs come in the order of QRY-1; derived is one generation."),
        _clause(
            "EVT-1",
            "No event ever appears with a sequence below one that was already read.",
            Capability.EVENTS,
        ),
        _clause(
            "EVT-2",
            "The last write of an output key wins; prefixes and pages of keys are exact.",
            Capability.OUTPUTS,
        ),
        _clause("CON-1", "All of one run's state is one linearizable object."),
        _clause("CON-2", "No driver exception ever surfaces."),
        _clause(
            "CON-3", "A lost acknowledgement is resolved by probing the database, else OutcomeUnknownError."
        ),
        _clause("CON-4", "A cancelled call has happened entirely or not at all, and leaks nothing."),
        _clause(
            "CON-5", "The effect of every returned call survives kill -9 of the client.", Capability.DURABLE
        ),
        _clause(
            "CON-6",
            "Opening many times at once migrates once and keeps all data; a wrong schema version is refused.",
        ),
    )
}
"""The clauses by id, in the order of the contract."""
