"""The states of a check and of a clause."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """The status of a check or of a clause."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNSUPPORTED = "UNSUPPORTED"
    """The backend lacks a required capability. Never counts as passed."""
    WAIVED = "WAIVED"
    """Fails, and a valid waiver permits it."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """The check could not decide. Never counts as passed."""
    NOT_RUN = "NOT RUN"
    """No check completed: not selected, or stopped by the failure of another clause."""
