"""Gives pytest the options when the suite's folder is named, without ``-p flowstore_conformance.options``."""

from __future__ import annotations

import pytest

from flowstore_conformance import options


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.has_plugin(options.__name__):
        options.pytest_addoption(parser)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    options.pytest_sessionfinish(session, exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    options.pytest_unconfigure(config)
