"""Mutants that share a clock in name only."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from flowstore_core import Capability
from flowstore_sqlite.store import SqliteStore
from tests.mutants import mutant


@mutant("postgresql", "CLK-1")
class ClockOfTheProcess:
    """Sends the time of the process with every statement, in place of the server's."""

    def begin(self) -> None:
        pool: Any = self._database.pool  # type: ignore[attr-defined]
        pool._clock = lambda: datetime.now(UTC)


@mutant("postgresql", "CLK-1")
class StalledByTheClockOfTheProcess:
    """Compares stalled steps with the time of the process, unless as_of is given."""

    async def get_stalled_steps(self, **given: Any) -> Any:
        given["as_of"] = given["as_of"] or datetime.now(UTC)
        return await super().get_stalled_steps(**given)


@mutant("sqlite", "CLK-1")
class ClockOfTheMachineDeclaredShared:
    """Declares SHARED_CLOCK, although every process reads the clock of its machine."""

    capabilities = SqliteStore.capabilities | {Capability.SHARED_CLOCK}
    max_skew = timedelta(0)
