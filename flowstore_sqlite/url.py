"""The URL of a SQLite store."""

from __future__ import annotations

import os
import re

from flowstore_core import ConfigurationError
from flowstore_core.platforms import require_posix
from flowstore_core.urls import parse_url


def database_path(url: str) -> str:
    """The absolute path in a URL. Raises ConfigurationError."""
    # Permissions, locks and the rejection of links rely on POSIX.
    require_posix("the SQLite backend")
    parts = parse_url(url)
    if parts.hosts or parts.user or parts.password:
        raise ConfigurationError(
            "a SQLite URL names no host: write sqlite:///relative.db or sqlite:////absolute.db"
        )
    path = parts.path
    if path in ("", "/", ":memory:"):
        raise ConfigurationError(
            "a SQLite URL names a file: sqlite:///relative.db or sqlite:////absolute.db; "
            "for a store in memory open memory://"
        )
    if "\0" in path:
        raise ConfigurationError("the path in a SQLite URL must not hold a zero byte")
    try:
        # abspath keeps a second leading slash, which has no meaning.
        return os.path.abspath(re.sub("^/+", "/", path))
    except OSError:
        raise ConfigurationError(
            f"the SQLite URL names the relative path {path!r}, and the working directory no longer exists or "
            "may not be read; change to another directory, or name an absolute path: sqlite:////absolute.db"
        ) from None
