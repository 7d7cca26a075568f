"""Faults of claims and the dispatch ledger on PostgreSQL."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from flowstore_core import StepStatus, open_store
from flowstore_core.timeseries import LATEST
from tests.calls import new_run
from tests.source_mutants import source_mutant
from tests.source_mutants.postgres_setup import (
    connection,
    end,
    finish,
    outcome,
    outcomes,
    send,
    wait_until_blocked,
)
from tests.virtual_clock import VirtualClock

CLAIMS = "flowstore_postgres/claims.py"
FLAGS = "flowstore_postgres/batch_statement.py"
PLACEHOLDERS = "flowstore_postgres/sql_placeholders.py"
LEASE = timedelta(seconds=5)
KEYS = [f"key-{n:02}" for n in range(20)]


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "AND (s.claimed_at IS NULL OR s.claim_expires_at <= excluded.claimed_at",
            "AND (s.claimed_at IS NULL OR s.claim_expires_at < excluded.claimed_at",
        )
    ],
)
async def lease_blocks_at_its_end(url: str) -> None:
    """A claim whose lease ends exactly now cannot be taken yet."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        assert await store.try_claim_step(run_id, "a", owner="two"), "the ended lease blocks"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-6",),
    changes=[(CLAIMS, "WHEN claim_expires_at <= began THEN NULL", "WHEN claim_expires_at < began THEN NULL")],
)
async def batch_misses_a_lease_that_ends_now(url: str) -> None:
    """A batch of claims does not try a step whose lease ends exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        for key in KEYS:
            assert await store.try_claim_step(run_id, key, owner="one", lease=LEASE)
        clock.advance(seconds=5)
        won = await outcomes([store.try_claim_step(run_id, key, owner="two") for key in KEYS])
        assert won == [True] * len(KEYS), "an ended lease blocks in a batch"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-1", "CLM-3", "STP-7"),
    changes=[
        (
            CLAIMS,
            "WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running'))\n  AND (s.claimed_at",
            "WHERE (s.status IS NULL OR s.status IN ('Running'))\n  AND (s.claimed_at",
        )
    ],
)
async def pending_step_cannot_be_claimed(url: str) -> None:
    """A step that waits for its next poll is free, and every claim of it is lost."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        attempt = await store.record_step_start(run_id, "a", "poll")
        await store.reschedule_step(run_id, "a", attempt=attempt)
        assert await store.try_claim_step(run_id, "a"), "a free Pending step cannot be claimed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("RUN-4", "CLM-1"),
    changes=[
        (
            CLAIMS,
            "WHERE (s.status IS NULL OR s.status IN ('Pending', 'Running')) AND s.dispatched_at IS NULL",
            "WHERE s.status IS DISTINCT FROM 'Succeeded' AND s.dispatched_at IS NULL",
        )
    ],
)
async def failed_step_is_dispatched(url: str) -> None:
    """A Failed or Skipped step can be dispatched."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.FAILED)
        assert not await store.try_record_dispatch(run_id, "a"), "a terminal step is dispatched"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (PLACEHOLDERS, "return duration // MICROSECOND", "return int(duration.total_seconds()) * 1_000_000")
    ],
)
async def lease_loses_its_fraction_of_a_second(url: str) -> None:
    """A lease is cut to whole seconds."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=timedelta(seconds=1.5))
        (claim,) = await store.get_step_claims(run_id)
        assert claim.expires_at == clock.now + timedelta(seconds=1.5), "the lease was cut"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            PLACEHOLDERS,
            "return duration // MICROSECOND",
            "return duration.seconds * 1_000_000 + duration.microseconds",
        )
    ],
)
async def lease_loses_its_days(url: str) -> None:
    """A lease of more than a day loses its days."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=timedelta(days=2, seconds=1))
        (claim,) = await store.get_step_claims(run_id)
        assert claim.expires_at == clock.now + timedelta(days=2, seconds=1), "the days of the lease are lost"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("INP-3", "CLM-6"),
    changes=[
        (
            CLAIMS,
            "THEN now + $6 * {microsecond}\n            ELSE {latest} END, has_bound",
            "THEN now + $6 * {microsecond}\n            ELSE now + $6 * {microsecond} END, has_bound",
        )
    ],
)
async def lease_ends_after_the_last_datetime(url: str) -> None:
    """The end of a lease is not capped at the last allowed datetime."""
    clock = VirtualClock(datetime(9999, 12, 29, tzinfo=UTC))
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        assert await store.try_claim_step(run_id, "a", owner="one", lease=timedelta(days=2))
        found = await outcome(store.get_step_claims(run_id))
        assert isinstance(found, tuple), "the claims cannot be read"
        assert found[0].expires_at == LATEST, "the lease ends too late"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("STP-3",),
    changes=[(CLAIMS, "THEN s.started_owner END", "THEN s.started_owner ELSE s.started_owner END")],
)
async def new_claim_keeps_the_memory_of_the_start(url: str) -> None:
    """A token that claims again after its lease gets its old attempt instead of a new one."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        assert await store.record_step_start(run_id, "a", "task", owner="one") == 1
        clock.advance(seconds=6)
        assert await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        attempt = await store.record_step_start(run_id, "a", "task", owner="one")
        assert attempt == 2, "the start under the new claim repeats the old attempt"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-5", "CLM-6"),
    changes=[
        (
            CLAIMS,
            "THEN s.claim_expires_at ELSE excluded.claim_expires_at END",
            "THEN greatest(s.claim_expires_at, excluded.claim_expires_at) ELSE excluded.claim_expires_at END",
        )
    ],
)
async def repeated_claim_extends_its_lease(url: str) -> None:
    """The owner of a live claim extends its lease by claiming again."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        (before,) = await store.get_step_claims(run_id)
        clock.advance(seconds=2)
        assert await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        (after,) = await store.get_step_claims(run_id)
        assert after == before, "a repeated claim changes the claim"


@source_mutant(
    "postgresql",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (CLAIMS, "AND claim_token = to_hex($3::bigint) RETURNING true", "AND $3::bigint > 0 RETURNING true")
    ],
)
async def compensation_releases_the_claim_of_another_call(url: str) -> None:
    """A cancelled claim releases the claim of the call that won the step."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        assert await store.try_claim_step(run_id, "a")
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            losing = asyncio.ensure_future(store.try_claim_step(run_id, "a"))
            await send(losing)
            losing.cancel()
            await asyncio.wait([losing])
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == {"a"}, "the winner's claim was released"


