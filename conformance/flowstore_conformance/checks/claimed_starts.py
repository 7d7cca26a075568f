"""CLM-8: claiming a step and starting its attempt in one call."""

from __future__ import annotations

from collections.abc import Awaitable
from uuid import UUID

from flowstore_conformance.checks.example_checks import example
from flowstore_conformance.checks.fixtures import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    TERMINAL_RUN_STATUSES,
    TERMINAL_STEP_STATUSES,
    advance,
    assert_same,
    call_at_once,
    expect_fields,
    get_run,
    get_step,
    new_id,
    now,
    observe,
    outcome_of,
    run_step,
    second_store,
    single,
    skip_steps,
    start,
)
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import (
    Capability,
    ClaimLostError,
    FlowStoreError,
    RunNotFoundError,
    RunStatus,
    StaleAttemptError,
    StepDispatch,
    StepStatus,
)
from flowstore_core.steps import superseded_by

LEASES = [Capability.LEASES]
LEASED = [Capability.LEASES, Capability.VIRTUAL_CLOCK]
QUEUED = [Capability.LEASES, Capability.QUEUES]


async def _expect_refused(context: CheckContext, run_id: UUID, step_key: str, owner: str, why: str) -> None:
    """Expect None, and that nothing changes."""
    before = await observe(context, run_id)
    answer = await outcome_of(
        context.store.try_start_step(run_id, step_key, "other", owner=owner, lease=DAY, input_json="[]")
    )
    context.expect(answer, None, f"try_start_step of {why}")
    assert_same(context, await observe(context, run_id), before, f"a refused try_start_step of {why}")


@example("CLM-8", needs=LEASED)
async def a_new_step_is_claimed_and_started(context: CheckContext) -> None:
    """The key becomes a Running step with attempt 1, under a claim with the lease."""
    store, run_id, at = context.store, await start(context), now(context)
    attempt = await outcome_of(
        store.try_start_step(
            run_id, "charge", "http", owner="me", lease=MINUTE, input_json='{"a": 1}', job_id="job 1"
        )
    )
    context.expect(attempt, 1, "the first try_start_step of a new key")
    step = await get_step(context, run_id)
    wanted = {"step_type": "http", "status": StepStatus.RUNNING, "input_json": '{"a": 1}', "job_id": "job 1"}
    expect_fields(context, step, "the step", **wanted, started_at=at, completed_at=None, attempt_count=1)
    expect_fields(context, single(step.attempts, "the attempts"), "the attempt", **wanted, started_at=at)
    claim = single(await store.get_step_claims(run_id), "the claims")
    expect_fields(
        context, claim, "the claim", step_key="charge", owner="me", claimed_at=at, expires_at=at + MINUTE
    )
    context.expect(await store.get_dispatches(run_id), (), "the dispatches")
    other = await second_store(context)
    answer = await outcome_of(other.try_start_step(run_id, "charge", "http", owner="other", lease=MINUTE))
    context.expect(answer, None, "try_start_step through another store of a step that was just started")


@example("CLM-8", needs=LEASES)
async def the_owner_that_started_a_step_ends_it(context: CheckContext) -> None:
    """The attempt is the owner's: it may renew its claim and close the attempt, and others may not."""
    store, run_id = context.store, await start(context)
    await store.try_start_step(run_id, "charge", "http", owner="me", lease=HOUR)
    answer = await outcome_of(store.try_claim_step(run_id, "charge", owner="me"))
    context.expect(answer, True, "try_claim_step by the owner after try_start_step")
    number = await outcome_of(store.record_step_start(run_id, "charge", "http", owner="me"))
    context.expect(number, 1, "record_step_start by the owner after try_start_step: the open attempt")
    context.expect(
        await outcome_of(store.renew_step_claim(run_id, "charge", "me", DAY)), True, "renewing the claim"
    )
    call = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1, owner="other")
    await context.expect_error(call, ClaimLostError, "closing the attempt as another owner")
    call = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1, owner="me")
    context.expect(await outcome_of(call), None, "closing the attempt as its owner")


