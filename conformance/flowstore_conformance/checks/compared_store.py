"""A store beside the model, for checks of many calls whose results the model knows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive
from flowstore_conformance.differential import describe_mismatch, expected_outcome, guess_clause
from flowstore_conformance.diffing import brief, shorten
from flowstore_conformance.execution import execute, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, Outcome
from flowstore_conformance.model import Model

MAX_CONCURRENT = 50
"""Number of concurrent calls that prepare a state."""


@dataclass
class ComparedStore:
    """Makes every call on the context's store and on the model, and compares the outcomes.

    Without a virtual clock times are not compared. The model knows only the runs of these calls, so queries
    of all runs need a namespace without others.
    """

    context: CheckContext
    model: Model
    stage: str = "at first"
    """What happened before the next calls; the beginning of a failure's message."""

    @staticmethod
    def of(context: CheckContext) -> ComparedStore:
        clock = context.clock or (lambda: datetime.now(UTC))
        return ComparedStore(context, Model(clock))

    async def call(self, method: str, **arguments: Any) -> None:
        """Make one call."""
        await self.make([Call(method=method, arguments=arguments)])

    async def make(self, calls: Sequence[Call]) -> None:
        """Make calls, one after another."""
        for call in calls:
            self._compare(call, await self._execute(call))
            # A store may answer without suspending; the watchdog expects that other tasks run.
            await asyncio.sleep(0)

    async def make_concurrently(self, calls: Sequence[Call]) -> None:
        """Make calls whose outcomes do not depend on their order."""
        for at in range(0, len(calls), MAX_CONCURRENT):
            some = calls[at : at + MAX_CONCURRENT]
            outcomes = await asyncio.gather(*(self._execute(call) for call in some))
            for call, outcome in zip(some, outcomes, strict=True):
                self._compare(call, outcome)

    async def _execute(self, call: Call) -> Outcome:
        return await execute(self.context.store, call, exact_times=self.context.exact_times)

    def _compare(self, call: Call, actual: Outcome) -> None:
        self.context.assertions += 1
        if actual is UNKNOWN or is_unavailable(actual):
            raise Inconclusive(f"{call.method} was unavailable although only this check uses the namespace")
        expected = expected_outcome(self.model, call, exact_times=self.context.exact_times)
        if actual != expected:
            made = brief(shorten(call.source()).removeprefix("store."))
            message = f"{self.stage}, {describe_mismatch(made, expected, actual)}"
            raise ContractViolation(message, clause=guess_clause(call, expected, actual))
