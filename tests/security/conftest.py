"""Fixtures of these tests; a third party's plugin is installed as the tests of core do it."""

from __future__ import annotations

from tests.core.conftest import install

__all__ = ["install"]
