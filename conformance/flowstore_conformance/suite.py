"""Run the checks against one backend. Independent of pytest."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import platform
import random
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import cast

from flowstore_conformance.clauses import CLAUSES
from flowstore_conformance.context import (
    DEFAULT_VARIANT,
    CheckContext,
    ContractViolation,
    Inconclusive,
    Profile,
    SharedNamespace,
    Unsupported,
    new_context,
)
from flowstore_conformance.guard import (
    CANNOT_INSPECT,
    GuardedBackend,
    NoNamespace,
    RecyclingBackend,
    Refused,
    guard,
)
from flowstore_conformance.history import Raised
from flowstore_conformance.lane_pool import CheckQueue, LaneOrder, LaneProcess, origin_of, read_processes
from flowstore_conformance.loop_errors import capture_callback_errors
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.network_faults import BackendWithNetworkFaults
from flowstore_conformance.registry import Check, Kind, all_checks, rotate
from flowstore_conformance.report import Report, apply_waivers
from flowstore_conformance.repro import replay_on_memory
from flowstore_conformance.results import CheckResult, Failure
from flowstore_conformance.status import Status
from flowstore_conformance.supervisor import Stopped, Supervisor
from flowstore_conformance.traces import Scrubber, error_type, operation_of, place_of, trace_of
from flowstore_conformance.waivers import Waiver
from flowstore_conformance.watchdog import OPTION, Hang, Hung, Limits, Watchdog
from flowstore_conformance.worker_pool import WorkerProcesses
from flowstore_core import Backend, Capability, ConfigurationError, FlowStoreError
from flowstore_core.backend import ScratchClearable, VariantUrls
from flowstore_core.distributions import installed_version
from flowstore_core.plugins import find_backend
from flowstore_core.suggestions import did_you_mean
from flowstore_core.urls import parse_url, redact

INCONCLUSIVE_RETRIES = 2
"""Retries of an inconclusive check, each with four times the time of the one before."""

LANES = 4
"""The number of checks that run at the same time, while a check waits for the store.

