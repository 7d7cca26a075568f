"""The conformance suite for flowstore backends: checks whether a store keeps the contract.

``await run_suite(url)`` checks a backend from a running event loop, ``check_backend(url)`` from other code;
both return a Report. The command is ``flowstore conformance URL``.
"""

from flowstore_conformance.clauses import CLAUSES, Clause, Level
from flowstore_conformance.context import Profile
from flowstore_conformance.report import Report
from flowstore_conformance.repro import write_programs
from flowstore_conformance.results import CheckResult, ClauseResult, Failure
from flowstore_conformance.status import Status
from flowstore_conformance.suite import check_backend, run_suite
from flowstore_conformance.waivers import Waiver, WaiverResult, WaiverState, read_waivers

__all__ = [
    "CLAUSES",
    "CheckResult",
    "Clause",
    "ClauseResult",
    "Failure",
    "Level",
    "Profile",
    "Report",
    "Status",
    "Waiver",
    "WaiverResult",
    "WaiverState",
    "check_backend",
    "read_waivers",
    "run_suite",
    "write_programs",
]
