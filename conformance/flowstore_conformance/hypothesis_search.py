"""Call sequences that Hypothesis's state machine draws and varies, in search of one that breaks the model."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, Verbosity, reject, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir, storage_directory
from hypothesis.errors import HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from flowstore_conformance.context import CheckContext
from flowstore_conformance.differential import CallSequence, ModelMismatch
from flowstore_conformance.operations import available_strategies, draw_call, draw_clock_advance
from flowstore_conformance.violation_signature import Signature

T = TypeVar("T")


async def search(
    context: CheckContext, *, examples: int, steps: int, seconds: float, shrink_seconds: float
) -> ModelMismatch | None:
    """Run sequences of at most ``steps`` calls, and return the shortest one that breaks the model.

    Draws until there are ``examples`` sequences or the time is up, and then shrinks a failure for at most
    ``shrink_seconds``.
    """
    bridge = _LoopBridge()
    sequences = _Search(context, bridge, until=time.monotonic() + seconds, shrink_seconds=shrink_seconds)
    machine = seed(context.seed)(_new_machine(sequences))
    chosen = settings(
        max_examples=examples,
        stateful_step_count=steps,
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    async with sequences.stack:
        with _temporary_hypothesis_home():
            await bridge.serve(asyncio.ensure_future(asyncio.to_thread(_run_machine, machine, chosen)))
    return sequences.found


@contextmanager
def _temporary_hypothesis_home() -> Iterator[None]:
    """Let Hypothesis write its files to a temporary folder instead of the working directory."""
    before = storage_directory(intent_to_write=False).home_directory
    with tempfile.TemporaryDirectory(prefix="flowstore-hypothesis-") as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(before)


def _run_machine(machine: Any, chosen: settings) -> None:
    """Run the state machine in the thread; the search keeps its failures."""
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except (ModelMismatch, HypothesisException, _TimeIsUp, _CheckEnded):
        # The search has kept each failure. Hypothesis reports flaky failures as errors; a kept failure
        # counts even if it is flaky.
        return


class _CheckEnded(BaseException):
    """The check has ended, so its thread must end too."""


class _TimeIsUp(BaseException):
    """The time for drawing, or for shrinking, is over."""


class _LoopBridge:
    """Runs coroutines of a thread in the check's task, because Hypothesis is not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._requests: asyncio.Queue[tuple[Callable[[], Coroutine[Any, Any, Any]], Future[Any]] | None]
        self._requests = asyncio.Queue()
        """Coroutines to await; None after the thread has ended."""
        self._closed = False

    def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """From the thread: run a coroutine in the check's task and return its result or raise its error."""
        future: Future[T] = Future()
        self._loop.call_soon_threadsafe(self._enqueue, make, future)
        return future.result()

    def _enqueue(self, make: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        if self._closed:
            future.set_exception(_CheckEnded())
        else:
            self._requests.put_nowait((make, future))

    async def serve(self, work: asyncio.Future[None]) -> None:
        """In the check's task: await the thread's coroutines until its work is done."""
        work.add_done_callback(lambda _: self._requests.put_nowait(None))
        try:
            while (request := await self._requests.get()) is not None:
                await self._resolve(*request)
            work.result()
        finally:
            self._closed = True
            while not self._requests.empty():
                if (request := self._requests.get_nowait()) is not None:
                    request[1].set_exception(_CheckEnded())

    async def _resolve(self, make: Callable[[], Coroutine[Any, Any, Any]], future: Future[Any]) -> None:
        try:
            future.set_result(await make())
        except Exception as error:  # noqa: BLE001 - raised in the thread
            future.set_exception(error)
        except BaseException:
            # The thread must not wait forever.
            future.set_exception(_CheckEnded())
            raise


@dataclass
class _Search:
    """The sequences of one check: their namespace, and the shortest failure."""

    context: CheckContext
    bridge: _LoopBridge
    until: float
    """The monotonic time at which drawing stops."""
    shrink_seconds: float
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    namespace: CheckContext | None = None
    programs: int = 0
    found: ModelMismatch | None = None
    signature: Signature | None = None
    """The signature of the first violation."""

    async def begin(self) -> CallSequence:
        """Start a sequence in a namespace without failures."""
        if self.namespace is None:
            self.namespace = await self.stack.enter_async_context(self.context.new_namespace())
        self.programs += 1
        return CallSequence.on(self.namespace, self.programs)

    def keep(self, found: ModelMismatch) -> bool:
        """Keep the shortest sequence that shows the first violation, and discard the namespace.

        Returns False for a different violation.
        """
        self.namespace = None
        if self.signature is None:
            self.signature = found.signature
            seconds = 0.0 if self.signature.shows_missing_method else self.shrink_seconds
            self.until = time.monotonic() + seconds
        if not self.signature.covers(found.signature):
            return False
        if self.found is None or len(found.entries) < len(self.found.entries):
            self.found = found
        return True


class _Machine(RuleBasedStateMachine):
    """One call sequence that Hypothesis draws."""

    search: _Search
    """Set by the subclass of each check."""

    def __init__(self) -> None:
        super().__init__()
        # At least one sequence is drawn, however slow the machine is.
        if self.search.programs and time.monotonic() > self.search.until:
            raise _TimeIsUp
        self.failed = False
        self.program = self.search.bridge.run(self.search.begin)

    def run(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            self.search.bridge.run(make)
        except ModelMismatch as found:
            self.failed = True
            if not self.search.keep(found):
                # Hypothesis treats every ModelMismatch as the same failure and would shrink this one.
                reject()
            raise

    def draw(self, data: st.DataObject, method: str) -> None:
        call = draw_call(_HypothesisChoices(data), self.program.universe, method)
        self.run(lambda: self.program.call(call))

    def compare_state(self) -> None:
        self.run(self.program.compare_state)

    def teardown(self) -> None:
        if not self.failed and self.program.entries:
            self.run(self.program.finish)


def _new_machine(search: _Search) -> type[_Machine]:
    """The machine of one check, with rules in proportion to the weight of each method."""
    rules: dict[str, Any] = {"search": search, "first_calls": initialize(data=st.data())(_first_calls)}
    for method, strategy in available_strategies(search.context.capabilities).items():
        for number in range(strategy.weight):
            rules[f"{method}_{number}"] = rule(data=st.data())(_draw(method))
    for number in range(4):
        rules[f"repeat_read_{number}"] = rule(data=st.data())(_repeat_read)
    for number in range(8):
        rules[f"advance_clock_{number}"] = rule(data=st.data())(_advance_clock)
        rules[f"compare_state_{number}"] = rule()(_compare_state)
    return type("Machine", (_Machine,), rules)


def _draw(method: str) -> Callable[[Any, st.DataObject], None]:
    def draw(self: Any, data: st.DataObject) -> None:
        self.draw(data, method)

    return draw


def _first_calls(self: Any, data: st.DataObject) -> None:
    for _ in range(_HypothesisChoices(data).one_of((1, 2, 0))):
        self.draw(data, "start_run")


def _repeat_read(self: Any, data: st.DataObject) -> None:
    if reads := self.program.reads:
        call = _HypothesisChoices(data).one_of(reads)
        self.run(lambda: self.program.call(call))


def _advance_clock(self: Any, data: st.DataObject) -> None:
    self.program.advance_clock(draw_clock_advance(_HypothesisChoices(data), self.program.universe))


def _compare_state(self: Any) -> None:
    self.compare_state()


class _HypothesisChoices:
    """A ChoiceSource backed by Hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def one_of(self, options: Sequence[T]) -> T:
        # Draw an index: the options often depend on the state, their number rarely does.
        return options[self._data.draw(st.integers(0, len(options) - 1))]
