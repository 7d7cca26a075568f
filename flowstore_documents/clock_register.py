"""A clock that never falls, for spaces whose server tells no time: a key that holds the latest time told.

Two machines never disagree about whether a time has passed, whatever their clocks say: an answer is the
time in the register, or a later one that was put there first. A machine whose clock is ahead by less than
``max_skew`` ends leases up to that much too early.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from flowstore_documents import keys
from flowstore_documents.space import Change, KeyValueSpace, MaybeApplied, NotApplied, Version

KEY = b"clock"
RESOLUTION = timedelta(milliseconds=10)
"""Answers within this time are equal, so that the register has at most 100 writes a second."""
MAX_DRIFT = timedelta(milliseconds=100)
"""How far a clock may be ahead of the monotonic one since it was last asked, without having jumped."""
TICK_SECONDS = 1.0
"""How long a machine whose clock is far ahead waits for signs of the others."""


def machine_clock() -> datetime:
    return datetime.now(UTC)


class ClockRegister:
    """The clock of one space: implement ``KeyValueSpace.clock`` with ``now``."""

    def __init__(
        self,
        space: KeyValueSpace,
        max_skew: timedelta,
        *,
        machine_clock: Callable[[], datetime] = machine_clock,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._space = space
        self._max_skew = max_skew
        self._machine_clock = machine_clock
        self._monotonic = monotonic
        self._accepted: tuple[datetime, float] | None = None
        """What this machine's clock and the monotonic one said when the former was last accepted."""

    async def now(self) -> datetime:
        """A time that is not before any earlier answer to anyone.

        Raises NotApplied if this machine's clock is more than ``max_skew`` ahead of others in use.
        """
        while True:
            latest, version = await self._read()
            own = self._machine_clock()
            if latest is not None and own - latest < RESOLUTION:
                self._accept(own)
                return latest
            if latest is not None and own - latest > self._max_skew and not self._keeps_time(own):
                # Either nobody has asked for a while, or this clock is wrong.
                await asyncio.sleep(TICK_SECONDS)
                moved = (await self._read())[0]
                if moved is not None and moved != latest and self._machine_clock() - moved > self._max_skew:
                    raise NotApplied("the clock of this machine is ahead of the others", retry=False)
            try:
                (put,) = await self._space.commit([Change({KEY: version}, {KEY: keys.time_bytes(own)})])
            except MaybeApplied:
                continue
            if put is not None:
                self._accept(own)
                return own

    def _accept(self, own: datetime) -> None:
        self._accepted = own, self._monotonic()

    def _keeps_time(self, own: datetime) -> bool:
        """Whether this machine's clock has not jumped since it was accepted, so that it still is acceptable."""
        if self._accepted is None:
            return False
        then, began = self._accepted
        return own - then - timedelta(seconds=self._monotonic() - began) < MAX_DRIFT

    async def _read(self) -> tuple[datetime | None, Version | None]:
        found = (await self._space.read([KEY])).found.get(KEY)
        return (None, None) if found is None else (keys.parse_time(found.value), found.version)
