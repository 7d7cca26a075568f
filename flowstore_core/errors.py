"""The errors of a store. An operation raises no others (CON-2).

Every error carries typed attributes, and its message names the next step. No message or attribute contains a
password, a payload or an output. A driver's exception is chained only if it cannot contain one either.
"""

from __future__ import annotations

from typing import Any
from uuid import UUID


class FlowStoreError(Exception):
    """The base class of every error that flowstore raises."""

    database_code: str | None = None
    """The error code of the database, such as SQLSTATE 53100; None if there is none."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Engines send errors between processes. The default pickling passes the message to the constructor,
        # which takes the attributes instead.
        return _rebuild, (type(self), self.args, dict(self.__dict__))


def _rebuild(kind: type[FlowStoreError], args: tuple[Any, ...], state: dict[str, Any]) -> FlowStoreError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def strip_driver_exceptions(error: FlowStoreError) -> FlowStoreError:
    """Unchain every exception that is not flowstore's own, and return the same error.

    ``raise ... from None`` only hides a driver's exception from tracebacks: ``__context__`` still refers to
    it, with its rows and passwords. Call this where an error leaves a backend.
    """
    link: BaseException | None = error
    while link is not None:
        if link.__cause__ is not None and not isinstance(link.__cause__, FlowStoreError):
            link.__cause__ = None
        if link.__context__ is not None and not isinstance(link.__context__, FlowStoreError):
            link.__context__ = None
        link = link.__cause__ or link.__context__
    return error


class InvalidArgumentError(FlowStoreError, ValueError):
    """An argument is outside its limits (INP-1 to INP-4); nothing was changed."""

    def __init__(self, argument: str, limit: str, got: str | None = None) -> None:
        self.argument = argument
        self.limit = limit
        super().__init__(f"{argument} must be {limit}" + (f"; got {got}" if got else ""))


class RunNotFoundError(FlowStoreError, LookupError):
    """The operation writes the state of a run that is not stored (UNK)."""

    def __init__(self, run_id: UUID) -> None:
        self.run_id = run_id
        super().__init__(f"run {run_id} does not exist; start it with start_run or trigger_run")


class StepNotFoundError(FlowStoreError, LookupError):
    """The run exists, but the step never started or was reset by retry_step (UNK, STP-6)."""

    def __init__(self, run_id: UUID, step_key: str) -> None:
        self.run_id = run_id
        self.step_key = step_key
        super().__init__(f"step {step_key!r} of run {run_id} has not started; record_step_start starts it")


class ConflictError(FlowStoreError):
    """The state of the run does not allow the operation; nothing was changed."""

    def __init__(self, message: str, *, run_id: UUID, step_key: str | None = None) -> None:
        self.run_id = run_id
        self.step_key = step_key
        super().__init__(message)


class RunAlreadyExistsError(ConflictError):
    """A run with this id is already stored (RUN-1, IDM-3)."""

    def __init__(self, run_id: UUID) -> None:
        super().__init__(f"run {run_id} already exists; use a new id from new_run_id()", run_id=run_id)


class RunCompletedError(ConflictError):
    """The run is terminal, so no step of it can start (RUN-4)."""

    def __init__(self, run_id: UUID, step_key: str | None = None) -> None:
        super().__init__(
            f"run {run_id} is completed; retry_step reopens it", run_id=run_id, step_key=step_key
        )


class RunNotCompletedError(ConflictError):
    """The run is Running, and only a terminal run can be deleted (RET-5)."""

    def __init__(self, run_id: UUID) -> None:
        super().__init__(
            f"run {run_id} is Running, so it cannot be deleted; complete it first, with complete_run",
            run_id=run_id,
        )


class StepAlreadyCompletedError(ConflictError):
    """The step or the attempt is already closed with a different outcome (STP-2, STP-4, STP-5)."""

    def __init__(self, run_id: UUID, step_key: str, attempt: int | None = None) -> None:
        self.attempt = attempt
        which = f"step {step_key!r}" if attempt is None else f"attempt {attempt} of {step_key!r}"
        super().__init__(
            f"{which} of run {run_id} is already completed; retry_step reopens a step",
            run_id=run_id,
            step_key=step_key,
        )


class StaleAttemptError(ConflictError):
    """The attempt is not the last one of its step, or the step has been reopened (STP-4, STP-6)."""

    def __init__(self, run_id: UUID, step_key: str, attempt: int | None, last_attempt: int) -> None:
        self.attempt = attempt
        self.last_attempt = last_attempt
        named = "its last attempt" if attempt is None else f"attempt {attempt}"
        super().__init__(
            f"{named} of step {step_key!r} of run {run_id} is no longer current "
            f"(last started: {last_attempt}); discard this result, a newer attempt decides",
            run_id=run_id,
            step_key=step_key,
        )


class ClaimLostError(ConflictError):
    """The caller does not hold an unexpired claim on the step (STP-3, STP-5)."""

    def __init__(self, run_id: UUID, step_key: str) -> None:
        super().__init__(
            f"the claim on step {step_key!r} of run {run_id} is not yours or has expired; "
            "stop working on it, a different worker decides",
            run_id=run_id,
            step_key=step_key,
        )


class NotSupportedError(FlowStoreError):
    """The backend does not offer this capability; test ``store.capabilities`` first."""

    def __init__(self, backend: str, capability: str, operation: str) -> None:
        self.backend = backend
        self.capability = capability
        self.operation = operation
        super().__init__(
            f"{operation} needs capability {capability}, which backend {backend!r} does not offer; "
            "'flowstore backends' lists what each backend offers"
        )


class LimitExceededError(FlowStoreError):
    """The store cannot hold what the call adds; nothing was changed, and a retry does not help (LIM-2)."""

    def __init__(self, backend: str, limit: str) -> None:
        self.backend = backend
        self.limit = limit
        super().__init__(
            f"backend {backend!r} cannot store this: it holds at most {limit}; "
            "store less in one run, or move to a store with higher limits"
        )


class StoreClosedError(FlowStoreError):
    """The store is closed."""

    def __init__(self) -> None:
        super().__init__("the store is closed; open it again with open_store")


class StoreUnavailableError(FlowStoreError):
    """The database is unreachable or too slow; the operation did not happen (CON-2)."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"the store is unavailable: {reason}")


class OutcomeUnknownError(StoreUnavailableError):
    """The write is unacknowledged and a probe was impossible: it may have happened (CON-3)."""

    def __init__(self, operation: str) -> None:
        self.operation = operation
        super().__init__(
            f"{operation} is unacknowledged and the store could not be probed; "
            "it may or may not have happened, so check the state before you repeat it"
        )


class SchemaVersionError(FlowStoreError):
    """The schema is too old for migrate=False, or newer than this code; it was not changed (CON-6)."""

    def __init__(self, found: int, needed: int, remedy: str) -> None:
        self.found = found
        self.needed = needed
        super().__init__(f"the database has schema version {found}, this code needs {needed}; {remedy}")


class ConfigurationError(FlowStoreError):
    """The URL, an option or a configuration file is wrong; nothing was opened."""


class UnknownBackendError(ConfigurationError):
    """No installed plugin serves the URL's scheme, or two of them claim it."""

    def __init__(self, scheme: str, message: str) -> None:
        self.scheme = scheme
        super().__init__(message)


class BackendLoadError(ConfigurationError):
    """A plugin could not be loaded: it is broken, or a required module is not installed."""

    def __init__(self, plugin: str, reason: str, remedy: str) -> None:
        self.plugin = plugin
        self.remedy = remedy
        super().__init__(f"plugin {plugin!r} cannot be loaded: {reason}; {remedy}")
