"""The replies to claim_next_steps are lost after the commit (QUE-3).

A call that the store repeats claims nothing more. A call of unknown outcome leaves claims that nobody knows;
their steps come back at the end of the leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.context import VirtualClock

from flowstore_chaos.context import RunContext
from flowstore_chaos.counts import Counts
from flowstore_chaos.proxy import Fault, MessageMatch, Proxy, proxy_before_port
from flowstore_chaos.scenario import FaultScenario
from flowstore_chaos.scenarios.replies_lost import BlindRetryMutant
from flowstore_core import (
    ClaimedStep,
    ConflictError,
    FlowStore,
    OutcomeUnknownError,
    RunStatus,
    StepRequest,
    StepStatus,
    new_run_id,
    open_store,
)

FLOW = UUID(int=20)
STEPS = 6
CALLERS = 4
LIMIT = 2
LEASE = timedelta(minutes=1)


async def run(context: RunContext) -> None:
    clock = VirtualClock()
    # No server crashes in this scenario, so fsync is off.
    async with context.server({"fsync": "off"}) as server, proxy_before_port(server.port) as proxy:
        through = server.url(port=proxy.port, schema="chaos")
        async with (
            open_store(server.url(schema="chaos"), clock=clock) as direct,
            open_store(through, clock=clock) as retrying,
            # Without retries every lost reply becomes an unknown outcome.
            open_store(through, clock=clock, retry_timeout=0) as giving_up,
        ):
            number = 0
            while not context.done:
                # With and without retries, in turn.
                claiming: Any = (retrying, giving_up)[number % 2]
                if context.is_mutant:
                    claiming = BlindRetryMutant(giving_up)
                await _Round(context, direct, claiming, proxy, clock, f"queue-{number}").run()
                number += 1


class _Round:
    """A run with ready steps, from concurrent claims whose replies are lost to its end."""

    def __init__(
        self,
        context: RunContext,
        direct: FlowStore,
        claiming: Any,
        proxy: Proxy,
        clock: VirtualClock,
        queue: str,
    ) -> None:
        self._counts: Counts = context.counts
        self._context = context
        self._direct = direct
        self._claiming = claiming
        self._proxy = proxy
        self._clock = clock
        self._queue = queue
        self._run_id = new_run_id()
        self._keys = {f"step-{number}" for number in range(STEPS)}

    async def run(self) -> None:
        await self._direct.trigger_run(
            FLOW,
            "claims",
            self._run_id,
            "chaos",
            dispatch=[
                StepRequest(step_key=key, step_type="test", queue=self._queue) for key in sorted(self._keys)
            ],
        )
        self._proxy.arm(
            1, Fault.REPLY_LOST, match=MessageMatch.COMMIT, times=self._context.rng.choice((1, 2))
        )
        results = await asyncio.gather(*(self._claim() for _ in range(CALLERS)))
        injected = self._proxy.injected.total()
        self._proxy.heal()
        first = [step for steps in results if steps is not None for step in steps]
        await self._verify_claims(first, unknown=results.count(None))
        # Every lease ends, those of the calls of unknown outcome included.
        self._clock.advance(LEASE + timedelta(seconds=1))
        again = await self._direct.claim_next_steps([self._queue], lease=LEASE, limit=2 * STEPS)
        self._verify_all(again)
        await self._verify_fencing(first)
        await self._finish(again)
        self._context.record_faults(injected)

    async def _claim(self) -> Sequence[ClaimedStep] | None:
        """The steps that a call claimed; None if its outcome is unknown."""
        try:
            steps: Sequence[ClaimedStep] = await self._claiming.claim_next_steps(
                queues=[self._queue], lease=LEASE, limit=LIMIT
            )
        except OutcomeUnknownError:
            self._counts.add_detail("outcomes unknown")
            return None
        self._counts.operations += 1
        return steps

    async def _verify_claims(self, returned: Sequence[ClaimedStep], *, unknown: int) -> None:
        """The store holds the returned claims, and at most those of unknown calls besides."""
        owners = {step.step_key: step.owner for step in returned}
        for _ in range(len(returned) - len(owners)):
            self._counts.count_duplicate("concurrent calls of claim_next_steps returned the same step")
        held = {claim.step_key: claim.owner for claim in await self._direct.get_step_claims(self._run_id)}
        for key, owner in owners.items():
            if held.pop(key, None) != owner:
                self._counts.count_lost(f"the claim of {key!r} was returned, and the store does not hold it")
        if len(held) > unknown * LIMIT:
            self._counts.count_wrong(
                f"{len(held)} claims were returned by no call, after {unknown} calls of unknown outcome"
            )
        self._counts.add_detail("claims that no call returned", len(held))

    def _verify_all(self, claimed: Sequence[ClaimedStep]) -> None:
        """Each step is handed out again exactly once, at the end of its lease."""
        keys = [step.step_key for step in claimed]
        for key in self._keys.difference(keys):
            self._counts.count_lost(f"{key!r} was not handed out again at the end of its lease")
        for _ in range(len(keys) - len(set(keys))):
            self._counts.count_duplicate("one call of claim_next_steps returned a step twice")

    async def _verify_fencing(self, earlier: Sequence[ClaimedStep]) -> None:
        """The owner of an ended claim cannot record an outcome any more."""
        for step in earlier:
            try:
                await self._advance(step)
            except ConflictError:
                continue
            self._counts.count_duplicate(f"the earlier owner of {step.step_key!r} recorded its outcome too")

    async def _finish(self, claimed: Sequence[ClaimedStep]) -> None:
        advances = await asyncio.gather(*(self._advance(step) for step in claimed))
        self._counts.operations += len(advances)
        completed = sum(advance.run_completed for advance in advances)
        if completed > 1:
            self._counts.count_duplicate(f"{completed} calls of advance_run completed the run")
        if await self._direct.get_run_status(self._run_id) is not RunStatus.SUCCEEDED:
            self._counts.count_lost("all steps ended, and the run did not")

    async def _advance(self, step: ClaimedStep) -> Any:
        return await self._direct.advance_run(
            step.run_id,
            step.step_key,
            StepStatus.SUCCEEDED,
            attempt=step.attempt,
            owner=step.owner,
            complete_as=RunStatus.SUCCEEDED,
        )


SCENARIO = FaultScenario(
    number=20,
    name="claim-replies-lost",
    fault="the replies to claim_next_steps are lost after the commit, with and without retries",
    unit="lost replies",
    planned=500,
    min_faults=20,
    backends=("postgresql",),
    pass_criterion="a retry claims nothing more, and every step comes back at the end of its lease",
    mutant="the store calls claim_next_steps again when the outcome is unknown",
    minutes=3,
    run=run,
)
