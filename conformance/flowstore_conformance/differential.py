"""Sequential calls on a store and on the model, compared call by call, and the shrinking of mismatches."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from flowstore_conformance.archives import with_changed_values
from flowstore_conformance.call_validity import is_correctly_rejected, is_valid
from flowstore_conformance.claim_tokens import ClaimToken
from flowstore_conformance.context import CheckContext, ContractViolation, Inconclusive, Profile
from flowstore_conformance.diffing import expected_and_got
from flowstore_conformance.execution import begin, finish, is_foreign, is_unavailable
from flowstore_conformance.history import UNKNOWN, Call, Outcome, Raised, Returned, comparable
from flowstore_conformance.model import Model
from flowstore_conformance.repro_script import ReproCall, sequential_script
from flowstore_conformance.state_probe import describe_outcome, probe_calls, rotate_probes
from flowstore_conformance.strategies import FLOWS, TAG_KEYS, TAG_VALUES, Universe
from flowstore_conformance.violation_signature import Signature, wrong_answers
from flowstore_core import Capability, ClaimedStep, EndedStep, FlowStore, FlowStoreError, RunArchive
from flowstore_core.operations import KEYWORD_CAPABILITIES, OPERATIONS

TWO_HOURS = timedelta(hours=2)
"""Long enough that cleanup deletes keys and controls without a run (RET-4)."""

MAX_CONCURRENT = 60
"""Number of calls that are made at once. Stores may answer concurrent reads with one request."""

ERROR_CLAUSES = {
    "RunNotFoundError": "UNK",
    "StepNotFoundError": "UNK",
    "RunCompletedError": "RUN-4",
    "ClaimLostError": "STP-3",
}

LISTS_OF_QRY_1 = (
    "get_runs",
    "get_active_runs",
    "get_derived_runs",
    "get_step_claims",
    "get_dispatches",
    "get_waiters",
)
"""The reads whose order QRY-1 defines; QRY-6 refers to it."""


def _required_parameters(method: str) -> list[str]:
    parameters = inspect.signature(getattr(FlowStore, method)).parameters.values()
    return [one.name for one in parameters if one.name != "self" and one.default is one.empty]


GLOBAL_READS = tuple(
    one
    for one in OPERATIONS.values()
    if one.spans_runs and not one.writes and not _required_parameters(one.name)
)
"""The operations that read all runs."""


def guess_clause(call: Call, expected: Outcome, actual: Outcome) -> str:
    """The clause that a wrong outcome most likely breaks."""
    if is_foreign(actual):
        return "CON-2"
    if call.method == "record_step_start" and Raised("StepAlreadyCompletedError") in (expected, actual):
        return "STP-2"
    if call.method == "get_runs_page" and not call.arguments.get("search"):
        return "QRY-1"
    for outcome in (expected, actual):
        if isinstance(outcome, Raised) and outcome.error in ERROR_CLAUSES:
            return ERROR_CLAUSES[outcome.error]
    if call.method in LISTS_OF_QRY_1 and _differ_in_order(expected, actual):
        return "QRY-1"
    return OPERATIONS[call.method].clauses[0]


def _differ_in_order(expected: Outcome, actual: Outcome) -> bool:
    """Whether two lists have the same records in different orders."""
    if not (isinstance(expected, Returned) and isinstance(actual, Returned)):
        return False
    lists = (expected.value, actual.value)
    return all(isinstance(one, tuple) for one in lists) and sorted(map(repr, lists[0])) == sorted(
        map(repr, lists[1])
    )


def expected_outcome(model: Model, call: Call, *, exact_times: bool = True) -> Outcome:
    """Apply the call to the model and return its outcome."""
    try:
        value = getattr(model, call.method)(**call.arguments)
        return Returned(comparable(value, exact_times=exact_times))
    except FlowStoreError as error:
        return Raised(type(error).__name__)


@dataclass
class CallSequence:
    """Calls on a context's store and on a model; ModelMismatch if their outcomes differ."""

    context: CheckContext
    universe: Universe
    started_at: datetime
    stores: Sequence[FlowStore]
    """One store, or two on the same namespace; a call names its store by index."""
    entries: list[ReproCall] = field(default_factory=list)
    advanced: timedelta = timedelta(0)
    _owners: dict[str | None, str] = field(default_factory=dict)
    """The store's owner of each claim that claim_next_steps made, by the model's owner."""

    @property
    def reads(self) -> list[Call]:
        """The reads so far, for calls that repeat one: its result may come from a cache."""
        return [entry.call for entry in self.entries if not entry.call.operation.writes]

    @staticmethod
    def on(context: CheckContext, block: int, *, second: FlowStore | None = None) -> CallSequence:
        """A sequence on the ids that belong to this block number, on one or two stores."""
        assert context.clock is not None
        runs = [UUID(int=(block << 4) + number) for number in (1, 2, 3)]
        universe = Universe(
            model=Model(context.clock), runs=runs, flows=FLOWS, capabilities=context.capabilities
        )
        # A backend that allows one store only has no second one.
        stores = [context.store] if second in (None, context.store) else [context.store, second]
        return CallSequence(context=context, universe=universe, started_at=context.clock.now, stores=stores)

    async def call(self, call: Call, *, store: int = 0) -> None:
        """Make a call on a store and on the model and compare the outcomes."""
        actual = await self._execute(call, store)
        self._keep(self._compared(call, actual, store))
        # A store may answer without suspending; the watchdog expects that other tasks run.
        await asyncio.sleep(0)

    def _keep(self, entry: ReproCall) -> None:
        self.entries.append(entry)
        self.advanced = timedelta(0)
        if entry.actual != entry.expected:
            raise ModelMismatch(self.started_at, self.entries)

    async def call_concurrently(self, calls: Sequence[Call]) -> None:
        """Make calls whose outcomes do not depend on their order, and compare the outcomes."""
        for entry in await self._concurrently(calls):
            self._keep(entry)

    async def _concurrently(self, calls: Sequence[Call]) -> list[ReproCall]:
        """Make calls on the first store, many of them at once, and return each with its outcomes."""
        entries: list[ReproCall] = []
        for at in range(0, len(calls), MAX_CONCURRENT):
            some = calls[at : at + MAX_CONCURRENT]
            outcomes = await asyncio.gather(*(self._execute(call, 0) for call in some))
            entries += [self._compared(call, actual, 0) for call, actual in zip(some, outcomes, strict=True)]
            # A store may answer without suspending; the watchdog expects that other tasks run.
            await asyncio.sleep(0)
        return entries

    def advance_clock(self, span: timedelta) -> None:
        assert self.context.clock is not None
        self.context.clock.advance(span)
        self.advanced += span

    async def compare_state(self, *, is_last: bool = False) -> None:
        """Compare all readable state; a difference is attributed to the last write.

        Only the last comparison reads everything, and in the profile thorough each one. The others read most
        of the state of each run, and other reads in turn: by the number of calls, so a repeated sequence
        makes the same.
        """
        asked = self._everything()
        if self.context.profile is not Profile.THOROUGH and not is_last:
            asked = rotate_probes(asked, len(self.entries))
        for entry in await self._concurrently(asked):
            if entry.actual != entry.expected:
                raise ModelMismatch(self.started_at, [*self.entries, entry])

    async def finish(self) -> None:
        """Complete all runs, delete everything, and check that the namespace is empty.

        With two stores one writes and the other reads.
        """
        writer = len(self.stores) - 1
        await self.compare_state(is_last=True)
        for record in reversed(self.universe.model.get_active_runs()):
            arguments = {"run_id": record.run_id, "status": "Cancelled"}
            await self.call(Call(method="complete_run", arguments=arguments), store=writer)
        self.advance_clock(TWO_HOURS)
        cleanup = Call(method="cleanup", arguments={"cutoff": self.universe.model.now})
        await self.call(cleanup, store=writer)
        await self.compare_state(is_last=True)

    def _everything(self) -> list[Call]:
        capabilities = self.context.capabilities
        named = [
            entry.call.arguments for entry in self.entries if entry.call.arguments.get("idempotency_key")
        ]
        # Includes keys that must no longer exist.
        keys = dict.fromkeys((one["flow_id"], one["trigger_key"], one["idempotency_key"]) for one in named)
        asked: list[Call] = []
        for run_id in self.universe.runs:
            asked += probe_calls(run_id, capabilities, step_keys=self.universe.keys, keys=list(keys))
            keys = {}
        asked += [Call(method=one.name) for one in GLOBAL_READS if one.is_offered(capabilities)]
        if Capability.TAGS in capabilities:
            tags = [{key: value} for key in TAG_KEYS for value in TAG_VALUES]
            asked += [Call(method="get_runs", arguments={"tags": tag}) for tag in tags]
        return asked

    async def _execute(self, call: Call, store: int) -> Outcome:
        """Make a call on a store, with its own owners of claims in place of the model's."""
        owner = self._owners.get(call.arguments.get("owner"))
        if owner is not None:
            call = replace(call, arguments={**call.arguments, "owner": owner})
        if "claims" in call.arguments:
            claims = [(*step, self._owners.get(owner, owner)) for *step, owner in call.arguments["claims"]]
            call = replace(call, arguments={**call.arguments, "claims": claims})
        if "steps" in call.arguments:
            steps = [
                replace(step, owner=self._owners.get(step.owner, step.owner))
                for step in call.arguments["steps"]
            ]
            call = replace(call, arguments={**call.arguments, "steps": steps})
        return await finish(self._remember_owners(begin(self.stores[store], call)))

    async def _remember_owners(self, begun: Awaitable[object]) -> object:
        result = await begun
        for each in result if isinstance(result, Sequence) else ():
            if isinstance(each, ClaimedStep):
                self._owners[ClaimToken.of(each.run_id, each.step_key)] = each.owner
        return result

    def _compared(self, call: Call, actual: Outcome, store: int) -> ReproCall:
        """A call with its actual outcome and that of the model."""
        if actual is UNKNOWN or is_unavailable(actual):
            raise Inconclusive(f"{call.method} was unavailable although nothing else uses the namespace")
        self.context.assertions += 1
        # A call that the contract forbids changes nothing (INP), so the model skips it.
        refused = is_correctly_rejected(call, actual)
        expected = actual if refused else expected_outcome(self.universe.model, call)
        return ReproCall(self.advanced, call, expected, actual, store)


