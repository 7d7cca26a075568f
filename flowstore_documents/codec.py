"""Documents as JSON: a field that has its default is left out, an unknown field is ignored."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cache
from typing import Any, TypeVar
from uuid import UUID

from flowstore_core.timeseries import EARLIEST

T = TypeVar("T")

_MICROSECOND = timedelta(microseconds=1)

# json.dumps makes a new encoder for every call with such arguments.
_write_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

Convert = Callable[[Any], Any]


def encode(document: Any) -> bytes:
    """A document, an instance of a dataclass, as bytes. Equal documents have equal bytes."""
    return _write_json(_to_json(document)).encode()


def decode(kind: type[T], data: bytes) -> T:
    """The document that ``encode`` made."""
    found: T = _from_json(kind, json.loads(data.decode()))
    return found


def json_bytes(text: str) -> int:
    """The size of a text in a document."""
    return len(json.dumps(text, ensure_ascii=False).encode())


def _to_json(document: Any) -> dict[str, Any]:
    found = {}
    kind: Any = type(document)
    for name, (default, to_json, _) in _fields(kind).items():
        value = getattr(document, name)
        if value is not default and value != default:
            found[name] = value if to_json is None else to_json(value)
    return found


def _from_json(kind: Any, values: dict[str, Any]) -> Any:
    fields = _fields(kind)
    arguments = {}
    for name, value in values.items():
        if name in fields:
            from_json = fields[name][2]
            arguments[name] = value if from_json is None else from_json(value)
    return kind(**arguments)


@cache
def _fields(kind: type[Any]) -> dict[str, tuple[Any, Convert | None, Convert | None]]:
    """The default of each field, and the functions that write and read its values."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (field.default, *_converters(hints[field.name])) for field in dataclasses.fields(kind)
    }


def _converters(hint: Any) -> tuple[Convert | None, Convert | None]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if len(kinds) == 1:
            return _converters(kinds[0])
        # A text, or a reference to its pieces.
        (nested,) = [kind for kind in kinds if kind is not str]
        return (
            lambda value: value if isinstance(value, str) else _to_json(value),
            lambda value: value if isinstance(value, str) else _from_json(nested, value),
        )
    if dataclasses.is_dataclass(hint):
        return _to_json, lambda value: _from_json(hint, value)
    if hint is datetime:
        return (
            lambda value: (value - EARLIEST) // _MICROSECOND,
            lambda value: EARLIEST + value * _MICROSECOND,
        )
    if hint is UUID:
        return (lambda value: value.hex), UUID
    if issubclass(hint, StrEnum):
        return None, hint
    return None, None
