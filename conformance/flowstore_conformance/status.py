"""The states of a check and of a clause."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of a check, or of a clause."""

    PASS = "PASS"
    FAIL = "FAIL"
    UNSUPPORTED = "UNSUPPORTED"
    """The backend does not declare the capability that it needs. Never counts as passed."""
    WAIVED = "WAIVED"
    """It fails, and a waiver that has not expired says why that is known."""
    INCONCLUSIVE = "INCONCLUSIVE"
    """The check could not look closely enough, or ran out of its budget. Never counts as passed."""
    NOT_RUN = "NOT RUN"
    """No check looked at it to the end: not asked for, or stopped by another clause's failure."""
