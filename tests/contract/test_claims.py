"""CLM: step claims; the dispatch ledger has a file of its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from flowstore_core import (
    Capability,
    ClaimLostError,
    FlowStore,
    RunStatus,
    StepClaim,
    StepStatus,
    new_claim_token,
)
from tests.conftest import OpenAnother
from tests.contract.scenes import MINUTE, new_run, picture, run_step, the_step, together
from tests.virtual_clock import VirtualClock

leases = pytest.mark.needs(Capability.LEASES)


async def test_clm_1_exactly_one_of_many_claimants_wins(store: FlowStore, open_another: OpenAnother) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    keys = [f"step {number}" for number in range(20)]
    calls = [
        (key, token, one)
        for key in keys
        for one in stores
        for token in (new_claim_token(), new_claim_token())
    ]
    won = await together(one.try_claim_step(run_id, key, owner=token) for key, token, one in calls)
    winners = {key: token for (key, token, _), answer in zip(calls, won, strict=True) if answer}
    assert sum(won) == len(keys)
    assert {c.step_key: c.owner for c in await store.get_step_claims(run_id)} == winners


async def test_clm_1_exactly_one_of_many_claimants_without_owner_wins(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    won = await together(stores[n % 2].try_claim_step(run_id, "charge") for n in range(24))
    assert sorted(won) == [False] * 23 + [True]


async def test_clm_1_a_claim_lasts_until_it_is_released(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge")
    clock.advance(days=3650)
    assert not await store.try_claim_step(run_id, "charge")
    assert not await store.try_claim_step(run_id, "charge", owner="other", lease=MINUTE)


async def test_clm_2_a_won_claim_is_seen_by_every_store(store: FlowStore, open_another: OpenAnother) -> None:
    other = await open_another()
    run_id = await new_run(store)
    for number in range(10):
        assert await store.try_claim_step(run_id, f"step {number}", owner="mine")
        assert f"step {number}" in await other.get_claimed_step_keys(run_id)
        assert len(await other.get_step_claims(run_id)) == number + 1
        assert not await other.try_claim_step(run_id, f"step {number}", owner="theirs")


async def test_clm_3_releasing_frees_that_key_alone_and_is_idempotent(store: FlowStore) -> None:
    run_id, other_run = await new_run(store), await new_run(store)
    for run, key in ((run_id, "a"), (run_id, "b"), (other_run, "a")):
        assert await store.try_claim_step(run, key, owner="me")
    await store.release_step_claim(run_id, "a")
    await store.release_step_claim(run_id, "a")
    assert await store.get_claimed_step_keys(run_id) == {"b"}
    assert await store.get_claimed_step_keys(other_run) == {"a"}
    assert await store.try_claim_step(run_id, "a", owner="next")


async def test_clm_3_with_owner_only_that_owners_claim_is_released(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="mine")
    await store.release_step_claim(run_id, "charge", owner="theirs")
    assert await store.get_claimed_step_keys(run_id) == {"charge"}
    await store.release_step_claim(run_id, "charge", owner="mine")
    assert await store.get_step_claims(run_id) == ()


async def test_clm_3_with_owner_a_claim_without_owner_stays(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge")
    await store.release_step_claim(run_id, "charge", owner="mine")
    assert await store.get_claimed_step_keys(run_id) == {"charge"}


async def test_clm_3_releasing_keeps_the_dispatch_and_the_step(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_record_dispatch(run_id, "charge")
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.record_step_start(run_id, "charge", "http", owner="me")
    before = await the_step(store, run_id)
    await store.release_step_claim(run_id, "charge", owner="me")
    assert await the_step(store, run_id) == before
    assert await store.get_dispatched_step_keys(run_id) == {"charge"}


@leases
async def test_clm_3_an_expired_claim_can_be_released_by_its_owner(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    clock.advance(minutes=2)
    await store.release_step_claim(run_id, "charge", owner="me")
    assert await store.get_step_claims(run_id) == ()


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED])
async def test_clm_4_a_completed_step_keeps_its_claim(store: FlowStore, status: StepStatus) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    await run_step(store, run_id, "charge", status)
    assert not await store.try_claim_step(run_id, "charge", owner="redelivered")
    assert await store.get_claimed_step_keys(run_id) == frozenset()
    assert [claim.owner for claim in await store.get_step_claims(run_id)] == ["me"]


@leases
async def test_clm_4_the_claim_of_a_terminal_step_does_not_expire(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    await run_step(store, run_id, "charge", StepStatus.FAILED)
    clock.advance(hours=1)
    assert not await store.try_claim_step(run_id, "charge", owner="redelivered")
    with pytest.raises(ClaimLostError):
        await store.record_step_start(run_id, "charge", "http", owner="redelivered")
    # Still its owner's: a lease does not count while the step is terminal.
    assert await store.record_step_start(run_id, "charge", "http", owner="me") == 2


async def test_clm_4_a_pending_step_is_still_claimed(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "poll", owner="me")
    await run_step(store, run_id, "poll", StepStatus.PENDING)
    assert await store.get_claimed_step_keys(run_id) == {"poll"}


@leases
async def test_clm_4_expired_claims_are_listed_but_not_claimed(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    now = clock()
    await store.try_claim_step(run_id, "b", owner="late", lease=MINUTE)
    await store.try_claim_step(run_id, "a", owner="long", lease=3 * MINUTE)
    await store.try_claim_step(run_id, "c")
    clock.advance(minutes=2)
    assert await store.get_claimed_step_keys(run_id) == {"a", "c"}
    assert await store.get_step_claims(run_id) == (
        StepClaim(run_id=run_id, step_key="a", owner="long", claimed_at=now, expires_at=now + 3 * MINUTE),
        StepClaim(run_id=run_id, step_key="b", owner="late", claimed_at=now, expires_at=now + MINUTE),
        StepClaim(run_id=run_id, step_key="c", owner=None, claimed_at=now, expires_at=None),
    )


async def test_clm_5_the_owner_gets_true_again_and_changes_nothing(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    before = await store.get_step_claims(run_id)
    clock.advance(seconds=30)
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=10 * MINUTE)
    assert await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.get_step_claims(run_id) == before


async def test_clm_5_one_owner_calling_many_times_at_once_always_wins(
    store: FlowStore, open_another: OpenAnother
) -> None:
    stores = [store, await open_another()]
    run_id = await new_run(store)
    won = await together(stores[n % 2].try_claim_step(run_id, "charge", owner="me") for n in range(16))
    assert won == [True] * 16
    assert len(await store.get_step_claims(run_id)) == 1


async def test_clm_5_without_owner_every_call_is_its_own(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge")
    assert not await store.try_claim_step(run_id, "charge")
    assert not await store.try_claim_step(run_id, "charge", owner="None")
    (claim,) = await store.get_step_claims(run_id)
    assert claim.owner is None


async def test_clm_5_owners_are_compared_exactly(store: FlowStore) -> None:
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge", owner="worker")
    for other in ("Worker", "worker ", " worker", "wörker", "worke", "workers"):
        assert not await store.try_claim_step(run_id, "charge", owner=other)


@leases
async def test_clm_6_a_claim_is_held_until_the_moment_it_expires(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    expires_at = clock() + MINUTE
    assert await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    clock.now = expires_at - timedelta(microseconds=1)
    assert not await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    assert await store.get_claimed_step_keys(run_id) == {"charge"}
    clock.now = expires_at
    assert await store.get_claimed_step_keys(run_id) == frozenset()
    assert await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    assert not await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.owner, claim.claimed_at, claim.expires_at) == ("new", expires_at, expires_at + MINUTE)


@leases
async def test_clm_6_the_old_owner_may_win_again_like_any_other(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    again = clock.advance(minutes=5)
    assert await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.claimed_at, claim.expires_at) == (again, again + MINUTE)


@leases
async def test_clm_6_exactly_one_of_many_takes_over_an_expired_claim(
    store: FlowStore, open_another: OpenAnother, clock: VirtualClock
) -> None:
    stores = [store, await open_another(), await open_another()]
    run_id = await new_run(store)
    for round_ in range(8):
        owners = [f"{round_} {number}" for number in range(12)]
        won = await together(
            stores[n % 3].try_claim_step(run_id, "charge", owner=owner, lease=MINUTE)
            for n, owner in enumerate(owners)
        )
        assert sum(won) == 1
        (claim,) = await store.get_step_claims(run_id)
        assert claim.owner == owners[won.index(True)]
        clock.advance(minutes=1)


@leases
async def test_clm_6_an_expired_claim_without_a_lease_in_the_new_one(
    store: FlowStore, clock: VirtualClock
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    clock.advance(minutes=1)
    assert await store.try_claim_step(run_id, "charge")
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.owner, claim.expires_at) == (None, None)


@leases
async def test_clm_6_renewing_extends(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    claimed_at = clock()
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    now = clock.advance(seconds=30)
    assert await store.renew_step_claim(run_id, "charge", "me", MINUTE)
    (claim,) = await store.get_step_claims(run_id)
    assert (claim.owner, claim.claimed_at, claim.expires_at) == ("me", claimed_at, now + MINUTE)


@leases
async def test_clm_6_renewing_never_shortens(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=60 * MINUTE)
    before = await store.get_step_claims(run_id)
    clock.advance(seconds=1)
    assert await store.renew_step_claim(run_id, "charge", "me", MINUTE)
    assert await store.get_step_claims(run_id) == before


@leases
async def test_clm_6_renewing_is_refused_past_the_lease(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    before = await store.get_step_claims(run_id)
    clock.advance(minutes=1)
    assert not await store.renew_step_claim(run_id, "charge", "me", MINUTE)
    assert await store.get_step_claims(run_id) == before


@leases
async def test_clm_6_renewing_is_refused_without_lease_to_others_and_without_claim(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "leased", owner="me", lease=MINUTE)
    await store.try_claim_step(run_id, "unleased", owner="me")
    await store.try_claim_step(run_id, "anonymous")
    before = await store.get_step_claims(run_id)
    assert not await store.renew_step_claim(run_id, "leased", "other", MINUTE)
    assert not await store.renew_step_claim(run_id, "unleased", "me", MINUTE)
    assert not await store.renew_step_claim(run_id, "anonymous", "me", MINUTE)
    assert not await store.renew_step_claim(run_id, "unclaimed", "me", MINUTE)
    assert await store.get_step_claims(run_id) == before


@leases
async def test_clm_6_a_taken_over_worker_cannot_renew(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="old", lease=MINUTE)
    clock.advance(minutes=1)
    await store.try_claim_step(run_id, "charge", owner="new", lease=MINUTE)
    assert not await store.renew_step_claim(run_id, "charge", "old", MINUTE)
    assert await store.renew_step_claim(run_id, "charge", "new", MINUTE)


@leases
async def test_clm_6_the_longest_lease_ends_within_what_a_store_can_hold(
    store: FlowStore, clock: VirtualClock
) -> None:
    latest = datetime(9999, 12, 30, tzinfo=UTC)
    clock.now = latest - timedelta(days=1)
    run_id = await new_run(store)
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=timedelta(days=366))
    assert await store.renew_step_claim(run_id, "charge", "me", timedelta(days=366))
    (claim,) = await store.get_step_claims(run_id)
    assert claim.expires_at == latest


@leases
async def test_clm_6_the_shortest_lease_is_a_microsecond(store: FlowStore, clock: VirtualClock) -> None:
    run_id = await new_run(store)
    shortest = timedelta(microseconds=1)
    assert await store.try_claim_step(run_id, "charge", owner="me", lease=shortest)
    assert not await store.try_claim_step(run_id, "charge", owner="other", lease=shortest)
    clock.now += shortest
    assert await store.try_claim_step(run_id, "charge", owner="other", lease=shortest)


@pytest.mark.parametrize("status", [StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED])
async def test_run_4_a_terminal_step_is_not_claimed_not_even_by_the_claims_owner(
    store: FlowStore, status: StepStatus
) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    await run_step(store, run_id, "charge", status)
    await run_step(store, run_id, "never claimed", status)
    before = await picture(store, run_id)
    assert not await store.try_claim_step(run_id, "charge", owner="me")
    assert not await store.try_claim_step(run_id, "never claimed", owner="me")
    assert not await store.try_claim_step(run_id, "never claimed")
    assert await picture(store, run_id) == before


@pytest.mark.parametrize("status", [RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELLED])
async def test_run_4_nothing_of_a_terminal_run_is_claimed(store: FlowStore, status: RunStatus) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    await store.complete_run(run_id, status)
    before = await picture(store, run_id)
    assert not await store.try_claim_step(run_id, "charge", owner="me")
    assert not await store.try_claim_step(run_id, "new", owner="me")
    assert await picture(store, run_id) == before


@leases
async def test_clm_a_claim_of_a_terminal_run_can_be_renewed_and_released(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me", lease=MINUTE)
    await store.complete_run(run_id, RunStatus.CANCELLED)
    assert [claim.owner for claim in await store.get_step_claims(run_id)] == ["me"]
    assert await store.renew_step_claim(run_id, "charge", "me", 2 * MINUTE)
    await store.release_step_claim(run_id, "charge", owner="me")
    assert await store.get_step_claims(run_id) == ()


async def test_clm_claims_on_unstarted_keys_show_no_step(store: FlowStore) -> None:
    run_id = await new_run(store)
    await store.try_claim_step(run_id, "charge", owner="me")
    assert await store.get_step_statuses(run_id) == {}
    detail = await store.get_run_detail(run_id)
    assert detail is not None
    assert detail.steps == ()


async def test_clm_claims_and_keys_of_unknown_runs_are_empty(store: FlowStore) -> None:
    assert await store.get_step_claims(uuid4()) == ()
    assert await store.get_claimed_step_keys(uuid4()) == frozenset()


def test_clm_5_claim_tokens_are_distinct_legal_owners() -> None:
    tokens = {new_claim_token() for _ in range(1000)}
    assert len(tokens) == 1000
    assert all(0 < len(token) <= 256 for token in tokens)
