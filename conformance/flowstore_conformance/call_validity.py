"""Decide which calls the contract allows (INP)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import NoReturn

from flowstore_conformance.history import Call, Outcome, Raised
from flowstore_core import Capability, InvalidArgumentError
from flowstore_core.validated_store import ValidatedStore


class _AcceptedError(Exception):
    """Raised if the arguments passed every check."""


class _AcceptingStore:
    """A backend store behind core's checks that accepts every call."""

    def __getattr__(self, operation: str) -> Callable[..., NoReturn]:
        def accept(**arguments: object) -> NoReturn:
            raise _AcceptedError

        return accept


def is_valid(call: Call) -> bool:
    """Whether core passes the call on to a backend. Needs a running event loop."""
    store = ValidatedStore(_AcceptingStore(), "checks", frozenset(Capability), AsyncExitStack())
    try:
        made = getattr(store, call.method)(**call.arguments)
    except TypeError:
        return False  # An argument is missing or unknown.
    try:
        # The checks of arguments never suspend.
        made.send(None)
    except InvalidArgumentError:
        return False
    except (_AcceptedError, StopIteration):
        pass
    finally:
        made.close()
    return True


def is_correctly_rejected(call: Call, outcome: Outcome) -> bool:
    """Whether the call is invalid and was rejected with InvalidArgumentError."""
    return outcome == Raised(InvalidArgumentError.__name__) and not is_valid(call)
