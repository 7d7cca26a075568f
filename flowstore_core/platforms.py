"""The platform requirements of parts of flowstore."""

from __future__ import annotations

import os

from flowstore_core.errors import ConfigurationError


def require_posix(part: str) -> None:
    """Raise ConfigurationError, naming the part of flowstore, unless this is a POSIX system."""
    if os.name != "posix":
        raise ConfigurationError(
            f"{part} requires a POSIX system, such as Linux or macOS; on Windows run it in WSL, the Windows "
            "Subsystem for Linux"
        )
