"""CLM: claims and leases."""

from __future__ import annotations

from datetime import datetime, timedelta

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    SIMILAR_KEYS,
    TERMINAL_STEP_STATUSES,
    TICK,
    advance,
    assert_same,
    expect_fields,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    observe_all,
    outcome_of,
    require_clock,
    run_step,
    second_store,
    single,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import check
from flowstore_core import Capability, ClaimLostError, RunStatus, StepClaim, StepStatus

LEASED = [Capability.LEASES, Capability.VIRTUAL_CLOCK]


# CLM-1, CLM-2


@example("CLM-1")
async def one_claimant_wins_until_the_claim_is_released(context: CheckContext) -> None:
    """Losing returns False and changes nothing; a claim without lease never expires."""
    store, run_id, other = context.store, await start(context), await start(context)
    at = now(context)
    context.expect(
        await outcome_of(store.try_claim_step(run_id, "b", owner="first")), True, "claiming a free key"
    )
    context.expect(await outcome_of(store.try_claim_step(run_id, "a")), True, "claiming another free key")
    answer = await outcome_of(store.try_claim_step(other, "b", owner="second"))
    context.expect(answer, True, "claiming the same key of another run")
    wanted = tuple(
        StepClaim(run_id=run_id, step_key=key, owner=owner, claimed_at=at, expires_at=None)
        for key, owner in (("a", None), ("b", "first"))
    )
    context.expect(await store.get_step_claims(run_id), wanted, "get_step_claims by step_key")
    advance(context, 3650 * DAY)
    for key in ("a", "b"):
        for owner in ("second", None):
            answer = await outcome_of(store.try_claim_step(run_id, key, owner=owner))
            context.expect(answer, False, f"claiming a claimed key as {owner}")
    if Capability.LEASES in context.capabilities:
        answer = await outcome_of(store.try_claim_step(run_id, "b", owner="second", lease=MINUTE))
        context.expect(answer, False, "claiming a claimed key with a lease")
    context.expect(await store.get_step_claims(run_id), wanted, "a losing claim changes nothing")
    context.expect(await store.get_claimed_step_keys(run_id), {"a", "b"}, "get_claimed_step_keys")
    context.expect(await store.get_step_statuses(run_id), {}, "the statuses with a claimed key")
    context.expect(
        (await get_run(context, run_id)).steps, (), "the steps of get_run_detail with a claimed key"
    )


@example("CLM-2")
async def successful_writes_are_visible_to_every_store(context: CheckContext) -> None:
    """Another store on the same namespace sees each claim, dispatch, completion and key immediately."""
    store, other = context.store, await second_store(context)
    for number in range(4):
        run_id = await start(context)
        # Read first, so that a stale cache shows.
        context.expect(await other.get_claimed_step_keys(run_id), set(), "the claims of a new run")
        context.expect(await other.get_dispatched_step_keys(run_id), set(), "the dispatches of a new run")
        await store.try_claim_step(run_id, "a", owner="mine")
        context.expect(
            await other.get_claimed_step_keys(run_id), {"a"}, "the claims read through another store"
        )
        answer = await outcome_of(other.try_claim_step(run_id, "a", owner="theirs"))
        context.expect(answer, False, "claiming through another store a claimed key")
        await store.try_record_dispatch(run_id, "a")
        context.expect(
            await other.get_dispatched_step_keys(run_id), {"a"}, "the dispatches read through another store"
        )
        answer = await outcome_of(other.try_record_dispatch(run_id, "a"))
        context.expect(answer, False, "dispatching through another store a dispatched key")
        key = ("manual", f"key {number}")
        await store.try_register_idempotency_key(run_id, *key, run_id)
        found = await other.find_run_id_by_idempotency_key(run_id, *key)
        context.expect(found, run_id, "the run of an idempotency key, read through another store")
        await store.request_cancel(run_id)
        context.expect(
            await outcome_of(other.request_cancel(run_id)), False, "a second cancel through another store"
        )
        await store.complete_run(run_id, RunStatus.SUCCEEDED)
        status = await other.get_run_status(run_id)
        context.expect(
            status, RunStatus.SUCCEEDED, "the status of a completed run, read through another store"
        )
        mine, theirs = await observe(context, run_id), await observe(context, run_id, store=other)
        assert_same(context, theirs, mine, "two stores on one namespace return the same state")


# CLM-3


