"""A clock that never falls, for spaces whose server tells no time: a key that holds the latest time told.

Two machines never disagree about whether a time has passed, whatever their clocks say: an answer is the
time in the register, or a later one that was put there first. A machine whose clock is ahead by less than
``max_skew`` ends leases up to that much too early.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from flowstore_documents import keys
from flowstore_documents.space import Change, KeyValueSpace, MaybeApplied, NotApplied, Version

KEY = b"clock"
RESOLUTION = timedelta(milliseconds=10)
"""Answers within this time are equal, so that the register has at most 100 writes a second."""
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
    ) -> None:
        self._space = space
        self._max_skew = max_skew
        self._machine_clock = machine_clock

    async def now(self) -> datetime:
        """A time that is not before any earlier answer to anyone.

        Raises NotApplied if this machine's clock is more than ``max_skew`` ahead of others in use.
        """
        while True:
            latest, version = await self._read()
            own = self._machine_clock()
            if latest is not None and own - latest < RESOLUTION:
                return latest
            if latest is not None and own - latest > self._max_skew:
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
                return own

    async def _read(self) -> tuple[datetime | None, Version | None]:
        found = (await self._space.read([KEY])).found.get(KEY)
        return (None, None) if found is None else (keys.parse_time(found.value), found.version)
