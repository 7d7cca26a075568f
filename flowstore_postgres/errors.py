"""The mapping of asyncpg's errors to flowstore's.

PostgreSQL's messages contain keys and row contents, asyncpg's contain arguments. A mapped error therefore
shows only the class, the five-character code and the name of the constraint, and never chains the driver's
error.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from flowstore_core import ConfigurationError, FlowStoreError, LimitExceededError, StoreUnavailableError
from flowstore_core.errors import strip_driver_exceptions
from flowstore_core.instrumentation import Observers
from flowstore_core.urls import ENCODING_RULE

log = logging.getLogger("flowstore_postgres")

# Rolled back by the server; the transaction may be retried (CON-2).
RETRYABLE_SQLSTATES = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
    }
)

DRIVER_ERRORS = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# A wrong URL, or a server whose certificate does not match: a retry does not help.
PERMANENT_ERRORS = (asyncpg.ClientConfigurationError, ssl.SSLCertVerificationError)

# The server cannot be reached now; no statement was sent.
UNREACHABLE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TargetServerAttributeNotMatched,
)

# The connection broke or timed out during a statement, whose outcome is unknown.
CONNECTION_LOST_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
)

ROW_LEVEL_SQLSTATE_CLASSES = frozenset({"22", "23", "54", "P0"})
"""Classes of errors that one row of a batch can cause: a value, a constraint, a limit of the server, a
trigger.

Any other error would occur again in each half of a batch; a locked row would block each half again.
"""

LIMIT_SQLSTATE_CLASS = "54"
"""The class of errors that report a limit of the server, such as the size of an index entry (LIM-2)."""

_REMEDIES: dict[str, tuple[type[FlowStoreError], str]] = {
    "28P01": (
        ConfigurationError,
        f"PostgreSQL refused the password of the URL's user; in the URL, {ENCODING_RULE}",
    ),
    "28000": (ConfigurationError, "PostgreSQL refused the URL's user (see pg_hba.conf)"),
    "3D000": (ConfigurationError, "the URL's database does not exist; create it with createdb"),
    "42501": (
        ConfigurationError,
        "the role lacks a privilege; docs/using-it-in-an-engine.md lists the GRANTs it needs",
    ),
    "3F000": (ConfigurationError, "the schema does not exist; run: flowstore migrate up"),
    "42P01": (ConfigurationError, "a table is missing; run: flowstore migrate up"),
    "25006": (
        StoreUnavailableError,
        "the server, or the role's default_transaction_read_only, allows no writes; "
        "name target_session_attrs=read-write, or run: flowstore doctor",
    ),
    "53100": (StoreUnavailableError, "the server's disk is full"),
    "53200": (StoreUnavailableError, "the server is out of memory"),
    "57014": (StoreUnavailableError, "a statement ran longer than statement_timeout"),
}


CONNECTION_LOST = "connection_lost"
"""The reason of a retry: a connection broke, timed out, or could not be made."""


class RetryableError(Exception):
    """The operation is known not to have happened and may be retried; internal to this package."""

    def __init__(self, error: FlowStoreError, *, resolvable_at: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.resolvable_at = resolvable_at
        """The event loop's time from which a retry can resolve the outcome; None if unknown."""


def describe(error: BaseException) -> FlowStoreError:
    """Map a driver's error to a flowstore error without secrets or contents."""
    code = getattr(error, "sqlstate", None)
    if isinstance(error, asyncpg.PostgresError) and code:
        if code.startswith(LIMIT_SQLSTATE_CLASS):
            refused = LimitExceededError("postgresql", f"what the server allows ({name_error(error)})")
            refused.database_code = code
            return refused
        kind, text = _REMEDIES.get(code, (StoreUnavailableError, "PostgreSQL refused the statement"))
        text = f"{text} ({name_error(error)})"
        found = StoreUnavailableError(text) if kind is StoreUnavailableError else kind(text)
        found.database_code = code
        return found
    if isinstance(error, asyncpg.ClientConfigurationError):
        return invalid_url()
    if isinstance(error, ssl.SSLCertVerificationError):
        # Its text describes only the certificate.
        return ConfigurationError(
            f"the server's certificate is not trusted: {error.verify_message}; set sslrootcert to the root "
            "that signed it, and use the host name of the certificate"
        )
    if isinstance(error, TimeoutError):
        return StoreUnavailableError("PostgreSQL did not answer in time")
    if isinstance(error, ssl.SSLError):
        return StoreUnavailableError(
            f"no TLS connection with PostgreSQL ({type(error).__name__}, {error.reason})"
        )
    if isinstance(error, ConnectionError) and "rejected SSL" in str(error):
        return StoreUnavailableError(
            "PostgreSQL offers no TLS, and sslmode requires it; set ssl = on in the server's postgresql.conf"
        )
    if isinstance(error, OSError):
        return StoreUnavailableError(f"PostgreSQL cannot be reached ({type(error).__name__})")
    return StoreUnavailableError(f"the PostgreSQL driver failed ({type(error).__name__})")


def name_error(error: BaseException) -> str:
    """The class of a driver's error, its SQLSTATE and its constraint, without its text."""
    words = [type(error).__name__]
    if code := getattr(error, "sqlstate", None):
        words.append(f"SQLSTATE {code}")
    if constraint := getattr(error, "constraint_name", None):
        words.append(f"constraint {constraint}")
    return ", ".join(words)


def report_retry(
    observers: Observers, operation: str, tries: int, error: FlowStoreError, wait: float
) -> None:
    """Log and report a retry.

    The first retry of a call is a warning, unless its reason is a conflict between transactions, which is
    normal.
    """
    code = error.database_code
    # The driver reports broken connections with a code of class 08.
    reason = CONNECTION_LOST if code is None or code.startswith("08") else code
    log.log(
        logging.WARNING if tries == 1 and code not in RETRYABLE_SQLSTATES else logging.DEBUG,
        "%s: try %d failed (%s); the next in %.3f s",
        operation,
        tries,
        reason,
        wait,
        extra={
            "flowstore.operation": operation,
            "flowstore.attempt": tries,
            "flowstore.reason": reason,
            "flowstore.sqlstate": code,
            "flowstore.wait_seconds": wait,
        },
    )
    if observers:
        observers.retried(operation, reason, wait)


def invalid_url() -> ConfigurationError:
    """An error without the URL; the driver's message would quote it, password included."""
    return ConfigurationError(
        "the PostgreSQL driver cannot read the URL or one of its options; it must look like "
        f"postgresql://user:password@host:5432/database?sslmode=require; {ENCODING_RULE}"
    )


@contextmanager
def map_errors() -> Iterator[None]:
    """Map the errors that the driver raises while connecting; CancelledError passes."""
    try:
        yield
    except FlowStoreError as error:
        strip_driver_exceptions(error)
        raise
    except (*DRIVER_ERRORS, ValueError) as error:
        log.debug(
            "the driver raised %s",
            name_error(error),
            extra={
                "flowstore.error_type": type(error).__name__,
                "flowstore.sqlstate": getattr(error, "sqlstate", None),
            },
        )
        failure = describe(error) if isinstance(error, DRIVER_ERRORS) else invalid_url()
        try:
            raise failure from None
        finally:
            # Python chains the driver's error despite `from None`.
            strip_driver_exceptions(failure)
