"""The limits of a store: what it declares, and the check of every argument against them (LIM-1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from flowstore_core.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """What a store holds (LIM-1). The defaults are the largest limits, which the built-in backends have.

    Raises ValueError for a limit outside its bounds.
    """

    text_bytes: int = 16_777_216
    """Maximum size of one text, in bytes of UTF-8."""
    key_bytes: int = 1_024
    """Maximum size of one key or name, in bytes of UTF-8; it has at most 256 characters in any case."""
    run_steps: int | None = None
    """Maximum number of step keys of one run; None: no limit. Only the backend sees it (LIM-2)."""
    run_bytes: int | None = None
    """Maximum size of all keys, names and texts of one run, in bytes of UTF-8; None: no limit (LIM-2)."""
    page_size: int = 1_000
    """Maximum ``take`` of one call."""

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and high is None:
                continue
            if type(value) is not int or value < low or (high is not None and value > high):
                top = "or more, or None" if high is None else f"to {high:,}"
                raise ValueError(f"{name} must be an int from {low:,} {top}")

    def reduced(self) -> tuple[str, ...]:
        """The limits below the largest ones, each in a few words; empty if there are none."""
        return tuple(
            words.format(getattr(self, name))
            for name, words in _WORDS.items()
            if getattr(self, name) != getattr(LARGEST_LIMITS, name)
        )


_BOUNDS: Mapping[str, tuple[int, int | None]] = {
    "text_bytes": (65_536, 16_777_216),
    "key_bytes": (256, 1_024),
    "run_steps": (10_000, None),
    "run_bytes": (16_777_216, None),
    "page_size": (200, 1_000),
}
"""The smallest value of each limit, and the largest; None: a run has no such limit."""

_WORDS = {
    "text_bytes": "texts of {:,} bytes",
    "key_bytes": "keys of {:,} bytes",
    "run_steps": "{:,} steps in a run",
    "run_bytes": "{:,} bytes in a run",
    "page_size": "pages of {:,}",
}

LARGEST_LIMITS = StoreLimits()
"""The limits of the contract, which the built-in backends have."""
SMALLEST_LIMITS = StoreLimits(**{name: low for name, (low, _) in _BOUNDS.items()})
"""The limits that every store has at least."""

_TEXTS = frozenset(
    {
        *("trigger_data", "input_json", "output_json", "error_message", "reason", "message"),
        *("payload_json", "value_json", "outputs", "cancel_reason", "timed_out_reason"),
    }
)
"""Names of the arguments, and of fields of archives, that are texts or contain them (INP-2)."""
_BOUNDED_ALREADY = frozenset({"job_id", "worker", "search"})
"""Names of texts that no limit of a store concerns. Any other text is a key."""
_PAIRS = frozenset({"outputs", "tags"})
"""Fields of archives that are tuples of a key and a value."""


class LimitCheck:
    """Checks arguments, which the rules of the contract allow, against lower limits of a store.

    A store with the largest limits needs no such check, so its calls do not pay for one.
    """

    def __init__(self, limits: StoreLimits, backend: str) -> None:
        self._limits = limits
        self._backend = backend

    @staticmethod
    def is_needed(limits: StoreLimits) -> bool:
        """Whether core checks a limit of these that is below the largest one."""
        checked = ("text_bytes", "key_bytes", "page_size")
        return any(getattr(limits, name) < getattr(LARGEST_LIMITS, name) for name in checked)

    def check(self, arguments: Mapping[str, Any]) -> None:
        """Raise InvalidArgumentError for an argument beyond a limit; it names argument, backend and limit."""
        for name, value in arguments.items():
            self._check(name, name, value)

    def _check(self, path: str, name: str, value: Any) -> None:
        if type(value) is str:
            if name in _TEXTS:
                self._check_text(path, value)
            elif name not in _BOUNDED_ALREADY:
                self._check_key(path, value)
        elif type(value) is int:
            if name == "take" and value > self._limits.page_size:
                self._refuse(path, f"an int from 0 to {self._limits.page_size:,}", f"{value:,}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                self._check_key(path, key)
                self._check(path, name, item)
            if name == "outputs":
                self._check_size(path, sum(map(_size, value.values())), " in all values together")
        elif isinstance(value, (tuple, list, frozenset)):
            for item in value:
                self._check(path, name, item)
        elif is_dataclass(value):
            for field in fields(value):
                self._check_part(f"{path}.{field.name}", field.name, getattr(value, field.name))

    def _check_part(self, path: str, name: str, value: Any) -> None:
        """Check a field of a request or an archive."""
        if isinstance(value, tuple) and name != "after":
            for number, item in enumerate(value):
                if name in _PAIRS:
                    self._check_key(f"{path}[{number}]", item[0])
                    self._check(f"{path}[{number}]", name if name in _TEXTS else "key", item[1])
                else:
                    self._check(f"{path}[{number}]", name, item)
        else:
            self._check(path, name, value)

    def _check_text(self, path: str, value: str) -> None:
        # UTF-8 has at most four bytes per character.
        if len(value) * 4 > self._limits.text_bytes:
            self._check_size(path, _size(value))

    def _check_size(self, path: str, size: int, of: str = "") -> None:
        if size > self._limits.text_bytes:
            self._refuse(path, f"at most {self._limits.text_bytes:,} bytes of UTF-8{of}", f"{size:,} bytes")

    def _check_key(self, path: str, value: str) -> None:
        limit = self._limits.key_bytes
        if len(value) * 4 > limit and (size := _size(value)) > limit:
            self._refuse(path, f"at most {limit:,} bytes of UTF-8", f"{size:,} bytes")

    def _refuse(self, path: str, limit: str, got: str) -> None:
        raise InvalidArgumentError(path, f"{limit}, the limit of backend {self._backend!r}", got)


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