@example("CLM-3")
async def releasing_a_claim_frees_only_that_key(context: CheckContext) -> None:
    """Releasing is idempotent, keeps step and dispatch, and lets the next caller win."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one, key in ((run_id, "a"), (run_id, "b"), (other, "a")):
        await store.try_record_dispatch(one, key)
        await store.try_claim_step(one, key, owner="me")
        await store.record_step_start(one, key, "http", owner="me")
    step = await get_step(context, run_id, "a")
    for again in ("", " again"):
        call = store.release_step_claim(run_id, "a")
        context.expect(await outcome_of(call), None, f"releasing a claim{again}")
        claims = [claim.step_key for claim in await store.get_step_claims(run_id)]
        context.expect(claims, ["b"], f"the claims of the run after releasing one{again}")
    context.expect(
        await store.get_claimed_step_keys(other), {"a"}, "the claim of the same key in another run"
    )
    context.expect(await get_step(context, run_id, "a"), step, "the step after a release")
    context.expect(await store.get_dispatched_step_keys(run_id), {"a", "b"}, "the dispatches after a release")
    context.expect(
        await outcome_of(store.release_step_claim(run_id, "never claimed")), None, "releasing nothing"
    )
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="next"))
    context.expect(answer, True, "claiming a released key")


@example("CLM-3")
async def a_release_with_owner_frees_only_that_owners_claim(context: CheckContext) -> None:
    """Other claims stay; without owner any claim is released, also of a terminal step."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "mine", owner="me")
    await store.try_claim_step(run_id, "ownerless")
    for key in ("mine", "ownerless"):
        for owner in ("other", "Me", "me ", "None", "null"):
            await store.release_step_claim(run_id, key, owner=owner)
    both = {"mine", "ownerless"}
    context.expect(
        await store.get_claimed_step_keys(run_id), both, "the claims after releases by other owners"
    )
    await store.release_step_claim(run_id, "mine", owner="me")
    context.expect(
        await store.get_claimed_step_keys(run_id), {"ownerless"}, "the claims after a release by the owner"
    )
    call = store.record_step_start(run_id, "mine", "http", owner="me")
    await context.expect_error(call, ClaimLostError, "a start under a claim that its owner has released")
    await store.release_step_claim(run_id, "ownerless")
    context.expect(await store.get_step_claims(run_id), (), "the claims after a release without owner")
    for by in ("me", None):
        key = f"done, released by {by}"
        await store.try_claim_step(run_id, key, owner="me")
        await run_step(context, run_id, key)
        await store.release_step_claim(run_id, key, owner=by)
        context.expect(await store.get_step_claims(run_id), (), f"the claim of a terminal step, {key}")
        answer = await outcome_of(store.try_claim_step(run_id, key, owner="me"))
        context.expect(answer, False, "claiming a terminal step after a release")


@example("CLM-3", needs=LEASED)
async def an_expired_claim_is_released_by_its_owner(context: CheckContext) -> None:
    """The owner removes its expired claim, but not the claim of a caller that took it over."""
    store, run_id = context.store, await start(context)
    for key in ("expired", "taken over"):
        await store.try_claim_step(run_id, key, owner="me", lease=MINUTE)
    advance(context, 2 * MINUTE)
    await store.try_claim_step(run_id, "taken over", owner="next", lease=MINUTE)
    for key in ("expired", "taken over"):
        await store.release_step_claim(run_id, key, owner="me")
    claims = [(claim.step_key, claim.owner) for claim in await store.get_step_claims(run_id)]
    context.expect(claims, [("taken over", "next")], "the claims after releases by the former owner")


# CLM-4


@example("CLM-4")
async def a_terminal_step_keeps_its_claim(context: CheckContext) -> None:
    """A redelivered message loses; get_claimed_step_keys omits the step, get_step_claims lists it."""
    store, run_id = context.store, await start(context)
    for status in TERMINAL_STEP_STATUSES:
        await store.try_claim_step(run_id, status, owner=f"of {status}")
        await run_step(context, run_id, status, status)
    await store.try_claim_step(run_id, "pending", owner="me")
    await run_step(context, run_id, "pending", StepStatus.PENDING)
    await store.try_claim_step(run_id, "running", owner="me")
    await store.record_step_start(run_id, "running", "http", owner="me")
    for status in TERMINAL_STEP_STATUSES:
        answer = await outcome_of(store.try_claim_step(run_id, status, owner="redelivered"))
        context.expect(answer, False, f"a redelivered message's claim of a {status} step")
    claimed = await store.get_claimed_step_keys(run_id)
    context.expect(claimed, {"pending", "running"}, "get_claimed_step_keys with terminal steps")
    owners = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
    wanted = {status.value: f"of {status}" for status in TERMINAL_STEP_STATUSES}
    sentence = "get_step_claims with terminal steps"
    context.expect(owners, {**wanted, "pending": "me", "running": "me"}, sentence)


