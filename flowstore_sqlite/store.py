"""The SQLite store, composed of its nouns."""

from __future__ import annotations

import sqlite3

from flowstore_core import Capability
from flowstore_sqlite.claims import Claims
from flowstore_sqlite.controls import Controls
from flowstore_sqlite.database import Database
from flowstore_sqlite.events import Events
from flowstore_sqlite.outputs import Outputs
from flowstore_sqlite.pages import Pages
from flowstore_sqlite.queues import Queues
from flowstore_sqlite.recovery import Recovery
from flowstore_sqlite.retention import Retention
from flowstore_sqlite.retries import Retries
from flowstore_sqlite.runs import Runs
from flowstore_sqlite.signals import Signals
from flowstore_sqlite.stalled import StalledSteps
from flowstore_sqlite.statistics import Statistics
from flowstore_sqlite.steps import Steps
from flowstore_sqlite.tags import Tags
from flowstore_sqlite.transfer import Transfer
from flowstore_sqlite.watching import CommitWatcher, Watch

PING = "SELECT COUNT(*) FROM flowstore_schema"


class SqliteStore(
    Runs,
    Pages,
    Tags,
    Steps,
    Retries,
    Recovery,
    StalledSteps,
    Claims,
    Queues,
    Watch,
    Controls,
    Signals,
    Outputs,
    Events,
    Transfer,
    Retention,
    Statistics,
):
    """Implements flowstore_core.FlowStore. Each call is one transaction on a connection's thread."""

    capabilities = frozenset(Capability) - {Capability.SHARED_CLOCK}

    def __init__(self, database: Database, commits: CommitWatcher) -> None:
        self._database = database
        self._commits = commits

    async def ping(self) -> None:
        """Read from the file. Like every call, it fails after the file was removed or replaced."""
        await self._database.read(_ping)


class NonDurableSqliteStore(SqliteStore):
    """A store with synchronous=NORMAL: a power failure may lose acknowledged writes."""

    capabilities = SqliteStore.capabilities - {Capability.DURABLE}


def _ping(db: sqlite3.Connection) -> None:
    db.execute(PING).fetchone()
