"""Mutants of claims and of the dispatch ledger in SQLite."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from flowstore_core import ClaimLostError, RunStatus, StepStatus, open_store
from flowstore_core.timeseries import LATEST
from tests.calls import new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.sqlite_setup import (
    begin,
    ended_run,
    error_of,
    new_step,
    raw_connection,
    write_lock,
)
from tests.virtual_clock import VirtualClock

CLAIMS = "flowstore_sqlite/claims.py"
FIVE_SECONDS = timedelta(seconds=5)


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[(CLAIMS, "expires_at <= excluded.claimed_at", "expires_at < excluded.claimed_at")],
)
async def lease_that_ends_now_still_blocks(url: str) -> None:
    """A claim whose lease ends exactly now keeps the next claimant from winning."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        assert await store.try_claim_step(run_id, "charge", owner="b")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-4",),
    changes=[
        (
            CLAIMS,
            "    AND (status IS NULL OR status IN ('Pending', 'Running'))\n\"\"\"\n\nRELEASE_STEP_CLAIM",
            "    AND (status IS NULL OR status NOT IN ('Succeeded', 'Skipped'))\n"
            '"""\n\nRELEASE_STEP_CLAIM',
        )
    ],
)
async def failed_step_can_be_claimed(url: str) -> None:
    """A claim on a Failed step succeeds, as if Failed were not terminal."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await new_step(store, run_id, status=StepStatus.FAILED)
        assert not await store.try_claim_step(run_id, "charge", owner="a")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-3",),
    changes=[
        (
            CLAIMS,
            "claim_token = excluded.claim_token, started_owner = NULL",
            "claim_token = excluded.claim_token",
        )
    ],
)
async def second_claim_of_an_owner_continues_its_old_attempt(url: str) -> None:
    """An owner that claims again after its lease ended gets the number of its old attempt."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        await store.record_step_start(run_id, "charge", "http", owner="a")
        clock.advance(seconds=5)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        assert await store.record_step_start(run_id, "charge", "http", owner="a") == 2


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-5",),
    changes=[
        (
            CLAIMS,
            "OR expires_at <= excluded.claimed_at)",
            "OR expires_at <= excluded.claimed_at OR claim_owner = excluded.claim_owner)",
        )
    ],
)
async def repeated_claim_starts_a_new_claim(url: str) -> None:
    """A repeated claim of the owner replaces its claim instead of changing nothing."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        (before,) = await store.get_step_claims(run_id)
        clock.advance(seconds=1)
        await store.try_claim_step(run_id, "charge", owner="a")
        assert list(await store.get_step_claims(run_id)) == [before]


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-4",),
    changes=[
        (
            CLAIMS,
            "return not step.run_is_terminal and not step.is_terminal and",
            "return not step.is_terminal and",
        )
    ],
)
async def owner_keeps_winning_on_an_ended_run(url: str) -> None:
    """The owner of a claim gets True again after the run has ended."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.complete_run(run_id, RunStatus.CANCELLED)
        assert not await store.try_claim_step(run_id, "charge", owner="a")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("STP-3", "CLM-3"),
    changes=[
        (
            CLAIMS,
            "UPDATE steps SET claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND claim_owner = ?",
            "UPDATE steps SET claimed_at = NULL, expires_at = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND claim_owner = ?",
        )
    ],
)
async def released_claim_keeps_its_owner(url: str) -> None:
    """Releasing a claim leaves its owner in the row, so the owner may start the step without a claim."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.release_step_claim(run_id, "charge", owner="a")
        start = store.record_step_start(run_id, "charge", "http", owner="a")
        assert await error_of(start) is ClaimLostError


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-3",),
    changes=[
        (
            CLAIMS,
            "WHERE run_id = ? AND step_key = ? AND claimed_at IS NOT NULL",
            "WHERE run_id = ? AND step_key = ? AND claimed_at IS NOT NULL AND claim_owner IS NULL",
        )
    ],
)
async def release_without_owner_spares_owned_claims(url: str) -> None:
    """Releasing without an owner removes only claims without an owner."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.release_step_claim(run_id, "charge")
        assert await store.try_claim_step(run_id, "charge", owner="b")


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[(CLAIMS, "SET expires_at = MAX(expires_at, :until)", "SET expires_at = :until")],
)
async def renewal_shortens_a_lease(url: str) -> None:
    """Renewing a claim for a shorter time than is left shortens its lease."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=timedelta(hours=1))
        await store.renew_step_claim(run_id, "charge", "a", FIVE_SECONDS)
        (claim,) = await store.get_step_claims(run_id)
        assert claim.expires_at == clock() + timedelta(hours=1)


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[(CLAIMS, "expires_at > :now", "expires_at >= :now")],
)
async def lease_that_ends_now_can_be_renewed(url: str) -> None:
    """A claim whose lease ends exactly now can still be renewed."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        assert not await store.renew_step_claim(run_id, "charge", "a", FIVE_SECONDS)


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-6",),
    changes=[(CLAIMS, "expires_at > :now", "(expires_at IS NULL OR expires_at > :now)")],
)
async def claim_without_lease_can_be_renewed(url: str) -> None:
    """Renewing a claim without lease is True, although it has no lease to extend."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        assert not await store.renew_step_claim(run_id, "charge", "a", FIVE_SECONDS)


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-4",),
    changes=[
        (
            CLAIMS,
            "WHERE run_id = ? AND claimed_at IS NOT NULL AND (expires_at IS NULL OR expires_at > ?)",
            "WHERE run_id = ? AND claimed_at IS NOT NULL AND (expires_at IS NULL OR expires_at >= ?)",
        )
    ],
)
async def claimed_keys_include_a_lease_that_ends_now(url: str) -> None:
    """get_claimed_step_keys lists a claim whose lease ends exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        assert await store.get_claimed_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("QRY-1",),
    changes=[
        (
            CLAIMS,
            "WHERE run_id = ? AND claimed_at IS NOT NULL ORDER BY step_key",
            "WHERE run_id = ? AND claimed_at IS NOT NULL ORDER BY claimed_at",
        )
    ],
)
async def claims_are_ordered_by_time(url: str) -> None:
    """get_step_claims lists claims by their time instead of their step_key."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for step_key in ("ship", "charge"):
            await store.try_claim_step(run_id, step_key)
            clock.advance(seconds=1)
        assert [claim.step_key for claim in await store.get_step_claims(run_id)] == ["charge", "ship"]


@source_mutant(
    "sqlite",
    kind="encoding",
    clauses=("QRY-1",),
    changes=[
        (
            CLAIMS,
            "WHERE run_id = ? AND dispatched_at IS NOT NULL ORDER BY step_key",
            "WHERE run_id = ? AND dispatched_at IS NOT NULL ORDER BY step_key COLLATE NOCASE",
        )
    ],
)
async def dispatches_are_ordered_without_case(url: str) -> None:
    """get_dispatches orders step keys without regard to case, instead of by code point."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for step_key in ("Ship", "charge"):
            await store.try_record_dispatch(run_id, step_key)
        assert [one.step_key for one in await store.get_dispatches(run_id)] == ["Ship", "charge"]


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-1",),
    changes=[
        (
            CLAIMS,
            "WHERE dispatched_at IS NULL AND (status IS NULL OR status IN ('Pending', 'Running'))",
            "WHERE dispatched_at IS NULL AND (status IS NULL OR status = 'Pending')",
        )
    ],
)
async def running_step_cannot_be_dispatched(url: str) -> None:
    """A dispatch of a Running step, whose worker may have died, is refused."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.record_step_start(run_id, "charge", "http")
        assert await store.try_record_dispatch(run_id, "charge")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("RUN-4",),
    changes=[
        (
            CLAIMS,
            "dispatched_at, due_at, dispatch_token)\n"
            "VALUES ((SELECT run_id FROM runs WHERE run_id = ? AND status = 'Running')",
            "dispatched_at, due_at, dispatch_token)\n"
            "VALUES ((SELECT run_id FROM runs WHERE run_id = ? AND status NOT IN ('Succeeded', 'Failed'))",
        )
    ],
)
async def step_of_a_cancelled_run_can_be_dispatched(url: str) -> None:
    """A step of a cancelled run can be dispatched; only Succeeded and Failed runs refuse it."""
    async with open_store(url) as store:
        run_id = await ended_run(store, RunStatus.CANCELLED)
        assert not await store.try_record_dispatch(run_id, "charge")


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-7",),
    changes=[
        (
            CLAIMS,
            "SET dispatch_job_id = ? WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL",
            "SET dispatch_job_id = ? WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL\n"
            "    AND dispatch_job_id IS NULL",
        )
    ],
)
async def dispatch_keeps_its_first_annotation(url: str) -> None:
    """A second annotate_dispatch of a dispatch changes nothing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        for job_id in ("first", "second"):
            await store.annotate_dispatch(run_id, "charge", job_id)
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id == "second"


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "return to_us(lease_end(from_us(now), lease))",
            "return min(now + int(lease.total_seconds()) * 1_000_000, to_us(lease_end(from_us(now), lease)))",
        )
    ],
)
async def lease_is_cut_to_whole_seconds(url: str) -> None:
    """The fraction of a second of a lease is dropped."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=timedelta(seconds=1.5))
        clock.advance(seconds=1)
        assert not await store.try_claim_step(run_id, "charge", owner="b")


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("INP-3",),
    changes=[
        (
            CLAIMS,
            "return to_us(lease_end(from_us(now), lease))",
            "return now + lease // timedelta(microseconds=1)",
        )
    ],
)
async def lease_is_not_capped(url: str) -> None:
    """A lease may end after the last datetime that the contract allows."""
    clock = VirtualClock(datetime(9999, 12, 29, tzinfo=UTC))
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=timedelta(days=2))
        (claim,) = await store.get_step_claims(run_id)
        assert claim.expires_at == LATEST


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (CLAIMS, "    claim_token = excluded.claim_token, started_owner = NULL", "    started_owner = NULL")
    ],
)
async def claim_of_a_dispatched_key_is_not_compensated(url: str) -> None:
    """A claim on a key that has a row already stores no token, so its compensation finds nothing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        with write_lock(url):
            claim = await begin(store.try_claim_step(run_id, "charge"))
            claim.cancel()
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (CLAIMS, "await self._remove_own(COMPENSATE_DISPATCH)", "await self._remove_own(COMPENSATE_CLAIM)")
    ],
)
async def dispatch_is_compensated_like_a_claim(url: str) -> None:
    """The compensation of a cancelled dispatch looks for a claim, so the dispatch stays."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            dispatch = await begin(store.try_record_dispatch(run_id, "charge"))
            dispatch.cancel()
    async with open_store(url) as store:
        assert list(await store.get_dispatches(run_id)) == []


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            CLAIMS,
            "UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, "
            "dispatch_token = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND dispatch_token = ?",
            "UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, "
            "dispatch_token = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND dispatch_token IS NOT NULL AND ? IS NOT NULL",
        )
    ],
)
async def compensation_removes_the_dispatch_of_another_call(url: str) -> None:
    """The compensation of a cancelled dispatch removes whatever dispatch is recorded by then."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            cancelled = await begin(store.try_record_dispatch(run_id, "charge"))
            release = await begin(store.release_dispatch(run_id, "charge"))
            other = await begin(store.try_record_dispatch(run_id, "charge"))
            cancelled.cancel()
        await release
        assert await other
    async with open_store(url) as store:
        assert await store.get_dispatched_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[(CLAIMS, "self.token = next(_tokens)", "self.token = hash((run_id, step_key))")],
)
async def calls_for_one_step_share_a_token(url: str) -> None:
    """The token of a claim depends only on the step, so a compensation removes another call's claim."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            cancelled = await begin(store.try_claim_step(run_id, "charge"))
            release = await begin(store.release_step_claim(run_id, "charge"))
            other = await begin(store.try_claim_step(run_id, "charge"))
            cancelled.cancel()
        await release
        assert await other
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[(CLAIMS, "await self.database.write_while_closing(", "await self.database.write(")],
)
async def compensation_stops_when_the_store_closes(url: str) -> None:
    """A store that is closing refuses the compensation of a cancelled claim."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        with write_lock(url):
            claim = await begin(store.try_claim_step(run_id, "charge"))
            claim.cancel()
            closing = await begin(store.aclose())
        await closing
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == frozenset()


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-6", "CLM-1"),
    changes=[
        (
            CLAIMS,
            "claimed_at = excluded.claimed_at, expires_at = excluded.expires_at, claim_owner",
            "claimed_at = excluded.claimed_at, claim_owner",
        )
    ],
)
async def second_claim_keeps_the_lease_of_the_first(url: str) -> None:
    """A claim that replaces an expired one keeps its expires_at, so a third claimant wins as well."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=5)
        await store.try_claim_step(run_id, "charge", owner="b", lease=FIVE_SECONDS)
        assert not await store.try_claim_step(run_id, "charge", owner="c", lease=FIVE_SECONDS)


@source_mutant(
    "sqlite",
    kind="connection",
    clauses=("CLM-7",),
    changes=[
        (CLAIMS, "except StoreUnavailableError as error:", "except OutcomeUnknownError as error:"),
    ],
)
async def annotation_fails_while_the_file_is_locked(url: str) -> None:
    """annotate_dispatch raises when the write lock does not become free."""
    async with open_store(url, busy_timeout=0) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        with write_lock(url):
            assert await error_of(store.annotate_dispatch(run_id, "charge", "job")) is None


@source_mutant(
    "sqlite",
    kind="cache",
    clauses=("CLM-1", "CLM-2", "CLM-3"),
    changes=[
        (
            CLAIMS,
            "    expires_at = None if lease is None else lease_end_us(lease, now)\n    row =",
            "    if (run_id, step_key) in _lost:\n        return False\n"
            "    expires_at = None if lease is None else lease_end_us(lease, now)\n    row =",
        ),
        (
            CLAIMS,
            "    return not step.run_is_terminal and not step.is_terminal and step.claim_owner == owner\n",
            "    if step.claim_owner == owner:\n"
            "        return not step.run_is_terminal and not step.is_terminal\n"
            "    _lost.add((run_id, step_key))\n    return False\n",
        ),
        (CLAIMS, "class Claims", "_lost: set[tuple[UUID, str]] = set()\n\n\nclass Claims"),
    ],
)
async def lost_claim_is_remembered(url: str) -> None:
    """A process caches a failed claim, although another process released the step."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.try_claim_step(run_id, "charge", owner="b")
        with raw_connection(url) as other_process:
            other_process.execute("UPDATE steps SET claimed_at = NULL, claim_owner = NULL")
        assert await store.try_claim_step(run_id, "charge", owner="b")


