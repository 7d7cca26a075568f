"""A clock that never falls, for spaces whose server tells no time: a key that holds the latest time told.

Two machines never disagree about whether a time has passed, whatever their clocks say: an answer is the
time in the register, or a later one that was put there first. A machine whose clock is ahead by less than
``max_skew`` ends leases up to that much too early.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from flowstore_documents import keys
from flowstore_documents.space import (
    AppliedOrRefused,
    Change,
    KeyValueSpace,
    MaybeApplied,
    NotApplied,
    Version,
    Versioned,
)

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
        self._asking = asyncio.Lock()
        self._next: asyncio.Task[datetime] | None = None
        """Answers the calls that have come since the last question was asked."""
        self._accepted: tuple[datetime, float] | None = None
        """What this machine's clock and the monotonic one said when the former was last accepted."""
        self._told = datetime.min.replace(tzinfo=UTC)
        """The latest time that is known to be in the register."""

    async def now(self) -> datetime:
        """A time that is not before any earlier answer to anyone. Concurrent calls share one.

        Raises NotApplied if this machine's clock is more than ``max_skew`` ahead of others in use.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask_next())
            # The error is for the callers, who may all have been cancelled.
            self._next.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._next)

    def time_of(self, register: Versioned | None) -> datetime | None:
        """``View.time`` of a read that includes KEY; None: this clock may be wrong, and ``now`` finds out."""
        if register is None:
            return None
        latest = self._parse(register)
        own, at = self._machine_clock(), self._monotonic()
        if own - latest > self._max_skew and not self._keeps_time(own, at):
            return None
        self._accepted = own, at
        return latest if own - latest < RESOLUTION else own

    def change_for(self, changes: Sequence[Change]) -> Sequence[Change]:
        """What a commit must contain too, so that its changes tell their times: one change, or none.

        ``told`` is called with it once it is committed.
        """
        moment = max((change.time for change in changes if change.time is not None), default=None)
        if moment is None or moment <= self._told:
            return ()
        return (Change(puts={KEY: keys.time_bytes(moment)}, before=moment, time=moment),)

    def told(self, changes: Sequence[Change]) -> None:
        """The result of ``change_for`` was committed."""
        for change in changes:
            assert change.time is not None
            self._told = max(self._told, change.time)

    async def _ask_next(self) -> datetime:
        async with self._asking:
            # Later calls must not share this answer: it may be older than what their callers know.
            self._next = None
            return await self._ask()

    async def _ask(self) -> datetime:
        # Once, so that an answer to others since then will do, however slow the space is.
        own, began = self._machine_clock(), self._monotonic()
        while True:
            latest, version = await self._read()
            if latest is not None and own - latest < RESOLUTION:
                self._accepted = own, began
                return latest
            if latest is not None and own - latest > self._max_skew and not self._keeps_time(own, began):
                # Either nobody has asked for a while, or this clock is wrong.
                await asyncio.sleep(TICK_SECONDS)
                own, began = self._machine_clock(), self._monotonic()
                moved = (await self._read())[0]
                if moved is not None and moved != latest and own - moved > self._max_skew:
                    raise NotApplied("the clock of this machine is ahead of the others", retry=False)
            try:
                (put,) = await self._space.commit([Change({KEY: version}, {KEY: keys.time_bytes(own)})])
            except AppliedOrRefused as error:
                raise NotApplied(error.reason, retry=False) from None
            except MaybeApplied:
                continue
            if put is not None:
                self._accepted = own, began
                self._told = max(self._told, own)
                return own

    def _keeps_time(self, own: datetime, began: float) -> bool:
        """Whether this machine's clock has not jumped since it was accepted."""
        if self._accepted is None:
            return False
        then, accepted = self._accepted
        return own - then - timedelta(seconds=began - accepted) < MAX_DRIFT

    async def _read(self) -> tuple[datetime | None, Version | None]:
        found = (await self._space.read([KEY])).found.get(KEY)
        return (None, None) if found is None else (self._parse(found), found.version)

    def _parse(self, register: Versioned) -> datetime:
        moment = keys.parse_time(register.value)
        assert moment is not None
        self._told = max(self._told, moment)
        return moment
