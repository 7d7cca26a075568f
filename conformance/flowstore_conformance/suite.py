"""Running the checks against one backend. Nothing here needs pytest."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
import random
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from flowstore_conformance.bench import (
    Bench,
    Inconclusive,
    Profile,
    SharedNamespace,
    Unsupported,
    Violation,
    make_bench,
)
from flowstore_conformance.checks.registry import Check, all_checks
from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.guard import GuardedBackend, NoNamespace, Refused, guard
from flowstore_conformance.programs import replay_on_memory
from flowstore_conformance.report import CheckResult, Failure, Report, Status
from flowstore_conformance.surfacing import watch_callbacks
from flowstore_conformance.waivers import Waiver, apply_waivers
from flowstore_core import Backend, Capability, ConfigurationError, FlowStoreError
from flowstore_core.distributions import installed_version
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url, redact

CHECK_SECONDS = {Profile.QUICK: 120.0, Profile.STANDARD: 300.0, Profile.THOROUGH: 3600.0}
"""After this long a check is taken to hang, which is a failure: no operation may block for ever."""

MORE_LOOKS = 2
"""So often a check that was inconclusive by chance looks again, each time four times as patiently."""

REPEATS = 4
"""A check that fails runs so many times more, to tell how often it strikes."""

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
    progress: Progress | None = None,
    starting: Starting | None = None,
) -> Report:
    """Check the backend that a URL names and return the report.

    Works only inside namespaces that the backend's ``scratch(url)`` makes, never in what the URL
    itself holds. ``clauses`` limits the run to checks of these; ``seed`` repeats an earlier run;
    ``checks`` replaces the suite's own.

    Raises ConfigurationError for an unknown clause or profile, for a URL that no backend serves, for
    a missing extra, and when the namespace is not a fresh and empty one; StoreUnavailableError when
    none can be made.
    """
    profile = read_profile(profile)
    chosen = select_checks(clauses, checks)
    chosen_seed = new_seed() if seed is None else seed
    parts = parse_url(url)
    # Backends get it without whitespace around it, as from open_store.
    url = parts.text
    plugin, backend = find_backend(parts.scheme)
    started_at, begun = datetime.now(UTC), time.monotonic()
    guarded = await guard(backend, url)
    results: list[CheckResult] = []
    left = REPEAT_SECONDS
    shared = SharedNamespace(url, guarded, profile)
    try:
        for number, check in enumerate(chosen, 1):
            if starting is not None:
                starting(check, number, len(chosen))
            result = await run_check(check, url, guarded, profile, chosen_seed, shared=shared)
            if result.failure is not None:
                since = time.monotonic()
                result = await strike_again(result, url, guarded, profile, repeats=repeats, seconds=left)
                left -= time.monotonic() - since
            results.append(result)
            if progress is not None:
                progress(result, number, len(chosen))
    finally:
        await _give_up(shared)
    report = Report(
        backend=backend.name,
        url=redact(url),
        capabilities=tuple(sorted(guarded.capabilities)),
        profile=profile.value,
        seed=chosen_seed,
        started_at=started_at,
        seconds=time.monotonic() - begun,
        results=tuple(results),
        versions=versions(plugin.distribution),
        selected=tuple(clause for clause in CLAUSES if clause in clauses),
    )
    return apply_waivers(report, waivers)


def check_backend(
    url: str,
    *,
    profile: Profile | str = Profile.STANDARD,
    clauses: Collection[str] = (),
    seed: int | None = None,
    waivers: Sequence[Waiver] = (),
) -> Report:
    """run_suite for code that has no event loop running; the same arguments, errors and report."""
    return asyncio.run(run_suite(url, profile=profile, clauses=clauses, seed=seed, waivers=waivers))


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
) -> CheckResult:
    """Run one check on a namespace of its own; any outcome is a result.

    A check that can share a namespace is run in the shared one first, if there is one. When it does not
    pass there, nothing is said yet: it is run on a namespace of its own, and that counts.
    Raises Refused alone: then the suite must stop, since it is not safe to go on.
    """
    begun = time.monotonic()
    outcome = await _among_others(check, profile, seed, shared) if shared and check.shares else None
    if outcome is None:
        outcome = await _outcome(check, url, backend, profile, seed)
    for number in range(1, MORE_LOOKS + 1):
        if not outcome.by_chance:
            break
        # Something else may have kept the machine busy: look longer, and at other draws.
        outcome = await _outcome(check, url, backend, profile, seed, look=number)
    return CheckResult(
        check=check,
        status=outcome.status,
        exercised=outcome.exercised,
        seconds=time.monotonic() - begun,
        seed=seed,
        failure=outcome.failure,
        reason=outcome.reason,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What one look of a check found."""

    status: Status
    exercised: int = 0
    failure: Failure | None = None
    reason: str | None = None
    by_chance: bool = False
    """Inconclusive, and perhaps not the next time."""


async def _among_others(check: Check, profile: Profile, seed: int, shared: SharedNamespace) -> Outcome | None:
    """What a check found in a shared namespace; None, and the namespace given up, unless it passed."""
    try:
        with watch_callbacks() as surfaced:
            async with shared.bench(_own_seed(check, seed)) as bench:
                outcome = _lacking(check, bench.capabilities) or await _judge(check, bench, profile)
        if outcome.status in (Status.PASS, Status.UNSUPPORTED) and not surfaced:
            return outcome
    except Exception as error:  # noqa: BLE001 - what it says of the backend is seen alone
        _raise_refusal(error)
    await _give_up(shared)
    return None