@example("CLM-4", needs=LEASED)
async def the_claim_of_a_terminal_step_does_not_expire(context: CheckContext) -> None:
    """The lease does not count while the step is terminal, so only its owner can start it again."""
    store, run_id = context.store, await start(context)
    for status in TERMINAL_STEP_STATUSES:
        await store.try_claim_step(run_id, status, owner="me", lease=MINUTE)
        await run_step(context, run_id, status, status)
    before = await store.get_step_claims(run_id)
    advance(context, HOUR)
    for status in TERMINAL_STEP_STATUSES:
        for owner in ("redelivered", "me"):
            answer = await outcome_of(store.try_claim_step(run_id, status, owner=owner))
            context.expect(
                answer, False, f"claiming a {status} step after the lease of its claim, as {owner}"
            )
    context.expect(
        await store.get_step_claims(run_id), before, "the claims of terminal steps after their leases"
    )
    call = store.record_step_start(run_id, "Failed", "http", owner="redelivered")
    await context.expect_error(call, ClaimLostError, "starting a Failed step under another owner's claim")
    number = await outcome_of(store.record_step_start(run_id, "Failed", "http", owner="me"))
    context.expect(number, 2, "starting a Failed step under its owner's claim")


@example("CLM-4", needs=LEASED)
async def expired_claims_are_listed_but_not_live(context: CheckContext) -> None:
    """get_claimed_step_keys omits a claim from the moment its lease ends; get_step_claims lists it."""
    store, run_id = context.store, await start(context)
    at = now(context)
    await store.try_claim_step(run_id, "b", owner="late", lease=MINUTE)
    await store.try_claim_step(run_id, "a", owner="long", lease=3 * MINUTE)
    await store.try_claim_step(run_id, "c")
    ends = {"a": ("long", at + 3 * MINUTE), "b": ("late", at + MINUTE), "c": (None, None)}
    wanted = tuple(
        StepClaim(run_id=run_id, step_key=key, owner=owner, claimed_at=at, expires_at=end)
        for key, (owner, end) in ends.items()
    )
    advance(context, MINUTE - TICK)
    for claimed in ({"a", "b", "c"}, {"a", "c"}):
        found = await store.get_claimed_step_keys(run_id)
        context.expect(
            found, claimed, f"the live claims at {now(context)} with a lease that ends at {at + MINUTE}"
        )
        context.expect(await store.get_step_claims(run_id), wanted, "get_step_claims with expired claims")
        advance(context, TICK)


# CLM-5


@example("CLM-5")
async def the_owner_can_repeat_its_claim(context: CheckContext) -> None:
    """The owner of a live claim gets True again and changes nothing; every other caller gets False."""
    store, run_id = context.store, await start(context)
    leased = Capability.LEASES in context.capabilities
    lease = {"lease": DAY} if leased else {}
    await store.try_claim_step(run_id, "plain", owner="me")
    await store.try_claim_step(run_id, "leased", owner="me", **lease)
    before = await store.get_step_claims(run_id)
    advance(context, SECOND)
    for key in ("plain", "leased"):
        answer = await outcome_of(store.try_claim_step(run_id, key, owner="me"))
        context.expect(answer, True, f"a repeated claim by the owner ({key})")
        if leased:
            answer = await outcome_of(store.try_claim_step(run_id, key, owner="me", lease=10 * DAY))
            context.expect(answer, True, f"a repeated claim by the owner with a lease ({key})")
    context.expect(await store.get_step_claims(run_id), before, "the claims after repeated claims")
    await store.record_step_start(run_id, "plain", "http", owner="me")
    answer = await outcome_of(store.try_claim_step(run_id, "plain", owner="me"))
    context.expect(answer, True, "a repeated claim by the owner of a Running step")
    number = await outcome_of(store.record_step_start(run_id, "plain", "http", owner="me"))
    context.expect(number, 1, "a repeated start after a repeated claim: the attempt")


