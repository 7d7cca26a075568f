"""The parser of store URLs, and their redaction for messages.

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
# A host with a port that is not a number.
_BAD_PORT = re.compile(r"(?:^|,)(?:\[[^]]*\]|(?!\[[^]]*\])[^:,]*):(?!\d*(?:,|$))")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class StoreUrl:
    """A parsed store URL. Its repr and str hide the password and the values of options."""

    text: str
    """The whole URL, stripped of surrounding whitespace."""
    scheme: str
    """In lower case."""
    user: str
    """Decoded; empty if absent, as are password, hosts and path."""
    password: str
    hosts: str
    """Not decoded, with ports, so that an encoded comma or colon is distinct from a separator."""
    path: str
    """Decoded, without the slash after the hosts: ``/a/b`` for ``sqlite:////a/b``."""
    options: Mapping[str, str]
    """The decoded query."""

    def __repr__(self) -> str:
        return f"StoreUrl({redact(self.text)!r})"

    def __str__(self) -> str:
        return redact(self.text)

    @property
    def has_at_in_query(self) -> bool:
        """Whether the query contains a raw @: the names in it may then be parts of a password."""
        return "@" in _split(self.text)[2]

    def with_path(self, path: str) -> str:
        """The URL with a different path, given decoded."""
        before_query, mark, query = self.text.partition("?")
        head, _, _ = before_query.partition("://")
        authority, _, _ = _split(self.text)
        return f"{head}://{authority}/{quote(path, errors='surrogateescape')}{mark}{query}"

    def with_hosts(self, hosts: str) -> str:
        """The URL with different hosts, given encoded and with ports, as ``hosts`` has them."""
        head, _, rest = self.text.partition("://")
        authority, _, _ = _split(self.text)
        userinfo, at, _ = authority.rpartition("@")
        return f"{head}://{userinfo}{at}{hosts}{rest[len(authority) :]}"

    def with_options(self, options: Mapping[str, str]) -> str:
        """The URL with a different query, given decoded."""
        before_query, _, _ = self.text.partition("?")
        return f"{before_query}?{urlencode(options, quote_via=quote)}" if options else before_query

    def with_more_options(self, options: Mapping[str, str]) -> str:
        """The URL with these options, given decoded, added to its own or in their place."""
        return self.with_options({**self.options, **options})

    def secrets(self) -> set[str]:
        """Every password in the URL, encoded and decoded, for programs that remove them from a text."""
        authority, _, query = _split(self.text)
        found = {self.password, authority.rpartition("@")[0].partition(":")[2]}
        for part in query.split("&"):
            name, _, value = part.partition("=")
            if "password" in unquote(name):
                found.add(value)
        found.update(value for name, value in self.options.items() if "password" in name)
        return found - {""}


def parse_url(text: str) -> StoreUrl:
    """Parse a store URL, ignoring surrounding whitespace. Raises ConfigurationError."""
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
            "a store URL must not contain control characters; percent-encode them, such as a line feed as %0A"
        )
    authority, path, query = _split(text)
    # Most likely a password with a raw slash or question mark: without this check, its beginning would be
    # parsed as a host and a port.
    if authority and ("@" in (path or "") or ("@" in query and (path is None or ":" in authority))):
        raise ConfigurationError(
            f"an @ after the host of a store URL must be written as %40; {ENCODING_RULE}"
        )
    userinfo, _, hosts = authority.rpartition("@")
    user, _, password = userinfo.partition(":")
    return StoreUrl(
        text=text,
        scheme=scheme.lower(),
        user=decode(user, "the user"),
        password=decode(password, "the password"),
        hosts=hosts,
        # File names may contain bytes that are not UTF-8.
        path=unquote(path or "", errors="surrogateescape"),
        options=MappingProxyType(_read_options(query)),
    )


def decode(text: str, what: str) -> str:
    """Decode a percent-encoded part of a URL. Raises ConfigurationError if it is not UTF-8."""
    decoded = None
    with contextlib.suppress(UnicodeDecodeError):
        decoded = unquote(text, errors="strict")
    if decoded is None:
        # Raised outside the handler: the decoder's error contains the text.
        raise ConfigurationError(f"{what} in the URL does not decode to UTF-8; {ENCODING_RULE}")
    return decoded


def has_control_characters(text: str) -> bool:
    """Whether a text contains control characters, including line ends."""
    return _CONTROL.search(text) is not None


def redact_option(name: str) -> str:
    """The name of an option for messages; hidden if it may be part of a password with a raw question mark."""
    return name if re.fullmatch(r"[a-z][a-z_]{0,40}", name) else "<not shown>"


def redact(url: str) -> str:
    """A URL for messages, without passwords and option values; accepts malformed URLs too."""
    head, separator, rest = url.strip().partition("://")
    if not separator or not _SCHEME.fullmatch(head):
        return "<not a URL>"
    # Everything before the last @ counts as user and password, also after a slash or question mark: these may
    # be raw characters of a password, which must not appear as a path or as the name of an option.
    secret, at, rest = rest.rpartition("@")
    user = re.split("[:/?#]", secret)[0]
    if "?" in secret:
        # A raw question mark in the password, or a raw @ in the value of an option: the rest is either the
        # host or the end of a secret, so it is hidden.
        return f"{head}://{user}:***"
    location, _, query = rest.partition("?")
    hosts, slash, path = location.partition("/")
    shown = f"{head}://{user}{':***' if user != secret else ''}{at}"
    if bad := _BAD_PORT.search(hosts):
        # A user and a password without a host: the port is the password.
        return f"{shown}{hosts[: bad.end()]}***"
    shown += f"{hosts}{slash}{path}"
    names = "&".join(f"{redact_option(part.partition('=')[0])}=..." for part in query.split("&") if part)
    return f"{shown}?{names}" if names else shown


def _split(text: str) -> tuple[str, str | None, str]:
    """The undecoded authority, path (None if there is no slash) and query.

    urllib's urlsplit does not serve: it splits at a #, removes line ends, and its errors quote the URL.
    """
    location, _, query = text.partition("://")[2].partition("?")
    authority, slash, path = location.partition("/")
    return authority, path if slash else None, query


def _read_options(query: str) -> dict[str, str]:
    pairs = None
    with contextlib.suppress(UnicodeDecodeError):
        pairs = parse_qsl(query, keep_blank_values=True, errors="strict")
    if pairs is None:
        raise ConfigurationError("an option in the URL does not decode to UTF-8")
    found: dict[str, str] = {}
    for name, value in pairs:
        if name in found:
            # After an @ a name may be part of a password.
            shown = redact_option(name) if "@" not in query else "<not shown>"
            raise ConfigurationError(f"option {shown} appears twice in the URL")
        found[name] = value
    return found
