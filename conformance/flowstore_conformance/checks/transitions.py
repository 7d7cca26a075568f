"""Every write on a step in every state: each result, and what reads then show, is compared with the model.

One run has a step for each pair of a state and a write. So a few reads show the effects of many writes, and a
store may make the calls of all steps in one batch. The keys are independent of each other, and none of the
calls ends or reopens the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import product
from typing import Any
from uuid import UUID

from flowstore_conformance.checks.fixtures import MINUTE, SECOND, TICK, require_clock
from flowstore_conformance.context import CheckContext
from flowstore_conformance.differential import CallSequence, ModelMismatch, shrink
from flowstore_conformance.history import Call
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import probe_calls
from flowstore_core import Capability, StepStatus

SHRINK_SECONDS = 6.0
STEPS_OF_A_RUN = 60
CLAUSES = (
    *("STP-1", "STP-2", "STP-3", "STP-4", "STP-5", "STP-6", "STP-7", "STP-8", "RUN-4", "UNK"),
    *("CLM-1", "CLM-3", "CLM-4", "CLM-5", "CLM-6", "CLM-7", "CLM-8", "SIG-1", "SIG-2", "SIG-3", "SIG-4"),
)
MOMENT = timedelta(seconds=20)
"""The time between the start of a run and the writes; the calls that make the states come before."""
NOW = timedelta(0)
PENDING, SUCCEEDED, FAILED, SKIPPED = (
    StepStatus.PENDING,
    StepStatus.SUCCEEDED,
    StepStatus.FAILED,
    StepStatus.SKIPPED,
)


@dataclass(frozen=True, slots=True)
class Move:
    """A call on a step without its run and key.

    ``{}`` in a text stands for the key. A timedelta is a time relative to the moment of the writes: as a
    lease, it says when the lease ends.
    """

    method: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def on(self, run_id: UUID, key: str, now: datetime, moment: datetime) -> Call:
        """The call, made at ``now``."""

        def resolve(name: str, value: Any) -> Any:
            match value:
                case timedelta():
                    return moment + value - now if name == "lease" else moment + value
                case str():
                    return value.replace("{}", key)
                case list():
                    return [resolve(name, one) for one in value]
            return value

        arguments = {"step_key": "{}", **self.arguments}
        if arguments["step_key"] is None:
            del arguments["step_key"]
        return Call(
            method=self.method,
            arguments={"run_id": run_id, **{name: resolve(name, value) for name, value in arguments.items()}},
        )


def _start(owner: str | None = None, **given: Any) -> Move:
    return Move("record_step_start", {"step_type": "http", "owner": owner, **given})


def _close(
    status: StepStatus, output: str | None = None, error: str | None = None, attempt: int | None = None
) -> Move:
    given = {"status": status, "output_json": output, "error_message": error, "attempt": attempt}
    return Move("record_step_complete", given)


def _skip(owner: str | None = None, reason: str | None = None, **given: Any) -> Move:
    return Move("record_skipped_step", {"step_type": "skip", "reason": reason, "owner": owner, **given})


def _claim(owner: str | None = "me", ends: timedelta | None = None) -> Move:
    return Move("try_claim_step", {"owner": owner, **({} if ends is None else {"lease": ends})})


def _claim_and_start(owner: str = "me", ends: timedelta = MINUTE, **given: Any) -> Move:
    return Move("try_start_step", {"step_type": "http", "owner": owner, "lease": ends, **given})


def _release(owner: str | None = None) -> Move:
    return Move("release_step_claim", {"owner": owner})


def _dispatch(due: timedelta | None = None) -> Move:
    return Move("try_record_dispatch", {"due_at": due})


def _retry(**given: Any) -> Move:
    return Move("retry_step", given)


def _reschedule(attempt: int = 1, **given: Any) -> Move:
    return Move("reschedule_step", {"attempt": attempt, **given})


def _wait(expires: timedelta | None = None, **given: Any) -> Move:
    return Move("register_waiter", {"signal_name": "{}", "expires_at": expires, **given})


def _deliver(delivery_id: str | None = None, **given: Any) -> Move:
    signal = {"signal_name": "{}", "payload_json": "{}", "delivery_id": delivery_id, "step_key": None}
    return Move("deliver_signal", {**signal, **given})


ANNOTATE = Move("annotate_dispatch", {"job_id": "job of {}"})
UNDISPATCH = Move("release_dispatch")
REMOVE_WAITER = Move("remove_waiter")
EXPIRE_WAITER = Move("expire_waiter")

_FAIL = (_start(), _close(FAILED, error="error"))
_UPSTREAM = Move("record_step_start", {"step_key": "{} upstream", "step_type": "http"})
_RESET = (_UPSTREAM, Move("retry_step", {"step_key": "{} upstream", "reset": ["{}"]}))
"""The step is reset by the retry of another one."""

STATES: Mapping[str, Sequence[Move]] = {
    "new": (),
    # Unstarted keys.
    "dispatched": (_dispatch(), ANNOTATE),
    "due": (_dispatch(NOW),),
    "claimed": (_claim(),),
    "claimed without owner": (_claim(None), _dispatch(-SECOND)),
    "leased": (_claim(ends=MINUTE), _dispatch()),
    "lease ends": (_claim(ends=NOW),),
    "lease ended": (_claim(ends=-TICK), _dispatch(MINUTE)),
    "released": (_dispatch(), _claim(), _release("me"), UNDISPATCH),
    # Open attempts.
    "running": (_start(input_json="in", job_id="job"),),
    "second attempt": (_start(), _start(input_json="in")),
    "after a failure": (*_FAIL, _start(job_id="job")),
    "running by me": (_dispatch(), _claim(), _start("me")),
    "running, leased": (_claim(ends=MINUTE), _start("me")),
    "claimed and started": (_claim_and_start(job_id="job"),),
    "claimed and started, lease ends": (_dispatch(), _claim_and_start(ends=NOW, input_json="in")),
    "claimed and started, pending": (_claim_and_start(), _close(PENDING, "1")),
    "running, lease ends": (_claim(ends=NOW), _start("me")),
    "running, claimed again": (_claim(), _start("me"), _release(), _claim()),
    "taken over": (_claim("two", ends=-10 * SECOND), _start("two"), *4 * (UNDISPATCH,), _claim(ends=MINUTE)),
    "started by others": (_claim(), _start("me"), _start()),
    # Closed attempts; outcomes with and without texts.
    "succeeded": (_start(), _close(SUCCEEDED, "1")),
    "succeeded without output": (_dispatch(), _claim(ends=NOW), _start("me"), _close(SUCCEEDED)),
    "succeeded with an empty output": (_start(), _close(SUCCEEDED, "", "")),
    "failed": (*_FAIL,),
    "failed without error": (_start(), _close(FAILED, "1")),
    "failed, lease ends": (_claim(ends=NOW), _start("me"), _close(FAILED)),
    "failed, lease ended": (_claim(ends=-TICK), _dispatch(), _start("me"), _close(FAILED, error="error")),
    "failed twice": (*_FAIL, _start(), _close(FAILED, "1")),
    "pending": (_start(), _close(PENDING, "1")),
    "pending without output": (_dispatch(NOW), _claim(), _start("me"), _close(PENDING)),
    "closed as skipped": (_start(), _close(SKIPPED, error="reason")),
    # Skipped steps.
    "skipped": (_skip(reason="reason"),),
    "skipped by me": (_skip("me", "reason"),),
    "skipped by me without reason": (_skip("me"),),
    "skipped under a lease": (_claim(ends=NOW), _skip("me", "")),
    "skipped after a failure": (*_FAIL, _skip("me", "reason")),
    # Rescheduled steps.
    "rescheduled": (_start(), _reschedule(output_json="1", due_at=NOW)),
    "rescheduled as closed": (_start(), _close(PENDING, "1"), _reschedule()),
    "rescheduled, claimed": (_start(), _reschedule(), _claim(), ANNOTATE),
    "rescheduled, undispatched": (_start(), _reschedule(), UNDISPATCH),
    "running after a reschedule": (_start(), _reschedule(), UNDISPATCH, _start()),
    "pending after a reschedule": (_start(), _reschedule(), UNDISPATCH, _start(), _close(PENDING, "2")),
    # Retried and reset steps.
    "retried": (*_FAIL, _dispatch(), _claim(), _retry()),
    "retried while running": (_claim(), _start("me"), _retry()),
    "retried, claimed": (*_FAIL, _retry(), _claim(ends=NOW), _dispatch()),
    "retried, running": (*_FAIL, _retry(), _start()),
    "retried, skipped": (*_FAIL, _retry(), _skip("me", "reason")),
    "reset": (*_FAIL, _skip("me", "reason"), *_RESET),
    "reset, dispatched": (_skip(reason="reason"), *_RESET, _dispatch(NOW)),
    "reset, claimed": (_skip("me", "reason"), *_RESET, _claim()),
    "reset, running": (_skip("me", "reason"), *_RESET, _start()),
    # Waiters.
    "waiting": (_start(), _close(PENDING), _wait()),
    "waiting until now": (_start(), _close(PENDING), _wait(NOW)),
    "waiting until later": (_dispatch(NOW), _wait(MINUTE)),
    "waiter changed": (_wait(NOW, signal_name="{} first"), _dispatch(), _wait()),
    "delivered": (_dispatch(), _wait(NOW), _deliver("{} 1")),
    "delivered, removed": (_wait(), _deliver("{} 1"), REMOVE_WAITER),
    "delivered, waiting again": (_wait(), _deliver("{} 1"), REMOVE_WAITER, _wait()),
    "delivered without id": (_start(), _wait(MINUTE), _deliver(payload_json="")),
    "expired": (_start(), _close(PENDING), _wait(-10 * SECOND), *8 * (UNDISPATCH,), EXPIRE_WAITER),
    "two waiters": (_wait(step_key="{} z"), _wait(), _wait(step_key="{} z")),
    "retried, waiting": (*_FAIL, _wait(), _retry(), _wait()),
}
"""The calls that bring a step into each state. They are a second apart."""

WRITES: Sequence[Move] = (
    _start(),
    _start("me", input_json="in", job_id="job"),
    _start("two"),
    _close(SUCCEEDED, "1"),
    _close(SUCCEEDED, attempt=1),
    _close(SUCCEEDED, "", attempt=1),
    _close(SUCCEEDED, "", "", attempt=2),
    _close(FAILED, error="error"),
    _close(FAILED, "1", attempt=1),
    _close(FAILED, attempt=2),
    _close(PENDING, attempt=1),
    _close(PENDING, "1"),
    _close(PENDING, "2", attempt=2),
    _close(SKIPPED, error="reason", attempt=1),
    _close(SUCCEEDED, "1", attempt=3),
    _skip(),
    _skip(reason="reason"),
    _skip("me"),
    _skip("me", ""),
    _skip("me", "reason"),
    _skip("two", "reason"),
    _retry(),
    _retry(attempt=1),
    _retry(attempt=2, reset=["{}"]),
    _reschedule(),
    _reschedule(output_json="2", due_at=MINUTE),
    _reschedule(2, due_at=NOW),
    _claim(None),
    _claim("me"),
    _claim("me", ends=SECOND),
    _claim("two", ends=MINUTE),
    _claim_and_start(),
    _claim_and_start(ends=2 * MINUTE, input_json="in", job_id="job"),
    _claim_and_start("two", ends=SECOND, input_json=""),
    _release(),
    _release("me"),
    _release("two"),
    Move("renew_step_claim", {"owner": "me", "lease": SECOND}),
    Move("renew_step_claim", {"owner": "me", "lease": 2 * MINUTE}),
    Move("renew_step_claim", {"owner": "two", "lease": MINUTE}),
    _dispatch(),
    _dispatch(NOW),
    ANNOTATE,
    UNDISPATCH,
    _wait(),
    _wait(NOW),
    _wait(MINUTE, signal_name="{} first"),
    _deliver(),
    _deliver("{} 1"),
    _deliver("{} 2", signal_name="{} first"),
    REMOVE_WAITER,
    EXPIRE_WAITER,
)


@dataclass(frozen=True, slots=True)
class _Path:
    """The key of a step, its state, and the writes that follow."""

    key: str
    state: Sequence[Move]
    writes: Sequence[Move]


@check(
    *CLAUSES,
    needs=[Capability.VIRTUAL_CLOCK, Capability.LEASES, Capability.RECOVERY, Capability.WAITERS],
    kind=Kind.MODEL,
    rotation="call sequences",
)
async def every_write_in_every_state_of_a_step(context: CheckContext) -> None:
    """Each write has the model's result and effect in each state of its step, also on a terminal run.

    The profiles quick and standard draw some of the pairs of a state and a write.
    """
    of, every = context.profile.of, len(STATES) * len(WRITES)
    walks = [
        *((False, paths) for paths in _runs_of_paths(context, of(60, 400, every))),
        *((True, paths) for paths in _runs_of_paths(context, of(20, 100, every))),
    ]
    try:
        for number, (on_a_terminal_run, paths) in enumerate(walks, 1):
            await _walk(CallSequence.on(context, number), paths, on_a_terminal_run=on_a_terminal_run)
    except ModelMismatch as found:
        raise await shrink(context, found, SHRINK_SECONDS) from found.__cause__


def _runs_of_paths(context: CheckContext, count: int) -> Iterator[list[_Path]]:
    """Draw pairs of a state and a write, which a second write follows, and yield those of each run."""
    pairs = context.random.sample(list(product(STATES.items(), WRITES)), count)
    paths = [
        _Path(f"{number} {name}", state, (write, context.random.choice(WRITES)))
        for number, ((name, state), write) in enumerate(pairs)
    ]
    for at in range(0, count, STEPS_OF_A_RUN):
        yield paths[at : at + STEPS_OF_A_RUN]


async def _walk(program: CallSequence, paths: Sequence[_Path], *, on_a_terminal_run: bool) -> None:
    """Bring each step into its state, make the writes, and read."""
    clock, run_id = require_clock(program.context), program.universe.runs[0]
    flow = {"flow_id": program.universe.flows[0], "flow_name": "orders", "trigger_key": "manual"}
    await program.call(Call(method="start_run", arguments={"run_id": run_id, **flow}))
    moment = clock.now + MOMENT

    async def make(moves: Sequence[tuple[str, Move]]) -> None:
        await program.call_concurrently([move.on(run_id, key, clock.now, moment) for key, move in moves])

    for number in range(max(len(path.state) for path in paths)):
        await make([(path.key, path.state[number]) for path in paths if number < len(path.state)])
        program.advance_clock(SECOND)
    program.advance_clock(moment - clock.now)
    complete = Call(method="complete_run", arguments={"run_id": run_id, "status": "Failed"})
    if on_a_terminal_run:
        await program.call(complete)
    reads = [
        *probe_calls(run_id, program.context.capabilities),
        *(
            Call(method="get_stalled_steps", arguments={"as_of": as_of, "take": program.context.page_size})
            for as_of in (moment - TICK, moment, moment + MINUTE)
        ),
    ]
    await program.call_concurrently(reads)
    for number in range(2):
        moves = [(path.key, path.writes[number]) for path in paths]
        if on_a_terminal_run:
            # A retry would reopen the run for the other steps.
            moves = [(key, move) for key, move in moves if move.method != "retry_step"]
        await make(moves)
        await program.call_concurrently(reads)
    if not on_a_terminal_run:
        # The steps of a terminal run are not stalled.
        await program.call(complete)
