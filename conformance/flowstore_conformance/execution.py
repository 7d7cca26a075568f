"""Make calls on a store and record their outcomes."""

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
    """Create the coroutine of a call without starting it."""
    made: Awaitable[object] = getattr(store, call.method)(**call.arguments)
    return made


async def finish(begun: Awaitable[object], *, exact_times: bool = True) -> Outcome:
    """Await a call created by begin(). Any exception is an outcome, foreign ones included."""
    try:
        return Returned(comparable(await begun, exact_times=exact_times))
    except OutcomeUnknownError:
        return UNKNOWN
    except FlowStoreError as error:
        return Raised(type(error).__name__)
    except Exception as error:  # noqa: BLE001 - becomes a foreign outcome
        return Raised(type(error).__name__, error)


async def execute(store: FlowStore, call: Call, *, exact_times: bool = True) -> Outcome:
    """Make a call and return its outcome; see finish()."""
    return await finish(begin(store, call), exact_times=exact_times)


def is_foreign(outcome: Outcome) -> bool:
    """Whether the outcome is an exception outside the contract (CON-2)."""
    return isinstance(outcome, Raised) and outcome.error not in CONTRACT_ERRORS


def is_unavailable(outcome: Outcome) -> bool:
    """Whether the store refused the call as unavailable, without an effect (CON-2)."""
    return isinstance(outcome, Raised) and outcome.error == "StoreUnavailableError"


class YieldDetector:
    """Detects whether other tasks ran during a call."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._yielded = False
        # Runs in the next iteration of the event loop, so before the call ends only if the call suspends.
        self._handle = self._loop.call_soon(self._on_next_iteration)

    def _on_next_iteration(self) -> None:
        self._yielded = True

    def stop(self) -> bool:
        self._handle.cancel()
        return self._yielded
