"""The settings of a store, read from its URL and options."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any
from urllib.parse import quote, urlencode

import asyncpg

from flowstore_core import ConfigurationError, StoreConfig
from flowstore_core.urls import has_control_characters
from flowstore_postgres.driver_options import DRIVER_CHOICES, DRIVER_OPTIONS, DRIVER_VARIABLES
from flowstore_postgres.failover import Host, HostSelector, read_hosts, read_ports
from flowstore_postgres.session_settings import PINNED

DEFAULT_SCHEMA = "flowstore"
_SCHEMA_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f$\u2028\u2029\ud800-\udfff]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of a store; times are in seconds."""

    schema: str
    pool_size: int
    acquire_timeout: float
    statement_timeout: float
    retry_timeout: float
    pgbouncer: bool
    hosts: HostSelector = field(repr=False)
    connect_arguments: dict[str, Any] = field(repr=False)
    """The arguments of ``hosts.connect``."""

    @property
    def quoted_schema(self) -> str:
        return quote_identifier(self.schema)

    @property
    def client_timeout(self) -> float:
        """A little longer than statement_timeout, so that the server's more specific error arrives first."""
        return self.statement_timeout + 0.5


def read_settings(config: StoreConfig) -> Settings:
    """Validate the options and convert libpq's to arguments of the driver.

    Raises ConfigurationError.
    """
    _check_tls_files(config)
    hosts = read_hosts(config.url, config.options)
    statement_timeout = config.seconds("statement_timeout", 30.0, 0.1, 3600.0)
    pgbouncer = config.flag("pgbouncer", False)
    arguments: dict[str, Any] = {
        **_driver_arguments(config, hosts),
        "timeout": config.seconds("connect_timeout", 10.0, 0.1, 600.0),
    }
    if len(hosts) > 1 and "target_session_attrs" not in config.options:
        # One of them accepts writes; the others are its standbys, whose data is out of date.
        arguments["target_session_attrs"] = os.environ.get("PGTARGETSESSIONATTRS") or "read-write"
    if pgbouncer:
        # In transaction mode the statements of one session reach different server processes.
        arguments["statement_cache_size"] = 0
    else:
        milliseconds = str(int(statement_timeout * 1000))
        arguments["server_settings"] = {
            "application_name": str(config.options.get("application_name", "flowstore")),
            "statement_timeout": milliseconds,
            # Limits how long a transaction of a vanished client can hold its locks.
            "idle_in_transaction_session_timeout": milliseconds,
            **PINNED,
        }
    return Settings(
        schema=_check_schema_name(config.text("schema", DEFAULT_SCHEMA)),
        pool_size=config.integer("pool_size", 5, 1, 1000),
        acquire_timeout=config.seconds("acquire_timeout", 10.0, 0.01, 600.0),
        statement_timeout=statement_timeout,
        retry_timeout=config.seconds("retry_timeout", 15.0, 0.0, 3600.0),
        pgbouncer=pgbouncer,
        hosts=HostSelector(hosts),
        connect_arguments=arguments,
    )


def _driver_arguments(config: StoreConfig, hosts: Sequence[Host]) -> dict[str, Any]:
    """The driver's arguments; an option overrides the same part of the URL.

    The driver never parses the user's URL: it gets decoded parts. Options without an argument of the driver,
    such as those for TLS, go into the query of a new URL.
    """
    url = config.parts
    given = {k: str(v) for k, v in config.options.items() if k in DRIVER_OPTIONS - {"application_name"}}
    given.update(
        {name: config.choice(name, "", DRIVER_CHOICES[name]) for name in DRIVER_CHOICES.keys() & given}
    )
    user, password, database, dbname, _, port, servicefile = (
        given.pop(name, "")
        for name in ("user", "password", "database", "dbname", "host", "port", "servicefile")
    )
    arguments: dict[str, Any] = {
        "user": user or url.user,
        "password": password or url.password,
        "database": dbname or database or url.path,
        "servicefile": servicefile,
    }
    if (servicefile or "service" in given) and "servicefile" not in signature(asyncpg.connect).parameters:
        raise ConfigurationError("options service and servicefile need asyncpg 0.31 or newer")
    _check_texts({**given, **arguments, "host": ",".join(host for host, _ in hosts)})
    # Hosts carry their ports.
    arguments["port"] = read_ports(port) if not hosts else None
    query = urlencode(given, quote_via=quote, errors="surrogatepass")
    return {"dsn": f"postgresql://?{query}", **{name: value for name, value in arguments.items() if value}}


def _check_texts(given: Mapping[str, str]) -> None:
    """Refuse control characters, such as the line end of a mounted secret."""
    for name, value in given.items():
        if has_control_characters(value):
            raise ConfigurationError(f"option {name} must not contain control characters, such as a line end")
    for variable, name in DRIVER_VARIABLES.items():
        if not given.get(name) and has_control_characters(os.environ.get(variable, "")):
            raise ConfigurationError(
                f"environment variable {variable} must not contain control characters, such as a line end"
            )


def _check_tls_files(config: StoreConfig) -> None:
    """Name the TLS file that cannot be read; the driver's error would not."""
    for option in ("sslrootcert", "sslcert", "sslkey", "sslcrl"):
        for origin, name in (
            (f"option {option}", config.options.get(option)),
            (f"PG{option.upper()}", os.environ.get(f"PG{option.upper()}")),
        ):
            if not isinstance(name, str) or not name or (option == "sslrootcert" and name == "system"):
                continue
            problem = None
            try:
                with open(name, "rb"):
                    pass
            except (OSError, ValueError) as error:
                problem = getattr(error, "strerror", None) or "not a file name"
            if problem:
                raise ConfigurationError(f"the file that {origin} names cannot be read: {problem}")
            break


def _check_schema_name(name: str) -> str:
    # No dollar sign, although quoting would allow it: the schema's functions are written between dollar
    # signs.
    size = len(name.encode(errors="surrogatepass"))
    if (
        size > 63
        or name.startswith("pg_")
        or name == "information_schema"
        or not _SCHEMA_NAME.fullmatch(name)
    ):
        raise ConfigurationError(
            "option schema must have 1 to 63 bytes of UTF-8, no control characters, no dollar sign, and not "
            "be one of the server's own (pg_..., information_schema)"
        )
    return name


def quote_identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
