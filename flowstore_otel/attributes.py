"""The attributes of spans and metrics, after the semantic conventions for databases.

No attribute contains a secret or the content of a row: user, password and query of the URL are left out.
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
QUEUE = "flowstore.queue"
STATE = "flowstore.state"

Attributes = dict[str, str | int]

POSTGRESQL_PORT = 5432


def describe_store(config: StoreConfig) -> Attributes:
    """The attributes of all spans and metrics of a store."""
    if config.scheme in ("postgresql", "postgres"):
        return _describe_postgresql(config)
    found: Attributes = {SYSTEM: config.scheme}
    if config.scheme == "sqlite":
        # A file name may contain bytes that are not UTF-8, which exporters reject.
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
    # With several hosts the server is unknown until the store is connected.
    if host and "," not in host and not host.startswith("["):
        found[ADDRESS] = host
        if port.isdecimal() and int(port) != POSTGRESQL_PORT:
            found[PORT] = int(port)
    return found


def describe_error(error: BaseException) -> Attributes:
    """The attributes of a failed call: error type and database code, but no message."""
    found: Attributes = {ERROR_TYPE: type(error).__name__}
    if isinstance(error, FlowStoreError) and error.database_code:
        found[STATUS_CODE] = error.database_code
    return found
