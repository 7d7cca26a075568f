"""The session settings that the statements rely on; they override defaults of server, database and role."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flowstore_core import ConfigurationError

log = logging.getLogger("flowstore_postgres")

PINNED: Mapping[str, str] = {
    # At a stricter level contended statements fail, and the counters are never folded.
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "default_transaction_deferrable": "off",
    # statement_timeout ends a wait for a lock.
    "lock_timeout": "0",
    # Otherwise searches by index would omit runs.
    "gin_fuzzy_search_limit": "0",
    # Otherwise an error of one statement would close the connection.
    "exit_on_error": "off",
    # These define the meaning of literals and of conversions to text.
    "TimeZone": "UTC",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "array_nulls": "on",
    "standard_conforming_strings": "on",
    "transform_null_equals": "off",
    # The statements find rows by key; these settings decide their cost.
    "enable_indexscan": "on",
    "enable_nestloop": "on",
    "plan_cache_mode": "auto",
    "jit": "off",
    # Another access method may lack features that the tables need.
    "default_table_access_method": "heap",
    # The statements qualify every name of flowstore. An operator or a function in another schema, such as
    # public, must not shadow the server's own.
    "search_path": "pg_catalog, pg_temp",
}
"""Sent in the startup packet of a connection; a transaction pooler refuses that."""

# Settings that the startup packet cannot pin: not every server has the timeouts, and a stronger
# synchronous_commit must be kept (CON-5).
PIN_MORE = """
ARRAY[CASE WHEN current_setting('idle_session_timeout', true) IS NOT NULL
           THEN set_config('idle_session_timeout', '0', false) END,
      CASE WHEN current_setting('transaction_timeout', true) IS NOT NULL
           THEN set_config('transaction_timeout', '0', false) END] AS timeouts,
CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false)
     ELSE current_setting('synchronous_commit') END AS synchronous_commit,
current_setting('session_replication_role') AS session_replication_role
"""

WATCHED = ("default_transaction_isolation", "lock_timeout", "gin_fuzzy_search_limit")
"""The pinned settings whose role default, behind a pooler, can make calls slow or results incomplete."""

REFUSED_VALUES = {
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
"""By setting: the refused value, a correct one, and the consequence of the refused one."""
READ_DEFAULTS = ", ".join(f"current_setting('{name}') AS {name}" for name in (*WATCHED, *REFUSED_VALUES))


def check_session(row: Mapping[str, str]) -> None:
    """Raise ConfigurationError for a session that cannot keep the contract."""
    for name, (refused, right, consequence) in REFUSED_VALUES.items():
        if row[name] == refused:
            raise ConfigurationError(
                f"{name} is {refused} in this session, and flowstore cannot change it: {consequence}; "
                f"change the default where it was set, as with ALTER ROLE ... SET {name} = {right}"
            )


def warn_of_defaults(defaults: Mapping[str, str]) -> None:
    """Log the harmful defaults that cannot be overridden behind a pooler."""
    harmful = [f"{name} = {value}" for name, value in defaults.items() if value != PINNED[name]]
    if harmful:
        log.warning(
            "behind a pooler the role's defaults apply, and some are harmful: %s; set them for the role with "
            "ALTER ROLE ... SET (flowstore doctor prints the commands)",
            ", ".join(harmful),
        )