@source_mutant(
    "postgresql",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            CLAIMS,
            "AND dispatch_token = $3 AND dispatched_at IS NOT NULL RETURNING true",
            "AND $3::bigint > 0 AND dispatched_at IS NOT NULL RETURNING true",
        )
    ],
)
async def compensation_releases_the_dispatch_of_another_call(url: str) -> None:
    """A cancelled dispatch releases the dispatch of the call that won the step."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        assert await store.try_record_dispatch(run_id, "a")
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            losing = asyncio.ensure_future(store.try_record_dispatch(run_id, "a"))
            await send(losing)
            losing.cancel()
            await asyncio.wait([losing])
    async with open_store(url) as store:
        assert await store.get_dispatched_step_keys(run_id) == {"a"}, "the winner's dispatch was released"


@source_mutant(
    "postgresql",
    kind="cancellation",
    clauses=("CON-4",),
    changes=[
        (
            CLAIMS,
            "        elif result.won:\n            await self._database.compensate(sql, *key)\n",
            "",
        )
    ],
)
async def known_outcome_is_not_compensated(url: str) -> None:
    """A cancelled claim that was won is released only if its outcome was unknown at first."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            claims = [asyncio.ensure_future(store.try_claim_step(run_id, key)) for key in KEYS]
            await wait_until_blocked(url, other)
            for one in claims:
                one.cancel()
            await asyncio.wait(claims)
    async with open_store(url) as store:
        assert await store.get_claimed_step_keys(run_id) == frozenset(), "a cancelled claim is kept"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-3",),
    changes=[
        (
            CLAIMS,
            "AND (a.owner IS NULL OR claim_owned AND claim_token = a.owner)",
            "AND (a.owner IS NULL OR claim_owned)",
        )
    ],
)
async def owner_releases_the_claim_of_another_owner(url: str) -> None:
    """A release with an owner also releases the claim of another owner."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one")
        await store.release_step_claim(run_id, "a", owner="two")
        assert await store.get_claimed_step_keys(run_id) == {"a"}, "another owner released the claim"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "SET claim_expires_at = greatest(claim_expires_at, CASE",
            "SET claim_expires_at = coalesce(CASE",
        )
    ],
)
async def renewal_shortens_a_lease(url: str) -> None:
    """Renewing with a shorter lease shortens the claim."""
    async with open_store(url, clock=VirtualClock()) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=timedelta(minutes=5))
        (before,) = await store.get_step_claims(run_id)
        assert await store.renew_step_claim(run_id, "a", "one", timedelta(seconds=1))
        assert await store.get_step_claims(run_id) == (before,), "the renewal shortened the lease"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "AND claim_expires_at > coalesce($2, clock_timestamp())\n    RETURNING n",
            "AND claim_expires_at >= coalesce($2, clock_timestamp())\n    RETURNING n",
        )
    ],
)
async def ended_lease_is_renewed(url: str) -> None:
    """A claim can be renewed at the moment at which its lease has ended."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        assert not await store.renew_step_claim(run_id, "a", "one", LEASE), "an ended lease is renewed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "AND claim_token = a.owner AND claim_expires_at > coalesce($2, clock_timestamp())",
            "AND claim_token = a.owner AND (claim_expires_at > coalesce($2, clock_timestamp())) IS NOT false",
        )
    ],
)
async def claim_without_lease_is_renewed(url: str) -> None:
    """Renewing a claim without a lease is True and gives it a lease."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one")
        assert not await store.renew_step_claim(run_id, "a", "one", LEASE), "a claim without lease is renewed"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-6", "CON-1"),
    changes=[
        (
            CLAIMS,
            "AND s.run_id = a.run_id AND s.step_key = a.step_key AND claim_owned\n",
            "AND s.run_id = a.run_id AND claim_owned\n",
        )
    ],
)
async def renewal_extends_every_claim_of_the_owner(url: str) -> None:
    """A renewal extends every claim that its owner holds in the run."""
    async with open_store(url, clock=VirtualClock()) as store:
        run_id = await new_run(store)
        for key in ("a", "b"):
            await store.try_claim_step(run_id, key, owner="one", lease=LEASE)
        _, before = await store.get_step_claims(run_id)
        await store.renew_step_claim(run_id, "a", "one", timedelta(minutes=5))
        _, after = await store.get_step_claims(run_id)
        assert after == before, "the claim of another step was renewed"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-6", "CON-1"),
    changes=[
        (
            FLAGS,
            "return [n in written for n in range(1, len(rows) + 1)]",
            "return [n in written for n in range(len(rows))]",
        )
    ],
)
async def results_of_a_batch_are_shifted(url: str) -> None:
    """In a batch in which some rows are not written, each caller gets the result of its neighbour."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        for key in KEYS[::2]:
            await store.try_claim_step(run_id, key, owner="one", lease=LEASE)
        renewed = await outcomes([store.renew_step_claim(run_id, key, "one", LEASE) for key in KEYS])
        assert renewed == [True, False] * 10, "a renewal gets another call's result"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-1", "CON-1"),
    changes=[(CLAIMS, "CLAIMED if row[:2] in keys else", "CLAIMED if row[1] in {k for _, k in keys} else")],
)
async def batch_decodes_claims_by_step_key_alone(url: str) -> None:
    """A failed claim returns True if its batch claimed the same step key in another run."""
    async with open_store(url) as store:
        runs = [await new_run(store) for _ in range(20)]
        for run_id in runs[::2]:
            assert await store.try_claim_step(run_id, "a", owner="one")
        won = await outcomes([store.try_claim_step(run_id, "a", owner="two") for run_id in runs])
        assert won == [False, True] * 10, "a claim that another owner holds is won"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-1", "CLM-5"),
    changes=[
        (
            CLAIMS,
            "return ALREADY_CLAIMED if owner is None or owner != first[2] else result",
            "return ALREADY_CLAIMED if owner != first[2] else result",
        )
    ],
)
async def claims_without_owner_share_a_win(url: str) -> None:
    """Concurrent claims of one step without owner all win when they share a batch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        won = await outcomes([store.try_claim_step(run_id, "a") for _ in range(20)])
        assert won.count(True) == 1, "several claims of one step are won"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-1",),
    changes=[(CLAIMS, "return ALREADY_CLAIMED if result.won else result", "return result")],
)
async def dispatches_share_a_win(url: str) -> None:
    """Concurrent dispatches of one step all win when they share a batch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        won = await outcomes([store.try_record_dispatch(run_id, "a") for _ in range(20)])
        assert won.count(True) == 1, "several dispatches of one step are won"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-5",),
    changes=[
        (
            CLAIMS,
            "return requeue if result.holder is None or owner == result.holder else ALREADY_CLAIMED",
            "return ALREADY_CLAIMED",
        )
    ],
)
async def batch_refuses_the_owner_behind_a_loser(url: str) -> None:
    """The owner of a live claim loses if another caller's claim comes before its own in a batch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="holder")
        # The first call is sent alone, the others wait for a batch.
        owners = ["rival", "rival", "holder"] * 7
        won = await outcomes([store.try_claim_step(run_id, "a", owner=one) for one in owners])
        assert won == [False, False, True] * 7, "the owner of the claim loses"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("RUN-4", "UNK", "CLM-1"),
    changes=[
        (
            CLAIMS,
            "    if result.open is None:\n        raise RunNotFound",
            "    if not result.open:\n        raise RunNotFound",
        )
    ],
)
async def claim_on_a_terminal_run_raises(url: str) -> None:
    """A claim on a terminal run raises RunNotFoundError instead of losing."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await end(store, run_id)
        assert await outcome(store.try_claim_step(run_id, "a")) is False, "the claim raises"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "(SELECT coalesce($2, clock_timestamp()) AS now WHERE run.run_id = $3) locked\n"
            "WHERE clock_timestamp() < $1\n{claim_if_free}",
            "(SELECT coalesce($2, statement_timestamp()) AS now WHERE run.run_id = $3) locked\n"
            "WHERE clock_timestamp() < $1\n{claim_if_free}",
        )
    ],
)
async def lease_begins_before_the_wait(url: str) -> None:
    """A lease begins when the claim is sent, so the time that the claim waits for a lock shortens it."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            claiming = asyncio.ensure_future(store.try_claim_step(run_id, "a", owner="one", lease=LEASE))
            await wait_until_blocked(url, other)
            unlocked = await other.fetchval("SELECT clock_timestamp()")
        assert await claiming
        (claim,) = await store.get_step_claims(run_id)
        assert claim.claimed_at >= unlocked, "the lease began during the wait"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-6",),
    changes=[
        (
            CLAIMS,
            "           coalesce($2, clock_timestamp()) AS now,\n           (SELECT CASE WHEN status",
            "           began AS now,\n           (SELECT CASE WHEN status",
        )
    ],
)
async def lease_of_a_batch_begins_before_the_wait(url: str) -> None:
    """The leases of a batch begin when it is sent, before it waits for the lock of its run."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute("SELECT FROM runs WHERE run_id = $1 FOR UPDATE", run_id)
            claims = [
                asyncio.ensure_future(store.try_claim_step(run_id, key, owner="one", lease=LEASE))
                for key in KEYS
            ]
            await wait_until_blocked(url, other)
            unlocked = await other.fetchval("SELECT clock_timestamp()")
        assert all(await asyncio.gather(*claims))
        began = [claim.claimed_at for claim in await store.get_step_claims(run_id)]
        assert min(began) >= unlocked, "a lease of the batch began during the wait"


