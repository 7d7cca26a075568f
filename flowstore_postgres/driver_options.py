"""The options of URLs that are passed to asyncpg. Imports no driver, so that the plugin loads without one."""

from __future__ import annotations

# Options of libpq's URLs that asyncpg understands. TLS options are passed on unchanged (see docs).
DRIVER_OPTIONS = frozenset(
    {
        "application_name",
        "database",
        "dbname",
        "gsslib",
        "host",
        "krbsrvname",
        "passfile",
        "password",
        "port",
        "service",
        "servicefile",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcrl",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslpassword",
        "sslrootcert",
        "target_session_attrs",
        "user",
    }
)
DRIVER_CHOICES = {
    "gsslib": ("gssapi", "sspi"),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
}
"""The values of the options that accept a fixed set of words."""
DRIVER_VARIABLES = {
    "PGDATABASE": "database",
    "PGHOST": "host",
    "PGPASSFILE": "passfile",
    "PGPASSWORD": "password",
    "PGSERVICE": "service",
    "PGUSER": "user",
}
"""The driver's environment variables, with the option that overrides each."""
