"""The configuration of a store: where its URL and options come from, and how a backend reads them."""

from __future__ import annotations

import functools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flowstore_core.errors import ConfigurationError
from flowstore_core.instrumentation import Observers
from flowstore_core.suggestions import did_you_mean
from flowstore_core.urls import DEFAULT_URL, StoreUrl, parse_url, redact

URL_VARIABLE = "FLOWSTORE_URL"

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoreConfig:
    """The argument of a backend's ``open``. Its repr hides passwords and the values of options."""

    url: str
    """The URL as given, with its query, stripped of surrounding whitespace."""
    scheme: str
    options: Mapping[str, object]
    """From the URL's query (str) and from keywords (any type); only names that the backend declares."""
    clock: Callable[[], datetime] | None
    """The caller's clock, if any; every reading is checked to be aware, in UTC and within INP-3."""
    migrate: bool
    observers: Observers = field(default_factory=Observers, compare=False)
    """Receive reports of retries, batches and unacknowledged writes; empty unless a plugin added one."""

    @classmethod
    def from_url(cls, url: str) -> StoreConfig:
        """The configuration that a URL alone gives. Raises ConfigurationError for a malformed one."""
        parts = parse_url(url)
        options = MappingProxyType(dict(parts.options))
        return cls(url=url, scheme=parts.scheme, options=options, clock=None, migrate=True)

    @property
    def parts(self) -> StoreUrl:
        """The parsed URL."""
        return parse_url(self.url)

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.options))
        return (
            f"StoreConfig(url={redact(self.url)!r}, options=<{names}>, "
            f"clock={'given' if self.clock else None}, migrate={self.migrate})"
        )

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """Read an option as an int within limits. Raises ConfigurationError, naming option and limits."""
        value = self.options.get(name, default)
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise ConfigurationError(f"option {name} must be an int from {low:,} to {high:,}")
        return number

    def seconds(self, name: str, default: float, low: float, high: float) -> float:
        """Read an option as a number of seconds within limits. Raises ConfigurationError."""
        value = self.options.get(name, default)
        try:
            number = float(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, (int, float)) or isinstance(number, bool):
            number = None
        if number is None or not low <= number <= high:
            raise ConfigurationError(f"option {name} must be a number of seconds, {low} to {high}")
        return float(number)

    def flag(self, name: str, default: bool) -> bool:
        """Read an option as a bool; in a URL: true/false, yes/no, on/off, 1/0. Raises ConfigurationError."""
        return _flag(name, self.options.get(name, default))

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """Read an option as one of the allowed words, ignoring case. Raises ConfigurationError."""
        value = self.options.get(name, default)
        for word in allowed:
            if isinstance(value, str) and value.lower() == word.lower():
                return word
        near = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ConfigurationError(f"option {name} must be one of {', '.join(allowed)}{near}")

    def text(self, name: str, default: str) -> str:
        """Read an option as a non-empty str. Raises ConfigurationError."""
        value = self.options.get(name, default)
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"option {name} must be a non-empty str")
        return value

    def file(self, name: str) -> Path | None:
        """Read an option as the path of a file; None if it is not given.

        Raises ConfigurationError, with the reason, if the file cannot be read.
        """
        if name not in self.options:
            return None
        path = Path(self.text(name, ""))
        problem = None
        try:
            with path.open("rb"):
                return path
        except OSError as error:
            problem = error.strerror
        raise ConfigurationError(f"the file of option {name} cannot be read: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUrl:
    """The chosen URL, its options, and the source of the URL."""

    url: str = field(repr=False)
    options: Mapping[str, object] = field(repr=False)
    migrate: bool
    origin: str


def resolve_url(url: str | None, options: Mapping[str, object], *, migrate: bool = True) -> ResolvedUrl:
    """Choose the URL: the argument, FLOWSTORE_URL, flowstore.toml or [tool.flowstore], or the default.

    The options of a file apply to the URL of that file; a file without a URL applies its options to any.
    Options in the URL's query override those of the file, keywords override both.
    """
    file_name, table = _read_file()
    file_url = table.pop("url", None)
    if file_url is not None and not isinstance(file_url, str):
        raise ConfigurationError(f"key url in {file_name} must be a str")
    variable = os.environ.get(URL_VARIABLE, "").strip()
    if url is not None:
        chosen, origin = url, "argument url"
    elif variable:
        chosen, origin = variable, URL_VARIABLE
    elif file_url is not None:
        chosen, origin = file_url, f"key url in {file_name}"
    else:
        chosen, origin = DEFAULT_URL, "the default"
    parsed = parse_url(chosen)
    from_file = table if file_url is None or file_url.strip() == parsed.text else {}
    in_authority = _options_from_authority(parsed)
    from_file = {name: value for name, value in from_file.items() if name not in in_authority}
    merged = {**from_file, **parsed.options, **options}
    if "migrate" in merged:
        migrate = _flag("migrate", merged.pop("migrate")) and migrate
    return ResolvedUrl(url=parsed.text, options=MappingProxyType(merged), migrate=migrate, origin=origin)


def _options_from_authority(url: StoreUrl) -> set[str]:
    """The options that the URL sets outside its query; like the query, they override the file's."""
    values = {
        "user": url.user,
        "password": url.password,
        "host": url.hosts,
        "database": url.path,
        "dbname": url.path,
    }
    if re.search(r":\d+$", url.hosts):
        values["port"] = url.hosts
    return {name for name, value in values.items() if value}


@functools.lru_cache(maxsize=2)
def _parse_toml(text: str) -> dict[str, Any]:
    """Parse a file. Cached: every opening of a store reads the same file, and parsing takes milliseconds."""
    return tomllib.loads(text)


def _read_file() -> tuple[str, dict[str, Any]]:
    """The name and the table of the first file in the working directory that configures flowstore.

    A working directory that was deleted, or that the user may not enter, counts as one without files;
    this is why the names are relative.
    """
    for name, path in (("flowstore.toml", ()), ("pyproject.toml", ("tool", "flowstore"))):
        table: Any = None
        try:
            table = _parse_toml(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
            if not _is_visible(name):
                continue
            problem = f"{name} cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            problem = f"{name} is not UTF-8 (byte {error.start})"
        except tomllib.TOMLDecodeError as error:
            # Only the position is shown: the text may hold a password.
            position = re.search(r"\(at [^()]*\)$", str(error))
            problem = f"{name} is not valid TOML {position[0] if position else ''}".rstrip()
        if table is None:
            # Raised outside the handlers: the errors of both decoders hold the whole text.
            raise ConfigurationError(problem)
        for key in path:
            table = table.get(key, {}) if isinstance(table, dict) else {}
        if not isinstance(table, dict):
            raise ConfigurationError(f"[tool.flowstore] in {name} must be a table")
        if table or not path:
            return name, dict(table)
    return "", {}


def _is_visible(name: str) -> bool:
    """Whether the directory can be searched and has an entry of this name, readable or not."""
    try:
        os.lstat(name)
    except OSError:
        return False
    return True


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ConfigurationError(f"option {name} must be true or false")