@source_mutant(
    "postgresql",
    kind="time",
    clauses=("CLM-4",),
    changes=[
        (
            CLAIMS,
            "claim_expires_at > coalesce($2, clock_timestamp()))\n  AND (status IS NULL",
            "claim_expires_at >= coalesce($2, clock_timestamp()))\n  AND (status IS NULL",
        )
    ],
)
async def claimed_keys_show_an_ended_lease(url: str) -> None:
    """get_claimed_step_keys shows a claim whose lease ends exactly now."""
    clock = VirtualClock()
    async with open_store(url, clock=clock) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a", owner="one", lease=LEASE)
        clock.advance(seconds=5)
        assert await store.get_claimed_step_keys(run_id) == frozenset(), "an ended claim is shown"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-4",),
    changes=[
        (
            CLAIMS,
            "  AND (status IS NULL OR status IN ('Pending', 'Running'))\n",
            "  AND (status IS NULL OR status = 'Running')\n",
        )
    ],
)
async def claimed_keys_omit_pending_steps(url: str) -> None:
    """get_claimed_step_keys omits claims of Pending steps."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await finish(store, run_id, "a", StepStatus.PENDING)
        await store.try_claim_step(run_id, "a", owner="one")
        assert await store.get_claimed_step_keys(run_id) == {"a"}, "the claim of a Pending step is omitted"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-5",),
    changes=[
        (CLAIMS, 'owner=row["claim_token"] if row["claim_owned"] else None', 'owner=row["claim_token"]')
    ],
)
async def claim_without_owner_shows_a_token(url: str) -> None:
    """A claim without owner shows the store's internal token as its owner."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a")
        (claim,) = await store.get_step_claims(run_id)
        assert claim.owner is None, "an owner is shown that nobody gave"


