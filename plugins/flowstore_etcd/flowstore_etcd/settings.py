"""The settings of a store, from its URL: ``etcd://user:password@host:2379,host2:2379/prefix?option=value``."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta

import grpc

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.urls import StoreUrl
from flowstore_documents import read_address, read_tls_files

DEFAULT_PREFIX = "flowstore"
PREFIX_RULE = (
    "the path of an etcd URL is the prefix of all keys: 1 to 100 letters, digits, dots, hyphens, underscores "
    "and inner slashes"
)
ADDRESS_RULE = "the members of an etcd URL are separated by commas, such as host1:2379,host2:2379"


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
        addresses=_read_addresses(parts),
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


def _read_addresses(parts: StoreUrl) -> tuple[str, ...]:
    """The members of a URL as ``host:port``; without any, the one on this machine."""
    specs = (parts.hosts or "localhost").split(",")
    return tuple("{}:{}".format(*read_address(spec, 2379, ADDRESS_RULE)) for spec in specs)


def _read_credentials(config: StoreConfig) -> grpc.ChannelCredentials | None:
    files = read_tls_files(config)
    if not config.flag("tls", bool(files)):
        if files:
            raise ConfigurationError("options cacert, cert and key need TLS; remove them or tls=false")
        return None
    contents = {name: path.read_bytes() for name, path in files.items()}
    return grpc.ssl_channel_credentials(contents.get("cacert"), contents.get("key"), contents.get("cert"))
