"""CON-6: a store that an earlier release left holds the same data after its migration.

A backend offers such stores through SchemaRevertible of flowstore_core.backend; without it this check is
UNSUPPORTED. The data come from the write scenarios, so a new operation is covered without a change here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import product
from typing import TypeVar
from uuid import UUID

from flowstore_conformance.checks.compared_store import ComparedStore
from flowstore_conformance.checks.counters import queries_of_all_runs
from flowstore_conformance.checks.fixtures import DAY, FLOW, SECOND, require_clock
from flowstore_conformance.context import CheckContext, ContractViolation, Profile, Unsupported
from flowstore_conformance.differential import TWO_HOURS
from flowstore_conformance.history import Call
from flowstore_conformance.registry import Kind, check
from flowstore_conformance.state_probe import probe_calls
from flowstore_conformance.write_scenarios import TAGS, available
from flowstore_core import Capability, FlowStore, RunStatus, SchemaVersionError, open_store
from flowstore_core.backend import Migratable, SchemaRevertible
from flowstore_core.open import resolve_store
from flowstore_core.timeseries import EARLIEST

T = TypeVar("T")

BEFORE_1970 = datetime(1969, 12, 29, 23, 59, 59, 999_999, UTC)
"""The runs of the days that follow cross the change of sign in numbers of days and of microseconds."""
RUNS_OF_A_KIND = 2
"""Runs of one flow with one status that start on one day, so that a count differs from a presence."""


@check("CON-6", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.FAULT, rotation="schema versions")
async def migrations_keep_all_data(context: CheckContext) -> None:
    """After the migration of each earlier schema every read and every repeated write returns the same."""
    backend = context.backend
    if not isinstance(backend, SchemaRevertible):
        raise Unsupported("the backend does not implement SchemaRevertible, so no older store can be created")
    versions = _choose_versions(context, backend)
    is_quick = context.profile is Profile.QUICK
    if context.random.random() < 0.5:
        require_clock(context).now = BEFORE_1970
    data = _Data(context)
    await data.write_scenarios()
    stores: Sequence[FlowStore] = [context.store]
    for version in versions:
        await data.write_runs()
        if not is_quick:
            await data.compare("before a migration")
        for store in stores:
            await store.aclose()
        await backend.revert_schema(context.url, version)
        await _expect_refused(context, version)
        stores = await _migrate(context, version, by_tool=version != versions[0])
        context.store = stores[0]
        try:
            await data.compare(f"after the migration from schema version {version}", runs=True)
            is_last = version == versions[-1]
            await data.write_again(with_tags=is_last)
            if is_last:
                await data.delete_all()
        except ContractViolation as found:
            # The same calls return the right results in checks without a migration.
            raise ContractViolation(found.message, clause="CON-6") from found


def _choose_versions(context: CheckContext, backend: SchemaRevertible) -> list[int]:
    """The oldest version, which needs every migration, then none, two or all of the others by profile."""
    versions = list(backend.earlier_schema_versions())
    if not versions:
        raise Unsupported("the backend has no earlier version of the schema")
    oldest, *others = versions
    count = min(context.profile.of(0, 2, len(others)), len(others))
    return [oldest, *sorted(context.random.sample(others, count))]


class _Data:
    """Runs on a store and on the model, whose reads a migration must not change."""

    def __init__(self, context: CheckContext) -> None:
        self._context = context
        self._compared = ComparedStore.of(context)
        self._clock = require_clock(context)
        self._begun = self._clock.now
        # An earlier schema can hold no dispatch that names a queue, no tags and no buffered signal. Archives
        # have all of them.
        later = {Capability.QUEUES, Capability.TAGS, Capability.MAILBOX, Capability.TRANSFER}
        factories = available(context.capabilities - later).values()
        self._scenarios = [
            factory(UUID(int=number), UUID(int=number << 32)) for number, factory in enumerate(factories, 1)
        ]
        self._written = 0

    async def write_scenarios(self) -> None:
        """Write each scenario on its own run."""
        programs = [[*setup, write] for setup, write in self._scenarios]
        for number in range(max(map(len, programs))):
            calls = [calls[number] for calls in programs if number < len(calls)]
            await self._compared.make_concurrently(calls)

    async def write_runs(self) -> None:
        """Write runs of several flows and statuses, and Running runs alone on a day without any end."""
        self._clock.advance(DAY)
        kinds = list(product(range(2), RunStatus, range(RUNS_OF_A_KIND)))
        runs = [(self._new_id(), *kind) for kind in kinds]
        starts = [_start(run_id, UUID(int=FLOW.int + flow)) for run_id, flow, _, _ in runs]
        await self._compared.make_concurrently(starts)
        await self._compared.make_concurrently([_skip(run_id) for run_id, *_ in runs])
        self._clock.advance(SECOND)
        # One of each kind ends on the day of its start, the others a day later.
        for number in range(RUNS_OF_A_KIND):
            ends = [_complete(run_id, status) for run_id, _, status, own in runs if own == number]
            await self._compared.make_concurrently(
                [end for end in ends if end.arguments["status"].is_terminal]
            )
            self._clock.advance(DAY)
        await self._compared.make_concurrently([_start(self._new_id(), FLOW) for _ in range(RUNS_OF_A_KIND)])
        await self._maintain_index()

    async def _maintain_index(self) -> None:
        """Make a cleanup that deletes nothing, in which a backend may add ended runs to an index."""
        await self._compared.call("cleanup", cutoff=EARLIEST)

    def _new_id(self) -> UUID:
        self._written += 1
        return UUID(int=(1 << 64) + self._written)

    async def write_again(self, *, with_tags: bool) -> None:
        """Repeat the last write of each scenario, start, end and change further runs, and read again.

        ``with_tags`` if no earlier schema follows, which would lose them.
        """
        compared = self._compared
        await compared.make_concurrently([write for _, write in self._scenarios])
        active = compared.model.get_active_runs()[::3]
        await compared.make_concurrently([_complete(run.run_id, RunStatus.FAILED) for run in active])
        if with_tags and Capability.TAGS in self._context.capabilities:
            await compared.make_concurrently([_tag(run.run_id) for run in active])
        await self._maintain_index()
        # The texts of an indexed run change: searches for "ship" now find it.
        await compared.make_concurrently([_skip(run.run_id, "ship later") for run in active])
        await compared.make([_start(self._new_id(), FLOW)])
        is_quick = self._context.profile is Profile.QUICK
        await self.compare(f"{compared.stage} and further writes", runs=not is_quick)

    async def compare(self, stage: str, *, runs: bool = False) -> None:
        """Make every read over all runs, and with ``runs`` every read of each run of a scenario."""
        self._compared.stage = stage
        await self._compared.make_concurrently([*(self._reads_of_runs() if runs else ()), *self._queries()])

    async def delete_all(self) -> None:
        """End and delete every run; every count is then zero."""
        active = self._compared.model.get_active_runs()
        await self._compared.make_concurrently([_complete(run.run_id, RunStatus.CANCELLED) for run in active])
        self._clock.advance(TWO_HOURS)
        await self._compared.call("cleanup", cutoff=self._clock.now)
        await self._compared.make_concurrently(list(self._queries()))

    def _reads_of_runs(self) -> Iterator[Call]:
        capabilities = self._context.capabilities
        for number in range(1, len(self._scenarios) + 1):
            key = (UUID(int=number << 32), "manual", "K")
            yield from probe_calls(UUID(int=number), capabilities, step_keys=("a", "b"), keys=[key])

    def _queries(self) -> Iterator[Call]:
        for _, method, arguments in queries_of_all_runs(self._context, self._begun, source=UUID(int=1)):
            yield Call(method=method, arguments=arguments)


def _start(run_id: UUID, flow_id: UUID) -> Call:
    names = {"flow_name": "orders", "trigger_key": "manual", "trigger_data": "{ }", "job_id": "job 1"}
    given = {"run_id": run_id, "flow_id": flow_id, "source_run_id": UUID(int=1), **names}
    return Call(method="start_run", arguments=given)


def _skip(run_id: UUID, step_key: str = "ship") -> Call:
    given = {"step_key": step_key, "step_type": "http", "reason": f"{step_key} not needed"}
    return Call(method="record_skipped_step", arguments={"run_id": run_id, **given})


def _tag(run_id: UUID) -> Call:
    return Call(method="set_tags", arguments={"run_id": run_id, "tags": TAGS})


def _complete(run_id: UUID, status: RunStatus) -> Call:
    return Call(method="complete_run", arguments={"run_id": run_id, "status": status})


async def _expect_refused(context: CheckContext, version: int) -> None:
    """Open the older store with migrate=False."""
    try:
        async with open_store(context.url, migrate=False):
            opened = "a store"
    except Exception as error:  # noqa: BLE001 - only its class matters
        opened = type(error).__name__
    context.expect(
        opened, SchemaVersionError.__name__, f"opening schema version {version} with migrate=False"
    )


async def _migrate(context: CheckContext, version: int, *, by_tool: bool) -> Sequence[FlowStore]:
    """Migrate the older store and open it: with the backend's ``migrate``, or with several stores at once."""
    backend = context.backend
    count = context.profile.of(1, 4, 8) if Capability.MULTI_PROCESS in context.capabilities else 1
    if by_tool and isinstance(backend, Migratable):
        migration = backend.migrate(resolve_store(context.url)[2])
        await _expect_success(f"migrate() from schema version {version}", migration)
        count = 1
    opening = (context.open() for _ in range(count))
    return await _expect_success(f"opening schema version {version} {count} times at once", *opening)


async def _expect_success(what: str, *calls: Awaitable[T]) -> list[T]:
    """Make calls concurrently and return their results."""
    results = []
    for outcome in await asyncio.gather(*calls, return_exceptions=True):
        if isinstance(outcome, (ContractViolation, Unsupported)):
            raise outcome
        if isinstance(outcome, BaseException):
            raise ContractViolation(f"{what}: expected no error, got {type(outcome).__name__}") from outcome
        results.append(outcome)
    return results