@source_mutant(
    "postgresql",
    kind="size",
    clauses=("CLM-4", "CLM-2"),
    changes=[
        (
            CLAIMS,
            "WHERE run_id = $1 AND claimed_at IS NOT NULL ORDER BY step_key\n",
            "WHERE run_id = $1 AND claimed_at IS NOT NULL ORDER BY step_key LIMIT 1000\n",
        )
    ],
)
async def claims_beyond_a_thousand_are_cut_off(url: str) -> None:
    """get_step_claims returns at most 1,000 claims."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        assert all(await outcomes([store.try_claim_step(run_id, f"{n}") for n in range(1001)]))
        assert len(await store.get_step_claims(run_id)) == 1001, "claims are missing"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-7",),
    changes=[
        (
            CLAIMS,
            "AND run_id = $3 AND step_key = $4 AND dispatched_at IS NOT NULL\nRETURNING true AS done",
            "AND run_id = $3 AND step_key = $4\nRETURNING true AS done",
        )
    ],
)
async def annotation_waits_for_the_next_dispatch(url: str) -> None:
    """The job id of a key that is not dispatched shows up in its next dispatch."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_claim_step(run_id, "a")
        await store.annotate_dispatch(run_id, "a", "job-1")
        await store.try_record_dispatch(run_id, "a")
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id is None, "the new dispatch has the job id of an earlier call"