@example("CLM-8", needs=LEASED)
async def a_repeated_start_returns_the_open_attempt(context: CheckContext) -> None:
    """The owner of a live claim gets the number again; its other arguments and its lease are ignored."""
    store, run_id = context.store, await start(context)
    await store.try_start_step(run_id, "charge", "http", owner="me", lease=HOUR, input_json="1", job_id="j")
    before = await observe(context, run_id)
    advance(context, SECOND)
    for one in (store, await second_store(context)):
        for lease in (SECOND, DAY):
            again = one.try_start_step(run_id, "charge", "other", owner="me", lease=lease, input_json="2")
            context.expect(await outcome_of(again), 1, "a repeated try_start_step")
        assert_same(context, await observe(context, run_id, store=one), before, "a repeated try_start_step")


@example("CLM-8", needs=LEASED)
async def a_repeated_start_after_the_attempt_ended_is_a_new_one(context: CheckContext) -> None:
    """After Pending the owner opens the next attempt under its claim; after a terminal outcome it is None."""
    store, run_id = context.store, await start(context)
    await store.try_start_step(run_id, "charge", "http", owner="me", lease=HOUR, input_json="1", job_id="j")
    claims = await store.get_step_claims(run_id)
    await store.record_step_complete(run_id, "charge", StepStatus.PENDING, output_json="1", attempt=1)
    at = advance(context, SECOND)
    number = await outcome_of(store.try_start_step(run_id, "charge", "poll", owner="me", lease=DAY))
    context.expect(number, 2, "try_start_step by the owner after its attempt was closed as Pending")
    context.expect(await store.get_step_claims(run_id), claims, "the claim after the second attempt")
    step = await get_step(context, run_id)
    new = {"step_type": "poll", "input_json": None, "output_json": None, "job_id": None}
    expect_fields(context, step, "the step", **new, status=StepStatus.RUNNING, attempt_count=2)
    first, second = step.attempts
    expect_fields(context, first, "the first attempt", output_json="1", status=StepStatus.PENDING)
    expect_fields(context, second, "the second attempt", **new, started_at=at)
    for status in TERMINAL_STEP_STATUSES:
        await store.try_start_step(run_id, status, "http", owner="me", lease=HOUR)
        await store.record_step_complete(run_id, status, status, attempt=1, owner="me")
        await _expect_refused(context, run_id, status, "me", f"a {status} step by the owner that ended it")


@example("CLM-8", needs=LEASED)
async def after_the_lease_any_owner_starts_the_next_attempt(context: CheckContext) -> None:
    """An open attempt is closed as Failed, and its owner can neither renew nor close it; the former owner
    itself gets a new attempt too."""
    store = context.store
    for owner in ("next", "me"):
        run_id = await start(context)
        await store.try_start_step(run_id, "charge", "http", owner="me", lease=MINUTE)
        at = advance(context, MINUTE)
        number = await outcome_of(store.try_start_step(run_id, "charge", "http", owner=owner, lease=HOUR))
        context.expect(number, 2, f"try_start_step by {owner} at the end of the lease of the first owner")
        first, second = (await get_step(context, run_id)).attempts
        failed = {"status": StepStatus.FAILED, "error_message": superseded_by(2), "completed_at": at}
        expect_fields(context, first, "the attempt of the first owner", **failed)
        expect_fields(context, second, "the next attempt", status=StepStatus.RUNNING, started_at=at)
        claim = single(await store.get_step_claims(run_id), "the claims")
        expect_fields(context, claim, "the claim", owner=owner, claimed_at=at, expires_at=at + HOUR)
        call = store.record_step_complete(run_id, "charge", StepStatus.SUCCEEDED, attempt=1, owner="me")
        await context.expect_error(call, StaleAttemptError, "closing the attempt whose lease ended")
        number = await outcome_of(store.try_start_step(run_id, "charge", "http", owner=owner, lease=HOUR))
        context.expect(number, 2, f"a repeated try_start_step by {owner}")


