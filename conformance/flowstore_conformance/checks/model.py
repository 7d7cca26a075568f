"""Long programs of drawn calls, one after the other, held against the model; failures are shrunk.

Two searches share the work. Seeded random numbers draw long programs that reach deep states; Hypothesis's
state machine draws and varies shorter ones. What is drawn depends on the model alone, never on what the
store answered, so a program that was drawn can be drawn again.

Making a namespace costs more than a program, so programs share one: each has ids of its own, and its end
completes its runs, moves the clock and cleans up, after which the store must show nothing at all. So what
looks at all runs is compared exactly too. After a failure the namespace is given up for a fresh one.
"""

from __future__ import annotations

import asyncio
import random
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

from flowstore_conformance.checks.registry import Kind, check
from flowstore_conformance.context import CheckContext
from flowstore_conformance.differential import CallSequence, ModelMismatch, shrink
from flowstore_conformance.operations import available_strategies, draw_call, draw_clock_advance
from flowstore_conformance.strategies import KEYS, RandomChoices
from flowstore_conformance.violation_signature import Signature
from flowstore_core import Capability

T = TypeVar("T")

SHRINK_SECONDS = 6.0
LENGTH = 80
"""Calls of a random program."""
LOOK_EVERY = 8
"""Calls, between two looks at all there is."""


@check("CON-1", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.MODEL)
async def programs_agree_with_the_model(context: CheckContext) -> None:
    """Long random programs of all operations get the model's answers, and leave what it leaves."""
    until = time.monotonic() + context.profile.of(3, 12, 900)
    async with context.new_namespace() as namespace:
        try:
            for number in range(1, context.profile.of(5, 60, 5000)):
                await _random_program(CallSequence.on(namespace, number), context.random)
                if time.monotonic() > until:
                    break
        except ModelMismatch as found:
            raise await shrink(context, found, SHRINK_SECONDS) from found.__cause__


async def _random_program(program: CallSequence, generator: random.Random) -> None:
    chooser = RandomChoices(generator)
    methods = available_strategies(program.context.capabilities)
    # Swarms: with some operations missing and others frequent, programs reach states that a steady
    # mixture does not.
    weights = [one.weight * generator.choice((0, 1, 1, 2, 4)) for one in methods.values()]
    program.universe.keys = generator.sample(KEYS, generator.choice((1, 2, 2, 4)))
    for _ in range(generator.choice((1, 2))):
        await program.call(draw_call(chooser, program.universe, "start_run"))
    for number in range(LENGTH):
        if generator.random() < 0.15:
            program.advance_clock(draw_clock_advance(chooser, program.universe))
        [method] = generator.choices(list(methods), weights)
        await program.call(draw_call(chooser, program.universe, method))
        if number % LOOK_EVERY == 0:
            await program.compare_state()
    await program.finish()


