"""The errors of this package."""

from __future__ import annotations


class RunFailedError(Exception):
    """The run ended as Failed or Cancelled; the message says why."""


class OperationFailedError(Exception):
    """A replayed operation failed when it was executed; the message has the type and text of the error.

    The operation is not executed again before DurableRunner.retry reopens it.
    """


class RunTakenOverError(Exception):
    """This process lost its claim on the run, and another process may continue it."""


class EventNotOpenError(ValueError):
    """No run waits for this token: it is wrong, the event was resolved differently, or the wait is over."""