async def _give_up(shared: SharedNamespace) -> None:
    """Drop a namespace; that this fails is found by checks with one of their own."""
    try:
        await shared.give_up()
    except Exception as error:  # noqa: BLE001
        _raise_refusal(error)


def _own_seed(check: Check, seed: int, look: int = 0) -> int:
    """Each check has its own randomness, so that it repeats alike alone and among others."""
    return random.Random(f"{seed}/{check.name}{f'/{look}' if look else ''}").getrandbits(32)


async def _outcome(
    check: Check, url: str, backend: Backend, profile: Profile, seed: int, *, look: int = 0
) -> Outcome:
    # Once guarded, a backend declares what its opened store does. Else only a store can tell.
    if isinstance(backend, GuardedBackend) and (lacking := _lacking(check, backend.capabilities)):
        return lacking
    own_seed = _own_seed(check, seed, look)
    outcome: Outcome | None = None
    try:
        with watch_callbacks() as surfaced:
            async with make_bench(url, backend, profile, own_seed, patience=4.0**look) as bench:
                outcome = _lacking(check, bench.capabilities) or await _judge(check, bench, profile)
        if surfaced and outcome.status is Status.PASS:
            message = f"{type(surfaced[0]).__name__} surfaced in a callback, where no caller sees it"
            failure = Failure(clause="CON-2", message=message, traceback=_frames(surfaced[0], url))
            outcome = Outcome(Status.FAIL, outcome.exercised, failure)
    except Exception as error:  # noqa: BLE001 - whatever a backend lets out is its finding
        # Not of the check, which _judge has told, but of making the bench or of putting it away.
        _raise_refusal(error)
        if outcome is None or outcome.status is Status.PASS:
            outcome = _explain(error, check, 0, url)
    return outcome


def _lacking(check: Check, capabilities: Collection[Capability]) -> Outcome | None:
    if missing := check.needs - frozenset(capabilities):
        names = ", ".join(sorted(one.name for one in missing))
        return Outcome(Status.UNSUPPORTED, reason=f"the backend does not declare {names}")
    return None


async def _judge(check: Check, bench: Bench, profile: Profile) -> Outcome:
    limit = CHECK_SECONDS[profile]
    try:
        async with asyncio.timeout(limit) as timer:
            await check.run(bench)
    except Exception as error:  # noqa: BLE001 - whatever a backend lets out is its finding
        _raise_refusal(error)
        if timer.expired():
            hung = Failure(clause="CON-2", message=f"the check did not end within {limit:.0f} s")
            return Outcome(Status.FAIL, bench.exercised, hung)
        return _explain(error, check, bench.exercised, bench.base_url)
    if not bench.exercised:
        return Outcome(Status.INCONCLUSIVE, reason="nothing was exercised")
    return Outcome(Status.PASS, bench.exercised)


def _raise_refusal(error: Exception) -> None:
    found = _leaf(error)
    if isinstance(found, Refused):
        raise found


def _explain(error: Exception, check: Check, exercised: int, url: str) -> Outcome:
    """What an exception says about the backend."""
    found = _leaf(error)
    if isinstance(found, Violation):
        failure = Failure(
            clause=found.clause or check.clauses[0],
            message=found.message,
            program=found.program,
            history=found.history,
            verdict=found.verdict,
            traceback=_frames(found.__cause__, url) if found.__cause__ is not None else None,
        )
        return Outcome(Status.FAIL, exercised, failure)
    if isinstance(found, (Inconclusive, NoNamespace)):
        by_chance = isinstance(found, Inconclusive) and found.by_chance
        return Outcome(Status.INCONCLUSIVE, exercised, reason=str(found), by_chance=by_chance)
    if isinstance(found, Unsupported):
        return Outcome(Status.UNSUPPORTED, exercised, reason=str(found))
    if isinstance(found, FlowStoreError):
        clause = check.clauses[0]
        message = f"an operation that should have worked raised {type(found).__name__}: {found}"
    else:
        clause = "CON-2"
        message = f"{type(found).__name__} surfaced, which is no error of the contract"
    failure = Failure(clause=clause, message=message, traceback=_frames(found, url))
    return Outcome(Status.FAIL, exercised, failure)


def _leaf(error: BaseException) -> BaseException:
    """What stands behind an exception group: a violation before anything else."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    leaves = [_leaf(one) for one in error.exceptions]
    return next((one for one in leaves if isinstance(one, (Refused, Violation))), leaves[0])


def _frames(error: BaseException, url: str) -> str:
    """The traceback of an error, without the password of the URL."""
    text = "".join(traceback.format_exception(error))
    for secret in parse_url(url).secrets():
        text = text.replace(secret, "***")
    return text


async def strike_again(
    result: CheckResult,
    url: str,
    backend: Backend,
    profile: Profile,
    *,
    repeats: int = REPEATS,
    seconds: float = REPEAT_SECONDS,
) -> CheckResult:
    """A failed check with how often it fails when run again, and what its program prints on memory."""
    assert result.failure is not None
    struck = tried = 1
    begun = time.monotonic()
    while tried <= repeats and time.monotonic() - begun + result.seconds < seconds:
        again = await run_check(result.check, url, backend, profile, result.seed)
        tried += 1
        struck += again.failure is not None and again.failure.clause == result.failure.clause
    failure = dataclasses.replace(result.failure, struck=struck, tried=tried)
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