The stores of six lanes open a hundred connections, all that a PostgreSQL server with default settings allows.
"""

LANES_OF_SEVERAL = 2
"""The number of lanes of each process, if there are several: two open no more connections than one does."""

LANES_LIMIT_FACTOR = 5.0
"""The time limit of all lanes, as a multiple of the limit of a check; then the remaining checks run alone."""

RETRY_LIMIT_FACTOR = 4.0
"""The time limit of a retry, as a multiple of the limit of a check."""

REPEATS = 4
"""Reruns of a failed check, to measure how often it fails."""

EXPECTED_INSPECTION_SECONDS = 3.0
"""The expected duration of the inspection; if a backend takes longer, all time limits are scaled up."""

REPEAT_SECONDS = 20.0
"""Seconds for all reruns in one run of the suite."""

SETTLED = (Status.PASS, Status.UNSUPPORTED, Status.NOT_RUN)
"""The results that count although other checks ran at the same time: no other check makes a check pass or
takes a method away."""

FAULTS_OPTION = "--faults"

Progress = Callable[[CheckResult, int, int], None]
"""Called with each result, its number and the number of checks."""

Starting = Callable[[Check, int, int], None]
"""Called with each check before it runs, its number and the number of checks."""


async def run_suite(
    url: str,
    *,
    profile: Profile | str = Profile.STANDARD,
    clauses: Collection[str] = (),
    seed: int | None = None,
    waivers: Sequence[Waiver] = (),
    checks: Sequence[Check] | None = None,
    check_names: Collection[str] = (),
    repeats: int = REPEATS,
    check_timeout: float | None = None,
    variant: str | None = None,
    faults: bool = False,
    processes: int | None = None,
    progress: Progress | None = None,
    starting: Starting | None = None,
    stop: asyncio.Event | None = None,
) -> Report:
    """Check the backend that a URL names and return the report.

    Works only inside namespaces that the backend's ``scratch(url)`` creates; the data under the URL itself is
    not touched. ``clauses`` limits the run to checks of these clauses, ``check_names`` to checks or examples
    of these names; ``seed`` repeats an earlier run; ``checks`` replaces the suite's own checks. The checks
    run in an event loop in a separate thread, so that the suite can report a backend that blocks the loop;
    ``progress`` and ``starting`` are called in the caller's loop.

    ``check_timeout`` is the limit in seconds for a check; a call may take half of it. By default a call has
    30 s and the limit of a check depends on the profile; both are scaled up for a slow backend. ``variant``
    is the name of one of the backend's variants, or "default" for the options of the URL; by default the seed
    chooses one for each check. ``faults`` adds the checks that disturb the requests of stores: by proxies
    before the hosts of the URL, and by the injector of the backend. ``processes`` is the number of processes
    that share the checks: by default two, or one on a machine with one core. Setting ``stop`` ends the run
    early: the report then covers the checks that ran and is marked as incomplete.

    Raises ConfigurationError for an unknown clause, check, variant or profile, for a limit or a number of
    processes that is not positive, for a URL without a backend, for a missing extra, and if the scratch
    namespace is not new and empty; StoreUnavailableError if no namespace can be created.
    """
    profile = read_profile(profile)
    limits = read_limits(profile, check_timeout)
    processes = read_processes(processes)
    chosen = select_checks(clauses, checks, check_names, faults=faults)
    asked = {clause for one in chosen for clause in one.clauses} if check_names else clauses
    chosen_seed = new_seed() if seed is None else seed
    parts = parse_url(url)
    # Without surrounding whitespace, as open_store passes it to backends.
    url = parts.text
    plugin, backend = find_backend(parts.scheme)
    selected = bool(clauses or checks or check_names)
    if faults:
        backend = BackendWithNetworkFaults(backend)
    started_at, begun = datetime.now(UTC), time.monotonic()
    variants = Variants(backend, url, chosen_seed, variant)
    run = SuiteRun(url, backend, profile, chosen_seed, Supervisor(Watchdog(limits)), variants, stop)
    results: list[CheckResult] = []
    failed_beside_others: dict[Check, CheckResult] = {}
    incomplete: str | None = None
    left = REPEAT_SECONDS

    def ended(result: CheckResult) -> None:
        if result.status not in SETTLED:
            failed_beside_others[result.check] = result
            return
        results.append(result)
        if starting is not None:
            starting(result.check, len(results), len(chosen))
        if progress is not None:
            progress(result, len(results), len(chosen))

    try:
        await run.inspect(adapt=check_timeout is None)
        if not selected:
            chosen = checks_of_profile(chosen, profile, chosen_seed, run.backend, faults=faults)
            # A few selected checks run one after another, so that the progress names the check that hangs.
            await run.run_lanes(chosen, ended, processes)
        done = {one.check for one in results}
        for check in [one for one in chosen if one not in done]:
            number = len(results) + 1
            if starting is not None:
                starting(check, number, len(chosen))
            result = await run.check(check)
            since = time.monotonic()
            if result.status is Status.PASS and check in failed_beside_others:
                result = await run.try_again(
                    result, failed_beside_others[check], repeats=repeats, seconds=left
                )
                left -= time.monotonic() - since
            results.append(result)
            if result.failure is not None:
                since = time.monotonic()
                results[-1] = result = await run.rerun_failed(result, repeats=repeats, seconds=left)
                left -= time.monotonic() - since
            if progress is not None:
                progress(result, number, len(chosen))
    except Stopped as stopped:
        incomplete = f"interrupted after {len(results)} of {len(chosen)} checks"
        if stopped.pending_call:
            incomplete += f", while {Scrubber(url)(stopped.pending_call)}"
        done = {one.check for one in results}
        left_out = [one for one in chosen if one not in done]
        results += [_not_run(one, chosen_seed, "the run was interrupted") for one in left_out]
    finally:
        await run.aclose()
    order = {one: number for number, one in enumerate(chosen)}
    results.sort(key=lambda one: order[one.check])
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
        selected=tuple(clause for clause in CLAUSES if clause in asked),
        selected_checks=tuple(check_names),
        findings=run.backend.findings,
        incomplete=incomplete,
        check_timeout=check_timeout,
        faults=faults,
        variants=variants.names,
        left_behind=run.left_behind,
        limits=run.backend.limits,
        max_skew=run.backend.max_skew,
    )
    return apply_waivers(report, waivers)


class Variants:
    """The variants of a backend (see VariantUrls), and the choice of one for each check."""

    def __init__(self, backend: Backend, url: str, seed: int, chosen: str | None = None) -> None:
        own = tuple(backend.variants(url)) if isinstance(backend, VariantUrls) else ()
        if chosen not in (None, DEFAULT_VARIANT, *own):
            known = ", ".join(map(repr, (DEFAULT_VARIANT, *own)))
            raise ConfigurationError(f"there is no variant {chosen!r}; this backend has {known}")
        self.names = () if not own else (DEFAULT_VARIANT, *own) if chosen is None else (chosen,)
        """The variants that checks may run with; empty if the backend declares none."""
        self.chosen = chosen
        self._seed = seed

    def of(self, check: Check) -> str | None:
        """The variant of a check: that of half of the checks is the URL as given.

        Checks that share a namespace have at most one other.
        """
        if len(self.names) < 2:
            return self.names[0] if self.names else None
        default, *own = self.names
        if random.Random(f"{self._seed}/{check.name}").random() < 0.5:
            return default
        return random.Random(f"{self._seed}/{check.name if check.isolated else ''}/variant").choice(own)


class SuiteRun:
    """One run of checks in the event loop of a supervisor, which survives a backend that blocks the loop."""

    def __init__(
        self,
        url: str,
        backend: Backend,
        profile: Profile,
        seed: int,
        supervisor: Supervisor,
        variants: Variants | None = None,
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
        self._variants = Variants(backend, url, seed) if variants is None else variants
        self._stop = stop
        self._shares = shares
        self._shared: dict[str | None, SharedNamespace] = {}
        """By variant."""
        self._in_lanes: dict[Check, float] = {}
        """The checks that the lanes of this process run now, and the time.monotonic() of their starts."""
        self._processes = WorkerProcesses()
        self._failing_seconds = 0.0
        """The time spent on checks that did not pass. A slow machine alone must not end a run."""

    async def inspect(self, *, adapt: bool) -> None:
        """Inspect the backend before the first check; see guard."""
        begun = time.monotonic()
        self.backend = await inspect_backend(self._supervisor, self._plain, self._url, stop=self._stop)
        if adapt:
            self._watchdog.limits = self._watchdog.limits.scaled(slowdown_factor(time.monotonic() - begun))

    async def run_lanes(
        self, checks: Sequence[Check], ended: Callable[[CheckResult], None], processes: int = 1
    ) -> None:
        """Run checks in a few lanes at the same time, each in its own namespaces.

        Of several processes, each has lanes of its own. This one first runs the checks that run alone in
        their process.

        Calls ``ended``, in the caller's loop, with the result of each check that has begun. The caller must
        run those without a SETTLED result again, alone: another check may be to blame.
        """
        if len(checks) <= LANES or _blocker(self.backend) is not None:
            return
        # First the checks with namespaces of their own, many of which wait. Then the others by variant: a
        # lane keeps one namespace and its stores open at a time. Examples are short, so the lanes end at
        # about the same time if they come last.
        together = sorted(
            (one for one in checks if not one.alone),
            key=lambda one: (
                not one.breaks_namespace,
                "" if one.breaks_namespace else self._variants.of(one) or "",
                one.kind is Kind.EXAMPLE,
            ),
        )
        alone = [one for one in checks if one.alone]
        callers_loop = asyncio.get_running_loop()
        queue = CheckQueue.of(len(together))
        others: list[LaneProcess] = []
        if Capability.MULTI_PROCESS in self.backend.capabilities:
            order = self._lane_order([one.name for one in together], queue)
            others = [LaneProcess(order, together) for _ in range(processes - 1)]
        # In the caller's loop, which no backend can block.
        running = [asyncio.create_task(other.run(ended)) for other in others]

        def report(result: CheckResult) -> None:
            callers_loop.call_soon_threadsafe(ended, result)

        async def wait_for_others() -> None:
            if running:
                waiting = asyncio.run_coroutine_threadsafe(asyncio.wait(running), callers_loop)
                await asyncio.wrap_future(waiting)

        try:
            await self._run_in_lanes(
                queue.take(together),
                report,
                LANES_OF_SEVERAL if others else LANES,
                alone=alone,
                wait_for_others=wait_for_others,
            )
        finally:
            for one in running:
                one.cancel()
            errors = await asyncio.gather(*running, return_exceptions=True)
            queue.close()
            self.left_behind += tuple(url for other in others for url in other.in_use)
        for error in errors:
            # Refused by the guard in the other process.
            if isinstance(error, Exception):
                raise error

    async def take_checks(
        self, checks: Sequence[Check], queue: CheckQueue, ended: Callable[[CheckResult], None], lanes: int
    ) -> None:
        """Run checks of a queue in lanes of another process than that of the suite.

        Calls ``ended`` as run_lanes does, but in the loop of the lanes.
        """
        await self._run_in_lanes(queue.take(checks), ended, lanes)

    def _lane_order(self, names: Sequence[str], queue: CheckQueue) -> LaneOrder:
        return LaneOrder(
            url=self._url,
            origin=origin_of(self._plain),
            capabilities=sorted(self.backend.capabilities),
            profile=self._profile.value,
            seed=self._seed,
            variant=self._variants.chosen,
            faults=isinstance(self._plain, BackendWithNetworkFaults),
            findings=[dataclasses.asdict(one) for one in self.backend.findings],
            limits=dataclasses.asdict(self._watchdog.limits),
            lanes=LANES_OF_SEVERAL,
            checks=names,
            queue=queue.descriptor,
        )

    async def _run_in_lanes(
        self,
        together: Iterator[Check],
        ended: Callable[[CheckResult], None],
        lanes: int,
        *,
        alone: Sequence[Check] = (),
        wait_for_others: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Run the checks ``alone``, then the others in lanes, and wait for other processes."""

        async def job() -> None:
            with capture_callback_errors() as callback_errors:

                def report(result: CheckResult) -> None:
                    if not callback_errors:
                        ended(result)

                recycling = RecyclingBackend(self.backend)
                try:
                    async with self._watchdog.watch(timeout_factor=LANES_LIMIT_FACTOR):
                        try:
                            await self._run_lane(iter(alone), recycling, report)
                            async with asyncio.TaskGroup() as group:
                                for _ in range(lanes):
                                    group.create_task(self._run_lane(together, recycling, report))
                            if wait_for_others is not None:
                                await wait_for_others()
                        finally:
                            await recycling.discard()
                except Exception as error:  # noqa: BLE001 - the checks run again and report it
                    _raise_refusal(error)
                    self._end_in_lanes(error, ended)

        try:
            await self._supervisor.run(job, stop=self._stop)
        except Hung as hung:
            self._end_in_lanes(hung, ended)
            self._leave_loop()

    def _end_in_lanes(self, error: Exception, ended: Callable[[CheckResult], None]) -> None:
        """Report an error that has ended the lanes as the result of each check that they ran."""
        for check, begun in self._in_lanes.items():
            ended(_result(check, self._seed, begun, _explain(error, check, 0, self._url), None))
        self._in_lanes.clear()

    async def _run_lane(
        self, waiting: Iterator[Check], recycling: RecyclingBackend, report: Callable[[CheckResult], None]
    ) -> None:
        shared: SharedNamespace | None = None
        try:
            for check in waiting:
                begun, variant = time.monotonic(), self._variants.of(check)
                self._in_lanes[check] = begun
                seed = _seed_of(check, self._seed)
                backend = self.backend if check.breaks_namespace else cast(Backend, recycling)
                context: AbstractAsyncContextManager[CheckContext]
                if self._shares_namespace(check):
                    if shared is None or shared.variant != variant:
                        if shared is not None:
                            await shared.discard()
                        shared = self._new_shared_namespace(variant)
                    context = shared.context(seed, backend, empty=check.isolated)
                else:
                    context = self._new_context(backend, seed, variant)
                outcome = await self._run_in_lane(check, context)
                if outcome.status is Status.UNSUPPORTED and self._only_variant_lacks(check, variant):
                    variant = DEFAULT_VARIANT
                    context = self._new_context(cast(Backend, recycling), seed, variant)
                    outcome = await self._run_in_lane(check, context)
                del self._in_lanes[check]
                result = _result(check, self._seed, begun, outcome, variant)
                report(apply_findings(result, self.backend.findings))
                if outcome.status not in SETTLED:
                    if shared is not None and self._shares_namespace(check):
                        await shared.discard()
                    await recycling.discard()
                # The operations of a store may never suspend.
                await asyncio.sleep(0)
        finally:
            if shared is not None:
                await shared.discard()

    async def _run_in_lane(self, check: Check, made: AbstractAsyncContextManager[CheckContext]) -> _CheckRun:
        if lacking := _unsupported(check, self.backend.capabilities):
            return lacking
        try:
            async with made as context:
                return _unsupported(check, context.capabilities) or await _judge(check, context)
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            return _explain(error, check, 0, self._url)
        except Exception as error:  # noqa: BLE001 - the check runs again and reports it
            _raise_refusal(error)
            return _explain(error, check, 0, self._url)

    def _shares_namespace(self, check: Check) -> bool:
        """Whether a lane runs the check in the namespace that it keeps, emptied if the check needs that.

        A check that fills a namespace needs new stores: a database may keep plans made for few rows.
        """
        if not check.isolated:
            return True
        is_emptied = isinstance(self.backend, ScratchClearable) and check.kind is not Kind.VOLUME
        return is_emptied and not check.breaks_namespace

    def _new_context(
        self, backend: Backend, seed: int, variant: str | None
    ) -> AbstractAsyncContextManager[CheckContext]:
        limit = self._watchdog.limits.call
        return new_context(
            self._url, backend, self._profile, seed, 1.0, limit, variant, processes=self._processes
        )

    def _new_shared_namespace(self, variant: str | None) -> SharedNamespace:
        limit = self._watchdog.limits.call
        return SharedNamespace(self._url, self.backend, self._profile, limit, variant, self._processes)

    async def check(self, check: Check) -> CheckResult:
        if (blocker := _blocker(self.backend)) is not None:
            return _not_run(check, self._seed, blocker.title, blocker)
        if self._failing_seconds > (limit := self._watchdog.limits.failures):
            reason = (
                f"the checks that did not pass had taken longer than {limit:g} s ({OPTION} raises the limit)"
            )
            return _not_run(check, self._seed, reason)
        variant = self._variants.of(check)
        shared = None
        if self._shares and not check.isolated:
            if variant not in self._shared:
                self._shared[variant] = self._new_shared_namespace(variant)
            shared = self._shared[variant]
        result = await self._run(check, variant, shared)
        if result.status is Status.UNSUPPORTED and self._only_variant_lacks(check, variant):
            result = await self._run(check, DEFAULT_VARIANT, None)
        return result

    async def _run(self, check: Check, variant: str | None, shared: SharedNamespace | None) -> CheckResult:
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
                variant=variant,
                processes=self._processes,
            ),
        )

    def _only_variant_lacks(self, check: Check, variant: str | None) -> bool:
        """Whether the store has a capability without the variant, which the seed selected."""
        if variant == DEFAULT_VARIANT or DEFAULT_VARIANT not in self._variants.names:
            return False
        return _unsupported(check, self.backend.capabilities) is None

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
            self._on_hang(hung.hang)
            return result

    async def try_again(
        self,
        result: CheckResult,
        before: CheckResult,
        *,
        repeats: int = REPEATS,
        seconds: float = REPEAT_SECONDS,
    ) -> CheckResult:
        """Run a check that passed alone, and failed beside other checks, until it fails; return that result.

        If it always passes, its result tells of the failure in a note. An inconclusive check is no failure.
        """
        if before.status is not Status.FAIL:
            return result
        begun, passes = time.monotonic(), 1
        while passes <= repeats and time.monotonic() - begun + result.seconds < seconds:
            again = await self.check(result.check)
            if again.status is not Status.PASS:
                return again
            passes += 1
        said = before.reason if before.failure is None else before.failure.message
        alone = "when it ran alone" if passes == 1 else f"{passes} times when it ran alone"
        return dataclasses.replace(
            result, notes=(*result.notes, f"passed {alone}, after a failure beside other checks: {said}")
        )

    async def _examine(self, check: Check, job: Callable[[], Awaitable[CheckResult]]) -> CheckResult:
        begun = time.monotonic()
        try:
            result = await self._supervisor.run(job, stop=self._stop)
        except Hung as hung:
            # The abandoned event loop keeps its open namespaces and stores.
            self._on_hang(hung.hang)
            result = CheckResult(
                check=check,
                status=Status.FAIL,
                assertions=0,
                seconds=time.monotonic() - begun,
                seed=self._seed,
                failure=_hang_failure(hung.hang, Scrubber(self._url)),
            )
        if result.status in (Status.FAIL, Status.INCONCLUSIVE):
            self._failing_seconds += result.seconds
        return apply_findings(result, self.backend.findings)

    def _on_hang(self, hang: Hang) -> None:
        if hang.operation is not None:
            self._watchdog.known_hangs.add(hang.operation)
        self._leave_loop()

    def _leave_loop(self) -> None:
        """Forget what belongs to an abandoned event loop, which has killed its processes."""
        self.left_behind += tuple(one for one in self.backend.in_use if one not in self.left_behind)
        self._shared = {}
        self._processes = WorkerProcesses()

    async def aclose(self) -> None:
        """Drop the shared namespaces, and end the worker processes and the loop."""
        with suppress(Hung):
            for shared in list(self._shared.values()):
                await self._supervisor.run(partial(_discard, shared, self._watchdog))
            await self._supervisor.run(self._processes.aclose)
        await self._supervisor.aclose()
        self.left_behind += tuple(one for one in self.backend.in_use if one not in self.left_behind)


