"""Races for claims, leases and dispatches."""

from __future__ import annotations

from typing import Any

from flowstore_conformance.history import History, Returned
from flowstore_conformance.race_families.family import (
    LEASE,
    CallMaker,
    RaceBuilder,
    RaceFamily,
    family,
    stuck_on_reads,
    winners,
)
from flowstore_conformance.races import Race
from flowstore_core import Capability


def owner(client: int) -> str:
    return f"owner {client}"


def claim(d: RaceBuilder, **more: Any) -> CallMaker:
    return lambda client: d.step("try_claim_step", owner=owner(client), **more)


def _claims(d: RaceBuilder) -> Race:
    nobody = d.one_of(False, False, False, True)
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            claim(d),
            lambda client: d.on("get_step_claims"),
            lambda client: d.on("get_claimed_step_keys"),
            lambda client: d.step("release_step_claim", owner=owner(client)),
            first=(lambda client: d.step("try_claim_step")) if nobody else claim(d),
        ),
        final=d.final_reads(d.on("get_claimed_step_keys")),
    )


def _claims_of_one_owner(d: RaceBuilder) -> Race:
    def shared(client: int) -> str:
        return owner(client % 2)

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.step("try_claim_step", owner=shared(client)),
            lambda client: d.step("release_step_claim", owner=shared(client)),
            lambda client: d.step("record_step_start", step_type="s", owner=shared(client)),
            first=lambda client: d.step("try_claim_step", owner=shared(client)),
        ),
        final=d.final_reads(),
    )


def _releases(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(), d.step("try_claim_step", owner="first")),
        clients=d.clients(
            lambda client: d.step("release_step_claim", owner="first"),
            lambda client: d.step("release_step_claim", owner="first"),
            lambda client: d.step("release_step_claim"),
            claim(d),
            claim(d),
            lambda client: d.on("get_step_claims"),
        ),
        final=d.final_reads(),
    )


def _takeovers(d: RaceBuilder) -> Race:
    setup = [d.start_run(), d.step("try_claim_step", owner="old", lease=LEASE)]
    if d.one_of(True, False):
        setup.append(d.step("record_step_start", step_type="s", owner="old"))
    return Race(
        setup=tuple(setup),
        clients=d.clients(
            claim(d, lease=LEASE),
            claim(d, lease=LEASE),
            lambda client: d.step("renew_step_claim", owner="old", lease=LEASE),
            lambda client: d.step("try_claim_step", owner="old", lease=LEASE),
            lambda client: d.step("record_step_start", step_type="s", owner=d.one_of("old", owner(client))),
            lambda client: d.step("record_step_complete", status="Succeeded", attempt=1),
            lambda client: d.step("release_step_claim", owner="old"),
        ),
        final=d.final_reads(),
        clock_advance=LEASE,
    )


def start_claimed(d: RaceBuilder, *owners: str) -> CallMaker:
    """Claims that start an attempt, by one of some owners, or by an owner of the client's own."""
    return lambda client: d.step(
        "try_start_step",
        step_type="s",
        owner=d.one_of(*owners) if owners else owner(client),
        lease=LEASE,
        job_id=f"job {client}",
    )


def _claimed_starts(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            start_claimed(d),
            # A repeated call, maybe beside its first one.
            start_claimed(d, owner(0), owner(1)),
            claim(d),
            lambda client: d.step("record_step_start", step_type="s", owner=owner(client)),
            lambda client: d.step(
                "record_step_complete", status=d.one_of("Pending", "Succeeded"), owner=owner(client)
            ),
            lambda client: d.step("release_step_claim", owner=owner(client)),
            lambda client: d.one_of(d.step("get_step"), d.on("get_step_claims")),
            first=start_claimed(d),
        ),
        final=d.final_reads(),
    )


def _restarts(d: RaceBuilder) -> Race:
    start = {"step_type": "s", "owner": "old", "lease": LEASE}
    return Race(
        setup=(d.start_run(), d.step("try_start_step", **start)),
        clients=d.clients(
            start_claimed(d),
            start_claimed(d),
            start_claimed(d, "old"),
            claim(d, lease=LEASE),
            lambda client: d.step("renew_step_claim", owner="old", lease=LEASE),
            lambda client: d.step("record_step_complete", status="Succeeded", attempt=1, owner="old"),
            lambda client: d.step("release_step_claim", owner="old"),
        ),
        final=d.final_reads(),
        clock_advance=LEASE,
    )


def _attempts_of_several_owners(history: History) -> str | None:
    """Explain an attempt number that two owners received."""
    given: dict[int, dict[str, None]] = {}
    for one in history.operations:
        if one.call.method == "try_start_step" and isinstance(one.outcome, Returned) and one.outcome.value:
            given.setdefault(one.outcome.value, {})[one.call.arguments["owner"]] = None
    for number, owners in given.items():
        if len(owners) > 1:
            return f"attempt {number} was returned to {' and '.join(map(repr, owners))}"
    return None


def _dispatches(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(),),
        clients=d.clients(
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.step("annotate_dispatch", job_id=f"job {client}"),
            lambda client: d.on("get_dispatched_step_keys"),
            lambda client: d.step("release_dispatch") if d.one_of(True, False) else d.on("get_dispatches"),
            first=lambda client: d.step("try_record_dispatch"),
        ),
        final=d.final_reads(d.on("get_dispatched_step_keys")),
    )


ONE_WINNER = winners("try_claim_step", ("release_step_claim", "retry_step", "reschedule_step"))


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family(
        "claims",
        "CLM-1 CLM-2 CLM-3",
        "claims of one step",
        _claims,
        explain=ONE_WINNER,
        clause_of=stuck_on_reads("CLM-2"),
    ),
    family("releases", "CLM-3", "releases of a claim that other owners then win", _releases),
    family("claims_of_one_owner", "CLM-5", "repeated claims by the same owners", _claims_of_one_owner),
    family(
        "takeovers",
        "CLM-6",
        "claims of a step whose lease has just ended",
        _takeovers,
        Capability.LEASES,
        Capability.VIRTUAL_CLOCK,
        explain=ONE_WINNER,
    ),
    family(
        "claimed_starts",
        "CLM-8",
        "claims of one step that start it",
        _claimed_starts,
        Capability.LEASES,
        explain=_attempts_of_several_owners,
    ),
    family(
        "restarts",
        "CLM-8",
        "claims that start a step whose lease has just ended",
        _restarts,
        Capability.LEASES,
        Capability.VIRTUAL_CLOCK,
        explain=_attempts_of_several_owners,
    ),
    family(
        "dispatches",
        "CLM-1",
        "dispatches of one step",
        _dispatches,
        explain=winners("try_record_dispatch", ("release_dispatch",)),
    ),
)
