"""Where a store's URL and options come from, and how a backend reads them."""

from __future__ import annotations

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
    """What a backend's ``open`` gets. Its repr hides passwords and the options' values."""

    url: str
    """As the user gave it, query included, without whitespace around it."""
    scheme: str
    options: Mapping[str, object]
    """From the URL's query (str) and from keywords (typed); only names that the backend lists."""
    clock: Callable[[], datetime] | None
    """Checked: each reading is aware, in UTC and within the limits of INP-3."""
    migrate: bool
    observers: Observers = field(default_factory=Observers, compare=False)
    """Where the backend reports retries, batches and lost answers; empty as long as nobody listens."""

    @property
    def parts(self) -> StoreUrl:
        """The URL, parsed."""
        return parse_url(self.url)

    def __repr__(self) -> str:
        names = ", ".join(sorted(self.options))
        return (
            f"StoreConfig(url={redact(self.url)!r}, options=<{names}>, "
            f"clock={'given' if self.clock else None}, migrate={self.migrate})"
        )

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """An option as an int within limits; ConfigurationError that names both otherwise."""
        value = self.options.get(name, default)
        try:
            number = int(value) if isinstance(value, str) else value
        except ValueError:
            number = None
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise ConfigurationError(f"option {name} must be an int from {low:,} to {high:,}")
        return number

    def seconds(self, name: str, default: float, low: float, high: float) -> float:
        """An option as a number of seconds within limits; ConfigurationError otherwise."""
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
        """An option as a bool; true/false, yes/no, on/off, 1/0 in a URL."""
        return _flag(name, self.options.get(name, default))

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """An option as one of some words, in either case; ConfigurationError that lists them otherwise."""
        value = self.options.get(name, default)
        for word in allowed:
            if isinstance(value, str) and value.lower() == word.lower():
                return word
        near = did_you_mean(value, allowed) if isinstance(value, str) else ""
        raise ConfigurationError(f"option {name} must be one of {', '.join(allowed)}{near}")

    def text(self, name: str, default: str) -> str:
        """An option as text that is not empty."""
        value = self.options.get(name, default)
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"option {name} must be a str that is not empty")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedUrl:
    """A URL with the options that belong to it, and where it was found."""

    url: str = field(repr=False)
    options: Mapping[str, object] = field(repr=False)
    migrate: bool
    origin: str


def resolve_url(url: str | None, options: Mapping[str, object], *, migrate: bool = True) -> ResolvedUrl:
    """Choose the URL: argument, FLOWSTORE_URL, flowstore.toml or [tool.flowstore], the default.

    A file's options belong to the file's URL; a file without one gives its options to any. Options in
    the URL's query come before the file's, keywords before both.
    """
    place, table = _read_file()
    file_url = table.pop("url", None)
    if file_url is not None and not isinstance(file_url, str):
        raise ConfigurationError(f"key url in {place} must be a str")
    variable = os.environ.get(URL_VARIABLE, "").strip()
    if url is not None:
        chosen, origin = url, "argument url"
    elif variable:
        chosen, origin = variable, URL_VARIABLE
    elif file_url is not None:
        chosen, origin = file_url, f"key url in {place}"
    else:
        chosen, origin = DEFAULT_URL, "the default"
    parsed = parse_url(chosen)
    from_file = table if file_url is None or file_url.strip() == parsed.text else {}
    said = _options_from_authority(parsed)
    from_file = {name: value for name, value in from_file.items() if name not in said}
    merged = {**from_file, **parsed.options, **options}
    if "migrate" in merged:
        migrate = _flag("migrate", merged.pop("migrate")) and migrate
    return ResolvedUrl(url=parsed.text, options=MappingProxyType(merged), migrate=migrate, origin=origin)


def _options_from_authority(url: StoreUrl) -> set[str]:
    """The options that the URL gives without naming them; they go before the file's, as its query does."""
    said = {
        "user": url.user,
        "password": url.password,
        "host": url.hosts,
        "database": url.path,
        "dbname": url.path,
    }
    if re.search(r":\d+$", url.hosts):
        said["port"] = url.hosts
    return {name for name, value in said.items() if value}


def _read_file() -> tuple[str, dict[str, Any]]:
    """The name and the table of the first file in the working directory that configures flowstore.

    Relative names are opened, so that a working directory that was deleted, or that the user may not
    enter, counts as one without files.
    """
    for name, path in (("flowstore.toml", ()), ("pyproject.toml", ("tool", "flowstore"))):
        table: Any = None
        try:
            table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
            if not _is_visible(name):
                continue
            problem = f"{name} cannot be read: {error.strerror}"
        except UnicodeDecodeError as error:
            problem = f"{name} is not UTF-8 (byte {error.start})"
        except tomllib.TOMLDecodeError as error:
            # Where it is, not what it is: the text may hold a password.
            place = re.search(r"\(at [^()]*\)$", str(error))
            problem = f"{name} is not valid TOML {place[0] if place else ''}".rstrip()
        if table is None:
            # Out here, because both decoders' errors hold the whole text.
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