async def inspect_backend(
    supervisor: Supervisor, backend: Backend, url: str, *, stop: asyncio.Event | None = None
) -> GuardedBackend:
    """Inspect a backend (see guard). Raises ConfigurationError if it does not respond."""
    guarded = GuardedBackend(backend, url)

    async def job() -> GuardedBackend:
        try:
            async with supervisor.watchdog.watch():
                return await guard(guarded, url)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            raise Refused(f"{CANNOT_INSPECT}: the backend raised CancelledError") from None

    try:
        return await supervisor.run(job, stop=stop)
    except Hung as hung:
        if guarded.inspected:
            # Only closing hangs, which the checks will report.
            return guarded
        message = Scrubber(url)(hung.hang.message)
        raise Refused(f"{CANNOT_INSPECT}: {message}") from None


def slowdown_factor(seconds: float) -> float:
    """The factor by which a backend is slower than expected, given the duration of its inspection."""
    return max(1.0, seconds / EXPECTED_INSPECTION_SECONDS)


def _blocker(backend: GuardedBackend) -> SignatureFinding | None:
    """A finding that prevents core from opening the store."""
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


def apply_findings(result: CheckResult, findings: Sequence[SignatureFinding]) -> CheckResult:
    """Change a failure to NOT RUN if its cause is a method that core cannot call."""
    for finding in findings:
        if result.failure is not None and _is_due_to(result.failure, finding):
            return dataclasses.replace(
                result, status=Status.NOT_RUN, failure=None, reason=finding.title, finding=finding
            )
    return result


