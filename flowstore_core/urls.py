"""The parser of store URLs, and the form in which a URL may be shown.

``scheme://user:password@hosts/path?option=value``. Unlike a web address, a store URL has no fragment: ``#``
is an ordinary character. Errors never quote the URL, because it may contain a password.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from urllib.parse import parse_qsl, quote, unquote, urlencode

from flowstore_core.errors import ConfigurationError

DEFAULT_URL = "sqlite:///flowstore.db"
ENCODING_RULE = (
    "special characters in user and password must be percent-encoded "
    "(# as %23, / as %2F, ? as %3F, @ as %40, : as %3A, % as %25)"
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
# The host before a port that is not a number.
_BAD_PORT = re.compile(r"(?:^|,)(?:\[[^]]*\]|(?!\[[^]]*\])[^:,]*):(?!\d*(?:,|$))")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoreUrl:
    """A parsed store URL. Its repr and str hide the password and the values of options."""

    text: str
    """The whole URL, without whitespace around it."""
    scheme: str
    """In lower case."""
    user: str
    """Decoded; empty if absent, as are password, hosts and path."""
    password: str
    hosts: str
    """As written, with ports, so that an encoded comma or colon is distinct from a separator."""
    path: str
    """Decoded, without the slash that ends the hosts: ``sqlite:////a/b`` has ``/a/b``."""
    options: Mapping[str, str]
    """The query, decoded."""

    def __repr__(self) -> str:
        return f"StoreUrl({redact(self.text)!r})"

    def __str__(self) -> str:
        return redact(self.text)

    @property
    def has_at_in_query(self) -> bool:
        """Whether the query has a raw @: its names may be parts of a password then, and are not shown."""
        return "@" in _split(self.text)[2]

    def with_path(self, path: str) -> str:
        """The URL with another path, which is encoded."""
        place, mark, query = self.text.partition("?")
        head, _, _ = place.partition("://")
        authority, _, _ = _split(self.text)
        return f"{head}://{authority}/{quote(path, errors='surrogateescape')}{mark}{query}"

    def with_options(self, options: Mapping[str, str]) -> str:
        """The URL with another query."""
        place, _, _ = self.text.partition("?")
        return f"{place}?{urlencode(options, quote_via=quote)}" if options else place

    def secrets(self) -> set[str]:
        """Every form of every password in the URL, for programs that remove them from a text."""
        authority, _, query = _split(self.text)
        found = {self.password, authority.rpartition("@")[0].partition(":")[2]}
        for part in query.split("&"):
            name, _, value = part.partition("=")
            if "password" in unquote(name):
                found.add(value)
        found.update(value for name, value in self.options.items() if "password" in name)
        return found - {""}


def parse_url(text: str) -> StoreUrl:
    """Parse a store URL; whitespace around it is ignored. ConfigurationError if it is not one."""
    if not isinstance(text, str):
        raise ConfigurationError(f"url must be a str such as {DEFAULT_URL!r}, not {type(text).__name__}")
    text = text.strip()
    scheme, separator, _ = text.partition("://")
    # The text is not shown: a malformed URL may begin with its password.
    if not separator or not _SCHEME.fullmatch(scheme):
        raise ConfigurationError(
            "a store URL begins with scheme://, such as sqlite:///flows.db or postgresql://user@host/db"
        )
    if has_control_characters(text):
        raise ConfigurationError(
            "a store URL must not contain control characters; percent-encode one that is meant, "
            "such as a line feed as %0A"
        )
    authority, path, query = _split(text)
    # The @ most likely ends a password with a raw slash or question mark, whose beginning would be taken for
    # a host and a port.
    if authority and ("@" in (path or "") or ("@" in query and (path is None or ":" in authority))):
        raise ConfigurationError(
            f"an @ behind the host of a store URL must be written as %40; {ENCODING_RULE}"
        )
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    return StoreUrl(
        text=text,
        scheme=scheme.lower(),
        user=decode(user, "the user"),
        password=decode(password, "the password"),
        hosts=hosts,
        # File names may have bytes that are not UTF-8.
        path=unquote(path or "", errors="surrogateescape"),
        options=MappingProxyType(_read_options(query)),
    )


def decode(text: str, what: str) -> str:
    """A percent-encoded part of a URL, decoded; ConfigurationError that names it if it is not UTF-8."""
    decoded = None
    with contextlib.suppress(UnicodeDecodeError):
        decoded = unquote(text, errors="strict")
    if decoded is None:
        # Raised out here, because the decoder's error contains the text.
        raise ConfigurationError(f"{what} in the URL is not UTF-8 once it is decoded; {ENCODING_RULE}")
    return decoded


def has_control_characters(text: str) -> bool:
    """Whether a text contains control characters, line ends among them."""
    return _CONTROL.search(text) is not None


def redact_option(name: str) -> str:
    """An option's name for messages, unless it may be the end of a password with a raw question mark."""
    return name if re.fullmatch(r"[a-z][a-z_]{0,40}", name) else "<not shown>"


def redact(url: str) -> str:
    """A URL, well-formed or not, for messages: without passwords and without the values of options."""
    head, separator, rest = url.strip().partition("://")
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
    place, _, query = rest.partition("?")
    hosts, slash, path = place.partition("/")
    shown = f"{head}://{user}{':***' if user != secret else ''}{at}"
    if bad := _BAD_PORT.search(hosts):
        # The URL of a user and a password, without a host.
        return f"{shown}{hosts[: bad.end()]}***"
    shown += f"{hosts}{slash}{path}"
    names = "&".join(f"{redact_option(part.partition('=')[0])}=..." for part in query.split("&") if part)
    return f"{shown}?{names}" if names else shown


def _split(text: str) -> tuple[str, str | None, str]:
    """The undecoded parts behind the scheme: authority, path (None without a slash before it) and query.

    Not by urllib's urlsplit: it cuts at a #, removes line ends, and its errors quote the URL.
    """
    place, _, query = text.partition("://")[2].partition("?")
    authority, slash, path = place.partition("/")
    return authority, path if slash else None, query


def _read_options(query: str) -> dict[str, str]:
    pairs = None
    with contextlib.suppress(UnicodeDecodeError):
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    if pairs is None:
        raise ConfigurationError("an option in the URL is not UTF-8 once it is decoded")
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            # Behind an @ a name may be a part of a password.
            shown = redact_option(name) if "@" not in query else "<not shown>"
            raise ConfigurationError(f"option {shown} stands twice in the URL")
        found[name] = value
    return found
