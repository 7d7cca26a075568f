"""Running the checks against one backend. Nothing here needs pytest."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import platform
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from flowstore_conformance.checks.registry import Check, all_checks
from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.context import (
    CheckContext,
    ContractViolation,
    Inconclusive,
    Profile,
    SharedNamespace,
    Unsupported,
    new_context,
)
from flowstore_conformance.guard import GuardedBackend, NoNamespace, Refused, guard
from flowstore_conformance.history import Raised
from flowstore_conformance.loop_errors import capture_callback_errors
from flowstore_conformance.report import CheckResult, Failure, Report, Status
from flowstore_conformance.repro import replay_on_memory
from flowstore_conformance.signatures import SignatureFinding
from flowstore_conformance.supervision import Stopped, Supervisor
from flowstore_conformance.traces import Scrubber, error_type, operation_of, place_of, trace_of
from flowstore_conformance.waivers import Waiver, apply_waivers
from flowstore_conformance.watching import Hang, Hung, Limits, Watchdog
from flowstore_core import Backend, Capability, ConfigurationError, FlowStoreError
from flowstore_core.distributions import installed_version
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url, redact

INCONCLUSIVE_RETRIES = 2
"""So often a check that was inconclusive by chance looks again, each time four times as patiently."""

REPEATS = 4
"""A check that fails runs so many times more, to tell how often it strikes."""

USUAL_SECONDS = 3.0
"""A backend that takes longer to be looked into before the first check gets more time for all others."""

REPEAT_SECONDS = 20.0
"""What all of these together may take in one run of the suite."""

Progress = Callable[[CheckResult, int, int], None]
"""Told of each result, with its number and how many there are."""

Starting = Callable[[Check, int, int], None]
"""Told of each check before it runs, likewise."""


async def run_suite(
    url: str,
    *,
    profile: Profile | str = Profile.STANDARD,
    clauses: Collection[str] = (),
    seed: int | None = None,
    waivers: Sequence[Waiver] = (),
    checks: Sequence[Check] | None = None,
    repeats: int = REPEATS,
    check_timeout: float | None = None,
    progress: Progress | None = None,
    starting: Starting | None = None,
    stop: asyncio.Event | None = None,
) -> Report:
    """Check the backend that a URL names and return the report.

    Works only inside namespaces that the backend's ``scratch(url)`` makes, never in what the URL
    itself holds. ``clauses`` limits the run to checks of these; ``seed`` repeats an earlier run;
    ``checks`` replaces the suite's own. The checks run in an event loop in a thread of their own, so that a
    backend which blocks the loop can be told apart; ``progress`` and ``starting`` are called in the caller's.

    ``check_timeout`` is the limit in seconds for a check; a call of the store in it may take half of that.
    Without it a call has 30 s and a check as long as its profile says, both longer on a backend that is slow
    from the start. Setting ``stop`` ends the run early: the report of the checks that ran is then returned,
    marked as incomplete.

    Raises ConfigurationError for an unknown clause or profile, for a limit that is not positive, for a URL
    that no backend serves, for a missing extra, and when the namespace is not a fresh and empty one;
    StoreUnavailableError when none can be made.
    """
    profile = read_profile(profile)
    limits = read_limits(profile, check_timeout)
    chosen = select_checks(clauses, checks)
    chosen_seed = new_seed() if seed is None else seed
    parts = parse_url(url)
    # Backends get it without whitespace around it, as from open_store.
    url = parts.text
    plugin, backend = find_backend(parts.scheme)
    started_at, begun = datetime.now(UTC), time.monotonic()
    run = OneRun(url, backend, profile, chosen_seed, Supervisor(Watchdog(limits)), stop)
    results: list[CheckResult] = []
    incomplete: str | None = None
    left = REPEAT_SECONDS
    try:
        await run.look(adapt=check_timeout is None)
        for number, check in enumerate(chosen, 1):
            if starting is not None:
                starting(check, number, len(chosen))
            result = await run.check(check)
            if result.failure is not None:
                since = time.monotonic()
                result = await run.rerun_failed(result, repeats=repeats, seconds=left)
                left -= time.monotonic() - since
            results.append(result)
            if progress is not None:
                progress(result, number, len(chosen))
    except Stopped as stopped:
        incomplete = f"interrupted after {len(results)} of {len(chosen)} checks"
        if stopped.under_way:
            incomplete += f", while {Scrubber(url)(stopped.under_way)}"
        results += [_not_run(one, chosen_seed, "the run was interrupted") for one in chosen[len(results) :]]
    finally:
        await run.aclose()
    report = Report(
        backend=backend.name,
        url=redact(url),
        capabilities=tuple(sorted(run.backend.capabilities)),
        profile=profile.value,
        seed=chosen_seed,
        started_at=started_at,
        seconds=time.monotonic() - begun,
        results=tuple(results),
        versions=versions(plugin.distribution),
        selected=tuple(clause for clause in CLAUSES if clause in clauses),
        findings=run.backend.findings,
        incomplete=incomplete,
        check_timeout=check_timeout,
        left_behind=run.left_behind,
    )
    return apply_waivers(report, waivers)


class OneRun:
    """One run of checks: its jobs go to a supervisor, which survives a backend that blocks its loop."""

    def __init__(
        self,
        url: str,
        backend: Backend,
        profile: Profile,
        seed: int,
        supervisor: Supervisor,
        stop: asyncio.Event | None = None,
        *,
        shares: bool = True,
    ) -> None:
        self.backend = backend if isinstance(backend, GuardedBackend) else GuardedBackend(backend, url)
        self.left_behind: tuple[str, ...] = ()
        self._url = url
        self._plain = backend
        self._profile = profile
        self._seed = seed
        self._supervisor = supervisor
        self._watchdog = supervisor.watchdog
        self._stop = stop
        self._shares = shares
        self._shared: SharedNamespace | None = None

    async def look(self, *, adapt: bool) -> None:
        """Look into the backend before the first check; see guard."""
        begun = time.monotonic()
        self.backend = await look(self._supervisor, self._plain, self._url, stop=self._stop)
        if adapt:
            self._watchdog.limits = self._watchdog.limits.scaled(slowness(time.monotonic() - begun))

    async def check(self, check: Check) -> CheckResult:
        if (blocker := _blocker(self.backend)) is not None:
            return _not_run(check, self._seed, blocker.title, blocker)
        if self._shared is None and self._shares:
            self._shared = SharedNamespace(self._url, self.backend, self._profile, self._watchdog.limits.call)
        shared = self._shared
        return await self._examine(
            check,
            lambda: run_check(
                check,
                self._url,
                self.backend,
                self._profile,
                self._seed,
                shared=shared,
                watchdog=self._watchdog,
            ),
        )

    async def rerun_failed(
        self, result: CheckResult, *, repeats: int = REPEATS, seconds: float = REPEAT_SECONDS
    ) -> CheckResult:
        again = partial(
            rerun_failed,
            result,
            self._url,
            self.backend,
            self._profile,
            repeats=repeats,
            seconds=seconds,
            watchdog=self._watchdog,
        )
        try:
            return await self._supervisor.run(again, stop=self._stop)
        except Hung as hung:
            self._lose(hung.hang)
            return result

    async def _examine(self, check: Check, job: Callable[[], Awaitable[CheckResult]]) -> CheckResult:
        begun = time.monotonic()
        try:
            result = await self._supervisor.run(job, stop=self._stop)
        except Hung as hung:
            # The event loop is lost, and with it the namespaces and stores that were open in it.
            self._lose(hung.hang)
            result = CheckResult(
                check=check,
                status=Status.FAIL,
                assertions=0,
                seconds=time.monotonic() - begun,
                seed=self._seed,
                failure=_hang_failure(hung.hang, Scrubber(self._url)),
            )
        return stumbled(result, self.backend.findings)

    def _lose(self, hang: Hang) -> None:
        if hang.operation is not None:
            self._watchdog.known.add(hang.operation)
        self.left_behind += tuple(one for one in self.backend.in_use if one not in self.left_behind)
        self._shared = None

    async def aclose(self) -> None:
        """Drop the shared namespace and end the loop."""
        if (shared := self._shared) is not None:
            with suppress(Hung):
                await self._supervisor.run(lambda: _discard(shared, self._watchdog))
        await self._supervisor.aclose()
        self.left_behind += tuple(one for one in self.backend.in_use if one not in self.left_behind)


async def look(
    supervisor: Supervisor, backend: Backend, url: str, *, stop: asyncio.Event | None = None
) -> GuardedBackend:
    """Look into a backend (see guard); ConfigurationError when it does not answer."""
    guarded = GuardedBackend(backend, url)

    async def job() -> GuardedBackend:
        try:
            async with supervisor.watchdog.over():
                return await guard(guarded, url)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            because = "CancelledError surfaced"
            raise Refused(
                f"refused: whether the scratch namespace is empty cannot be seen, because {because}"
            ) from None

    try:
        return await supervisor.run(job, stop=stop)
    except Hung as hung:
        if guarded.looked_into:
            # Closing hangs, which the checks will find.
            return guarded
        message = Scrubber(url)(hung.hang.message)
        raise Refused(f"refused: whether the scratch namespace is empty cannot be seen: {message}") from None


def slowness(seconds: float) -> float:
    """By how much longer than usual a backend takes, from how long it took to look into it."""
    return max(1.0, seconds / USUAL_SECONDS)


def _blocker(backend: GuardedBackend) -> SignatureFinding | None:
    """A finding that keeps core from opening the store."""
    return next((one for one in backend.findings if one.missing and one.capability), None)


def _not_run(check: Check, seed: int, reason: str, finding: SignatureFinding | None = None) -> CheckResult:
    return CheckResult(
        check=check,
        status=Status.NOT_RUN,
        assertions=0,
        seconds=0.0,
        seed=seed,
        reason=reason,
        finding=finding,
    )


def stumbled(result: CheckResult, findings: Sequence[SignatureFinding]) -> CheckResult:
    """The result of a check; NOT RUN where it failed because core cannot call a method."""
    for finding in findings:
        if result.failure is not None and _is_due_to(result.failure, finding):
            return dataclasses.replace(
                result, status=Status.NOT_RUN, failure=None, reason=finding.title, finding=finding
            )
    return result


def _is_due_to(failure: Failure, finding: SignatureFinding) -> bool:
    error = "NotSupportedError" if finding.missing else "TypeError"
    if failure.error is not None:
        # Raised by the call itself, not in the author's code.
        return failure.error == error and failure.operation == finding.method and failure.place is None
    raised = () if failure.history is None else failure.history.operations
    return any(
        one.call.method == finding.method and isinstance(one.outcome, Raised) and one.outcome.error == error
        for one in raised
    ) or (error in failure.message and re.search(rf"\b{finding.method}\b", failure.message) is not None)


def check_backend(
    url: str,
    *,
    profile: Profile | str = Profile.STANDARD,
    clauses: Collection[str] = (),
    seed: int | None = None,
    waivers: Sequence[Waiver] = (),
    check_timeout: float | None = None,
) -> Report:
    """run_suite for code that has no event loop running; the same arguments, errors and report."""
    suite = run_suite(
        url, profile=profile, clauses=clauses, seed=seed, waivers=waivers, check_timeout=check_timeout
    )
    return asyncio.run(suite)


def select_checks(clauses: Collection[str] = (), checks: Sequence[Check] | None = None) -> Sequence[Check]:
    """The checks of some clauses, or all. Raises ConfigurationError for an unknown clause."""
    if unknown := set(clauses) - CLAUSES.keys():
        raise ConfigurationError(f"there is no clause {', '.join(sorted(unknown))}; docs/contract.md has all")
    if checks is None:
        try:
            checks = all_checks()
        except ModuleNotFoundError as error:
            if error.name != "hypothesis":
                raise
            message = "module 'hypothesis' is missing; pip install 'flowstore[conformance]'"
            raise ConfigurationError(message) from error
    return [one for one in checks if not clauses or set(one.clauses) & set(clauses)]


def read_profile(name: str) -> Profile:
    """The profile of a name; ConfigurationError that lists them otherwise."""
    try:
        return Profile(name)
    except ValueError:
        raise ConfigurationError(f"profile must be one of {', '.join(Profile)}, not {name!r}") from None


def read_limits(profile: Profile, check_timeout: float | None) -> Limits:
    """The time limits of a run; ConfigurationError for one that is not positive."""
    if check_timeout is not None and not 0 < check_timeout < math.inf:
        message = f"the check timeout must be a positive number of seconds, not {check_timeout}"
        raise ConfigurationError(message)
    return Limits.of(profile, check_timeout)


def new_seed() -> int:
    return random.SystemRandom().getrandbits(32)


async def run_check(
    check: Check,
    url: str,
    backend: Backend,
    profile: Profile,
    seed: int,
    *,
    shared: SharedNamespace | None = None,
    watchdog: Watchdog | None = None,
) -> CheckResult:
    """Run one check on a namespace of its own; any outcome is a result.

    It runs in the caller's event loop. A call that does not end is cancelled and is a failure; one that
    blocks the loop cannot be, which is why run_suite has a Supervisor.

    A check that can share a namespace is run in the shared one first, if there is one. When it does not
    pass there, nothing is said yet: it is run on a namespace of its own, and that counts.
    Raises Refused alone: then the suite must stop, since it is not safe to go on.
    """
    begun = time.monotonic()
    dog = watchdog or Watchdog(Limits.of(profile))
    outcome = None
    if shared and not check.isolated:
        outcome = await _run_shared(check, profile, seed, shared, dog, url)
    if outcome is None:
        outcome = await _outcome(check, url, backend, profile, seed, dog)
    for number in range(1, INCONCLUSIVE_RETRIES + 1):
        if not outcome.retryable:
            break
        # Something else may have kept the machine busy: look longer, and at other draws.
        outcome = await _outcome(check, url, backend, profile, seed, dog, look=number)
    if outcome.failure is not None and outcome.failure.hung and outcome.failure.operation is not None:
        dog.known.add(outcome.failure.operation)
    return CheckResult(
        check=check,
        status=outcome.status,
        assertions=outcome.assertions,
        seconds=time.monotonic() - begun,
        seed=seed,
        failure=outcome.failure,
        reason=outcome.reason,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one look of a check found."""

    status: Status
    assertions: int = 0
    failure: Failure | None = None
    reason: str | None = None
    retryable: bool = False
    """Inconclusive, and perhaps not the next time."""


