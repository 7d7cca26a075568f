"""Calls and answers in the fewest words that a person needs."""

from __future__ import annotations

import re
from typing import Any

from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, literal
from flowstore_conformance.racing import AFTER, BEFORE

_LONG_UUID = re.compile(r"UUID\('([0-9a-f]{8})-[0-9a-f-]{27}'\)")
_ILLEGIBLE = re.compile("[^\n\t\u0020-\u007e\u00a0-\ud7ff\ue000-\U0010ffff]")
_MOMENT = re.compile(r"datetime\.fromisoformat\('([^']*)'\)")


def client_words(client: int) -> str:
    """Who made a call: a client, or the race itself before and after."""
    return {BEFORE: "before", AFTER: "after"}.get(client, f"client {client}")


def call_words(call: Call) -> str:
    """A call, without the arguments that are None, and with ids and datetimes shortened."""
    given = (f"{name}={literal(value)}" for name, value in call.arguments.items() if value is not None)
    return f"{call.method}({_shorten(', '.join(given))})"


def outcome_words(outcome: Outcome) -> str:
    """What a call returned, or the name of the error that it raised."""
    if outcome is UNKNOWN:
        return "no answer"
    if isinstance(outcome, Raised):
        return f"raises {outcome.error}"
    return _shorten(_value(outcome.value))


def outcome_word(outcome: Outcome) -> str:
    """The same as one word, to stand in a bar."""
    if isinstance(outcome, Raised):
        return outcome.error.removesuffix("Error")
    return "?" if outcome is UNKNOWN else outcome_words(outcome)


def legible(text: str) -> str:
    """Text with control characters and lone surrogates as escapes.

    A terminal might obey the first, and UTF-8 does not have the second.
    """
    return _ILLEGIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def span(seconds: float) -> str:
    """A length of time in a few characters."""
    if not seconds:
        return "0"
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.0f} µs"


def _shorten(text: str) -> str:
    return _MOMENT.sub(r"\1", _LONG_UUID.sub(r"\1…", text))


def _value(value: Any) -> str:
    """A comparable value (see history.comparable) with its records as they were."""
    if _is_record(value):
        name, fields = value
        shown = ", ".join(f"{key}={_value(each)}" for key, each in fields if each is not None)
        return f"{name}({shown})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(_value, value))) + "}"
    return literal(value)


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], str)
        and value[0].isidentifier()
        and isinstance(value[1], tuple)
        and all(isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in value[1])
    )