@check("CON-1", needs=[Capability.VIRTUAL_CLOCK], kind=Kind.MODEL)
async def machine_agrees_with_the_model(context: CheckContext) -> None:
    """Programs that Hypothesis draws and varies get the model's answers, and leave what it leaves."""
    line = _Line()
    session = _Session(context, line, until=time.monotonic() + context.profile.of(2, 8, 300))
    machine = seed(context.seed)(_machine_of(session))
    chosen = settings(
        max_examples=context.profile.of(4, 60, 2000),
        stateful_step_count=context.profile.of(30, 40, 50),
        database=None,
        deadline=None,
        derandomize=False,
        print_blob=False,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    async with session.stack:
        with _no_traces():
            await line.serve(asyncio.ensure_future(asyncio.to_thread(_run, machine, chosen)))
    if session.found is not None:
        raise await shrink(context, session.found, SHRINK_SECONDS) from session.found.__cause__


@contextmanager
def _no_traces() -> Iterator[None]:
    """Let Hypothesis keep its notes in a folder that goes, not in the one where the suite was started."""
    before = storage_directory(intent_to_write=False).home_directory
    with tempfile.TemporaryDirectory(prefix="flowstore-hypothesis-") as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(before)


def _run(machine: Any, chosen: settings) -> None:
    """In the thread; what it finds is kept by the session."""
    try:
        run_state_machine_as_test(machine, settings=chosen)
    except (ModelMismatch, HypothesisException, _Enough, _Abandoned):
        # A failure was kept when it came. Hypothesis itself complains of failures that do not come
        # again; the one that was seen stands all the same.
        return


class _Abandoned(BaseException):
    """The check has ended, so its thread must."""


class _Enough(BaseException):
    """The time for drawing, or for shrinking, is over."""


class _Line:
    """Lets a thread, as Hypothesis is not asynchronous, have coroutines awaited by the check's own task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._asked: asyncio.Queue[tuple[Callable[[], Coroutine[Any, Any, Any]], Future[Any]] | None]
        self._asked = asyncio.Queue()
        """What is asked; None says that the thread has ended."""
        self._closed = False

    def ask(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """In the thread: what the coroutine returned or raised."""
        answer: Future[T] = Future()
        self._loop.call_soon_threadsafe(self._put, make, answer)
        return answer.result()

    def _put(self, make: Callable[[], Coroutine[Any, Any, Any]], answer: Future[Any]) -> None:
        if self._closed:
            answer.set_exception(_Abandoned())
        else:
            self._asked.put_nowait((make, answer))

    async def serve(self, work: asyncio.Future[None]) -> None:
        """In the task: await what is asked, until the work in the thread is done."""
        work.add_done_callback(lambda _: self._asked.put_nowait(None))
        try:
            while (asked := await self._asked.get()) is not None:
                await self._answer(*asked)
            work.result()
        finally:
            self._closed = True
            while not self._asked.empty():
                if (asked := self._asked.get_nowait()) is not None:
                    asked[1].set_exception(_Abandoned())

    async def _answer(self, make: Callable[[], Coroutine[Any, Any, Any]], answer: Future[Any]) -> None:
        try:
            answer.set_result(await make())
        except Exception as error:  # noqa: BLE001 - goes to the thread, which asked
            answer.set_exception(error)
        except BaseException:
            # The thread must not wait for ever, whatever came.
            answer.set_exception(_Abandoned())
            raise


@dataclass
class _Session:
    """All programs of one check: where they run, and the shortest that failed."""

    context: CheckContext
    line: _Line
    until: float
    """When to stop drawing."""
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    namespace: CheckContext | None = None
    programs: int = 0
    found: ModelMismatch | None = None
    signature: Signature | None = None
    """Of the first violation."""

    async def begin(self) -> CallSequence:
        """A program in a namespace in which nothing has failed."""
        if self.namespace is None:
            self.namespace = await self.stack.enter_async_context(self.context.new_namespace())
        self.programs += 1
        return CallSequence.on(self.namespace, self.programs)

    def keep(self, found: ModelMismatch) -> bool:
        """Keep the shortest program that shows the first violation, and give the namespace up.

        False for another violation.
        """
        self.namespace = None
        if self.signature is None:
            self.until = time.monotonic() + SHRINK_SECONDS
            self.signature = found.signature
        if not self.signature.covers(found.signature):
            return False
        if self.found is None or len(found.entries) < len(self.found.entries):
            self.found = found
        return True


class _Machine(RuleBasedStateMachine):
    """One program that Hypothesis draws."""

    session: _Session
    """Set by the class that is made for each check."""

    def __init__(self) -> None:
        super().__init__()
        if time.monotonic() > self.session.until:
            raise _Enough
        self.failed = False
        self.program = self.session.line.ask(self.session.begin)

    def run(self, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            self.session.line.ask(make)
        except ModelMismatch as found:
            self.failed = True
            if not self.session.keep(found):
                # Hypothesis takes every Disagreement for the same failure, and would follow this one.
                reject()
            raise

    def draw(self, data: st.DataObject, method: str) -> None:
        call = draw_call(_Drawn(data), self.program.universe, method)
        self.run(lambda: self.program.call(call))

    def look(self) -> None:
        self.run(self.program.compare_state)

    def teardown(self) -> None:
        if not self.failed and self.program.entries:
            self.run(self.program.finish)


def _machine_of(session: _Session) -> type[_Machine]:
    """The machine for one check: a rule for each method, several times over for those that lead further."""
    rules: dict[str, Any] = {"session": session, "first_calls": initialize(data=st.data())(_first_calls)}
    for method, drawable in available_strategies(session.context.capabilities).items():
        for number in range(drawable.weight):
            rules[f"{method}_{number}"] = rule(data=st.data())(_draw(method))
    for number in range(8):
        rules[f"jump_{number}"] = rule(data=st.data())(_jump)
        rules[f"look_{number}"] = rule()(_look)
    return type("Machine", (_Machine,), rules)


def _draw(method: str) -> Callable[[Any, st.DataObject], None]:
    def draw(self: Any, data: st.DataObject) -> None:
        self.draw(data, method)

    return draw


def _first_calls(self: Any, data: st.DataObject) -> None:
    for _ in range(_Drawn(data).one_of((1, 2, 0))):
        self.draw(data, "start_run")


def _jump(self: Any, data: st.DataObject) -> None:
    self.program.advance_clock(draw_clock_advance(_Drawn(data), self.program.universe))


def _look(self: Any) -> None:
    self.look()


class _Drawn:
    """A Chooser that asks Hypothesis."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def one_of(self, options: Sequence[T]) -> T:
        # By index: what the options are may depend on the state, how many of them rarely does.
        return options[self._data.draw(st.integers(0, len(options) - 1))]