def _is_due_to(failure: Failure, finding: SignatureFinding) -> bool:
    error = "NotSupportedError" if finding.missing else "TypeError"
    if failure.error is not None:
        # Raised by the call itself, not inside the author's code.
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
    check_names: Collection[str] = (),
    seed: int | None = None,
    waivers: Sequence[Waiver] = (),
    check_timeout: float | None = None,
    variant: str | None = None,
    faults: bool = False,
    processes: int | None = None,
) -> Report:
    """run_suite for code without a running event loop; same arguments, errors and report."""
    suite = run_suite(
        url,
        profile=profile,
        clauses=clauses,
        check_names=check_names,
        seed=seed,
        waivers=waivers,
        check_timeout=check_timeout,
        variant=variant,
        faults=faults,
        processes=processes,
    )
    return asyncio.run(suite)


def select_checks(
    clauses: Collection[str] = (),
    checks: Sequence[Check] | None = None,
    names: Collection[str] = (),
    *,
    faults: bool = False,
) -> Sequence[Check]:
    """The checks of some clauses and of some names, or all; a name may be that of one example of a check.

    Checks that run only with faults are left out unless ``faults`` is set. Raises ConfigurationError for an
    unknown clause or name, and for the name of such a check.
    """
    if unknown := set(clauses) - CLAUSES.keys():
        raise ConfigurationError(
            f"there is no clause {', '.join(sorted(unknown))}; docs/contract.md lists all"
        )
    if checks is None:
        try:
            checks = all_checks()
        except ModuleNotFoundError as error:
            if error.name != "hypothesis":
                raise
            message = "module 'hypothesis' is missing; pip install 'flowstore[conformance]'"
            raise ConfigurationError(message) from error
    if names:
        checks = _named(names, checks)
        if not faults and (left_out := [one.name for one in checks if one.only_with_faults]):
            raise ConfigurationError(f"check {left_out[0]!r} runs only with faults: add {FAULTS_OPTION}")
    checks = [one for one in checks if faults or not one.only_with_faults]
    return [one for one in checks if not clauses or set(one.clauses) & set(clauses)]