@example("CLM-5")
async def owners_are_compared_exactly(context: CheckContext) -> None:
    """Calls without owner never share a claim and are recorded as None; similar tokens are distinct."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "ownerless")
    for owner in (None, "None", "null"):
        answer = await outcome_of(store.try_claim_step(run_id, "ownerless", owner=owner))
        context.expect(answer, False, f"claiming as {owner!r} a key claimed without owner")
    claim = single(await store.get_step_claims(run_id), "the claim")
    context.expect(claim.owner, None, "the recorded owner of a claim without owner")
    first, *others = SIMILAR_KEYS
    await store.try_claim_step(run_id, "charge", owner=first)
    for owner in others:
        answer = await outcome_of(store.try_claim_step(run_id, "charge", owner=owner))
        context.expect(answer, False, f"claiming as {owner!r} a key claimed by {first!r}")


# CLM-6


@example("CLM-6", needs=LEASED)
async def a_lease_ends_on_time(context: CheckContext) -> None:
    """A claim is live while now < expires_at, which is its time plus the lease; then the next claimant
    wins."""
    store, run_id = context.store, await start(context)
    at = now(context)
    context.expect(
        await outcome_of(store.try_claim_step(run_id, "a", owner="old", lease=MINUTE)), True, "claiming"
    )
    advance(context, MINUTE - TICK)
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="new", lease=MINUTE))
    context.expect(answer, False, "claiming a microsecond before the lease of the claim ends")
    claim = single(await store.get_step_claims(run_id), "the claim")
    expect_fields(context, claim, "a leased claim", owner="old", claimed_at=at, expires_at=at + MINUTE)
    end = advance(context, TICK)
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="new", lease=MINUTE))
    context.expect(answer, True, "claiming at the end of the lease")
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="old", lease=MINUTE))
    context.expect(answer, False, "a claim by the former owner after a takeover")
    claim = single(await store.get_step_claims(run_id), "the claim after a takeover")
    expect_fields(
        context, claim, "the claim after a takeover", owner="new", claimed_at=end, expires_at=end + MINUTE
    )
    again = advance(context, HOUR)
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="new", lease=MINUTE))
    context.expect(answer, True, "a claim by the former owner after the second lease ended")
    claim = single(await store.get_step_claims(run_id), "the new claim of the former owner")
    expect_fields(
        context, claim, "the new claim of the former owner", claimed_at=again, expires_at=again + MINUTE
    )
    advance(context, MINUTE)
    context.expect(
        await outcome_of(store.try_claim_step(run_id, "a")), True, "a takeover without owner or lease"
    )
    claim = single(await store.get_step_claims(run_id), "the claim without lease")
    expect_fields(context, claim, "the claim after a takeover without lease", owner=None, expires_at=None)
    advance(context, 3650 * DAY)
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="new", lease=MINUTE))
    context.expect(answer, False, "claiming long after a takeover without lease")


@example("CLM-6", needs=LEASED)
async def renewing_extends_and_never_shortens(context: CheckContext) -> None:
    """expires_at becomes now + lease if that is later; owner, claimed_at and the attempt stay."""
    store, run_id = context.store, await start(context)
    at = now(context)
    await store.try_claim_step(run_id, "a", owner="me", lease=MINUTE)
    await store.record_step_start(run_id, "a", "http", owner="me")
    early = advance(context, TICK)
    answer = await outcome_of(store.renew_step_claim(run_id, "a", "me", MINUTE))
    context.expect(answer, True, "renewing a claim at the beginning of its lease")
    claim = single(await store.get_step_claims(run_id), "the claim")
    expect_fields(context, claim, "a claim renewed at the beginning of its lease", expires_at=early + MINUTE)
    half = advance(context, MINUTE / 2)
    for lease, end in ((MINUTE, half + MINUTE), (SECOND, half + MINUTE), (HOUR, half + HOUR)):
        answer = await outcome_of(store.renew_step_claim(run_id, "a", "me", lease))
        context.expect(answer, True, f"renewing a live claim by {lease}")
        claim = single(await store.get_step_claims(run_id), "the claim")
        expect_fields(
            context, claim, f"a claim renewed by {lease}", owner="me", claimed_at=at, expires_at=end
        )
    number = await outcome_of(store.record_step_start(run_id, "a", "http", owner="me"))
    context.expect(number, 1, "a repeated start after a renewal: the attempt")
    advance(context, HOUR - TICK)
    answer = await outcome_of(store.try_claim_step(run_id, "a", owner="other"))
    context.expect(answer, False, "claiming a microsecond before a renewed lease ends")
    answer = await outcome_of(store.renew_step_claim(run_id, "a", "me", SECOND))
    context.expect(answer, True, "renewing a microsecond before the lease ends")


@example("CLM-6", needs=LEASED)
async def renewing_an_expired_or_foreign_claim_is_refused(context: CheckContext) -> None:
    """Renewing an absent, expired, leaseless or foreign claim returns False and changes nothing."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "leased", owner="me", lease=HOUR)
    await store.try_claim_step(run_id, "expired", owner="me", lease=MINUTE)
    await store.try_claim_step(run_id, "taken over", owner="me", lease=MINUTE)
    await store.try_claim_step(run_id, "plain", owner="me")
    await store.try_claim_step(run_id, "ownerless")
    advance(context, MINUTE)
    await store.try_claim_step(run_id, "taken over", owner="next", lease=MINUTE)
    before = await observe_all(context, run_id)
    owners = {"leased": ("other", "Me"), "ownerless": ("me", "None"), "unclaimed": ("me",)}
    for key in ("leased", "expired", "taken over", "plain", "ownerless", "unclaimed"):
        for owner in owners.get(key, ("me",)):
            answer = await outcome_of(store.renew_step_claim(run_id, key, owner, HOUR))
            context.expect(answer, False, f"renewing the claim {key!r} as {owner!r}")
    assert_same(context, await observe_all(context, run_id), before, "a refused renewal changes nothing")
    await run_step(context, run_id, "leased")
    await store.complete_run(run_id, RunStatus.SUCCEEDED)
    answer = await outcome_of(store.renew_step_claim(run_id, "leased", "me", 2 * HOUR))
    context.expect(answer, True, "renewing the claim of a terminal step in a terminal run")