@source_mutant(
    "postgresql",
    kind="connection",
    clauses=("CLM-7",),
    changes=[
        (
            CLAIMS,
            "        except StoreUnavailableError as error:",
            "        except OutcomeUnknownError as error:",
        )
    ],
)
async def annotation_raises_when_the_store_is_unavailable(url: str) -> None:
    """annotate_dispatch raises StoreUnavailableError instead of logging it."""
    async with (
        open_store(url, statement_timeout=2, retry_timeout=2) as store,
        connection(url) as other,
    ):
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        async with other.transaction():
            await other.execute("SELECT FROM steps WHERE run_id = $1 FOR UPDATE", run_id)
            assert await outcome(store.annotate_dispatch(run_id, "a", "job-1")) is None, "the call raises"


@source_mutant(
    "postgresql",
    kind="sql",
    clauses=("CLM-3",),
    changes=[
        (
            CLAIMS,
            "s SET {no_dispatch}\n    FROM guard",
            "s SET dispatched_at = NULL, due_at = NULL, dispatch_queue = NULL, dispatch_priority = NULL,\n"
            "        dispatch_step_type = NULL, dispatch_input_json = NULL\n    FROM guard",
        ),
    ],
)
async def released_dispatch_keeps_job_id(url: str) -> None:
    """A dispatch recorded after a release shows the job id of the released one."""
    async with open_store(url) as store:
        run_id = await new_run(store)
        await store.try_record_dispatch(run_id, "a")
        await store.annotate_dispatch(run_id, "a", "job-1")
        await store.release_dispatch(run_id, "a")
        await store.try_record_dispatch(run_id, "a")
        (dispatch,) = await store.get_dispatches(run_id)
        assert dispatch.job_id is None, "the new dispatch has the old job id"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RUN-4", "CON-1", "CLM-1"),
    changes=[
        (
            CLAIMS,
            "ELSE {latest} END, has_bound\n"
            "FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound\n      "
            "FROM {schema}.runs WHERE run_id = $3 AND "
            "status = 'Running' FOR SHARE) run,",
            "ELSE {latest} END, has_bound\n"
            "FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound\n      "
            "FROM {schema}.runs WHERE run_id = $3 AND "
            "status = 'Running') run,",
        )
    ],
)
async def claim_does_not_lock_its_run(url: str) -> None:
    """A claim reads the status of its run without a lock, and wins while the run is being completed."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute(
                "UPDATE runs SET status = 'Succeeded', completed_at = now() WHERE run_id = $1", run_id
            )
            claiming = asyncio.ensure_future(store.try_claim_step(run_id, "a"))
            await wait_until_blocked(url, other, claiming)
        assert not await claiming, "a claim is won after the run has ended"


@source_mutant(
    "postgresql",
    kind="concurrency",
    clauses=("RUN-4", "RUN-2", "CON-1", "CLM-1"),
    changes=[
        (
            CLAIMS,
            "$5, now, $6, has_bound\n"
            "FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound\n      "
            "FROM {schema}.runs WHERE run_id = $3 AND "
            "status = 'Running' FOR SHARE) run,",
            "$5, now, $6, has_bound\n"
            "FROM (SELECT run_id, stall_bound > '-infinity' AS has_bound\n      "
            "FROM {schema}.runs WHERE run_id = $3 AND "
            "status = 'Running') run,",
        )
    ],
)
async def dispatch_does_not_lock_its_run(url: str) -> None:
    """A dispatch reads the status of its run without a lock, and wins while the run is being completed."""
    async with open_store(url) as store, connection(url) as other:
        run_id = await new_run(store)
        async with other.transaction():
            await other.execute(
                "UPDATE runs SET status = 'Succeeded', completed_at = now() WHERE run_id = $1", run_id
            )
            dispatching = asyncio.ensure_future(store.try_record_dispatch(run_id, "a"))
            await wait_until_blocked(url, other, dispatching)
        assert not await dispatching, "a dispatch is recorded after the run has ended"


@source_mutant(
    "postgresql",
    kind="batching",
    clauses=("CLM-1", "CON-1"),
    changes=[
        (
            "flowstore_postgres/batch_writer.py",
            "return operation.submit((row[0].int, row[1]), row, on_abandoned)\n\n    async def",
            "return operation.submit((0, row[1]), row, on_abandoned)\n\n    async def",
        )
    ],
)
async def calls_are_grouped_without_their_run(url: str) -> None:
    """Concurrent calls on one step key in different runs count as calls on one step."""
    async with open_store(url) as store:
        runs = [await new_run(store) for _ in range(20)]
        won = await outcomes([store.try_claim_step(run_id, "a") for run_id in runs])
        assert won == [True] * 20, "a free step of another run is lost"