@source_mutant(
    "sqlite",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "SET expires_at = MAX(expires_at, :until)",
            "SET expires_at = CASE WHEN expires_at - :now > (:until - :now) / 2 THEN expires_at "
            "ELSE :until END",
        )
    ],
)
async def early_renewal_extends_nothing(url: str) -> None:
    """A renewal during the first half of a lease is True and does not extend the lease."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "charge", owner="a", lease=FIVE_SECONDS)
        clock.advance(seconds=1)
        await store.renew_step_claim(run_id, "charge", "a", FIVE_SECONDS)
        (claim,) = await store.get_step_claims(run_id)
        assert claim.expires_at == clock() + FIVE_SECONDS


@source_mutant(
    "sqlite",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            CLAIMS,
            "UPDATE steps SET claimed_at = NULL, expires_at = NULL, claim_owner = NULL, claim_token = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND claim_token = ?",
            "DELETE FROM steps WHERE run_id = ? AND step_key = ? AND claim_token = ?",
        )
    ],
)
async def compensation_of_a_claim_removes_the_dispatch(url: str) -> None:
    """The compensation of a cancelled claim deletes the row of the step, its dispatch included."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        with write_lock(url):
            claim = await begin(store.try_claim_step(run_id, "charge"))
            claim.cancel()
    async with open_store(url) as store:
        assert await store.get_dispatched_step_keys(run_id) == {"charge"}


@source_mutant(
    "sqlite",
    kind="sql",
    clauses=("CLM-3",),
    changes=[
        (
            CLAIMS,
            "UPDATE steps SET dispatched_at = NULL, due_at = NULL, dispatch_job_id = NULL, "
            "dispatch_token = NULL\n"
            "WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL",
            "DELETE FROM steps WHERE run_id = ? AND step_key = ? AND dispatched_at IS NOT NULL\n"
            "    AND status IS NULL",
        )
    ],
)
async def released_dispatch_takes_the_claim(url: str) -> None:
    """Releasing the dispatch of an unstarted key deletes its row, its claim included."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "charge")
        await store.try_claim_step(run_id, "charge", owner="a")
        await store.release_dispatch(run_id, "charge")
        assert await store.get_claimed_step_keys(run_id) == {"charge"}
