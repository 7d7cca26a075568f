"""What spans and metrics tell of a store, by the semantic conventions for databases.

Nothing of it is a secret or the content of a row: the URL is read without its user, password and query.
"""

from __future__ import annotations

from flowstore_core import FlowStoreError, StoreConfig

SYSTEM = "db.system.name"
NAMESPACE = "db.namespace"
OPERATION = "db.operation.name"
COLLECTION = "db.collection.name"
ADDRESS = "server.address"
PORT = "server.port"
STATUS_CODE = "db.response.status_code"
ERROR_TYPE = "error.type"

RUN_ID = "flowstore.run_id"
REASON = "flowstore.reason"
RESOLUTION = "flowstore.resolution"

Attributes = dict[str, str | int]

POSTGRESQL_PORT = 5432


def describe_store(config: StoreConfig) -> Attributes:
    """The attributes that all of a store's spans and metrics have."""
    if config.scheme in ("postgresql", "postgres"):
        return _describe_postgresql(config)
    found: Attributes = {SYSTEM: config.scheme}
    if config.scheme == "sqlite":
        # A file name may have bytes that are not UTF-8; exporters accept UTF-8 alone.
        found[NAMESPACE] = config.parts.path.encode(errors="replace").decode()
    return found


def _describe_postgresql(config: StoreConfig) -> Attributes:
    found: Attributes = {SYSTEM: "postgresql"}
    options = config.options
    parts = config.parts
    database = options.get("dbname") or options.get("database") or parts.path
    schema = options.get("schema") or "flowstore"
    found[NAMESPACE] = f"{database}|{schema}" if database else str(schema)
    host, _, port = parts.hosts.partition(":")
    host, port = str(options.get("host") or host), str(options.get("port") or port)
    # Of several hosts, which one it is shows only once connected.
    if host and "," not in host and not host.startswith("["):
        found[ADDRESS] = host
        if port.isdecimal() and int(port) != POSTGRESQL_PORT:
            found[PORT] = int(port)
    return found


def describe_error(error: BaseException) -> Attributes:
    """What spans and metrics tell of a call that failed: its kind and the database's code, no message."""
    found: Attributes = {ERROR_TYPE: type(error).__name__}
    if isinstance(error, FlowStoreError) and error.database_code:
        found[STATUS_CODE] = error.database_code
    return found
