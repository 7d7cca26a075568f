"""What the URLs of most servers have in common: addresses, the files of TLS, a prefix of the keys."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path

from flowstore_core import ConfigurationError, StoreConfig

TLS_FILES = frozenset({"cacert", "cert", "key"})
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")


def read_address(spec: str, default_port: int, form: str) -> tuple[str, int]:
    """The host of ``host:port``, with the brackets of an IPv6 address, and the port.

    Raises ConfigurationError with ``form``, which says how the addresses of a URL are written.
    """
    found = _ADDRESS.fullmatch(spec)
    port = int((found and found[2]) or default_port)
    if found is None or not 1 <= port <= 65_535:
        # Not shown: the end of a password with a raw @ may be here.
        raise ConfigurationError(
            f"{form}: a name or an address, in brackets if it is one of IPv6, and a port from 1 to 65,535"
        )
    return found[1], port


def read_tls_files(config: StoreConfig) -> Mapping[str, Path]:
    """The options of TLS_FILES that are given.

    Raises ConfigurationError for a certificate without its key.
    """
    files = {name: path for name in TLS_FILES if (path := config.file(name)) is not None}
    if ("cert" in files) != ("key" in files):
        raise ConfigurationError("options cert and key must be given together")
    return files


def scratch_prefix(prefix: str) -> str:
    """A prefix that no store uses, of the same characters and of at most 100, for ``Backend.scratch``."""
    return f"{prefix[:60]}-scratch-{secrets.token_hex(8)}"
