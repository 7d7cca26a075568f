"""Small domains from which arguments are drawn, depending on the state of the model."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol, TypeVar
from uuid import UUID

from flowstore_conformance.model import Model, Run
from flowstore_conformance.model.state import Step
from flowstore_core import Capability, RunPosition, StepRequest, StepStatus

T = TypeVar("T")

KEYS = ("a", "B", "é", "b")
FLOWS = (UUID(int=0xF1), UUID(int=0xF2))
OWNERS = ("one", "two", "One")
TEXTS = (None, "", "x%_", "ABC é")
SIGNALS = ("go", "Go")
QUEUES = ("mail", "Mail")
PRIORITIES = (0, 9, 0, 1)
IDEMPOTENCY_KEYS = ("k", "K")
TAG_KEYS = ("k", "K", "é")
TAG_VALUES = ("v", "V")
OUTCOMES = ("Succeeded", "Failed", "Pending", "Skipped")
FINAL_OUTCOMES = ("Succeeded", "Failed", "Skipped")
ENDINGS = ("Succeeded", "Failed", "Cancelled")
SEARCHES = (None, "", "x%", "abc", "B", "É", "é", "running", "superseded", "J1", "-0000", "_")
TICK = timedelta(microseconds=1)
SPANS = (
    timedelta(0),
    TICK,
    timedelta(seconds=1),
    timedelta(minutes=1),
    timedelta(hours=1),
    timedelta(days=1),
)
LEASES = (timedelta(minutes=1), timedelta(days=2), timedelta(hours=1), timedelta(seconds=1))


class ChoiceSource(Protocol):
    """A source of choices, such as Hypothesis or a random generator."""

    def one_of(self, options: Sequence[T]) -> T:
        """Choose one option; the first counts as the simplest."""
        ...


class RandomChoices:
    """Choices of a seeded random generator."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def one_of(self, options: Sequence[T]) -> T:
        return self._generator.choice(options)


@dataclass(slots=True)
class Universe:
    """The names that calls use, and the model's state, which tells which of them exist."""

    model: Model
    runs: Sequence[UUID]
    flows: Sequence[UUID]
    keys: Sequence[str] = KEYS
    owners: Sequence[str] = OWNERS
    capabilities: Collection[Capability] = field(default_factory=lambda: frozenset(Capability))

    def edges(self) -> list[datetime]:
        """The times at which a claim, dispatch, waiter, deadline or run ends, in order."""
        found: set[datetime | None] = set()
        for run in self.model.state.runs.values():
            for step in run.steps.values():
                found.add(step.claim.expires_at if step.claim else None)
                found.add(step.dispatch.due_at if step.dispatch else None)
            found.update(waiter.expires_at for waiter in run.waiters.values())
            found.add(run.control.timeout_at if run.control else None)
            found.add(run.record.completed_at if run.record else None)
        return sorted(each for each in found if each is not None)


