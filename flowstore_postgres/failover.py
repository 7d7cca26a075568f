"""Connections to one of several hosts. A failover changes which of them accepts writes."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from flowstore_core import ConfigurationError
from flowstore_core.urls import ENCODING_RULE, decode, parse_url
from flowstore_postgres.errors import UNREACHABLE_ERRORS

Host = tuple[str, int | None]

HOST = re.compile(r"(\[[^]]*\]|[^][:]*)(?::(\d*))?")


class HostSelector:
    """Connects to the first suitable host.

    Each host gets its share of the timeout, and a host that failed moves to the end of the list. The driver
    tries several hosts under one timeout, so a host whose machine is off would use it up.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = list(hosts)

    async def connect(self, dsn: str, *, timeout: float, **arguments: Any) -> Any:
        """Connect, with the arguments and errors of asyncpg.connect.

        ``timeout`` is in seconds, for all hosts together.
        """
        if not self._hosts:
            return await asyncpg.connect(dsn, timeout=timeout, **arguments)
        failure: BaseException | None = None
        for host, port in tuple(self._hosts):
            try:
                return await asyncpg.connect(
                    dsn, host=host, port=port, timeout=timeout / len(self._hosts), **arguments
                )
            except BaseException as error:
                # Cancellations included: the caller's timeout may be shorter.
                self._hosts.remove((host, port))
                self._hosts.append((host, port))
                if not isinstance(error, UNREACHABLE_ERRORS):
                    raise
                failure = error
        assert failure is not None
        raise failure


def read_hosts(url: str, options: Mapping[str, object]) -> list[Host]:
    """Parse the hosts and ports of the options or the URL; empty if neither has any.

    Raises ConfigurationError for a malformed host, and for a number of ports that does not match the hosts.
    """
    named = str(options.get("host", ""))
    # Split before decoding: an encoded comma or colon is part of a name.
    specs = (named or parse_url(url).hosts).split(",")
    if specs == [""]:
        return []
    found = [_read_host(spec) if named else _read_encoded_host(spec) for spec in specs]
    ports = read_ports(str(options.get("port", "")))
    if len(ports) > 1 and len(ports) != len(found):
        raise ConfigurationError(
            f"option port must have one port, or one for each of the {len(found)} hosts, not {len(ports)}"
        )
    if not ports:
        return found
    return [(host, ports[number % len(ports)]) for number, (host, _) in enumerate(found)]


def read_ports(text: str) -> list[int]:
    """Parse comma-separated ports; empty for an empty text."""
    ports = text.split(",") if text else []
    return [_read_port(port) for port in ports]


def _read_encoded_host(spec: str) -> Host:
    name, port = _split_port(spec)
    return decode(name, "a host"), port


def _read_host(spec: str) -> Host:
    # The path of a socket directory may contain a colon.
    return (spec, None) if spec.startswith("/") else _split_port(spec)


def _split_port(spec: str) -> Host:
    try:
        ipaddress.IPv6Address(spec)
    except ValueError:
        found = HOST.fullmatch(spec)
    else:
        return spec, None
    if found is None:
        raise ConfigurationError(
            "a host must be written as name or name:port, with a number as the port, and an IPv6 address in "
            f"brackets; {ENCODING_RULE}"
        )
    return found[1].strip("[]"), _read_port(found[2]) if found[2] else None


def _read_port(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ConfigurationError(f"a port must be a number from 1 to 65,535; {ENCODING_RULE}")
    return int(text)
