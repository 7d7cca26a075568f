"""The session settings that statements rely on, whatever the server, the database or the role defaults to."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flowstore_core import ConfigurationError

log = logging.getLogger("flowstore_postgres")

PINNED: Mapping[str, str] = {
    # Under a stricter level contended statements fail, and the counters are never folded.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # A wait for a lock ends with statement_timeout.
    "lock_timeout": "0",
    # Searches by index would leave out runs.
    "gin_fuzzy_search_limit": "0",
    # An error of one statement would cost the connection.
    "exit_on_error": "off",
    # What literals and conversions to text mean.
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    # Statements find rows by key: these decide their cost.
    "enable_indexscan": "on",
    "enable_nestloop": "on",
    "plan_cache_mode": "auto",
    "jit": "off",
    # Another access method may lack what the tables need.
    "default_table_access_method": "heap",
    # All that is ours is named with its schema. Whatever others have made elsewhere, an operator
    # or a function in schema public say, is never taken for the server's own.
    "search_path": "pg_catalog, pg_temp",
}
"""What a connection asks for when it is made; a transaction pooler refuses that."""

# What a connection cannot ask for when it is made. Not every server knows the time-outs, and a stronger
# synchronous_commit stays as it is (CON-5).
PIN_MORE = """
ARRAY[CASE WHEN current_setting('idle_session_timeout', true) IS NOT NULL
           THEN set_config('idle_session_timeout', '0', false) END,
      CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
           THEN set_config('transaction_timeout', '0', false) END] AS time_outs,
CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false)
     ELSE current_setting('synchronous_commit') END AS synchronous_commit,
current_setting('session_replication_role') AS session_replication_role
"""

WATCHED = ("default_transaction_isolation", "lock_timeout", "gin_fuzzy_search_limit")
"""Of the pinned settings, those that make calls slow or incomplete where a pooler keeps the role's value."""

REFUSED = {
    "session_replication_role": (
        "replica",
        "origin",
        "triggers do not run, so counts and pages would be wrong from then on",
    ),
    "synchronous_commit": (
        "off",
        "on",
        "a crash of the server would lose writes that were acknowledged",
    ),
}
"""What a store refuses: the value, a right one, and what would follow."""
READ_DEFAULTS = ", ".join(f"current_setting('{name}') AS {name}" for name in (*WATCHED, *REFUSED))


def check_session(row: Mapping[str, str]) -> None:
    """Refuse a session in which the contract cannot be kept.

    Raises ConfigurationError.
    """
    for name, (refused, right, consequence) in REFUSED.items():
        if row[name] == refused:
            raise ConfigurationError(
                f"{name} is {refused} in this session, and flowstore cannot change it: {consequence}; "
                f"change the default where it was set, as with ALTER ROLE ... SET {name} = {right}"
            )


def warn_of_defaults(defaults: Mapping[str, str]) -> None:
    """Log what makes calls slow or incomplete, and cannot be set behind a pooler."""
    harmful = [f"{name} = {value}" for name, value in defaults.items() if value != PINNED[name]]
    if harmful:
        log.warning(
            "behind a pooler the role's defaults apply, and some do harm: %s; set them for the role with "
            "ALTER ROLE ... SET (flowstore doctor says how)",
            ", ".join(harmful),
        )
