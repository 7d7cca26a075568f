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
from urllib.parse import parse_qsl, unquote

from flowstore_core.errors import ConfigurationError
from flowstore_core.observing import Observers

DEFAULT_URL = "sqlite:///flowstore.db"
URL_VARIABLE = "FLOWSTORE_URL"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoreConfig:
    """What a backend's ``open`` gets. Its repr hides passwords and the options' values."""

    url: str
    """As the user gave it, query included."""
    scheme: str
    options: Mapping[str, object]
    """From the URL's query (str) and from keywords (typed); only names that the backend lists."""
    clock: Callable[[], datetime] | None
    """Checked: each reading is aware, in UTC and within the limits of INP-3."""
    migrate: bool
    observers: Observers = field(default_factory=Observers, compare=False)
    """Where the backend reports retries, batches and lost answers; empty as long as nobody listens."""

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
        raise ConfigurationError(f"option {name} must be one of {', '.join(allowed)}")

    def text(self, name: str, default: str) -> str:
        """An option as text that is not empty."""
        value = self.options.get(name, default)
        if not isinstance(value, str) or not value:
            raise ConfigurationError(f"option {name} must be a str that is not empty")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """A URL with the options that belong to it, and where it was found."""

    url: str = field(repr=False)
    options: Mapping[str, object] = field(repr=False)
    migrate: bool
    origin: str


def read_settings(url: str | None, options: Mapping[str, object], *, migrate: bool = True) -> Settings:
    """Choose the URL: argument, FLOWSTORE_URL, flowstore.toml or [tool.flowstore], the default.

    A file's options belong to the file's URL; a file without one gives its options to any. Options in
    the URL's query come before the file's, keywords before both.
    """
    place, table = _read_file(Path.cwd())
    file_url = table.pop("url", None)
    if file_url is not None and not isinstance(file_url, str):
        raise ConfigurationError(f"key url in {place} must be a str")
    if url is not None:
        chosen, origin = url, "argument url"
    elif os.environ.get(URL_VARIABLE):
        chosen, origin = os.environ[URL_VARIABLE], URL_VARIABLE
    elif file_url is not None:
        chosen, origin = file_url, f"key url in {place}"
    else:
        chosen, origin = DEFAULT_URL, "the default"
    if not isinstance(chosen, str):
        raise ConfigurationError(f"url must be a str such as {DEFAULT_URL!r}, not {type(chosen).__name__}")
    from_file = table if file_url is None or file_url == chosen else {}
    said = _said_in_front(chosen)
    from_file = {name: value for name, value in from_file.items() if name not in said}
    merged = {**from_file, **read_query(chosen), **options}
    if "migrate" in merged:
        migrate = _flag("migrate", merged.pop("migrate")) and migrate
    return Settings(url=chosen, options=MappingProxyType(merged), migrate=migrate, origin=origin)


def _said_in_front(url: str) -> set[str]:
    """The options that the URL gives without naming them; they go before the file's, as its query does."""
    authority, path = split_place(url.partition("#")[0])
    userinfo, _, place = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    said = {"user": user, "password": password, "host": place, "database": path, "dbname": path}
    if re.search(r":\d+$", place):
        said["port"] = place
    return {name for name, value in said.items() if value}


def _read_file(folder: Path) -> tuple[str, dict[str, Any]]:
    for name, path in (("flowstore.toml", ()), ("pyproject.toml", ("tool", "flowstore"))):
        table: Any = None
        try:
            table = tomllib.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
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


def read_scheme(url: str) -> str:
    """The scheme of a URL, in lower case; ConfigurationError when there is none."""
    scheme, separator, _ = url.partition("://")
    # What stands there is not shown: a URL that is badly written may have its password in front.
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ConfigurationError(
            "a store URL begins with scheme://, such as sqlite:///flows.db or postgresql://user@host/db"
        )
    return scheme.lower()


def read_query(url: str) -> dict[str, str]:
    """The query of a URL; ConfigurationError for a name that stands twice."""
    query = url.partition("#")[0].partition("?")[2]
    found: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in found:
            raise ConfigurationError(f"option {shown_option(name)} stands twice in the URL")
        found[name] = value
    return found


def read_path(url: str) -> str:
    """The path of a URL, decoded, without its leading slash: ``sqlite:////a/b`` gives ``/a/b``."""
    return unquote(split_place(url)[1])


def split_place(url: str) -> tuple[str, str]:
    """What a URL has between its scheme and its query: the part up to the first slash, and what follows.

    Not by urlsplit, which raises errors that quote the URL.
    """
    place = url.partition("://")[2].partition("?")[0]
    authority, _, path = place.partition("/")
    return authority, path


def shown_option(name: str) -> str:
    """An option's name for people's eyes, unless it may be the end of a password with a raw question mark."""
    return name if re.fullmatch(r"[a-z][a-z_]{0,40}", name) else "<not shown>"


def redact(url: str) -> str:
    """A URL for people's eyes: no password, no query values."""
    head, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(head):
        return "<not a URL>"
    # Everything up to the last @ counts as user and password, wherever it stands: a password with a
    # raw slash or question mark must not slip out as a path or as an option's name.
    secret, at, rest = rest.rpartition("@")
    user = re.split("[:/?#]", secret)[0]
    if "?" in secret:
        # A raw question mark in the password, or a raw @ in a query's value: what follows is the host,
        # or the end of a secret, so neither is shown.
        return f"{head}://{user}:***"
    rest, _, query = rest.partition("?")
    shown = f"{head}://{user}{':***' if user != secret else ''}{at}{rest}"
    names = "&".join(f"{shown_option(part.partition('=')[0])}=..." for part in query.split("&") if part)
    return f"{shown}?{names}" if names else shown


def _flag(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise ConfigurationError(f"option {name} must be true or false")
