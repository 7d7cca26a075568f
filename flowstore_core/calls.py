"""One call on its way through a Batcher, and what may become of it."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any

AGAIN: Any = object()
"""The outcome of a call that has to be sent again: ``run`` did not come to it, or ``share`` cannot tell."""


class BatchError(Exception):
    """Nothing of the batch happened, and one row may be the reason: the parts are to be tried."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause
        """What the caller of a row that fails alone gets."""


class Elsewhere:
    """The outcome of a call that another batcher's method is to answer."""

    __slots__ = ("take",)

    def __init__(self, take: Callable[[Call], None]) -> None:
        self.take: Callable[[Call], None] = take
        """Gets the call, and those that hoped to be answered from its answer; see Method.adopt."""


class Call:
    """One call on its way."""

    __slots__ = ("followers", "give_back", "item", "key", "outcome", "since")

    def __init__(
        self,
        key: Hashable,
        item: Any,
        outcome: asyncio.Future[Any],
        give_back: Callable[[Any], Awaitable[None]] | None,
        since: float,
    ) -> None:
        self.key: Hashable = key
        self.item: Any = item
        self.outcome: asyncio.Future[Any] = outcome
        self.give_back: Callable[[Any], Awaitable[None]] | None = give_back
        self.since: float = since
        self.followers: list[Call] | None = None
        """Calls with the same key that hope to be answered from this one's answer."""

    def follow(self, later: Call) -> None:
        """Let a later call with the same key hope for this one's answer."""
        if self.followers is None:
            self.followers = []
        self.followers.append(later)


def shared(
    share: Callable[[Any, Any, Any], Any] | None, first: Call, outcome: Any, followers: Sequence[Call]
) -> list[Any]:
    """What each follower gets from the first one's outcome, or AGAIN."""
    if outcome is AGAIN or share is None or isinstance(outcome, Exception):
        return [AGAIN] * len(followers)
    item = first.item
    answers: list[Any] = []
    for follower in followers:
        try:
            answers.append(share(item, outcome, follower.item))
        except Exception as error:  # noqa: BLE001 - not swallowed: the caller gets it
            answers.append(error)
    return answers


def another(error: Exception) -> Exception:
    """The same error for another caller: one object raised in many tasks gathers their tracebacks."""
    try:
        return copy.copy(error).with_traceback(error.__traceback__)
    except Exception:  # noqa: BLE001 - an error that cannot be copied serves all
        return error
