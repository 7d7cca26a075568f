"""Observers of the events inside a backend: retries, batches and unacknowledged writes.

A wrapper sees each call and its result, but not the events in between. A backend reports these to
``config.observers``::

    if observers:
        observers.batch("try_claim_step", 17, 0.004)

A plugin appends its observer in the hook ``flowstore_wrap_store``. Without observers the list is empty, and
a report costs one truth test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

_log = logging.getLogger("flowstore_core")


class Resolution(StrEnum):
    """The resolution of an unacknowledged write (CON-3)."""

    HAPPENED = "happened"
    """The probe found it; the caller gets its true result."""
    DID_NOT_HAPPEN = "did_not_happen"
    """The probe did not find it and it can no longer take effect; it is retried."""
    REPEATED = "repeated"
    """It is retried without a probe, because the retry returns the true result in either case."""
    UNKNOWN = "unknown"
    """The probe failed; the caller gets OutcomeUnknownError."""


class Observer(Protocol):
    """Receives the reports of backends. Called on the event loop, so it must be fast and must not block.

    ``operation`` is the name of the store's method, or one word for several methods that share a statement
    or transaction, such as ``read``. No report contains a key, a text or an id.
    """

    def retried(self, operation: str, reason: str, wait: float) -> None:
        """An operation that is known not to have happened is retried after ``wait`` seconds.

        ``reason`` has few distinct values: ``connection_lost``, or the error code of the database.
        """
        ...

    def batch(self, operation: str, size: int, waited: float) -> None:
        """A batch of ``size`` calls is sent; its oldest call was queued for ``waited`` seconds."""
        ...

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int) -> None:
        """Unacknowledged writes of ``calls`` calls were resolved."""
        ...


class Observers(list[Observer]):
    """The observers of one store; false while it is empty.

    An exception of an observer is logged and not raised, so that measuring cannot break a store.
    """

    def retried(self, operation: str, reason: str, wait: float) -> None:
        self._report(lambda observer: observer.retried(operation, reason, wait))

    def batch(self, operation: str, size: int, waited: float) -> None:
        self._report(lambda observer: observer.batch(operation, size, waited))

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int = 1) -> None:
        self._report(lambda observer: observer.outcome_unknown(operation, resolution, calls))

    def _report(self, report: Callable[[Observer], Any]) -> None:
        for observer in self:
            try:
                report(observer)
            except Exception as error:  # noqa: BLE001 - see the class
                _log.warning(
                    "an observer failed with %s",
                    type(error).__name__,
                    extra={"flowstore.error_type": type(error).__name__},
                )


NO_OBSERVERS = Observers()
"""The default where no store configuration exists; always empty."""


def report_batch(observers: Observers, log: logging.Logger, operation: str, size: int, waited: float) -> None:
    """Report a batch to the observers and to the log. Call only if observers exist or debug is enabled."""
    if observers:
        observers.batch(operation, size, waited)
    log.debug(
        "%s: batch of %d calls, the oldest queued for %.6f s",
        operation,
        size,
        waited,
        extra={
            "flowstore.operation": operation,
            "flowstore.batch_size": size,
            "flowstore.wait_seconds": waited,
        },
    )
