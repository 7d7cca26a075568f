"""Running the checks against one backend. Nothing here needs pytest."""

from __future__ import annotations

import asyncio
import platform
import random
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime

from flowstore_conformance.bench import Inconclusive, Profile, Violation, make_bench
from flowstore_conformance.checks.registry import Check, all_checks
from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.report import CheckResult, Failure, Report, Status
from flowstore_core import Backend, ConfigurationError, FlowStoreError
from flowstore_core.config import read_scheme, redact
from flowstore_core.plugins import find_backend

CHECK_SECONDS = 300.0
"""After this long a check is taken to hang, which is a failure: no operation may block for ever."""

Progress = Callable[[CheckResult, int, int], None]
"""Told of each result, with its number and how many there are."""


async def run_suite(
    url: str,
    *,
    profile: Profile | str = Profile.STANDARD,
    clauses: Collection[str] = (),
    seed: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check the backend that a URL names and return the report.

    Works only inside namespaces that the backend's ``scratch(url)`` makes, never in what the URL
    itself holds. ``clauses`` limits the run to checks of these; ``seed`` repeats an earlier run.

    Raises ConfigurationError for an unknown clause or a URL that no backend serves, and
    StoreUnavailableError when no namespace can be made.
    """
    unknown = set(clauses) - CLAUSES.keys()
    if unknown:
        raise ConfigurationError(f"there is no clause {', '.join(sorted(unknown))}")
    profile = Profile(profile)
    chosen_seed = random.SystemRandom().getrandbits(32) if seed is None else seed
    _, backend = find_backend(read_scheme(url))
    started_at, begun = datetime.now(UTC), time.monotonic()
    checks = select_checks(clauses)
    results: list[CheckResult] = []
    for number, check in enumerate(checks, 1):
        result = await run_check(check, url, backend, profile, chosen_seed)
        results.append(result)
        if progress is not None:
            progress(result, number, len(checks))
    return Report(
        backend=backend.name,
        url=redact(url),
        capabilities=tuple(sorted(backend.capabilities)),
        profile=profile.value,
        seed=chosen_seed,
        started_at=started_at,
        seconds=time.monotonic() - begun,
        results=tuple(results),
        versions={"python": platform.python_version()},
        selected=bool(clauses),
    )


def select_checks(clauses: Collection[str] = ()) -> Sequence[Check]:
    """The checks of some clauses, or all."""
    return [one for one in all_checks() if not clauses or set(one.clauses) & set(clauses)]


async def run_check(check: Check, url: str, backend: Backend, profile: Profile, seed: int) -> CheckResult:
    """Run one check on a namespace of its own; any outcome is a result."""
    # Each check has its own randomness, so that it repeats alike alone and among others.
    own_seed = random.Random(f"{seed}/{check.name}").getrandbits(32)
    begun = time.monotonic()

    def result(
        status: Status, exercised: int = 0, failure: Failure | None = None, reason: str | None = None
    ) -> CheckResult:
        seconds = time.monotonic() - begun
        return CheckResult(
            check=check,
            status=status,
            exercised=exercised,
            seconds=seconds,
            seed=seed,
            failure=failure,
            reason=reason,
        )

    missing = check.needs - backend.capabilities
    if missing:
        return result(Status.UNSUPPORTED, reason=f"not declared: {', '.join(sorted(missing))}")
    try:
        async with make_bench(url, backend, profile, own_seed) as bench:
            try:
                await asyncio.wait_for(check.run(bench), CHECK_SECONDS)
            except Violation as found:
                failure = Failure(
                    clause=found.clause or check.clauses[0],
                    message=found.message,
                    program=found.program,
                    history=found.history,
                    verdict=found.verdict,
                )
                return result(Status.FAIL, bench.exercised, failure)
            except Inconclusive as reason:
                return result(Status.INCONCLUSIVE, bench.exercised, reason=str(reason))
            if not bench.exercised:
                return result(Status.INCONCLUSIVE, 0, reason="nothing was exercised")
            return result(Status.PASS, bench.exercised)
    except TimeoutError:
        hung = Failure(clause="CON-2", message=f"the check did not end within {CHECK_SECONDS:.0f} s")
        return result(Status.FAIL, failure=hung)
    except FlowStoreError as error:
        message = f"an operation that should have worked raised {type(error).__name__}: {error}"
        return result(Status.FAIL, failure=Failure(clause=check.clauses[0], message=message))
    except Exception as error:  # noqa: BLE001 - whatever a backend lets out is its finding
        message = f"{type(error).__name__} surfaced, which is no error of the contract"
        return result(Status.FAIL, failure=Failure(clause="CON-2", message=message))
