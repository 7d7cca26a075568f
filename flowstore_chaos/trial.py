"""One row being run: what a line is given to work with."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flowstore_chaos.server import Server, new_server
from flowstore_chaos.tally import Tally


class SkippedError(Exception):
    """This machine cannot run the row; the text says what it lacks."""


@dataclass(slots=True, kw_only=True)
class Trial:
    """A row's plan, its tally, and a folder of its own that is deleted afterwards."""

    backend: str
    """sqlite, postgresql or memory."""
    seed: int
    planned: int
    broken: bool
    """Whether to run the broken variant, on which the row must go red."""
    folder: Path
    say: Callable[[int], None]
    """Tell whoever watches how many faults have landed."""
    tally: Tally = field(default_factory=Tally)
    rng: random.Random = field(init=False)
    _stores: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.backend}")

    def landed(self, amount: int = 1) -> None:
        """Count faults that happened."""
        self.tally.landed += amount
        self.say(self.tally.landed)

    @property
    def done(self) -> bool:
        """Whether as many faults have landed as were planned."""
        return self.tally.landed >= self.planned

    @asynccontextmanager
    async def store_url(self, settings: Mapping[str, str] | None = None) -> AsyncIterator[str]:
        """The URL of a new, empty store: a file, a schema on a new server, or memory.

        ``settings`` are those of the PostgreSQL server.
        """
        async with AsyncExitStack() as stack:
            if self.backend == "postgresql":
                server = await stack.enter_async_context(self.server(settings))
                yield server.url(schema="chaos")
            elif self.backend == "sqlite":
                self._stores += 1
                yield f"sqlite:///{self.folder}/store-{self._stores}.db"
            else:
                yield "memory://"

    @asynccontextmanager
    async def server(self, settings: Mapping[str, str] | None = None) -> AsyncIterator[Server]:
        """A new PostgreSQL server, durable unless the settings say otherwise; gone afterwards."""
        self._stores += 1
        async with new_server(self.folder / f"pg-{self._stores}", settings or {}) as server:
            yield server
