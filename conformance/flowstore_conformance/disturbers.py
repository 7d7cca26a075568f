"""What disturbs the requests of stores at random moments: proxies, or the injector of a backend."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from flowstore_conformance.context import CheckContext, Unsupported
from flowstore_conformance.network_faults import NetworkInjector, disturbed_network
from flowstore_conformance.proxy import FaultyNetwork, NetworkFault
from flowstore_core import ConfigurationError
from flowstore_core.backend import FaultInjectable, FaultInjector

STORES = 2
"""The number of disturbed stores; each has faults of its own."""
MAX_SILENCE_SECONDS = 0.5
MAX_LATE_SECONDS = 0.3
MAX_FAULTS = 5
"""Faults of a store in one round: a store that never gets an answer takes long to give up."""
MAX_SKIPPED_REQUESTS = 25
"""The largest number of requests to any server between two faults of the network."""
MAX_SKIPPED_WRITES = 8
"""The same for a backend's own injector, which may count commits only."""
MAX_HOOK_SECONDS = 0.1
"""How long a fault of a backend's own injector stays armed."""
NO_HOOK = "the backend does not implement FaultInjectable, so it has no points of its own"


@dataclass(frozen=True, slots=True)
class Injected:
    """A fault that happened between the store ``store`` and its database."""

    store: int
    fault: str
    since: float
    until: float
    where: str = ""


class Disturber(Protocol):
    """Disturbs the requests of one store."""

    url: str

    @property
    def injected(self) -> Sequence[Injected]:
        """The faults that happened, in order."""
        ...

    @property
    def kinds(self) -> Sequence[str]:
        """Descriptions of the faults that it injects."""
        ...

    async def disturb(self) -> None:
        """Inject up to MAX_FAULTS faults at random moments; may be cancelled."""
        ...

    def heal(self) -> None:
        """Inject nothing more. Requests that are held stay so."""
        ...

    async def release(self) -> None:
        """Deliver the held requests."""
        ...


class _FaultDeck:
    """All kinds of faults in a random order, again and again."""

    def __init__(self, kinds: Sequence[Any], generator: random.Random, max_skip: int) -> None:
        self._kinds = kinds
        self._max_skip = max_skip
        self._generator = generator
        self._left: list[Any] = []

    def draw(self) -> Any:
        self._left = self._left or self._generator.sample(self._kinds, len(self._kinds))
        return self._left.pop()

    def skip(self) -> int:
        """The number of requests before the next fault; faults also follow each other closely."""
        return self._generator.randrange(self._generator.choice((3, self._max_skip)))


class NetworkDisturber:
    """Injects the faults of the network."""

    def __init__(self, store: int, network: FaultyNetwork, url: str, generator: random.Random) -> None:
        self.url = url
        self._store = store
        self._network = network
        self._generator = generator
        self._deck = _FaultDeck(list(NetworkFault), generator, MAX_SKIPPED_REQUESTS)

    @property
    def injected(self) -> Sequence[Injected]:
        return [
            Injected(
                self._store,
                one.fault.value,
                one.moment,
                one.moment,
                f"request {one.request} to {one.address[0]}:{one.address[1]}",
            )
            for one in self._network.injections
        ]

    @property
    def kinds(self) -> Sequence[str]:
        return [fault.value for fault in NetworkFault]

    async def disturb(self) -> None:
        for _ in range(MAX_FAULTS):
            fault = self._deck.draw()
            self._network.arm(fault, skip=self._deck.skip(), at_byte=self._generator.randrange(1, 1000))
            await self._network.injected.wait()
            if fault is NetworkFault.BLACK_HOLE:
                await asyncio.sleep(self._generator.uniform(0.02, MAX_SILENCE_SECONDS))
                self._network.heal()
            if fault is NetworkFault.HOLD_REQUEST and self._generator.random() < 0.5:
                await asyncio.sleep(self._generator.uniform(0.0, MAX_LATE_SECONDS))
                await self._network.release()

    def heal(self) -> None:
        self._network.disarm()
        self._network.heal()

    async def release(self) -> None:
        await self._network.release()


class HookDisturber:
    """Injects the faults of a backend's own injector."""

    _KINDS = ("the reply was lost", "the request was delayed", "the request was refused once")

    def __init__(self, store: int, injector: FaultInjector, generator: random.Random) -> None:
        self.url: str = injector.url
        self._injected: list[Injected] = []
        self._store = store
        self._injector = injector
        self._generator = generator
        self._deck = _FaultDeck(range(len(self._KINDS)), generator, MAX_SKIPPED_WRITES)

    @property
    def injected(self) -> Sequence[Injected]:
        return self._injected

    @property
    def kinds(self) -> Sequence[str]:
        return self._KINDS

    async def disturb(self) -> None:
        arm = (self._injector.lose_reply, self._injector.hold_request, self._injector.refuse_request)
        for _ in range(MAX_FAULTS):
            number, since = self._deck.draw(), time.monotonic()
            arm[number](skip=self._deck.skip())
            try:
                await asyncio.sleep(self._generator.uniform(0.0, MAX_HOOK_SECONDS))
            finally:
                if self._injector.disarm():
                    one = Injected(self._store, self._KINDS[number], since, time.monotonic())
                    self._injected.append(one)

    def heal(self) -> None:
        """``disturb`` disarms when it is cancelled."""

    async def release(self) -> None:
        await self._injector.release_request()


@asynccontextmanager
async def network_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the network before each of STORES stores. Raises ConfigurationError if that is impossible."""
    async with AsyncExitStack() as stack:
        disturbers = []
        for number in range(STORES):
            network, url = await stack.enter_async_context(disturbed_network(context.url))
            generator = random.Random(context.random.getrandbits(64))
            disturbers.append(NetworkDisturber(number, network, url, generator))
        yield disturbers


@asynccontextmanager
async def hook_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the requests of STORES stores by the backend's own injector.

    Raises Unsupported if it has none, and ConfigurationError if that cannot work with the URL.
    """
    if not isinstance(context.backend, FaultInjectable):
        raise Unsupported(NO_HOOK)
    async with AsyncExitStack() as stack:
        disturbers = []
        for number in range(STORES):
            injector = await stack.enter_async_context(context.backend.inject_faults(context.url))
            if isinstance(injector, NetworkInjector):
                raise Unsupported(NO_HOOK)
            generator = random.Random(context.random.getrandbits(64))
            disturbers.append(HookDisturber(number, injector, generator))
        yield disturbers


@asynccontextmanager
async def any_disturbers(context: CheckContext) -> AsyncIterator[Sequence[Disturber]]:
    """Disturb the network or, if there is none, use the backend's own injector."""
    async with AsyncExitStack() as stack:
        try:
            disturbers = await stack.enter_async_context(network_disturbers(context))
        except ConfigurationError:
            disturbers = await stack.enter_async_context(hook_disturbers(context))
        yield disturbers


@asynccontextmanager
async def disturbing(disturbers: Sequence[Disturber]) -> AsyncIterator[None]:
    """Inject faults while the body runs; afterwards the stores can be reached again."""
    tasks = [asyncio.ensure_future(one.disturb()) for one in disturbers]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        for disturber in disturbers:
            disturber.heal()
    for end in ends:
        if end is not None and not isinstance(end, asyncio.CancelledError):
            raise end