class ModelMismatch(ContractViolation):
    """A violation shown by a sequence of calls, the last of which has the wrong outcome."""

    def __init__(self, started_at: datetime, entries: Sequence[ReproCall]) -> None:
        last, blamed = entries[-1], _responsible_call(entries)
        message = describe_mismatch(last.call.method, last.expected, last.actual)
        if (write := _missed_write(entries)) is not None:
            by = " by another store" if write.store != last.store else ""
            message += f" (the result of the same call before {write.call.method}{by})"
        if blamed is not last:
            message = f"after {blamed.call.method}, {message}"
        clause = guess_clause(blamed.call, blamed.expected, blamed.actual)
        program = sequential_script(f"{clause}: {message}", started_at, entries)
        super().__init__(message, clause=clause, program=program)
        self.started_at = started_at
        self.entries = tuple(entries)
        # From the wrong outcome alone: the write to which a wrong read is attributed depends on the sequence.
        self.signature = Signature(
            guess_clause(last.call, last.expected, last.actual),
            frozenset(wrong_answers(last.call, last.expected, last.actual)),
        )
        self.__cause__ = last.actual.exception if isinstance(last.actual, Raised) else None


def _responsible_call(entries: Sequence[ReproCall]) -> ReproCall:
    """The call with the wrong outcome; for a read of state, the last successful write before it."""
    last = entries[-1]
    if last.call.operation.shows_state and not is_foreign(last.actual):
        for entry in reversed(entries[:-1]):
            if entry.call.operation.writes and isinstance(entry.expected, Returned):
                return entry
    return last


