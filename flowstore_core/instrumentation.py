"""What happens inside a backend, for whoever measures: retries, batches, answers that were lost.

A wrapper sees each call and its answer. What lies between, it cannot see: that a call was tried again,
that it went out with others and had waited for them, that its acknowledgement was lost and how it was
resolved. So a backend reports that to ``config.observers``, and a plugin that wants to know appends an
observer there in its hook ``flowstore_wrap_store``::

    if observers:
        observers.batch("try_claim_step", 17, 0.004)

Without an observer the list is empty, and that ``if`` is all that it costs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Any, Protocol

_log = logging.getLogger("flowstore_core")


class Resolution(StrEnum):
    """What became of a write whose acknowledgement was lost (CON-3)."""

    HAPPENED = "happened"
    """It was found; its caller gets the true answer."""
    DID_NOT_HAPPEN = "did_not_happen"
    """It was not found, and nothing can take effect any more; it is sent again."""
    REPEATED = "repeated"
    """It is sent again without a look, because that gives the true answer whether it had happened or not."""
    UNKNOWN = "unknown"
    """It could not be looked for; its caller gets OutcomeUnknownError."""


class Observer(Protocol):
    """Hears what backends report. Called on the event loop, so it must be quick and must not block.

    ``operation`` is the name of the store's method, or a word for several of them that share a way to
    the database, such as ``read``. Nothing that is reported holds a key, a text or an id.
    """

    def retried(self, operation: str, reason: str, wait: float) -> None:
        """A try that is known not to have happened is made again after ``wait`` seconds.

        ``reason`` is one of few words: ``connection_lost``, or the database's own code.
        """
        ...

    def batch(self, operation: str, size: int, waited: float) -> None:
        """``size`` calls go out together; the one that waited longest has waited that many seconds."""
        ...

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int) -> None:
        """The acknowledgement of so many calls was lost, and this became of them."""
        ...


class Observers(list[Observer]):
    """The observers of one store: empty, and so false, as long as nobody listens.

    What an observer raises is logged and goes no further: measuring never breaks a store.
    """

    def retried(self, operation: str, reason: str, wait: float) -> None:
        self._tell(lambda observer: observer.retried(operation, reason, wait))

    def batch(self, operation: str, size: int, waited: float) -> None:
        self._tell(lambda observer: observer.batch(operation, size, waited))

    def outcome_unknown(self, operation: str, resolution: Resolution, calls: int = 1) -> None:
        self._tell(lambda observer: observer.outcome_unknown(operation, resolution, calls))

    def _tell(self, report: Callable[[Observer], Any]) -> None:
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
"""For what is used without a store's configuration; nothing is ever appended to it."""


def report_batch(observers: Observers, log: logging.Logger, operation: str, size: int, waited: float) -> None:
    """Tell of a batch, in the log at level debug too; to be called only where one of them listens."""
    if observers:
        observers.batch(operation, size, waited)
    log.debug(
        "%s: a batch of %d, the first of them after %.6f s",
        operation,
        size,
        waited,
        extra={
            "flowstore.operation": operation,
            "flowstore.batch_size": size,
            "flowstore.wait_seconds": waited,
        },
    )
