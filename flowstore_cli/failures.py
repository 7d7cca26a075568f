"""Exit codes, and the error messages of the command line: one line that ends with a remedy."""

from __future__ import annotations

from collections.abc import Sequence

from flowstore_cli.words import in_words
from flowstore_core import (
    ConfigurationError,
    FlowStoreError,
    InvalidArgumentError,
    NotSupportedError,
    SchemaVersionError,
    StoreUnavailableError,
)
from flowstore_replay import ReplayError, WorkflowError

MISUSES = (
    ConfigurationError,
    InvalidArgumentError,
    NotSupportedError,
    SchemaVersionError,
    WorkflowError,
)

SUCCESS = 0
NO = 1
"""A negative result: not found, a conflict, a failed check."""
USAGE = 2
UNAVAILABLE = 3
UNWRITTEN = 4
"""The work is done, but the output cannot be written."""
INTERRUPTED = 130

EXIT_CODES = """\
Exit codes: 0 success; 1 a negative result, such as a failed check or nothing found;
2 wrong usage or configuration; 3 the store is unavailable;
4 the work is done, but the output cannot be written; 130 interrupted."""


class Failure(Exception):  # noqa: N818 - ends the command, not a defect
    """Ends the command with one line on stderr, indented details, and an exit code."""

    def __init__(self, message: str, code: int = NO, details: Sequence[str] = ()) -> None:
        self.code = code
        self.details = details
        super().__init__(message)


def explain_unavailable(error: StoreUnavailableError) -> str:
    """The error's message; appends a next step unless it has one, after a semicolon."""
    text = in_words(error)
    return text if "; " in text else f"{text}; check that the server runs and that the URL is right"


def explain(error: Exception) -> tuple[str, int] | None:
    """The line and the exit code for an error; None for an unexpected one."""
    if isinstance(error, Failure):
        return str(error), error.code
    if isinstance(error, StoreUnavailableError):
        return explain_unavailable(error), UNAVAILABLE
    if isinstance(error, MISUSES):
        return in_words(error) if isinstance(error, FlowStoreError) else str(error), USAGE
    if isinstance(error, ReplayError):
        return str(error), USAGE if error.usage else NO
    if isinstance(error, FlowStoreError):
        return in_words(error), NO
    return None
