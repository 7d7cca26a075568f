"""Making calls on a store, and telling what it answered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import flowstore_core
from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, Returned, comparable
from flowstore_core import FlowStore, FlowStoreError, OutcomeUnknownError

CONTRACT_ERRORS = frozenset(
    name
    for name, value in vars(flowstore_core).items()
    if isinstance(value, type) and issubclass(value, FlowStoreError)
)


def begin(store: FlowStore, call: Call) -> Awaitable[object]:
    """The call as a coroutine that has not begun."""
    made: Awaitable[object] = getattr(store, call.method)(**call.arguments)
    return made


async def finish(begun: Awaitable[object], *, exact_times: bool = True) -> Outcome:
    """Await a call that begin made; whatever comes is an outcome, foreign exceptions included."""
    try:
        return Returned(comparable(await begun, exact_times=exact_times))
    except OutcomeUnknownError:
        return UNKNOWN
    except FlowStoreError as error:
        return Raised(type(error).__name__)
    except Exception as error:  # noqa: BLE001 - told as the outcome, which is then found foreign
        return Raised(type(error).__name__, error)


async def execute(store: FlowStore, call: Call, *, exact_times: bool = True) -> Outcome:
    """Make a call and tell its outcome, as finish does."""
    return await finish(begin(store, call), exact_times=exact_times)


def is_foreign(outcome: Outcome) -> bool:
    """Whether an exception surfaced that is none of the contract's (CON-2)."""
    return isinstance(outcome, Raised) and outcome.error not in CONTRACT_ERRORS


def is_unavailable(outcome: Outcome) -> bool:
    """Whether the store said that it did not do the call, because it is too busy or gone (CON-2)."""
    return isinstance(outcome, Raised) and outcome.error == "StoreUnavailableError"


class YieldDetector:
    """Notices whether a call let other tasks run between its beginning and its end."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._yielded = False
        # Runs at the next turn of the event loop: before the call's end only if the call lets it.
        self._handle = self._loop.call_soon(self._on_next_iteration)

    def _on_next_iteration(self) -> None:
        self._yielded = True

    def stop(self) -> bool:
        self._handle.cancel()
        return self._yielded
