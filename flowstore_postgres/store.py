"""The PostgreSQL store, composed of its nouns."""

from __future__ import annotations

import asyncio

from flowstore_postgres.claim_bounds import ClaimBounds
from flowstore_postgres.claims import Claims
from flowstore_postgres.controls import Controls
from flowstore_postgres.database import Database
from flowstore_postgres.events import Events
from flowstore_postgres.outputs import Outputs
from flowstore_postgres.pages import Pages
from flowstore_postgres.queues import CONCURRENT_CLAIMS, Queues
from flowstore_postgres.retention import Retention
from flowstore_postgres.retries import Retries
from flowstore_postgres.runs import Runs
from flowstore_postgres.signals import Signals
from flowstore_postgres.stalled import StalledSteps
from flowstore_postgres.starts import Starts
from flowstore_postgres.statistics import Statistics
from flowstore_postgres.steps import Steps
from flowstore_postgres.tags import Tags
from flowstore_postgres.transfer import Transfer


class PostgresStore(
    Runs,
    Pages,
    Tags,
    Steps,
    Retries,
    StalledSteps,
    Claims,
    Starts,
    Queues,
    Controls,
    Signals,
    Outputs,
    Events,
    Transfer,
    Retention,
    Statistics,
):
    """The store. The file of each noun holds its statements and the methods that execute them."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._free_numbers = []
        self._claiming = asyncio.Semaphore(CONCURRENT_CLAIMS)
        self._claim_bounds = ClaimBounds()

    async def ping(self) -> None:
        await self._database.ping()
