"""Example checks, histories and reports for the tests of the conformance suite's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from uuid import UUID

from flowstore_conformance import CLAUSES, CheckResult, Failure, Report, Status
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.history import UNKNOWN, Call, History, Operation, Outcome, Raised, Returned
from flowstore_conformance.linearizability import Verdict, check_history
from flowstore_conformance.registry import Check, Kind, Run

from flowstore_core import Capability, RunStatus, new_run_id

RUN = UUID("5f0d7c1e-8f5e-4a44-9c1d-3f4f5b3f9a10")
FLOW = UUID(int=7)
NOW = datetime(2026, 3, 14, 9, 26, 53, tzinfo=UTC)

PROGRAM = """\
import asyncio
import sys

from flowstore_core import new_run_id, open_store


async def main(url):
    run_id = new_run_id()
    async with open_store(url) as store:
        await store.start_run(new_run_id(), "orders", run_id, "manual")
        print("first", await store.try_claim_step(run_id, "charge", owner="a"))
        print("second", await store.try_claim_step(run_id, "charge", owner="b"))


asyncio.run(main(sys.argv[1]))
"""


def operation(
    client: int, invoked: float, returned: float, outcome: Outcome, **arguments: object
) -> Operation:
    method = str(arguments.pop("method", "try_claim_step"))
    call = Call(method=method, arguments={"run_id": RUN, **arguments})
    return Operation(client=client, call=call, invoked=invoked, returned=returned, outcome=outcome, now=NOW)


def two_winners() -> History:
    """A history in which two claims succeed and a third has no reply."""
    started = Raised("RunAlreadyExistsError")
    create = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", "method": "start_run"}
    return History.of(
        [
            operation(0, 0.0, 0.0011, _started(), **create),
            operation(1, 0.0012, 0.0019, started, **create),
            operation(0, 0.0020, 0.0034, Returned(True), step_key="charge", owner="a"),
            operation(1, 0.0022, 0.0031, Returned(True), step_key="charge", owner="b"),
            operation(2, 0.0021, 0.0042, Returned(False), step_key="charge", owner="c"),
            operation(3, 0.0025, float("inf"), UNKNOWN, step_key="charge", owner="d"),
            operation(2, 0.0050, 0.0058, Returned(frozenset({"charge"})), method="get_claimed_step_keys"),
        ]
    )


def _started() -> Returned:
    from flowstore_conformance.linearizability import apply_call
    from flowstore_conformance.model import State

    create = {"flow_id": FLOW, "flow_name": "orders", "trigger_key": "manual", "method": "start_run"}
    outcome, _ = apply_call(State(), operation(0, 0, 1, Returned(None), **create))
    assert isinstance(outcome, Returned)
    return outcome


def verdict_of(history: History) -> Verdict:
    return check_history(history)


def example_check(
    clause: str, name: str, run: Run | None = None, *also: str, needs: Sequence[Capability] = ()
) -> Check:
    """A check outside the suite's registry."""
    return Check(
        name=name,
        clauses=(clause, *also),
        kind=Kind.EXAMPLE,
        needs=frozenset(needs),
        sentence=f"An example check of {clause}.",
        run=run or passes,
    )


async def passes(context: CheckContext) -> None:
    run_id = new_run_id()
    run = await context.store.start_run(new_run_id(), "orders", run_id, "manual")
    context.expect(run.status, RunStatus.RUNNING, "a run that was started is Running")


async def breaks(context: CheckContext) -> None:
    history = two_winners()
    context.assertions += 40
    raise ContractViolation(
        "two of three concurrent try_claim_step were told True: expected exactly one",
        program=PROGRAM,
        history=history,
        verdict=verdict_of(history),
    )


async def exhausts_budget(context: CheckContext) -> None:
    context.assertions += 1
    raise Inconclusive("the search ran out of its budget of 200,000 states")


def example_report(
    outcomes: dict[str, Status] | None = None,
    *,
    failing: Callable[[str], Failure] | None = None,
    selected: tuple[str, ...] = (),
) -> Report:
    """A report with one check for each clause, which passes unless ``outcomes`` has another status."""
    given = outcomes or {}
    results = []
    for number, clause in enumerate(CLAUSES):
        status = given.get(clause, Status.PASS)
        if selected and clause not in selected:
            continue
        failed = status in (Status.FAIL, Status.WAIVED)
        failure = (failing or simple_failure)(clause) if failed else None
        reasons = {
            Status.INCONCLUSIVE: "the search ran out of its budget of 200,000 states",
            Status.UNSUPPORTED: f"the backend does not declare {CLAUSES[clause].needs or 'it'}",
            Status.WAIVED: "known (https://example.org/7; until 2027-01-31)",
        }
        results.append(
            CheckResult(
                check=example_check(clause, f"keeps_{clause.lower().replace('-', '_')}"),
                status=status,
                assertions=0 if status is Status.UNSUPPORTED else 13 * (number + 1),
                seconds=0.012 * (number + 1),
                seed=1234,
                failure=failure,
                reason=reasons.get(status),
            )
        )
    return Report(
        backend="sqlite",
        url="sqlite:///flows.db",
        capabilities=tuple(sorted(Capability)),
        profile="quick",
        seed=1234,
        started_at=NOW,
        seconds=12.34,
        results=tuple(results),
        versions={"python": "3.11.9", "flowstore": "0.1.0"},
        selected=selected,
    )


def simple_failure(clause: str) -> Failure:
    return Failure(
        clause=clause,
        message="expected True, got <False> & `nothing` | else",
        reproductions=5,
        repetitions=5,
    )


def race_failure(clause: str) -> Failure:
    """A failure with a value for every field."""
    history = two_winners()
    return Failure(
        clause=clause,
        message="two of three concurrent try_claim_step were told True: expected exactly one",
        program=PROGRAM,
        right_answer="first True\nsecond False",
        history=history,
        verdict=verdict_of(history),
        traceback="Traceback (most recent call last):\n  ...\nKeyError: 'charge'\n",
        reproductions=3,
        repetitions=5,
    )
