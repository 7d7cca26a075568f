"""The context in which a fault scenario runs."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flowstore_chaos.counts import Counts
from flowstore_chaos.server import Server, new_server


class SkippedError(Exception):
    """This machine cannot run the row; the message names the missing requirement."""


@dataclass(slots=True, kw_only=True)
class RunContext:
    """The plan and the counts of one row, and its temporary folder, which is deleted afterwards."""

    backend: str
    """sqlite, postgresql or memory."""
    seed: int
    planned: int
    is_mutant: bool
    """Whether to run the mutant, on which the row must fail."""
    folder: Path
    on_progress: Callable[[int], None]
    """Called with the number of injected faults."""
    counts: Counts = field(default_factory=Counts)
    rng: random.Random = field(init=False)
    _stores: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed}/{self.backend}")

    def record_faults(self, amount: int = 1) -> None:
        """Count faults that took effect."""
        self.counts.injected += amount
        self.on_progress(self.counts.injected)

    @property
    def done(self) -> bool:
        """Whether all planned faults have been injected, or the mutant has been detected."""
        return self.counts.injected >= self.planned or self.is_detected

    @property
    def is_detected(self) -> bool:
        """Whether the row runs a mutant and has a finding, so that it may end."""
        return self.is_mutant and not self.counts.clean

    @asynccontextmanager
    async def store_url(self, settings: Mapping[str, str] | None = None) -> AsyncIterator[str]:
        """The URL of a new, empty store: a file, a schema on a new server, or memory.

        ``settings`` configure the PostgreSQL server.
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
        """A new PostgreSQL server, durable unless ``settings`` disable it; deleted afterwards."""
        self._stores += 1
        async with new_server(self.folder / f"pg-{self._stores}", settings or {}) as server:
            yield server
