"""Error messages of a store in terms of the command line: its options, arguments and next commands."""

from __future__ import annotations

import re
from collections.abc import Iterable

from flowstore_core import (
    FlowStoreError,
    InvalidArgumentError,
    NotSupportedError,
    OutcomeUnknownError,
    RunNotCompletedError,
    RunNotFoundError,
    SchemaVersionError,
    StaleAttemptError,
    StepNotFoundError,
)
from flowstore_core.suggestions import closest_word

OPTIONS = {
    "after": "--after",
    "as_of": "--grace",
    "attempt": "--attempt",
    "buffer": "--buffer",
    "cutoff": "--older-than",
    "delivery_id": "--delivery-id",
    "flow_id": "--flow",
    "payload_json": "PAYLOAD",
    "position": "--after",
    "reason": "--reason",
    "reset": "--reset",
    "run_id": "RUN",
    "search": "--search",
    "signal_name": "SIGNAL",
    "since": "--since",
    "skip": "--skip",
    "step_key": "STEP",
    "tags": "a tag",
    "take": "--take",
    "until": "--until",
}
"""The option or argument of the command line for each argument of the store's operations."""


def in_words(error: FlowStoreError) -> str:
    """The message of an error, for a user who knows the command line and not the Python API."""
    if isinstance(error, InvalidArgumentError):
        rest = str(error).removeprefix(error.argument)
        rest = re.sub(r"\ba str\b", "text", re.sub(r"\b(since|until)\b", r"--\1", rest))
        return f"{OPTIONS.get(error.argument, error.argument)}{rest}"
    if isinstance(error, RunNotFoundError):
        return f"there is no run {error.run_id} in this store; list the runs with: flowstore runs list"
    if isinstance(error, RunNotCompletedError):
        return (
            f"run {error.run_id} is Running, and only a completed run can be deleted; "
            f"cancel it first with: flowstore runs cancel {error.run_id}"
        )
    if isinstance(error, StepNotFoundError):
        return (
            f"run {error.run_id} has no started step {error.step_key!r}; list its steps with: "
            f"flowstore runs show {error.run_id}"
        )
    if isinstance(error, StaleAttemptError) and error.attempt is not None:
        return (
            f"attempt {error.last_attempt} is the last of step {error.step_key!r}, not attempt "
            f"{error.attempt}; see the changes with: flowstore runs show {error.run_id}"
        )
    if isinstance(error, NotSupportedError):
        return (
            f"this needs capability {error.capability}, which backend {error.backend!r} lacks; "
            "list the capabilities of each backend with: flowstore backends"
        )
    if isinstance(error, OutcomeUnknownError):
        return (
            "the connection was lost before the store answered, so the change may or may not have been made; "
            "check the state before you repeat the command"
        )
    if isinstance(error, SchemaVersionError) and error.found < error.needed:
        return (
            f"the database has schema version {error.found}, this flowstore supports {error.needed}; "
            "bring it up to date with: flowstore migrate up"
        )
    return str(error)


def suggestion(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` for a misspelt or unfinished word, else an empty string."""
    close = closest_word(word, known)
    return f"; did you mean {close!r}?" if close else ""