@example("CLM-8", needs=LEASES)
async def a_refused_start_is_none_and_changes_nothing(context: CheckContext) -> None:
    """None while another owner holds the claim, on a terminal step and on a terminal run."""
    store, run_id = context.store, await start(context)
    await store.try_start_step(run_id, "started", "http", owner="me", lease=HOUR)
    await store.try_claim_step(run_id, "claimed", owner="me")
    await store.try_claim_step(run_id, "ownerless")
    for key in ("started", "claimed", "ownerless"):
        for owner in ("other", "Me", "None"):
            await _expect_refused(context, run_id, key, owner, f"the step {key!r} by {owner!r}")
    for status in TERMINAL_STEP_STATUSES:
        await run_step(context, run_id, status, status)
        await _expect_refused(context, run_id, status, "me", f"a {status} step")
    for ended in TERMINAL_RUN_STATUSES:
        run_id = await start(context)
        await store.try_start_step(run_id, "started", "http", owner="me", lease=HOUR)
        await store.complete_run(run_id, ended)
        for key in ("started", "new"):
            await _expect_refused(context, run_id, key, "me", f"the step {key!r} of a {ended} run")
    call = store.try_start_step(new_id(context), "charge", "http", owner="me", lease=HOUR)
    await context.expect_error(call, RunNotFoundError, "try_start_step of an unknown run")


@example("CLM-8", needs=LEASED)
async def a_start_under_an_own_claim_keeps_the_claim(context: CheckContext) -> None:
    """An owner that has claimed the step starts it; claim and lease stay as they are."""
    store, run_id = context.store, await start(context)
    await store.try_claim_step(run_id, "plain", owner="me")
    await store.try_claim_step(run_id, "leased", owner="me", lease=HOUR)
    await store.record_step_start(run_id, "by hand", "http")
    await store.try_claim_step(run_id, "by hand", owner="me", lease=HOUR)
    claims = await store.get_step_claims(run_id)
    advance(context, SECOND)
    for key, number in (("plain", 1), ("leased", 1), ("by hand", 2)):
        for again in ("", " again"):
            call = store.try_start_step(run_id, key, "http", owner="me", lease=DAY)
            context.expect(await outcome_of(call), number, f"starting{again} the claimed step {key!r}")
    context.expect(await store.get_step_claims(run_id), claims, "the claims after the starts")


@example("CLM-8", needs=LEASES)
async def an_open_attempt_without_a_claim_is_superseded(context: CheckContext) -> None:
    """It protects nothing; neither does the memory of an owner that has released its claim."""
    store, run_id = context.store, await start(context)
    await store.record_step_start(run_id, "by hand", "http")
    await store.try_start_step(run_id, "released", "http", owner="me", lease=HOUR)
    await store.release_step_claim(run_id, "released", owner="me")
    for key in ("by hand", "released"):
        number = await outcome_of(store.try_start_step(run_id, key, "http", owner="me", lease=HOUR))
        context.expect(number, 2, f"try_start_step of the open and unclaimed step {key!r}")
        first, _ = (await get_step(context, run_id, key)).attempts
        expect_fields(
            context, first, f"the first attempt of {key!r}", status="Failed", error_message=superseded_by(2)
        )


@example("CLM-8", needs=LEASES)
async def reopened_and_reset_steps_start_again(context: CheckContext) -> None:
    """Their attempts stay, and the number of the new one follows."""
    store, run_id = context.store, await start(context)
    await run_step(context, run_id, "failed", StepStatus.FAILED, error_message="declined")
    await skip_steps(context, run_id, "skipped")
    await store.retry_step(run_id, "failed", reset=["skipped"])
    for key, first_status in (("failed", StepStatus.FAILED), ("skipped", StepStatus.SKIPPED)):
        for again in ("", " again"):
            number = await outcome_of(store.try_start_step(run_id, key, "http", owner="me", lease=HOUR))
            context.expect(number, 2, f"try_start_step{again} of the {key} step after retry_step")
        statuses = [attempt.status for attempt in (await get_step(context, run_id, key)).attempts]
        context.expect(statuses, [first_status, StepStatus.RUNNING], f"the attempts of the {key} step")


@example("CLM-8", needs=LEASES)
async def latches_do_not_keep_a_step_from_starting(context: CheckContext) -> None:
    """Compensations run after a cancel: only the end of the run matters."""
    store, run_id = context.store, await start(context)
    await store.request_cancel(run_id, "enough")
    number = await outcome_of(store.try_start_step(run_id, "undo", "http", owner="me", lease=HOUR))
    context.expect(number, 1, "try_start_step in a run whose cancel is requested")
    await store.complete_run(run_id, RunStatus.CANCELLED)
    await _expect_refused(context, run_id, "more", "me", "a step of the cancelled run")


