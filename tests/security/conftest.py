"""Fixtures of the security tests."""

from __future__ import annotations

from tests.core.conftest import install

__all__ = ["install"]