def checks_of_profile(
    checks: Sequence[Check], profile: Profile, seed: int, backend: GuardedBackend, *, faults: bool
) -> Sequence[Check]:
    """The checks that a run makes if none are selected: in the profile quick, one of each rotation.

    If core cannot call a method of the store, all: whether a clause passes must not depend on whether the
    seed selects a check that calls the method.
    """
    if profile is not Profile.QUICK or backend.findings:
        return checks
    return rotate(checks, seed, backend.capabilities, faults=faults)


def _named(names: Collection[str], checks: Sequence[Check]) -> Sequence[Check]:
    # Imported after all_checks(), which explains a missing module or working directory.
    from flowstore_conformance.checks.example_checks import example_names, single_example

    found = {name: [one for one in checks if one.name == name] for name in names}
    for name, named in found.items():
        named += [example for one in checks if (example := single_example(one, name)) is not None]
    if unknown := sorted(name for name, named in found.items() if not named):
        known = [name for one in checks for name in (one.name, *example_names(one))]
        raise ConfigurationError(
            "; ".join(f"there is no check {name!r}{did_you_mean(name, known)}" for name in unknown)
        )
    return [one for named in found.values() for one in named]


def read_profile(name: str) -> Profile:
    """Parse the name of a profile. Raises ConfigurationError, which lists the valid names."""
    try:
        return Profile(name)
    except ValueError:
        raise ConfigurationError(f"profile must be one of {', '.join(Profile)}, not {name!r}") from None


