"""What ``--faults`` adds to a backend: a disturbed network between its stores and the servers of the URL."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowstore_conformance.guard import WrappedBackend
from flowstore_conformance.proxy import LOOPBACK, Address, FaultyNetwork, NetworkFault
from flowstore_core import (
    Backend,
    ConfigurationError,
    FlowStoreError,
    SchemaVersionError,
    open_store,
)
from flowstore_core.backend import FaultInjectable, FaultInjector
from flowstore_core.urls import StoreUrl, decode, parse_url

HOOK = "implement FaultInjectable (docs/writing-a-backend.md)"

_HOST = re.compile(r"(\[[^]]+\]|[^][:]+)(?::(\d{1,5}))?")


def read_addresses(url: StoreUrl) -> list[Address]:
    """The servers that a URL names. Raises ConfigurationError unless each has a host and a port."""
    addresses = []
    for spec in url.hosts.split(","):
        found = _HOST.fullmatch(spec)
        if found is None or found[2] is None:
            raise ConfigurationError(
                "the URL names no host:port, so no proxy can be put before the store. Write the port of each "
                f"server into the URL; to disturb a store without a server, {HOOK}"
            )
        addresses.append((decode(found[1].strip("[]"), "a host"), int(found[2])))
    return addresses


@asynccontextmanager
async def disturbed_network(url: str) -> AsyncIterator[tuple[FaultyNetwork, str]]:
    """Start a proxy before each server of a URL. Yields the network, and the URL through the proxies.

    Raises ConfigurationError, with the next step, for a URL that the proxies cannot serve.
    """
    parts = parse_url(url)
    addresses = read_addresses(parts)
    network = FaultyNetwork(addresses)
    await network.start()
    try:
        # A certificate for localhost is valid for the proxy too.
        names = ["localhost" if host == "localhost" else LOOPBACK for host, _ in addresses]
        through = parts.with_hosts(
            ",".join(f"{name}:{port}" for name, port in zip(names, network.ports, strict=True))
        )
        await _try(network, through)
        yield network, through
    finally:
        await network.aclose()


async def _try(network: FaultyNetwork, url: str) -> None:
    """Open the store once through the proxies. Raises ConfigurationError if that fails."""
    try:
        async with open_store(url) as store:
            await store.ping()
    except SchemaVersionError:
        raise
    except FlowStoreError as error:
        raise ConfigurationError(
            f"the store cannot be opened through a proxy on {LOOPBACK}: {error}. If its TLS checks the name "
            "of the server, use a URL without that check, or a certificate that is also valid for "
            f"{LOOPBACK}; if the server refuses clients of this machine, allow them; or {HOOK}"
        ) from error
    if not network.connections:
        raise ConfigurationError(
            "the store did not connect to the hosts in the first part of its URL, which lead to the proxy: "
            f"name the server there and not in an option, such as host=, or {HOOK}"
        )


class NetworkInjector:
    """Implements FaultInjector on any protocol; see flowstore_core.backend."""

    def __init__(self, network: FaultyNetwork, url: str) -> None:
        self.url = url
        self._network = network

    def lose_reply(self, *, skip: int = 0, isolates: bool = False) -> None:
        self._network.arm(NetworkFault.LOSE_REPLY, skip=skip, isolates=isolates)

    def hold_request(self, *, skip: int = 0) -> None:
        """Unlike the contract of FaultInjector, requests inside a transaction count: it may keep locks."""
        self._network.arm(NetworkFault.HOLD_REQUEST, skip=skip)

    def refuse_request(self, *, skip: int = 0) -> None:
        raise ConfigurationError(f"a proxy without the protocol cannot refuse a request; {HOOK}")

    async def release_request(self) -> None:
        await self._network.release()

    def disarm(self) -> bool:
        return self._network.disarm()


class BackendWithNetworkFaults(WrappedBackend):
    """A backend that is FaultInjectable: by its own injector, which knows the protocol, else by proxies."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        if not isinstance(self, FaultInjectable):
            self.inject_faults = inject_network_faults


@asynccontextmanager
async def inject_network_faults(url: str) -> AsyncIterator[FaultInjector]:
    """See FaultInjectable."""
    async with disturbed_network(url) as (network, through):
        yield NetworkInjector(network, through)
