"""The servers that a URL names. One of them takes writes, and which one that is may change."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

import asyncpg

from flowstore_postgres.errors import UNREACHABLE

Host = tuple[str, int | None]

HOST = re.compile(r"(\[[^]]*\]|[^:]*)(?::(\d*))?")


class Hosts:
    """Connects to the first of several servers that will do.

    The driver does that too, but one time-out is over all of it: a server that is silent, because its
    machine is off, would keep it from ever asking the next. Here each gets its part of the time, and
    one that failed comes last from then on.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = list(hosts)

    async def connect(self, dsn: str, *, timeout: float, **arguments: Any) -> Any:  # noqa: ASYNC109
        """As asyncpg.connect, and raises what it does; ``timeout`` is in seconds, for all hosts together."""
        if len(self._hosts) < 2:
            return await asyncpg.connect(dsn, timeout=timeout, **arguments)
        failure: BaseException | None = None
        for host, port in tuple(self._hosts):
            try:
                return await asyncpg.connect(
                    dsn, host=host, port=port, timeout=timeout / len(self._hosts), **arguments
                )
            except BaseException as error:
                # A cancellation too: whoever waits for a connection may have less patience than this.
                self._hosts.remove((host, port))
                self._hosts.append((host, port))
                if not isinstance(error, UNREACHABLE):
                    raise
                failure = error
        assert failure is not None
        raise failure


def read_hosts(url: str, options: Mapping[str, object]) -> list[Host]:
    """The hosts and ports that options or a URL name; empty where that is left to the driver."""
    place = re.split("[/?#]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]
    names = str(options.get("host", "")) or place
    if not names:
        return []
    specs = names.split(",")
    ports = str(options.get("port", "")).split(",")
    ports = ports * len(specs) if len(ports) == 1 else ports
    found: list[Host] = []
    for spec, given in zip(specs, ports, strict=len(specs) == len(ports)):
        # A folder of sockets may hold a colon.
        parts = None if unquote(spec).startswith("/") else HOST.fullmatch(unquote(spec))
        host, port = (parts[1].strip("[]"), given or parts[2]) if parts else (unquote(spec), given)
        found.append((host, int(port) if port and port.isdecimal() else None))
    return found