def read_limits(profile: Profile, check_timeout: float | None) -> Limits:
    """The time limits of a run. Raises ConfigurationError for a limit that is not positive."""
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
    variant: str | None = None,
    processes: WorkerProcesses | None = None,
) -> CheckResult:
    """Run one check in a new namespace and return its result, whatever happens.

    Runs in the caller's event loop. A call that does not end is cancelled and counts as a failure; a call
    that blocks the loop cannot be cancelled, which is why run_suite uses a Supervisor.

    ``processes`` are worker processes that the check may use; by default it starts its own.

    A check that can share a namespace runs in the shared one first, if there is one. If it does not pass
    there, it runs again in a new namespace, and only that result counts. Raises only Refused, after which it
    is not safe to continue.
    """
    begun = time.monotonic()
    watchdog = watchdog or Watchdog(Limits.of(profile))
    isolated = partial(_run_isolated, check, url, backend, profile, seed, watchdog, variant, processes)
    outcome = None
    if shared:
        outcome = await _run_shared(check, profile, seed, shared, watchdog, url)
    if outcome is None:
        outcome = await isolated()
    for number in range(1, INCONCLUSIVE_RETRIES + 1):
        is_hung_again = outcome.failure is not None and number > 1
        if not outcome.retryable or is_hung_again or watchdog.retry_seconds >= watchdog.limits.retries:
            break
        # The machine may have been busy: retry with more time and other draws.
        since = time.monotonic()
        outcome = await isolated(retry=number)
        watchdog.retry_seconds += time.monotonic() - since
    if outcome.failure is not None and outcome.failure.hung and outcome.failure.operation is not None:
        watchdog.known_hangs.add(outcome.failure.operation)
    return _result(check, seed, begun, outcome, variant)