class CallStrategy:
    """Draws the arguments of one call."""

    def __init__(self, chooser: ChoiceSource, universe: Universe) -> None:
        self._chooser = chooser
        self.universe = universe
        self.now = universe.model.now

    def one_of(self, *options: T) -> T:
        return self._chooser.one_of(options)

    def sampled_from(self, options: Sequence[T]) -> T:
        return self._chooser.one_of(options)

    def often(self) -> bool:
        """True in four of five draws, and in the simplest draw."""
        return self.one_of(True, True, True, True, False)

    def text(self) -> str | None:
        return self.sampled_from(TEXTS)

    def flow(self) -> UUID:
        return self.sampled_from(self.universe.flows)

    def timestamp(self) -> datetime:
        """A timestamp near now, or at or next to an edge of the state."""
        edges = self.universe.edges()
        on_an_edge = self.one_of(True, False)
        if edges and on_an_edge:
            return self.sampled_from(edges) + self.one_of(timedelta(0), TICK, -TICK)
        return self.now + self.one_of(1, -1) * self.sampled_from(SPANS)

    def position(self) -> RunPosition | None:
        """Mostly None; otherwise the position of a run, stored or not, or one tick before or after it."""
        is_given = self.one_of(False, True)
        if not is_given:
            return None
        run_id = self.sampled_from(self.universe.runs)
        record = self.universe.model.get(run_id).record
        started_at = self.now if record is None else record.started_at
        shifted = started_at + self.one_of(timedelta(0), timedelta(0), TICK, -TICK)
        return RunPosition(started_at=shifted, run_id=run_id)

    def maybe_timestamp(self) -> datetime | None:
        later = self.one_of(False, True)
        return self.timestamp() if later else None

    def run(self, wanted: Callable[[Run], object] = lambda run: run.record is not None) -> UUID:
        """Mostly a run that satisfies ``wanted``."""
        fitting = [run_id for run_id in self.universe.runs if wanted(self.universe.model.get(run_id))]
        return self.sampled_from(fitting if fitting and self.often() else self.universe.runs)

    def step(
        self,
        wanted: Callable[[Step], object] = lambda step: True,
        running: bool = False,
    ) -> tuple[UUID, str, Step]:
        """Mostly a step that satisfies ``wanted``."""
        candidates = []
        for run_id in self.universe.runs:
            run = self.universe.model.get(run_id)
            if run.record is None or (running and run.record.status.is_terminal):
                continue
            candidates += [(run_id, key) for key in self.universe.keys if wanted(run.steps.get(key, Step()))]
        if candidates and self.often():
            run_id, key = self.sampled_from(candidates)
        else:
            run_id, key = self.run(lambda run: run.steps), self.sampled_from(self.universe.keys)
        return run_id, key, self.universe.model.get(run_id).steps.get(key, Step())

    def waiting(self) -> tuple[UUID, str]:
        """Mostly a step with a waiter."""
        candidates = [
            (run_id, key)
            for run_id in self.universe.runs
            for key in sorted(self.universe.model.get(run_id).waiters)
        ]
        if candidates and self.often():
            return self.sampled_from(candidates)
        return self.run(), self.sampled_from(self.universe.keys)

    def attempt(self, step: Step) -> int | None:
        """Mostly the number of the last attempt."""
        last = max(len(step.attempts), 1)
        return self.one_of(last, None, last, max(last - 1, 1), last + 1)

    def owner(self, step: Step) -> str | None:
        """Mostly the owner of the step's claim."""
        holder = step.claim.owner if step.claim is not None else None
        return (
            self.sampled_from((holder, holder, *self.universe.owners))
            if holder
            else self.sampled_from((None, *self.universe.owners))
        )

    def starter(self, step: Step) -> str | None:
        """Often None, else mostly the owner that started the step's newest attempt."""
        owner = step.started_under.owner if step.started_under is not None else None
        return self.sampled_from((None, None, owner, owner, *self.universe.owners))

    def has(self, capability: Capability) -> bool:
        return capability in self.universe.capabilities

    def queues(self) -> list[str]:
        """Mostly every queue."""
        return self.one_of(list(QUEUES), [QUEUES[0]], [QUEUES[1], "no such queue"])

    def requests(self, step_key: str | None = None, *, after: bool = True) -> tuple[StepRequest, ...]:
        """Requests for some keys, in a drawn order; none for ``step_key``."""
        if not self.has(Capability.QUEUES):
            return ()
        left = [key for key in self.universe.keys if key != step_key]
        requests = []
        for _ in range(self.one_of(0, 1, 1, 2)):
            if left:
                key = self.sampled_from(left)
                left.remove(key)
                requests.append(self._request(key, after=after))
        return tuple(requests)

    def _request(self, step_key: str, *, after: bool) -> StepRequest:
        others = [key for key in self.universe.keys if key != step_key]
        ends = tuple(key for key in others if self.one_of(False, True)) if after else ()
        every = (StepStatus.SUCCEEDED, StepStatus.FAILED, StepStatus.SKIPPED)
        return StepRequest(
            step_key=step_key,
            step_type=self.one_of("http", "other"),
            input_json=self.text(),
            queue=self.sampled_from(QUEUES),
            priority=self.sampled_from(PRIORITIES),
            due_at=self.maybe_timestamp(),
            after=ends,
            accept=frozenset(self.one_of(every[:1], every, every[1:2], every[:2])),
        )

    def tags(self, count: int = len(TAG_KEYS)) -> dict[str, dict[str, str]]:
        """The keyword ``tags`` with up to ``count`` tags; often none, and none for a store without TAGS."""
        if not self.has(Capability.TAGS) or self.one_of(False, True):
            return {}
        keys = [key for key in TAG_KEYS if self.one_of(True, False)][:count]
        return {"tags": {key: self.sampled_from(TAG_VALUES) for key in keys}}

    def output_key(self) -> str:
        """A key of an output; several keys begin with the same step key."""
        return self.sampled_from(self.universe.keys) + self.one_of("", "/1", "%", "\U0010ffff")

    def output_prefix(self) -> str:
        """A prefix of some keys of outputs, or of none."""
        key = self.sampled_from(self.universe.keys)
        return self.one_of("", key, key + "/", key + "_", key + "\U0010ffff", "%")

    def lease(self, owner: str | None) -> dict[str, Any]:
        leased = owner is not None and Capability.LEASES in self.universe.capabilities
        return {"lease": self.sampled_from(LEASES)} if leased and self.one_of(True, True, False) else {}
