"""A call on its way through a Batcher, and the outcomes that need special handling."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

REQUEUE: Any = object()
"""Outcome of a call that must be sent again: ``run`` did not reach it, or ``coalesce`` cannot answer it."""


class BatchError(Exception):
    """Raised by ``run`` when nothing of the batch happened and one row may be the cause.

    The batch is split in half until the failing row is alone.
    """

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
        """The error that the caller of the failing row gets."""


class Transfer:
    """Outcome of a call that moves to an operation of a different Batcher."""

    __slots__ = ("to",)

    def __init__(self, to: Callable[[PendingCall], None]) -> None:
        self.to: Callable[[PendingCall], None] = to
        """Receives the call, then each call coalesced with it: ``BatchedOperation.accept_transfer``."""


class PendingCall:
    """A queued or sent call: its item, its caller's future and its place in time."""

    __slots__ = ("coalesced", "future", "item", "key", "on_abandoned", "queued_at")

    def __init__(
        self,
        key: Hashable,
        item: Any,
        future: asyncio.Future[Any],
        on_abandoned: Callable[[Any], Awaitable[None]] | None,
        queued_at: float,
    ) -> None:
        self.key: Hashable = key
        self.item: Any = item
        self.future: asyncio.Future[Any] = future
        self.on_abandoned: Callable[[Any], Awaitable[None]] | None = on_abandoned
        self.queued_at: float = queued_at
        """Event loop time, in seconds."""
        self.coalesced: list[PendingCall] | None = None
        """Later calls with the same key that are answered from this call's outcome."""

    def coalesce_with(self, later: PendingCall) -> None:
        """Answer a later call with the same key from this call's outcome."""
        if self.coalesced is None:
            self.coalesced = []
        self.coalesced.append(later)


def count_callers(calls: Sequence[PendingCall]) -> int:
    """The number of callers that wait for a batch, coalesced ones included."""
    return len(calls) + sum(len(call.coalesced) for call in calls if call.coalesced is not None)


def coalesced_results(
    coalesce: Callable[[Any, Any, Any], Any] | None,
    first: PendingCall,
    outcome: Any,
    coalesced: Sequence[PendingCall],
) -> list[Any]:
    """The outcome of each coalesced call, derived from that of the first; REQUEUE where it cannot be."""
    if outcome is REQUEUE or coalesce is None or isinstance(outcome, Exception):
        return [REQUEUE] * len(coalesced)
    item = first.item
    results: list[Any] = []
    for call in coalesced:
        try:
            results.append(coalesce(item, outcome, call.item))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            results.append(error)
    return results


def copy_exception(error: Exception) -> Exception:
    """A copy of an error for a second caller.

    One instance raised in several tasks would accumulate the tracebacks of all of them.
    """
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except Exception:  # noqa: BLE001 - an error that cannot be copied is shared
        return error
