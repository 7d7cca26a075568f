"""The store, composed of one class per noun.

An operation that is not written yet does not exist: core refuses it with NotSupportedError, and the report
of the suite lists it with its signature and its clauses. Copy its typed signature from the Protocol in
``flowstore_core``, whose docstring is the promise.
"""

from __future__ import annotations

from uuid import UUID

from flowstore_core import FlowSignalWaiter

from flowstore_yourdb.claims import Claims
from flowstore_yourdb.controls import Controls
from flowstore_yourdb.runs import Runs
from flowstore_yourdb.steps import Steps


class YourdbStore(Runs, Steps, Claims, Controls):
    """The beginning of the base protocols."""

    async def ping(self) -> None:
        """Succeeds: there is no server to reach yet."""

    async def aclose(self) -> None:
        """Has no resources to release yet."""

    async def get_waiter(self, run_id: UUID, step_key: str) -> FlowSignalWaiter | None:
        # Until register_waiter exists, no step has a waiter. Move it to signals.py then.
        return None