def _missed_write(entries: Sequence[ReproCall]) -> ReproCall | None:
    """The first write that a stale last read misses; None if its store never returned this result before."""
    *before, last = entries
    if last.call.operation.writes:
        return None
    write = None
    for entry in reversed(before):
        if (entry.call, entry.store, entry.actual) == (last.call, last.store, last.actual):
            return write
        if entry.call.operation.writes:
            write = entry
    return None


def describe_mismatch(call: str, expected: Outcome, actual: Outcome) -> str:
    """Describe a wrong outcome of a call."""
    if is_foreign(actual):
        assert isinstance(actual, Raised)
        return f"{call} raised {actual.error}, which is not an error of the contract"
    if isinstance(actual, Returned) and isinstance(expected, Returned):
        return f"{call}: {expected_and_got(expected.value, actual.value)}"
    return f"{call} returned {describe_outcome(actual)} instead of {describe_outcome(expected)}"


# Shrinking


async def shrink(context: CheckContext, found: ModelMismatch, seconds: float) -> ModelMismatch:
    """Shrink a violation to fewer and simpler calls within a time limit.

    Every candidate must show a wrong outcome of the original violation (see Signature), attributed to a write
    that breaks the same clause. A missing method is returned as it is.
    """
    if found.signature.shows_missing_method:
        return found
    async with AsyncExitStack() as stack:
        return await _Shrinker(context, found, stack, time.monotonic() + seconds).run()


