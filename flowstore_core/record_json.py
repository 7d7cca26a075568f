"""JSON of records: dataclasses of texts, numbers, ids, datetimes, enums and other records.

The annotations of a record define its JSON. A field with its default, and an optional one that is None, is
left out. So are ``run_id`` and ``step_key`` where they are those of the enclosing record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints
from uuid import UUID

from flowstore_core.errors import InvalidArgumentError

INHERITED = ("run_id", "step_key")
_MISSING: Any = object()


class Field(NamedTuple):
    """A field of a record; its values are of ``kind``, or None if it is optional."""

    name: str
    kind: Any
    optional: bool
    item: Any
    """The type of the items of a tuple of any length; None for other values."""
    default: Any
    """_MISSING if the field is required."""


@cache
def fields_of(record: type) -> tuple[Field, ...]:
    """The fields of a record, from its annotations."""
    hints = get_type_hints(record)
    return tuple(_field(one, hints[one.name]) for one in dataclasses.fields(record))


def _field(field: dataclasses.Field[Any], hint: Any) -> Field:
    optional = get_origin(hint) in (Union, types.UnionType)
    if optional:
        [hint] = [one for one in get_args(hint) if one is not type(None)]
    item = get_args(hint)[0] if get_origin(hint) is tuple and get_args(hint)[1:] == (...,) else None
    default = None if optional else _MISSING if field.default is dataclasses.MISSING else field.default
    return Field(field.name, hint, optional, item, default)


def encode(record: Any, inherited: Mapping[str, Any] = types.MappingProxyType({})) -> dict[str, Any]:
    """A record as an object of JSON; ``inherited`` are the fields of the enclosing record."""
    known = {**inherited, **{name: getattr(record, name) for name in INHERITED if hasattr(record, name)}}
    document = {}
    kind: type = type(record)
    for field in fields_of(kind):
        value = getattr(record, field.name)
        if value != field.default and not (field.name in inherited and value == inherited[field.name]):
            document[field.name] = _encode(value, known)
    return document


def _encode(value: Any, inherited: Mapping[str, Any]) -> Any:
    if dataclasses.is_dataclass(value):
        return encode(value, inherited)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, tuple):
        return [_encode(item, inherited) for item in value]
    return value


def decode(record: type, document: Any, path: str, inherited: Mapping[str, Any]) -> Any:
    """The record of an object of JSON. Raises InvalidArgumentError, which names the path of a bad value."""
    if type(document) is not dict:
        raise InvalidArgumentError(path, "a JSON object", _type_name(document))
    known = dict(inherited)
    values: dict[str, Any] = {}
    for field in fields_of(record):
        name = field.name
        if name in document:
            values[name] = _decode(field, document[name], f"{path}.{name}", known)
        elif name in inherited:
            values[name] = inherited[name]
        elif field.default is not _MISSING:
            values[name] = field.default
        else:
            raise InvalidArgumentError(f"{path}.{name}", "present")
        if name in INHERITED:
            known[name] = values[name]
    if unknown := document.keys() - values.keys():
        raise InvalidArgumentError(path, "an object of known fields", f"the field {min(unknown)[:40]!a}")
    return record(**values)


def _decode(field: Field, value: Any, path: str, inherited: Mapping[str, Any]) -> Any:
    if value is None and field.optional:
        return None
    if field.item is None:
        return decode_value(field.kind, value, path, inherited)
    if type(value) is not list:
        raise InvalidArgumentError(path, "a JSON array", _type_name(value))
    return tuple(
        decode_value(field.item, item, f"{path}[{number}]", inherited) for number, item in enumerate(value)
    )


def decode_value(kind: Any, value: Any, path: str, inherited: Mapping[str, Any]) -> Any:
    """A value of the given type. Raises InvalidArgumentError, which names the path of a bad value."""
    if dataclasses.is_dataclass(kind):
        return decode(kind, value, path, inherited)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if type(value) is not list or len(value) != len(kinds):
            raise InvalidArgumentError(path, f"a JSON array of {len(kinds)} values", _type_name(value))
        return tuple(decode_value(one, item, path, inherited) for one, item in zip(kinds, value, strict=True))
    if kind in (bool, int, str):
        if type(value) is not kind:
            raise InvalidArgumentError(path, _NAMES[kind], _type_name(value))
        return value
    found = None
    if type(value) is str:
        # The error below does not contain the value.
        with contextlib.suppress(ValueError):
            found = datetime.fromisoformat(value) if kind is datetime else kind(value)
    if found is None or (kind is datetime and found.utcoffset() is None):
        values = f"one of {', '.join(kind)}" if issubclass(kind, Enum) else _NAMES[kind]
        raise InvalidArgumentError(path, values, _type_name(value))
    return found


_NAMES = {
    bool: "true or false",
    int: "an integer",
    str: "a text",
    UUID: "a text with a UUID",
    datetime: "a text with a datetime and its offset, such as 2026-03-14T12:00:00.000000Z",
}


def _type_name(value: object) -> str:
    # Only the type is shown: the value may be a secret.
    return "null" if value is None else type(value).__name__