async def _run_shared(
    check: Check, profile: Profile, seed: int, shared: SharedNamespace, dog: Watchdog, url: str
) -> Outcome | None:
    """What a check found in a shared namespace; None, and the namespace given up, unless it passed.

    A call that hangs again, as it did in a namespace of a check's own, is told at once.
    """
    told = None
    try:
        with capture_callback_errors() as surfaced:
            async with dog.over(), shared.context(_own_seed(check, seed)) as context:
                outcome = _unsupported(check, context.capabilities) or await _judge(check, context)
        if outcome.status in (Status.PASS, Status.UNSUPPORTED) and not surfaced:
            return outcome
    except Hung as error:
        if error.hang.operation in dog.known:
            told = _explain(error, check, 0, url)
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
    except Exception as error:  # noqa: BLE001 - what it says of the backend is seen alone
        _raise_refusal(error)
    await _discard(shared, dog)
    return told


def _is_cancelled() -> bool:
    """Whether somebody cancels the running task; else a CancelledError in it comes from the backend."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _discard(shared: SharedNamespace, dog: Watchdog) -> None:
    """Drop a namespace; that this fails is found by checks with one of their own."""
    try:
        async with dog.over():
            await shared.discard()
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
    except Exception as error:  # noqa: BLE001
        _raise_refusal(error)


def _own_seed(check: Check, seed: int, look: int = 0) -> int:
    """Each check has its own randomness, so that it repeats alike alone and among others."""
    return random.Random(f"{seed}/{check.name}{f'/{look}' if look else ''}").getrandbits(32)


async def _outcome(
    check: Check,
    url: str,
    backend: Backend,
    profile: Profile,
    seed: int,
    dog: Watchdog,
    *,
    look: int = 0,
) -> Outcome:
    # Once guarded, a backend declares what its opened store does. Else only a store can tell.
    if isinstance(backend, GuardedBackend) and (lacking := _unsupported(check, backend.capabilities)):
        return lacking
    own_seed = _own_seed(check, seed, look)
    outcome: Outcome | None = None
    made: CheckContext | None = None
    try:
        with capture_callback_errors() as surfaced:
            async with (
                dog.over(timeout_factor=4.0**look),
                new_context(url, backend, profile, own_seed, 4.0**look, dog.limits.call) as context,
            ):
                made = context
                outcome = _unsupported(check, context.capabilities) or await _judge(check, context)
        if surfaced and outcome.status is Status.PASS:
            message = f"{type(surfaced[0]).__name__} surfaced in a callback, where no caller sees it"
            failure = _exception_failure("CON-2", message, surfaced[0], url)
            outcome = Outcome(Status.FAIL, outcome.assertions, failure)
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        outcome = _explain(error, check, made.assertions if made else 0, url)
    except Exception as error:  # noqa: BLE001 - whatever a backend lets out is its finding
        # Not of the check, which _judge has told, but of making the bench or of putting it away.
        _raise_refusal(error)
        if outcome is None or outcome.status is Status.PASS:
            outcome = _explain(error, check, made.assertions if made else 0, url)
    return outcome


def _unsupported(check: Check, capabilities: Collection[Capability]) -> Outcome | None:
    if missing := check.needs - frozenset(capabilities):
        names = ", ".join(sorted(one.name for one in missing))
        return Outcome(Status.UNSUPPORTED, reason=f"the backend does not declare {names}")
    return None


async def _judge(check: Check, context: CheckContext) -> Outcome:
    try:
        await check.run(context)
    except Exception as error:  # noqa: BLE001 - whatever a backend lets out is its finding
        _raise_refusal(error)
        return _explain(error, check, context.assertions, context.base_url)
    if not context.assertions:
        return Outcome(Status.INCONCLUSIVE, reason="nothing was exercised")
    return Outcome(Status.PASS, context.assertions)


def _raise_refusal(error: Exception) -> None:
    found = _leaf(error)
    if isinstance(found, Refused):
        raise found


def _explain(error: BaseException, check: Check, assertions: int, url: str) -> Outcome:
    """What an exception says about the backend."""
    found, clean = _leaf(error), Scrubber(url)
    if isinstance(found, Hung):
        return Outcome(Status.FAIL, assertions, _hang_failure(found.hang, clean))
    if isinstance(found, ContractViolation):
        clause = found.clause or check.clauses[0]
        failure = _exception_failure(clause, found.message, found.__cause__, url)
        failure = dataclasses.replace(
            failure, program=found.program, history=found.history, verdict=found.verdict
        )
        return Outcome(Status.FAIL, assertions, failure)
    if isinstance(found, (Inconclusive, NoNamespace)):
        retryable = isinstance(found, Inconclusive) and found.retryable
        return Outcome(Status.INCONCLUSIVE, assertions, reason=clean(str(found)), retryable=retryable)
    if isinstance(found, Unsupported):
        return Outcome(Status.UNSUPPORTED, assertions, reason=clean(str(found)))
    if isinstance(found, FlowStoreError):
        clause = check.clauses[0]
        message = f"an operation that should have worked raised {type(found).__name__}: {found}"
    else:
        clause = "CON-2"
        message = f"{type(found).__name__} surfaced, which is no error of the contract"
    return Outcome(Status.FAIL, assertions, _exception_failure(clause, message, found, url))


def _hang_failure(hang: Hang, clean: Scrubber) -> Failure:
    return Failure(
        clause="CON-2",
        message=clean(hang.message),
        traceback=clean(hang.stack) or None,
        operation=hang.operation,
        place=hang.place,
        hung=True,
    )


def _exception_failure(clause: str, message: str, error: BaseException | None, url: str) -> Failure:
    """A failure with the exception that shows it, if there is one."""
    clean = Scrubber(url)
    if error is None:
        return Failure(clause=clause, message=clean(message))
    return Failure(
        clause=clause,
        message=clean(message),
        traceback=clean(trace_of(error)),
        operation=operation_of(error),
        place=place_of(error),
        error=error_type(error),
    )


def _leaf(error: BaseException) -> BaseException:
    """What stands behind an exception group: a hang or a violation before anything else."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_leaf(one) for one in error.exceptions]
    return next((one for one in leaves if isinstance(one, (Refused, Hung, ContractViolation))), leaves[0])


