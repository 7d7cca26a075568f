"""The conformance suite with its network faults: one test for each check.

pyproject.toml has its options, conftest.py starts the server.
"""

import pytest
import redis_server
from flowstore_conformance.test_conformance import pytest_generate_tests, test_clause

if redis_server.BINARY is None:
    pytest.skip(redis_server.MISSING, allow_module_level=True)

__all__ = ["pytest_generate_tests", "test_clause"]