@example("CLM-8", needs=QUEUED)
async def a_queued_step_starts_with_the_arguments_of_the_call(context: CheckContext) -> None:
    """Its dispatch stays, and no worker gets it while the claim is live; a worker's claim counts too."""
    store, run_id = context.store, await start(context)
    queue = f"queue {run_id}"
    for key in ("a", "b"):
        await store.try_record_dispatch(run_id, key, queue=queue, step_type="queued", input_json="1")
    dispatches = await store.get_dispatches(run_id)
    number = await outcome_of(
        store.try_start_step(run_id, "a", "direct", owner="me", lease=HOUR, input_json="2")
    )
    context.expect(number, 1, "try_start_step of a queued step")
    step = await get_step(context, run_id, "a")
    expect_fields(context, step, "the step", step_type="direct", input_json="2", job_id=None)
    kept: tuple[StepDispatch, ...] = tuple(await store.get_dispatches(run_id))
    context.expect(kept, tuple(dispatches), "the dispatches after try_start_step")
    claimed = single(await store.claim_next_steps([queue], lease=HOUR, limit=10), "the steps of a worker")
    context.expect(claimed.step_key, "b", "the step of a worker beside a started one")
    again = store.try_start_step(run_id, "b", "direct", owner=claimed.owner, lease=HOUR)
    context.expect(await outcome_of(again), 1, "try_start_step by the owner of a claim from a queue")
    await _expect_refused(context, run_id, "b", "me", "a step that a worker holds")


@check(
    "CLM-8", "CON-1", needs=LEASES, kind=Kind.VOLUME, isolated=False, rotation="concurrent calls of a store"
)
async def concurrent_starts_get_their_own_answers(context: CheckContext) -> None:
    """Of many calls at once on one store some start a step, some repeat a start, and some are refused."""
    store, count = context.store, context.profile.of(60, 600, 3_000)
    run_id, ended, unknown = await start(context), await start(context), new_id(context)
    keys, numbers = [f"step {number}" for number in range(count)], range(count)
    kinds = [number % 6 for number in numbers]

    def owner(number: int) -> str:
        return f"owner {number}"

    async def prepare(number: int) -> None:
        key = keys[number]
        match kinds[number]:
            case 1:
                await store.try_claim_step(run_id, key, owner="another")
            case 3:
                await run_step(context, run_id, key, StepStatus.PENDING)
            case 4:
                mine = owner(number)
                await store.try_start_step(run_id, key, "http", owner=mine, lease=DAY, input_json=key)

    context.expect(set(await call_at_once(prepare, numbers)), {None}, "the preparation of the steps")
    await store.complete_run(ended, RunStatus.FAILED)
    runs = {2: ended, 5: unknown}
    # A new step, a claimed one, one of an ended run, a second attempt, a repeated call, an unknown run.
    wanted = {0: 1, 1: None, 2: None, 3: 2, 4: 1, 5: "RunNotFoundError"}

    def call(number: int) -> Awaitable[object]:
        return store.try_start_step(
            runs.get(kinds[number], run_id),
            keys[number],
            "http",
            owner=owner(number),
            lease=DAY,
            input_json=keys[number],
        )

    mixed = context.random.sample(numbers, count)
    for number, outcome in zip(mixed, await call_at_once(call, mixed), strict=True):
        found = type(outcome).__name__ if isinstance(outcome, FlowStoreError) else outcome
        context.expect(found, wanted[kinds[number]], f"try_start_step number {number} of {count:,} at once")
    steps = {step.step_key: step for step in (await get_run(context, run_id)).steps}
    started = {keys[number] for number in numbers if kinds[number] in (0, 3, 4)}
    context.expect(steps.keys(), started, "the steps that started")
    for key, step in steps.items():
        expect_fields(context, step, f"the step {key!r}", input_json=key, status=StepStatus.RUNNING)
    owners = {claim.step_key: claim.owner for claim in await store.get_step_claims(run_id)}
    own = {keys[number]: owner(number) for number in numbers if keys[number] in started}
    claimed = {keys[number]: "another" for number in numbers if kinds[number] == 1}
    context.expect(owners, own | claimed, "the owners of the claims")