@dataclasses.dataclass(frozen=True, slots=True)
class _CheckRun:
    """The result of running a check once."""

    status: Status
    assertions: int = 0
    failure: Failure | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()
    retryable: bool = False
    """Whether a retry with more time may pass."""


def _result(check: Check, seed: int, begun: float, outcome: _CheckRun, variant: str | None) -> CheckResult:
    """The result of a check that began at a time of the monotonic clock and has just ended."""
    return CheckResult(
        check=check,
        status=outcome.status,
        assertions=outcome.assertions,
        seconds=time.monotonic() - begun,
        seed=seed,
        failure=outcome.failure,
        reason=outcome.reason,
        variant=variant,
        notes=outcome.notes,
    )


async def _run_shared(
    check: Check, profile: Profile, seed: int, shared: SharedNamespace, watchdog: Watchdog, url: str
) -> _CheckRun | None:
    """Run a check in a shared namespace. Unless it passes, discard the namespace and return None.

    A call that is already known to hang in a separate namespace is reported without a second run.
    """
    hung = None
    try:
        with capture_callback_errors() as callback_errors:
            async with watchdog.watch(), shared.context(_seed_of(check, seed)) as context:
                outcome = _unsupported(check, context.capabilities) or await _judge(check, context)
        if outcome.status in (Status.PASS, Status.UNSUPPORTED) and not callback_errors:
            return outcome
    except Hung as error:
        if error.hang.operation in watchdog.known_hangs:
            hung = _explain(error, check, 0, url)
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
    except Exception as error:  # noqa: BLE001 - the run in a separate namespace reports it
        _raise_refusal(error)
    await _discard(shared, watchdog)
    return hung