async def rerun_failed(
    result: CheckResult,
    url: str,
    backend: Backend,
    profile: Profile,
    *,
    repeats: int = REPEATS,
    seconds: float = REPEAT_SECONDS,
    watchdog: Watchdog | None = None,
) -> CheckResult:
    """A failed check with how often it fails when run again, and what its program prints on memory.

    A check in which a call hung is not run again: that would take as long each time.
    """
    assert result.failure is not None
    if result.failure.hung:
        return result
    reproductions = repetitions = 1
    begun = time.monotonic()
    while repetitions <= repeats and time.monotonic() - begun + result.seconds < seconds:
        again = await run_check(result.check, url, backend, profile, result.seed, watchdog=watchdog)
        repetitions += 1
        reproductions += again.failure is not None and again.failure.clause == result.failure.clause
    failure = dataclasses.replace(result.failure, reproductions=reproductions, repetitions=repetitions)
    if failure.program is not None and backend.name != "memory":
        answer = await replay_on_memory(failure.program)
        failure = dataclasses.replace(failure, right_answer=answer)
    return dataclasses.replace(result, failure=failure)


def versions(distribution: str | None) -> dict[str, str]:
    """Of Python, flowstore, and the distribution that brings the backend."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(("flowstore", distribution)):
        if name is not None:
            found[name] = installed_version(name) or "not installed"
    return found
