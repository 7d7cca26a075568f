"""One seam between asyncpg's errors and flowstore's own.

PostgreSQL's messages carry keys and row contents, asyncpg's carry arguments, so nothing of them but
the class, the five-character code and the constraint's name ever reaches a message, and none is chained.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import asyncpg

from flowstore_core import ConfigurationError, FlowStoreError, StoreUnavailableError
from flowstore_core.errors import strip_driver_exceptions
from flowstore_core.instrumentation import Observers
from flowstore_core.urls import ENCODING_RULE

log = logging.getLogger("flowstore_postgres")

# A transaction that ended with one of these was rolled back, and may be run again (CON-2).
ROLLED_BACK = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
    }
)

DRIVER = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)

# A wrong URL, and a server that is not who it should be: trying again does not help.
FINAL = (asyncpg.ClientConfigurationError, ssl.SSLCertVerificationError)

# The server cannot be reached now; nothing was sent.
UNREACHABLE = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TooManyConnectionsError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TargetServerAttributeNotMatched,
)

# The connection broke, or time ran out, with a statement under way: it may or may not have happened.
LOST = (
    OSError,
    TimeoutError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
)

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
"""The reason of a retry: a connection broke, was silent, or could not be had."""


class Retry(Exception):  # noqa: N818 - a signal within this package, not an error
    """The operation is known not to have happened; it may be tried again."""

    def __init__(self, error: FlowStoreError, *, fence: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.fence = fence
        """The event loop's time from which on a retry is certain to make progress; None if unknown."""


def describe(error: BaseException) -> FlowStoreError:
    """An error of our own that tells what may be told."""
    code = getattr(error, "sqlstate", None)
    if isinstance(error, asyncpg.PostgresError) and code:
        kind, text = _REMEDIES.get(code, (StoreUnavailableError, "PostgreSQL refused the statement"))
        text = f"{text} ({name_error(error)})"
        found = StoreUnavailableError(text) if kind is StoreUnavailableError else kind(text)
        found.database_code = code
        return found
    if isinstance(error, asyncpg.ClientConfigurationError):
        return unreadable_url()
    if isinstance(error, ssl.SSLCertVerificationError):
        # Its text tells of the certificate alone.
        return ConfigurationError(
            f"the server's certificate is not to be trusted: {error.verify_message}; name the root that "
            "signed it with sslrootcert, and the host as the certificate does"
        )
    if isinstance(error, TimeoutError):
        return StoreUnavailableError("PostgreSQL did not answer in time")
    if isinstance(error, ssl.SSLError):
        return StoreUnavailableError(
            f"no TLS connection with PostgreSQL ({type(error).__name__}, {error.reason})"
        )
    if isinstance(error, ConnectionError) and "rejected SSL" in str(error):
        return StoreUnavailableError("PostgreSQL offers no TLS, which sslmode asks for; turn ssl on there")
    if isinstance(error, OSError):
        return StoreUnavailableError(f"PostgreSQL cannot be reached ({type(error).__name__})")
    return StoreUnavailableError(f"the PostgreSQL driver failed ({type(error).__name__})")


def name_error(error: BaseException) -> str:
    """The class of a driver's error and what names it further; nothing of its text."""
    words = [type(error).__name__]
    if code := getattr(error, "sqlstate", None):
        words.append(f"SQLSTATE {code}")
    if constraint := getattr(error, "constraint_name", None):
        words.append(f"constraint {constraint}")
    return ", ".join(words)


def report_retry(
    observers: Observers, operation: str, tries: int, error: FlowStoreError, wait: float
) -> None:
    """Say that what did not happen is tried again.

    Warned of once for each call, and not of conflicts between transactions, which are everyday.
    """
    code = error.database_code
    # The driver's own word for a connection that broke is a code of class 08.
    reason = CONNECTION_LOST if code is None or code.startswith("08") else code
    log.log(
        logging.WARNING if tries == 1 and code not in ROLLED_BACK else logging.DEBUG,
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


def unreadable_url() -> ConfigurationError:
    """The driver's own message would quote the URL, password included."""
    return ConfigurationError(
        "the PostgreSQL driver cannot read the URL or one of its options; it must look like "
        f"postgresql://user:password@host:5432/database?sslmode=require; {ENCODING_RULE}"
    )


@contextmanager
def map_errors() -> Iterator[None]:
    """Turn what the driver raises on connecting into an error of our own; CancelledError passes."""
    try:
        yield
    except FlowStoreError as error:
        strip_driver_exceptions(error)
        raise
    except (*DRIVER, ValueError) as error:
        log.debug(
            "the driver raised %s",
            name_error(error),
            extra={
                "flowstore.error_type": type(error).__name__,
                "flowstore.sqlstate": getattr(error, "sqlstate", None),
            },
        )
        failure = describe(error) if isinstance(error, DRIVER) else unreadable_url()
        try:
            raise failure from None
        finally:
            # Python has chained the driver's error all the same.
            strip_driver_exceptions(failure)
