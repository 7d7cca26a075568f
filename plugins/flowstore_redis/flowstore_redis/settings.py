"""The settings of a store, from its URL: ``redis://user:password@host:6379/0?option=value``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.urls import StoreUrl, decode

TLS_SCHEMES = frozenset({"rediss", "valkeys"})
DEFAULT_PREFIX = "flowstore"
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    host: str
    port: int
    database: int
    prefix: str
    """The first characters of every key; a colon follows."""
    user: str
    password: str = field(repr=False)
    has_tls: bool
    cacert: str | None
    """The files of TLS; None: the system's authorities, no certificate of the client."""
    cert: str | None
    key: str | None
    connect_timeout: float
    """Seconds for a new connection, its login and the checks of the server."""
    request_timeout: float
    """Seconds for the answer to one request."""


def read_settings(config: StoreConfig) -> Settings:
    """Raises ConfigurationError for a malformed host, database, option or file."""
    parts = config.parts
    host, port = _read_address(parts)
    files = {name: config.file(name) for name in ("cacert", "cert", "key")}
    has_tls = config.scheme in TLS_SCHEMES
    if any(files.values()) and not has_tls:
        raise ConfigurationError("options cacert, cert and key need TLS: write rediss:// instead of redis://")
    if (files["cert"] is None) != (files["key"] is None):
        raise ConfigurationError("options cert and key must be given together")
    if not re.fullmatch(r"[0-9]{0,4}", parts.path):
        raise ConfigurationError(
            "the path of a Redis URL is the number of the database, 0 if it is left out; the prefix of all "
            "keys is the option prefix"
        )
    prefix = config.text("prefix", DEFAULT_PREFIX)
    if not re.fullmatch(r"[A-Za-z0-9._:/-]{1,100}", prefix):
        raise ConfigurationError(
            "option prefix must have 1 to 100 letters, digits, dots, colons, slashes, hyphens and underscores"
        )
    return Settings(
        host=host,
        port=port,
        database=int(parts.path or 0),
        prefix=prefix,
        user=parts.user,
        password=parts.password,
        has_tls=has_tls,
        **{name: None if path is None else str(path) for name, path in files.items()},
        connect_timeout=config.seconds("connect_timeout", 5.0, low=0.1, high=60.0),
        request_timeout=config.seconds("request_timeout", 5.0, low=0.1, high=60.0),
    )


def _read_address(parts: StoreUrl) -> tuple[str, int]:
    found = _HOST.fullmatch(parts.hosts or "localhost")
    port = int((found and found[2]) or 6379)
    if found is None or not 1 <= port <= 65_535:
        # Not shown: the end of a password with a raw @ may be here.
        raise ConfigurationError(
            "a Redis URL names one server, a name or address with a port from 1 to 65,535, such as "
            "host:6379; an IPv6 address is in brackets"
        )
    return decode(found[1].strip("[]"), "a host"), port