class _Shrinker:
    def __init__(
        self, context: CheckContext, found: ModelMismatch, stack: AsyncExitStack, until: float
    ) -> None:
        self._context = context
        self._best = found
        self._signature = found.signature
        self._clause: str | None = None
        """The broken clause, once the write that leads to the wrong outcome is known."""
        self._stack = stack
        self._deadline = until
        self._shared: CheckContext | None = None
        self._shared_second: FlowStore | None = None
        self._replays = 0

    async def run(self) -> ModelMismatch:
        await self._find_clause()
        await self._try(lambda entries: [replace(entry, store=0) for entry in entries])
        # The wrong read may need an earlier read with the same arguments, whose result was kept.
        await self._try(
            lambda entries: [
                entry for entry in entries if entry.call.operation.writes or entry.call == entries[-1].call
            ]
        )
        await self._try(
            lambda entries: [entry for entry in entries[:-1] if entry.call.operation.writes] + entries[-1:]
        )
        simpler = True
        while simpler:
            await self._shorten()
            # With an argument removed, earlier calls may have become unnecessary.
            simpler = await self._simplify()
        return self._best

    async def _shorten(self) -> None:
        """Remove calls: long ranges first, then single calls."""
        length = len(self._best.entries)
        while length >= 1 and time.monotonic() < self._deadline:
            shorter = await self._drop_chunks(length)
            length = min(length // 2, len(self._best.entries)) if not (shorter and length == 1) else 1

    async def _find_clause(self) -> None:
        """Repeat the wrong read after every write, to find the first write after which it is wrong."""
        *before, last = self._best.entries
        if last.call.operation.shows_state:
            read = replace(last, clock_advance=timedelta(0))
            watched: list[ReproCall] = []
            for entry in before:
                watched += [entry, read] if entry.call.operation.writes else [entry]
            await self._try(lambda entries: [*watched, last])
        self._clause = self._best.clause

    async def _drop_chunks(self, length: int) -> bool:
        """Try to remove each range of this length once, the last range first."""
        shorter = False
        end = len(self._best.entries) - 1
        while end > 0:
            first = max(end - length, 0)
            shorter |= await self._try(lambda entries: _without(entries, first, end))  # noqa: B023
            # A shorter sequence may show the violation before its end.
            end = min(first, len(self._best.entries) - 1)
        return shorter

    async def _simplify(self) -> bool:
        """Remove optional arguments. Returns whether one was removed."""
        simpler, index = False, 0
        while index < len(self._best.entries):
            call = self._best.entries[index].call
            for name in optional_arguments(call):
                candidate = without_argument(call, name)
                if candidate is not None and await self._try(
                    lambda entries: _with_call(entries, index, candidate)  # noqa: B023
                ):
                    simpler = True
                    break
            else:
                index += 1
        return simpler

    async def _try(self, change: Callable[[list[ReproCall]], list[ReproCall]]) -> bool:
        if time.monotonic() > self._deadline:
            return False
        entries = change(list(self._best.entries))
        if entries == list(self._best.entries):
            return False
        found = await self._replay(entries)
        if found is None or not self._signature.covers(found.signature):
            return False
        if self._clause not in (None, found.clause):
            return False
        self._best = found
        return True

    async def _replay(self, entries: Sequence[ReproCall]) -> ModelMismatch | None:
        """Run the calls on unused ids and return the mismatch, if any."""
        if any(entry.call.operation.spans_runs for entry in entries):
            async with self._context.new_namespace() as alone:
                return await self._run(alone, entries)
        if self._shared is None:
            self._shared = await self._stack.enter_async_context(self._context.new_namespace())
        self._replays += 1
        return await self._run(self._shared, _renamed(entries, self._replays))

    async def _second_store(self, context: CheckContext) -> FlowStore:
        """Another store on the namespace; that of the shared namespace is opened once."""
        if context is not self._shared:
            return await context.open()
        if self._shared_second is None:
            self._shared_second = await context.open()
        return self._shared_second

    async def _run(self, context: CheckContext, entries: Sequence[ReproCall]) -> ModelMismatch | None:
        second = await self._second_store(context) if any(entry.store for entry in entries) else None
        sequence = CallSequence.on(context, 1, second=second)
        assert context.clock is not None
        context.clock.now = sequence.started_at = self._best.started_at
        try:
            for entry in entries:
                sequence.advance_clock(entry.clock_advance)
                await sequence.call(entry.call, store=entry.store)
        except ModelMismatch as found:
            return found
        return None


def optional_arguments(call: Call) -> list[str]:
    """The given arguments that have a default."""
    parameters = inspect.signature(getattr(Model, call.method)).parameters
    return [name for name in call.arguments if parameters[name].default is not inspect.Parameter.empty]


def _without(entries: list[ReproCall], first: int, last: int) -> list[ReproCall]:
    """The entries without a range; its clock advances move to the next entry."""
    gone = sum((entry.clock_advance for entry in entries[first:last]), timedelta(0))
    rest = entries[last:]
    return [*entries[:first], replace(rest[0], clock_advance=rest[0].clock_advance + gone), *rest[1:]]


def without_argument(call: Call, name: str) -> Call | None:
    """The call without an optional argument and, if necessary, without others that depend on it.

    None if the contract allows neither, or if the argument was not given.
    """
    if name not in call.arguments:
        return None
    others = [other for other in optional_arguments(call) if other != name]
    # The companions of queue= are given only together with it.
    companions = {name, *KEYWORD_CAPABILITIES.get(call.method, ())}
    for gone in ({name}, *({name, other} for other in others), companions):
        arguments = {key: value for key, value in call.arguments.items() if key not in gone}
        simpler = replace(call, arguments=arguments)
        if is_valid(simpler):
            return simpler
    return None


def _with_call(entries: list[ReproCall], index: int, call: Call) -> list[ReproCall]:
    return [*entries[:index], replace(entries[index], call=call), *entries[index + 1 :]]


def _renamed(entries: Sequence[ReproCall], block: int) -> list[ReproCall]:
    """The entries on the ids of another block."""

    def rename(value: Any) -> Any:
        if isinstance(value, RunArchive):
            return with_changed_values(value, rename)
        # Ids of runs and flows are small, so adding a high block number keeps their order.
        if type(value) in (list, tuple):
            return type(value)(map(rename, value))
        if isinstance(value, EndedStep):
            return replace(value, run_id=rename(value.run_id), owner=rename(value.owner))
        if isinstance(value, ClaimToken):
            return ClaimToken.of(rename(value.run_id), value.step_key)
        return UUID(int=(block << 64) | (value.int & (1 << 64) - 1)) if isinstance(value, UUID) else value

    return [
        replace(
            entry,
            call=replace(
                entry.call, arguments={name: rename(value) for name, value in entry.call.arguments.items()}
            ),
        )
        for entry in entries
    ]
