"""The settings of a store, from its URL: ``redis://user:password@host:6379/0?option=value``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.urls import decode
from flowstore_documents import read_address, read_tls_files

TLS_SCHEMES = frozenset({"rediss", "valkeys"})
DEFAULT_PREFIX = "flowstore"
ADDRESS_RULE = "a Redis URL names one server, such as host:6379"


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
    files: Mapping[str, str]
    """The files of TLS by option. Without cacert the system's authorities hold."""
    connect_timeout: float
    """Seconds for a new connection, its login and the checks of the server."""
    request_timeout: float
    """Seconds for the answer to one request."""


def read_settings(config: StoreConfig) -> Settings:
    """Raises ConfigurationError for a malformed host, database, option or file."""
    parts = config.parts
    host, port = read_address(parts.hosts or "localhost", 6379, ADDRESS_RULE)
    files = read_tls_files(config)
    has_tls = config.scheme in TLS_SCHEMES
    if files and not has_tls:
        raise ConfigurationError("options cacert, cert and key need TLS: write rediss:// instead of redis://")
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
        host=decode(host.strip("[]"), "a host"),
        port=port,
        database=int(parts.path or 0),
        prefix=prefix,
        user=parts.user,
        password=parts.password,
        has_tls=has_tls,
        files={name: str(path) for name, path in files.items()},
        connect_timeout=config.seconds("connect_timeout", 5.0, low=0.1, high=60.0),
        request_timeout=config.seconds("request_timeout", 5.0, low=0.1, high=60.0),
    )