@example("CLM-6", needs=LEASED)
async def several_claims_are_renewed_each_for_itself(context: CheckContext) -> None:
    """renew_step_claims answers in the order of its claims; one refusal does not affect the others."""
    store, run_id, other = context.store, await start(context), await start(context)
    for one, key in ((run_id, "a"), (run_id, "b"), (other, "a")):
        await store.try_claim_step(one, key, owner=f"owner of {key}", lease=MINUTE)
    await store.try_claim_step(run_id, "plain", owner="me")
    await store.try_claim_step(run_id, "expired", owner="me", lease=SECOND)
    at = advance(context, SECOND)
    claims = [
        (run_id, "b", "owner of b"),
        (run_id, "expired", "me"),
        (other, "a", "owner of a"),
        (run_id, "a", "owner of b"),
        (run_id, "plain", "me"),
        (new_id(context), "a", "owner of a"),
        (run_id, "b", "owner of b"),
    ]
    answers = await store.renew_step_claims(claims, HOUR)
    context.expect(
        tuple(answers), (True, False, True, False, False, False, True), "the answers of renew_step_claims"
    )
    ends = {
        (one, claim.step_key): claim.expires_at
        for one in (run_id, other)
        for claim in await store.get_step_claims(one)
    }
    wanted = {
        (run_id, "a"): at - SECOND + MINUTE,
        (run_id, "b"): at + HOUR,
        (other, "a"): at + HOUR,
        (run_id, "plain"): None,
        (run_id, "expired"): at,
    }
    context.expect(ends, wanted, "the ends of the leases after renew_step_claims")
    context.expect(tuple(await store.renew_step_claims([], HOUR)), (), "the answers for no claim")
    many = [(run_id, f"unknown {number}", "me") for number in range(999)]
    answers = await store.renew_step_claims([*many, claims[0]], HOUR)
    context.expect(tuple(answers), (False,) * 999 + (True,), "the answers for 1,000 claims")


@example("CLM-6", needs=LEASED)
async def a_lease_of_one_microsecond_ends_on_time(context: CheckContext) -> None:
    """A lease may be one microsecond."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "short", owner="me", lease=TICK)
    answer = await outcome_of(store.try_claim_step(run_id, "short", owner="other", lease=TICK))
    context.expect(answer, False, "claiming within a lease of one microsecond")
    advance(context, TICK)
    answer = await outcome_of(store.try_claim_step(run_id, "short", owner="other", lease=TICK))
    context.expect(answer, True, "claiming after a lease of one microsecond")


@check("INP-3", "CLM-6", needs=LEASED, isolated=False)
async def a_lease_ends_at_the_latest_datetime_at_last(context: CheckContext) -> None:
    """A lease that would end after 9999-12-30 ends then."""
    store, clock, run_id = context.store, require_clock(context), await start(context)
    latest = datetime(9999, 12, 30, tzinfo=clock.now.tzinfo)
    clock.now = latest - DAY
    # The first one is within the range of datetime, the others are not.
    for claim_or_renew, days in (
        (store.try_claim_step, 2),
        (store.renew_step_claim, 2),
        (store.renew_step_claim, 366),
    ):
        call = claim_or_renew(run_id, "long", owner="me", lease=timedelta(days=days))
        context.expect(await outcome_of(call), True, "claiming with a lease that would end after 9999-12-30")
        claims = [claim for claim in await store.get_step_claims(run_id) if claim.step_key == "long"]
        end = single(claims, "the claim").expires_at
        context.expect(end, latest, "the end of such a lease")
