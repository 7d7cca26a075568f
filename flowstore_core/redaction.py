"""The repr of records, which hides application data."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

SENSITIVE_FIELDS = frozenset(
    {
        "cancel_reason",
        "error_message",
        "idempotency_key",
        "input_json",
        "message",
        "output_json",
        "payload_json",
        "timed_out_reason",
        "tags",
        "trigger_data",
    }
)
"""The fields that contain application data."""


def redacted_repr(record: Any) -> str:
    """The ``repr`` of a record: of application data only the length.

    Records end up in logs and in tracebacks that show local variables.
    """
    shown = []
    for field in fields(record):
        value = getattr(record, field.name)
        shown.append(f"{field.name}={_redact(value) if field.name in SENSITIVE_FIELDS else repr(value)}")
    return f"{type(record).__qualname__}({', '.join(shown)})"


def _redact(value: Any) -> str:
    if isinstance(value, str):
        return f"<{len(value):,} characters>"
    if isinstance(value, tuple):
        # Tags: their keys are names that the application chose.
        return "{" + ", ".join(f"{key!r}: {_redact(text)}" for key, text in value) + "}"
    return repr(value)


def full_repr(value: Any) -> str:
    """The full text of a record or a tuple of records, application data included."""
    if names := _field_names(value):
        shown = (f"{name}={full_repr(getattr(value, name))}" for name in names)
        return f"{type(value).__qualname__}({', '.join(shown)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(full_repr, value))}{',' if len(value) == 1 else ''})"
    return repr(value)


def _field_names(value: Any) -> tuple[str, ...]:
    """The fields of a dataclass or named tuple; empty for any other value."""
    if is_dataclass(value):
        return tuple(field.name for field in fields(value))
    return tuple(getattr(value, "_fields", ())) if isinstance(value, tuple) else ()
