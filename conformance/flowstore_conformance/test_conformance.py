"""One test for each check, named by its clause. See pytest_plugin.py for the options."""

from __future__ import annotations

import pytest

from flowstore_conformance.pytest_plugin import session_of
from flowstore_conformance.registry import Check
from flowstore_conformance.rendering.text import failure_text, finding_lines
from flowstore_conformance.status import Status


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    try:
        checks = session_of(metafunc.config).checks
    except pytest.UsageError as error:
        raise pytest.Collector.CollectError(str(error)) from None
    # The suite's own time limit names the hanging call; pytest-timeout would end the session.
    marks = [pytest.mark.timeout(0)] if metafunc.config.pluginmanager.hasplugin("timeout") else []
    metafunc.parametrize(
        "conformance_check",
        [pytest.param(one, id=f"{one.clauses[0]}-{one.name}", marks=marks) for one in checks],
    )


def test_clause(conformance_check: Check, pytestconfig: pytest.Config) -> None:
    result, report = session_of(pytestconfig).run(conformance_check)
    if result.status is Status.UNSUPPORTED:
        pytest.skip(result.reason or "")
    if result.status is Status.INCONCLUSIVE:
        pytest.fail(f"inconclusive, which does not count as passed: {result.reason}", pytrace=False)
    if (
        result.finding is not None
        and result.finding.missing
        and pytestconfig.getoption("flowstore_partial", False)
    ):
        pytest.skip(result.finding.title)
    if result.finding is not None:
        lines = "\n".join(finding_lines(result.finding))
        pytest.fail(f"not run, because core cannot call a method:\n{lines}", pytrace=False)
    if result.failure is not None:
        pytest.fail(f"{failure_text(report, result)}\n", pytrace=False)
