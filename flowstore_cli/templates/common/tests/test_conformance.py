"""The conformance suite: one test for each check. pyproject.toml has its options."""

from flowstore_conformance.test_conformance import pytest_generate_tests, test_clause

__all__ = ["pytest_generate_tests", "test_clause"]
