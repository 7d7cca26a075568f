"""The pytest plugin of the suite: its options and the session that they configure.

pytest reads a conftest inside an installed package too late to add options to ``pytest --pyargs``, so the
options come from this plugin. It is loaded only by ``-p flowstore_conformance.pytest_plugin``.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest

from flowstore_conformance.context import Profile
from flowstore_conformance.guard import GuardedBackend
from flowstore_conformance.method_signatures import SignatureFinding
from flowstore_conformance.network_faults import BackendWithNetworkFaults
from flowstore_conformance.registry import Check
from flowstore_conformance.report import Report
from flowstore_conformance.results import CheckResult
from flowstore_conformance.suite import (
    SuiteRun,
    Variants,
    checks_of_profile,
    inspect_backend,
    new_seed,
    read_limits,
    read_profile,
    select_checks,
    slowdown_factor,
    versions,
)
from flowstore_conformance.supervisor import Supervisor
from flowstore_conformance.watchdog import Limits, Watchdog
from flowstore_core import Backend, Capability, FlowStoreError
from flowstore_core.config import URL_VARIABLE
from flowstore_core.plugins import find_backend
from flowstore_core.urls import parse_url, redact

PACKAGE = "flowstore_conformance"

NO_URL = (
    f"the conformance suite needs to know which store to check: pytest -p {PACKAGE}.pytest_plugin "
    f"--pyargs {PACKAGE} --flowstore-url=URL, or set {URL_VARIABLE}; "
    "the suite works only in scratch namespaces beside that store"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceSession:
    """The configuration and state of a pytest session."""

    # Without repr, because pytest shows the arguments of failed tests.
    url: str = field(repr=False)
    backend: GuardedBackend
    profile: Profile
    seed: int
    checks: Sequence[Check]
    by_name: bool
    """Whether --flowstore-check selected the checks."""
    faults: bool
    """Whether --flowstore-faults is given."""
    variants: Variants
    versions: dict[str, str]
    limits: Limits
    known_hangs: set[str] = field(default_factory=set)
    """Operations that are known to hang."""
    abandoned: list[Supervisor] = field(default_factory=list)
    """Supervisors that abandoned an event loop."""

    def run(self, check: Check) -> tuple[CheckResult, Report]:
        """Run one check; return its result and a report of that result.

        Runs in a separate thread, as the command does, to detect a backend that blocks the event loop.
        """
        started_at = datetime.now(UTC)
        watchdog = Watchdog(self.limits)
        watchdog.known_hangs = self.known_hangs
        supervisor = Supervisor(watchdog)
        one = SuiteRun(
            self.url, self.backend, self.profile, self.seed, supervisor, self.variants, shares=False
        )
        result = asyncio.run(self._run(one, check))
        if result.failure is not None and result.failure.hung:
            self.abandoned.append(supervisor)
        report = Report(
            backend=self.backend.name,
            url=redact(self.url),
            capabilities=tuple(sorted(self.backend.capabilities)),
            profile=self.profile.value,
            seed=self.seed,
            started_at=started_at,
            seconds=result.seconds,
            results=(result,),
            versions=self.versions,
            selected=check.clauses,
            selected_checks=(check.name,) if self.by_name else (),
            faults=self.faults,
            variants=self.variants.names,
            left_behind=one.left_behind,
        )
        return result, report

    async def _run(self, one: SuiteRun, check: Check) -> CheckResult:
        try:
            result = await one.check(check)
            return result if result.failure is None else await one.rerun_failed(result)
        finally:
            await one.aclose()


_session = pytest.StashKey[ConformanceSession]()
_seed = pytest.StashKey[int]()
_exit_status = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flowstore conformance")
    group.addoption("--flowstore-url", metavar="URL", help="a store of the backend to check")
    group.addoption(
        "--flowstore-profile", metavar="PROFILE", default="standard", help="quick, standard or thorough"
    )
    group.addoption("--flowstore-seed", metavar="N", type=int, help="repeat the run that had this seed")
    group.addoption(
        "--flowstore-check-timeout",
        metavar="SECONDS",
        type=float,
        help="how long a check may take; a call may take half of that",
    )
    group.addoption(
        "--flowstore-clause", metavar="ID", action="append", default=[], help="check this clause only"
    )
    group.addoption(
        "--flowstore-check",
        metavar="NAME",
        action="append",
        default=[],
        help="run this check, or this example of a check, only",
    )
    group.addoption(
        "--flowstore-partial",
        action="store_true",
        help="skip the checks that call an operation that the store lacks",
    )
    group.addoption(
        "--flowstore-variant",
        metavar="NAME",
        help='open stores with this variant of the backend only; "default" for the options of the URL',
    )
    group.addoption(
        "--flowstore-faults",
        action="store_true",
        help="also check the store while its requests are disturbed",
    )


def pytest_configure(config: pytest.Config) -> None:
    if any(PACKAGE in argument for argument in config.args) and not config.option.help:
        session_of(config)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    # All workers of pytest-xdist share one seed and the controller's inspection of the backend.
    node.workerinput["flowstore_seed"] = _chosen_seed(node.config)
    session = node.config.stash.get(_session, None)
    node.workerinput["flowstore_guarded"] = session and {
        "capabilities": [one.value for one in session.backend.capabilities],
        "findings": [asdict(one) for one in session.backend.findings],
        "limits": asdict(session.limits),
    }


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[_exit_status] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    # A hanging thread of the backend would prevent the interpreter from exiting.
    own = config.stash.get(_session, None)
    if own is not None and own.abandoned and threading.active_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(config.stash.get(_exit_status, 1))


def session_of(config: pytest.Config) -> ConformanceSession:
    """The session of the options; the first call checks that a scratch namespace is empty.

    Raises pytest.UsageError if the suite cannot run.
    """
    if _session not in config.stash:
        try:
            config.stash[_session] = _open_session(config)
        except FlowStoreError as error:
            raise pytest.UsageError(str(error)) from error
    return config.stash[_session]


def _open_session(config: pytest.Config) -> ConformanceSession:
    url = config.getoption("flowstore_url", None) or os.environ.get(URL_VARIABLE, "").strip()
    if not url:
        raise pytest.UsageError(NO_URL)
    parts = parse_url(url)
    url = parts.text
    plugin, backend = find_backend(parts.scheme)
    profile = read_profile(config.getoption("flowstore_profile", "standard"))
    names = config.getoption("flowstore_check", ())
    clauses = config.getoption("flowstore_clause", ())
    faults = config.getoption("flowstore_faults", default=False)
    if faults:
        backend = BackendWithNetworkFaults(backend)
    checks = select_checks(clauses, names=names, faults=faults)
    variants = Variants(backend, url, _chosen_seed(config), config.getoption("flowstore_variant", None))
    limits = read_limits(profile, timeout := config.getoption("flowstore_check_timeout", None))
    shared = getattr(config, "workerinput", {}).get("flowstore_guarded")
    if shared is None:
        supervisor, begun = Supervisor(Watchdog(limits)), time.monotonic()
        guarded = asyncio.run(_inspect(supervisor, backend, url))
        if timeout is None:
            limits = limits.scaled(slowdown_factor(time.monotonic() - begun))
    else:
        guarded = GuardedBackend(backend, url, frozenset(map(Capability, shared["capabilities"])))
        guarded.findings = tuple(SignatureFinding(**one) for one in shared["findings"])
        limits = Limits(**shared["limits"])
    if not (clauses or names):
        checks = checks_of_profile(checks, profile, _chosen_seed(config), guarded, faults=faults)
    return ConformanceSession(
        url=url,
        backend=guarded,
        profile=profile,
        seed=_chosen_seed(config),
        checks=checks,
        by_name=bool(names),
        faults=faults,
        variants=variants,
        versions=versions(plugin.distribution),
        limits=limits,
    )


async def _inspect(supervisor: Supervisor, backend: Backend, url: str) -> GuardedBackend:
    try:
        return await inspect_backend(supervisor, backend, url)
    finally:
        await supervisor.aclose()


def _chosen_seed(config: pytest.Config) -> int:
    if _seed not in config.stash:
        given = config.getoption("flowstore_seed", None)
        shared = getattr(config, "workerinput", {}).get("flowstore_seed")
        config.stash[_seed] = next((one for one in (given, shared) if one is not None), new_seed())
    return config.stash[_seed]
