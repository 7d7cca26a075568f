"""Gives pytest the options when the suite's folder is named, without ``-p flowstore_conformance.options``."""

from __future__ import annotations

import pytest

from flowstore_conformance import options


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.has_plugin(options.__name__):
        options.pytest_addoption(parser)
