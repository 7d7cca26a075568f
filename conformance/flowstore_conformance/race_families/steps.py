"""Races of attempts: starts, outcomes, skips, retries, reschedulings."""

from __future__ import annotations

from flowstore_conformance.history import Call
from flowstore_conformance.race_families.claims import claim, owner
from flowstore_conformance.race_families.family import (
    CallMaker,
    RaceBuilder,
    RaceFamily,
    duplicate_attempt_numbers,
    family,
)
from flowstore_conformance.races import Race
from flowstore_core import Capability


def start(d: RaceBuilder) -> CallMaker:
    return lambda client: d.step("record_step_start", step_type="s", job_id=f"job {client}")


def _read(d: RaceBuilder) -> CallMaker:
    return lambda client: d.one_of(d.on("get_run_detail"), d.step("get_step"))


def _complete(d: RaceBuilder, attempt: int | None = None) -> CallMaker:
    def make(client: int) -> Call:
        status = d.one_of("Succeeded", "Failed", "Pending")
        said = {"status": status, "output_json": str(client), "attempt": attempt or d.one_of(1, 2, None)}
        return d.step("record_step_complete", **said)

    return make


def _attempts(d: RaceBuilder) -> Race:
    before = (d.step("record_step_start", step_type="s"),) * d.one_of(0, 1)
    return Race(
        setup=(d.start_run(), *before),
        clients=d.clients(
            start(d),
            start(d),
            start(d),
            lambda client: d.step("record_step_complete", status="Failed", output_json=str(client)),
            _read(d),
        ),
        final=d.final_reads(d.on("get_step_statuses")),
    )


def _starts_under_claims(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(), d.step("try_claim_step", owner=owner(0))),
        clients=d.clients(
            lambda client: d.step("record_step_start", step_type="s", owner=owner(d.one_of(0, client))),
            lambda client: d.step("record_step_start", step_type="s", owner=owner(0)),
            lambda client: d.step("release_step_claim", owner=owner(0)),
            claim(d),
            _read(d),
        ),
        final=d.final_reads(),
    )


def _completions(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(), d.step("record_step_start", step_type="s")),
        clients=d.clients(_complete(d, 1), _complete(d, 1), _complete(d), start(d), _read(d)),
        final=d.final_reads(),
    )


def _starts_of_ended_steps(d: RaceBuilder) -> Race:
    return Race(
        setup=(d.start_run(), d.step("record_step_start", step_type="s")),
        clients=d.clients(
            start(d),
            start(d),
            lambda client: d.step("record_step_complete", status="Succeeded", attempt=1),
            lambda client: d.step("record_step_complete", status="Succeeded"),
            lambda client: d.step("record_skipped_step", step_type="s", reason=str(client)),
            _read(d),
        ),
        final=d.final_reads(),
    )


def _skips(d: RaceBuilder) -> Race:
    def skip(client: int) -> Call:
        reason = {"step_type": "s", "reason": str(client)}
        return d.step("record_skipped_step", **reason, owner=d.one_of(None, owner(client), owner(0)))

    return Race(
        setup=(d.start_run(),),
        clients=d.clients(skip, skip, skip, claim(d), start(d), _read(d)),
        final=d.final_reads(),
    )


def ended_run(d: RaceBuilder) -> list[Call]:
    """A run that is Failed, with a step that failed and one that was skipped for it."""
    return [
        d.start_run(),
        d.step("try_claim_step", owner="first"),
        d.step("try_record_dispatch"),
        d.step("record_step_start", step_type="s", owner="first"),
        d.step("record_step_complete", status="Failed", error_message="no", attempt=1),
        d.step("record_skipped_step", step_key="b", step_type="s", reason="a failed"),
        d.on("complete_run", status="Failed"),
    ]


def _retries(d: RaceBuilder) -> Race:
    def retry(client: int) -> Call:
        return d.step("retry_step", attempt=d.one_of(1, 1, None), reset=d.one_of(["b"], ["b"], []))

    setup = ended_run(d)
    return Race(
        setup=tuple(setup if d.one_of(True, True, False) else setup[:-1]),
        clients=d.clients(
            retry,
            retry,
            retry,
            start(d),
            claim(d),
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.on("complete_run", status="Cancelled"),
            _complete(d, 1),
            _read(d),
            lambda client: d.step("record_step_start", step_key="b", step_type="s"),
        ),
        final=d.final_reads(),
    )


def _reschedules(d: RaceBuilder) -> Race:
    def reschedule(client: int) -> Call:
        return d.step("reschedule_step", attempt=1, output_json=str(client))

    return Race(
        setup=(
            d.start_run(),
            d.step("try_record_dispatch"),
            d.step("try_claim_step", owner="first"),
            d.step("record_step_start", step_type="s", owner="first"),
        ),
        clients=d.clients(
            reschedule,
            reschedule,
            reschedule,
            _complete(d, 1),
            claim(d),
            lambda client: d.step("try_record_dispatch"),
            lambda client: d.step("annotate_dispatch", job_id=f"job {client}"),
            start(d),
            lambda client: d.on("complete_run", status="Failed"),
            lambda client: d.on("get_dispatches"),
        ),
        final=d.final_reads(),
    )


RACE_FAMILIES: tuple[RaceFamily, ...] = (
    family("attempts", "STP-1", "starts of one step", _attempts, explain=duplicate_attempt_numbers),
    family("starts_under_claims", "STP-3", "starts under claims that are given up", _starts_under_claims),
    family("starts_of_ended_steps", "STP-2", "starts of a step that just ends", _starts_of_ended_steps),
    family("completions", "STP-4", "outcomes for one attempt", _completions),
    family("skips", "STP-5", "skips of one step", _skips),
    family("retries", "STP-6", "retries of one step", _retries),
    family("reschedules", "STP-7", "reschedulings of one step", _reschedules, Capability.RECOVERY),
)