def _is_cancelled() -> bool:
    """Whether the running task is being cancelled; otherwise a CancelledError comes from the backend."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _discard(shared: SharedNamespace, watchdog: Watchdog) -> None:
    """Drop a shared namespace; checks in separate namespaces report it if this fails."""
    try:
        async with watchdog.watch():
            await shared.discard()
    except asyncio.CancelledError:
        if _is_cancelled():
            raise
    except Exception as error:  # noqa: BLE001
        _raise_refusal(error)


def _seed_of(check: Check, seed: int, retry: int = 0) -> int:
    """The seed of a check, which does not depend on the other checks of the run."""
    return random.Random(f"{seed}/{check.name}{f'/{retry}' if retry else ''}").getrandbits(32)


async def _run_isolated(
    check: Check,
    url: str,
    backend: Backend,
    profile: Profile,
    seed: int,
    watchdog: Watchdog,
    variant: str | None,
    processes: WorkerProcesses | None,
    *,
    retry: int = 0,
) -> _CheckRun:
    # A guarded backend has the capabilities of an opened store; otherwise they are unknown before opening.
    if isinstance(backend, GuardedBackend) and (lacking := _unsupported(check, backend.capabilities)):
        return lacking
    own_seed = _seed_of(check, seed, retry)
    outcome: _CheckRun | None = None
    made: CheckContext | None = None
    try:
        with capture_callback_errors() as callback_errors:
            async with (
                watchdog.watch(timeout_factor=RETRY_LIMIT_FACTOR if retry else 1.0),
                new_context(
                    url, backend, profile, own_seed, 4.0**retry, watchdog.limits.call, variant, processes
                ) as context,
            ):
                made = context
                outcome = _unsupported(check, context.capabilities) or await _judge(check, context)
        if callback_errors and outcome.status is Status.PASS:
            name = type(callback_errors[0]).__name__
            message = f"a callback of the event loop raised {name}, which no caller sees"
            failure = _exception_failure("CON-2", message, callback_errors[0], url)
            outcome = _CheckRun(Status.FAIL, outcome.assertions, failure)
    except asyncio.CancelledError as error:
        if _is_cancelled():
            raise
        outcome = _explain(error, check, made.assertions if made else 0, url)
    except Exception as error:  # noqa: BLE001 - any exception of a backend is a finding
        # Raised while making or closing the context; _judge handles exceptions of the check itself.
        _raise_refusal(error)
        if outcome is None or outcome.status is Status.PASS:
            outcome = _explain(error, check, made.assertions if made else 0, url)
    return outcome


def _unsupported(check: Check, capabilities: Collection[Capability]) -> _CheckRun | None:
    if missing := check.needs - frozenset(capabilities):
        names = ", ".join(sorted(one.name for one in missing))
        return _CheckRun(Status.UNSUPPORTED, reason=f"the backend does not declare {names}")
    return None


async def _judge(check: Check, context: CheckContext) -> _CheckRun:
    try:
        await check.run(context)
    except Exception as error:  # noqa: BLE001 - any exception of a backend is a finding
        _raise_refusal(error)
        return _explain(error, check, context.assertions, context.base_url)
    if not context.assertions:
        return _CheckRun(Status.INCONCLUSIVE, reason="the check made no assertion")
    return _CheckRun(Status.PASS, context.assertions, notes=tuple(context.notes))


def _raise_refusal(error: Exception) -> None:
    found = _leaf(error)
    if isinstance(found, Refused):
        raise found


def _explain(error: BaseException, check: Check, assertions: int, url: str) -> _CheckRun:
    """Turn an exception into a result."""
    found, clean = _leaf(error), Scrubber(url)
    if isinstance(found, Hung):
        # If no single call hangs, the machine may be busy: the check gets more time once.
        too_slow = found.hang.operation is None
        return _CheckRun(Status.FAIL, assertions, _hang_failure(found.hang, clean), retryable=too_slow)
    if isinstance(found, ContractViolation):
        clause = found.clause or check.clauses[0]
        failure = _exception_failure(clause, found.message, found.__cause__, url)
        failure = dataclasses.replace(
            failure, program=found.program, history=found.history, verdict=found.verdict
        )
        return _CheckRun(Status.FAIL, assertions, failure)
    if isinstance(found, (Inconclusive, NoNamespace)):
        retryable = isinstance(found, Inconclusive) and found.retryable
        return _CheckRun(Status.INCONCLUSIVE, assertions, reason=clean(str(found)), retryable=retryable)
    if isinstance(found, Unsupported):
        return _CheckRun(Status.UNSUPPORTED, assertions, reason=clean(str(found)))
    if isinstance(found, FlowStoreError):
        clause = check.clauses[0]
        message = f"an operation that should have worked raised {type(found).__name__}: {found}"
    else:
        clause = "CON-2"
        message = f"the backend raised {type(found).__name__}, which is not an error of the contract"
    return _CheckRun(Status.FAIL, assertions, _exception_failure(clause, message, found, url))


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
    """A failure with its exception, if there is one."""
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
    """The most informative exception of a group: a refusal, a hang or a violation before any other."""
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
    """Rerun a failed check to count its failures, and run its program on the memory backend.

    A check with a hanging call is not rerun, because each rerun would take as long.
    """
    assert result.failure is not None
    if result.failure.hung:
        return result
    reproductions = repetitions = 1
    begun = time.monotonic()
    while repetitions <= repeats and time.monotonic() - begun + result.seconds < seconds:
        again = await run_check(
            result.check, url, backend, profile, result.seed, watchdog=watchdog, variant=result.variant
        )
        repetitions += 1
        reproductions += again.failure is not None and again.failure.clause == result.failure.clause
    failure = dataclasses.replace(result.failure, reproductions=reproductions, repetitions=repetitions)
    if failure.program is not None and backend.name != "memory":
        answer = await replay_on_memory(failure.program)
        failure = dataclasses.replace(failure, right_answer=answer)
    return dataclasses.replace(result, failure=failure)


def versions(distribution: str | None) -> dict[str, str]:
    """The versions of Python, flowstore and the backend's distribution."""
    found = {"python": platform.python_version()}
    for name in dict.fromkeys(("flowstore", distribution)):
        if name is not None:
            found[name] = installed_version(name) or "not installed"
    return found
