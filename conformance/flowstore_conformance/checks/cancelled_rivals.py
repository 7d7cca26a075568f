"""CON-4: callers that are cancelled while others claim, release or change the same steps.

A cancelled claim without owner, or dispatch, leaves nothing, and takes nothing from another caller. So at the
end of each check the claimed or dispatched keys are those whose caller got True.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from flowstore_conformance import state_probe
from flowstore_conformance.checks.fixtures import new_store, start
from flowstore_conformance.context import CheckContext
from flowstore_conformance.registry import Kind, check
from flowstore_core import FlowStore, FlowStoreError

CALLERS = 16


@dataclass(frozen=True, slots=True)
class Right:
    """What callers compete for: the claim or the dispatch of a step."""

    take: Callable[[FlowStore, UUID, str], Awaitable[bool]]
    give_back: Callable[[FlowStore, UUID, str], Awaitable[None]]
    read: Callable[[FlowStore, UUID], Awaitable[frozenset[str]]]
    name: str


RIGHTS = (
    Right(
        take=lambda store, run_id, key: store.try_claim_step(run_id, key),
        give_back=lambda store, run_id, key: store.release_step_claim(run_id, key),
        read=lambda store, run_id: store.get_claimed_step_keys(run_id),
        name="try_claim_step",
    ),
    Right(
        take=lambda store, run_id, key: store.try_record_dispatch(run_id, key),
        give_back=lambda store, run_id, key: store.release_dispatch(run_id, key),
        read=lambda store, run_id: store.get_dispatched_step_keys(run_id),
        name="try_record_dispatch",
    ),
)


@dataclass(slots=True)
class Contest:
    """Callers that try to take the same right of several keys of one run, some of which are cancelled."""

    right: Right
    run_id: UUID
    won: list[str] = field(default_factory=list)
    """Keys whose callers got True."""
    doubtful: set[str] = field(default_factory=set)
    """Keys of a call that ended with an error: it may have happened or not."""

    async def take(self, store: FlowStore, key: str) -> None:
        try:
            if await self.right.take(store, self.run_id, key):
                self.won.append(key)
        except FlowStoreError:
            self.doubtful.add(key)

    async def expect_only_wins(
        self, context: CheckContext, held_before: Collection[str], keys: Collection[str], what: str
    ) -> None:
        """Expect that the keys that are held are those that were held before or won since."""
        compared = set(keys) - self.doubtful
        won = sorted(key for key in self.won if key in compared)
        context.expect(won, sorted(set(won) - set(held_before)), f"the winners of {self.right.name} {what}")
        wanted = (set(won) | set(held_before)) & compared
        loop = asyncio.get_running_loop()
        deadline = loop.time() + state_probe.SETTLE_SECONDS
        # Another store than the one whose calls were cancelled.
        while (held := await self.right.read(context.store, self.run_id)) & compared != wanted:
            if loop.time() > deadline:
                break
            await asyncio.sleep(0.01)
        context.expect(
            held & compared,
            wanted,
            f"the keys held after {self.right.name} {what}: those won by a caller that got True",
        )


async def end_compensations(context: CheckContext, store: FlowStore) -> None:
    """Close a store, which waits until its cancelled calls are undone, unless it is the only one."""
    if store is not context.store:
        await store.aclose()


async def end_tasks(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Wait for tasks, of which some may have been cancelled."""
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


@check("CON-4", kind=Kind.CANCELLATION, isolated=False, rotation="cancelled rivals")
async def callers_cancelled_by_another_caller_keep_nothing(context: CheckContext) -> None:
    """One caller that has its result cancels the others, whose calls may have been won at that moment."""
    store, run_id = await new_store(context), await start(context)
    rounds = range(context.profile.of(4, 12, 80))
    keys = {number: [f"{number} {caller}" for caller in range(CALLERS)] for number in rounds}
    contests = [Contest(right, run_id) for right in RIGHTS]
    held = {key for some in keys.values() for key in context.random.sample(some, CALLERS // 4)}
    for contest in contests:
        await asyncio.gather(*(contest.right.take(context.store, run_id, key) for key in held))
        for some in keys.values():
            await _cancel_when_some_have_returned(context, contest, store, some)
    await end_compensations(context, store)
    for contest in contests:
        every = [key for some in keys.values() for key in some]
        await contest.expect_only_wins(context, held, every, "beside a caller that cancels the others")


async def _cancel_when_some_have_returned(
    context: CheckContext, contest: Contest, store: FlowStore, keys: Sequence[str]
) -> None:
    returned, last = 0, context.random.randrange(1, CALLERS)

    async def call(key: str) -> None:
        nonlocal returned
        await contest.take(store, key)
        returned += 1
        if returned == last:
            # Others may have their results already, and continue only after this task.
            for task in tasks:
                if task is not asyncio.current_task():
                    task.cancel()

    tasks = [asyncio.ensure_future(call(key)) for key in keys]
    await end_tasks(tasks)
