"""Add the options of the pytest plugin if the folder of the suite is named on the command line."""

from __future__ import annotations

import pytest

from flowstore_conformance import pytest_plugin


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.has_plugin(pytest_plugin.__name__):
        pytest_plugin.pytest_addoption(parser)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    pytest_plugin.pytest_sessionfinish(session, exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    pytest_plugin.pytest_unconfigure(config)
