"""The store, composed of one class per noun, and how a plugin opens it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flowstore_core import Capability, StoreConfig
from flowstore_documents.claims import Claims
from flowstore_documents.committer import Committer
from flowstore_documents.controls import Controls
from flowstore_documents.events import Events
from flowstore_documents.intents import Intents
from flowstore_documents.outputs import Outputs
from flowstore_documents.queues import Queues
from flowstore_documents.recovery import Recovery
from flowstore_documents.retention import Retention
from flowstore_documents.runs import Runs
from flowstore_documents.signals import Signals
from flowstore_documents.space import KeyValueSpace
from flowstore_documents.statistics import Statistics
from flowstore_documents.steps import Steps
from flowstore_documents.tags import Tags
from flowstore_documents.transactions import Transactions
from flowstore_documents.transfer import Transfer
from flowstore_documents.watching import Watch

OPTIONS = frozenset({"retry_timeout"})
"""The options that ``open_documents`` reads; a plugin adds its own."""
CLOSE_SECONDS = 10.0
"""How long closing waits for calls whose callers were cancelled."""

CAPABILITIES = frozenset(
    {
        Capability.TAGS,
        Capability.LEASES,
        Capability.TRIGGER,
        Capability.RECOVERY,
        Capability.DEADLINES,
        Capability.WAITERS,
        Capability.MAILBOX,
        Capability.EVENTS,
        Capability.OUTPUTS,
        Capability.DASHBOARD,
        Capability.QUEUES,
        Capability.WATCH,
        Capability.DELETION,
        Capability.TRANSFER,
        Capability.VIRTUAL_CLOCK,
    }
)
"""What the toolkit implements."""


def capabilities_of(*, snapshots: bool, watch: bool = True) -> frozenset[Capability]:
    """The capabilities of a store on a space; the plugin adds DURABLE and MULTI_PROCESS if they hold.

    The pages and counts of DASHBOARD are of one state, which needs snapshots.
    """
    lacking = set()
    if not snapshots:
        lacking.add(Capability.DASHBOARD)
    if not watch:
        lacking.add(Capability.WATCH)
    return CAPABILITIES - lacking


class DocumentStore(
    Runs,
    Tags,
    Steps,
    Recovery,
    Claims,
    Queues,
    Watch,
    Controls,
    Signals,
    Outputs,
    Events,
    Retention,
    Statistics,
    Transfer,
):
    """Implements flowstore_core.FlowStore on a space."""

    def __init__(
        self,
        space: KeyValueSpace,
        transactions: Transactions,
        committer: Committer,
        backend: str,
        capabilities: frozenset[Capability],
    ) -> None:
        super().__init__(space, transactions)
        self.backend = backend
        self.capabilities = capabilities
        self._committer = committer
        transactions.roll_forward = Intents(transactions, committer, self._shielded).roll_forward

    async def ping(self) -> None:
        await self._read("ping", lambda tx: tx.read([b"ping"], expect=False))

    async def aclose(self) -> None:
        await self._stop_watching()
        await self._shielded.drain(CLOSE_SECONDS)
        await self._transactions.aclose()
        await self._committer.aclose()
        await self._space.aclose()


@asynccontextmanager
async def open_documents(
    space: KeyValueSpace, config: StoreConfig, *, backend: str, capabilities: frozenset[Capability]
) -> AsyncIterator[DocumentStore]:
    """Open a store on a space, for ``Backend.open``; leaving the context closes both."""
    retry_seconds = config.seconds("retry_timeout", 30.0, low=0.1, high=3600.0)
    committer = Committer(space, retry_seconds, config.observers, backend)
    transactions = Transactions(space, committer, config.clock)
    store = DocumentStore(space, transactions, committer, backend, capabilities)
    try:
        yield store
    finally:
        await store.aclose()
