"""The settings of a store, from its URL: ``etcd://user:password@host:2379,host2:2379/prefix?option=value``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta

import grpc

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.urls import StoreUrl

DEFAULT_PREFIX = "flowstore"
PREFIX_RULE = (
    "the path of an etcd URL is the prefix of all keys: 1 to 100 letters, digits, dots, hyphens, underscores "
    "and inner slashes"
)
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    addresses: tuple[str, ...]
    """The members to talk to, as ``host:port``."""
    prefix: bytes
    user: str
    password: str = field(repr=False)
    credentials: grpc.ChannelCredentials | None = field(repr=False)
    """None: no TLS."""
    connect_timeout: float
    """Seconds for the connection to one member."""
    request_timeout: float
    """Seconds for the answer to one request."""
    max_skew: timedelta
    """How far the clocks of two machines may differ."""


def read_settings(config: StoreConfig) -> Settings:
    """Raises ConfigurationError for a malformed host, prefix, option or file."""
    parts = config.parts
    if parts.password and not parts.user:
        raise ConfigurationError("an etcd URL with a password must have a user")
    return Settings(
        addresses=read_addresses(parts),
        prefix=key_prefix(parts),
        user=parts.user,
        password=parts.password,
        credentials=_read_credentials(config),
        connect_timeout=config.seconds("connect_timeout", 2.0, low=0.1, high=60.0),
        request_timeout=config.seconds("request_timeout", 5.0, low=0.1, high=60.0),
        max_skew=timedelta(seconds=config.seconds("max_skew", 10.0, low=0.1, high=3600.0)),
    )


def key_prefix(parts: StoreUrl) -> bytes:
    """The first bytes of every key. No prefix begins with another one, because no path has a colon."""
    path = parts.path or DEFAULT_PREFIX
    if not re.fullmatch(r"[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*", path) or len(path) > 100:
        raise ConfigurationError(PREFIX_RULE)
    return path.encode() + b":"


def read_addresses(parts: StoreUrl) -> tuple[str, ...]:
    """The members of a URL as ``host:port``; without any, the one on this machine."""
    return tuple(_read_address(spec) for spec in (parts.hosts or "localhost").split(","))


def _read_address(spec: str) -> str:
    found = _HOST.fullmatch(spec)
    port = int((found and found[2]) or 2379)
    if found is None or not 1 <= port <= 65_535:
        # Not shown: the end of a password with a raw @ may be here.
        raise ConfigurationError(
            "the members of an etcd URL are separated by commas, each a name or address with a port from 1 "
            "to 65,535, such as host1:2379,host2:2379; an IPv6 address is in brackets"
        )
    return f"{found[1]}:{port}"


def _read_credentials(config: StoreConfig) -> grpc.ChannelCredentials | None:
    files = {name: config.file(name) for name in ("cacert", "cert", "key")}
    has_files = any(files.values())
    if not config.flag("tls", has_files):
        if has_files:
            raise ConfigurationError("options cacert, cert and key need TLS; remove them or tls=false")
        return None
    if (files["cert"] is None) != (files["key"] is None):
        raise ConfigurationError("options cert and key must be given together")
    contents = {name: None if path is None else path.read_bytes() for name, path in files.items()}
    return grpc.ssl_channel_credentials(contents["cacert"], contents["key"], contents["cert"])
