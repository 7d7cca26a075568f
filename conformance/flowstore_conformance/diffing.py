"""Describe the differences between two results in words, field by field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from typing import Any

from flowstore_conformance.history import literal

MAX_CHARACTERS = 240
"""Maximum length of one value; longer values are abbreviated."""

MAX_DIFFERENCES = 6
"""Maximum number of listed differences."""

_LONG_UUID = re.compile(r"UUID\('([0-9a-f]{8})-[0-9a-f-]{27}'\)")
_MOMENT = re.compile(r"datetime\.fromisoformat\('([^']*)'\)")


def shorten(text: str) -> str:
    """Abbreviate ids and datetimes in source code."""
    return _MOMENT.sub(r"\1", _LONG_UUID.sub(r"\1…", text))


def plain(value: Any) -> str:
    """Format a comparable value (see history.comparable), with records without their None fields."""
    return shorten(_plain(value))


def _plain(value: Any) -> str:
    if _is_record(value):
        name, fields = value
        shown = ", ".join(f"{key}={_plain(each)}" for key, each in fields if each is not None)
        return f"{name}({shown})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_plain, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, frozenset):
        return "{" + ", ".join(sorted(map(_plain, value))) + "}"
    return literal(value)


def _is_record(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and _is_name(value[0]) and _is_fields(value[1])


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier() and value[:1].isupper()


def _is_fields(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], str) for each in value
    )


def _is_mapping(value: Any) -> bool:
    """Whether the value may be a mapping: pairs with distinct strings as keys."""
    return (
        _is_fields(value)
        and len({each[0] for each in value}) == len(value)
        # A single record has the same form.
        and not any(_is_name(each[0]) and _is_fields(each[1]) for each in value)
    )


def brief(text: str) -> str:
    """Abbreviate a long text by removing its middle."""
    if len(text) <= MAX_CHARACTERS:
        return text
    half = MAX_CHARACTERS // 2
    return f"{text[:half]}[... {len(text) - 2 * half} characters ...]{text[-half:]}"


def expected_and_got(wanted: Any, got: Any) -> str:
    """Describe two differing values: both in full if they are short, otherwise field by field."""
    want, have = plain(wanted), plain(got)
    if max(len(want), len(have)) <= MAX_CHARACTERS and want != have:
        return f"expected {want}, got {have}"
    found = list(differences(wanted, got))
    described = [
        _in_words("".join(path).lstrip("."), one, other) for path, one, other in found[:MAX_DIFFERENCES]
    ]
    more = f"; and {len(found) - MAX_DIFFERENCES} more differences" if len(found) > MAX_DIFFERENCES else ""
    return "; ".join(described) + more


class Absent(Enum):
    """Marks a value that only the other result has."""

    ABSENT = "absent"


ABSENT = Absent.ABSENT


def differences(
    wanted: Any, got: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Every difference between two comparable values: its path, the expected value and the actual value.

    The path has a part for each field, such as ``.status``, and for each item, such as ``[0]``.
    """
    if wanted == got:
        return
    if _is_record(wanted) and _is_record(got) and wanted[0] == got[0]:
        yield from _pairs(dict(wanted[1]), dict(got[1]), path, ".{}".format)
    elif wanted and got and _is_mapping(wanted) and _is_mapping(got):
        yield from _pairs(dict(wanted), dict(got), path, "[{!r}]".format)
    elif isinstance(wanted, tuple) and isinstance(got, tuple) and len(wanted) == len(got):
        for number, (one, other) in enumerate(zip(wanted, got, strict=True)):
            yield from differences(one, other, (*path, f"[{number}]"))
    else:
        yield path, wanted, got


def _pairs(
    wanted: Mapping[str, Any], got: Mapping[str, Any], path: tuple[str, ...], part: Callable[[str], str]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for key in dict.fromkeys((*wanted, *got)):
        yield from differences(wanted.get(key, ABSENT), got.get(key, ABSENT), (*path, part(key)))


def _in_words(path: str, wanted: Any, got: Any) -> str:
    if isinstance(wanted, tuple) and isinstance(got, tuple):
        want, have = _lengths(wanted, got)
    elif isinstance(wanted, str) and isinstance(got, str) and max(len(wanted), len(got)) > MAX_CHARACTERS:
        want, have = _texts(wanted, got)
    else:
        # Values with the same text, such as 1 and True, are shown with their types.
        alike = plain(wanted) == plain(got)
        want, have = _of(wanted, alike), _of(got, alike)
    return f"{path}: expected {want}, got {have}" if path else f"expected {want}, got {have}"


def _of(value: Any, alike: bool) -> str:
    if value is ABSENT:
        return "nothing"
    return f"{brief(plain(value))} of {type(value).__name__}" if alike else brief(plain(value))


def _lengths(wanted: tuple[Any, ...], got: tuple[Any, ...]) -> tuple[str, str]:
    """Describe two sequences of different lengths: the lengths and the first differing items."""
    lacking = [one for one in wanted if one not in got]
    surplus = [one for one in got if one not in wanted]
    want, have = f"{len(wanted)} items", f"{len(got)}"
    if lacking:
        have += f", without {brief(plain(lacking[0]))}"
    if surplus:
        have += f", with {brief(plain(surplus[0]))}"
    if not lacking and not surplus:
        have += f", some of them repeated: {brief(plain(got))}"
    return want, have


def _texts(wanted: str, got: str) -> tuple[str, str]:
    """Describe two long texts: their lengths and the text at their first difference."""
    shared = next(
        (number for number, (one, other) in enumerate(zip(wanted, got, strict=False)) if one != other),
        min(len(wanted), len(got)),
    )

    def there(text: str) -> str:
        return f"{text[shared : shared + 40]!r} at character {shared} of {len(text)}"

    return there(wanted), there(got)
