"""The synchronous store: threads, interruptions, closing, forks, contexts and errors.

No test here runs an event loop of its own, except where the test is about one.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import os
import queue
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import asyncpg
import pytest

from flowstore_core import (
    Capability,
    ConfigurationError,
    FlowStore,
    InvalidArgumentError,
    RunNotFoundError,
    RunStatus,
    StoreClosedError,
    StoreConfig,
    SyncFlowStore,
    UnknownBackendError,
    open_store,
    open_store_sync,
)
from flowstore_core.sync import loop_thread
from tests import sync_source
from tests.calls import FLOW

HOUR = timedelta(hours=1)
SECONDS = 60.0
"""The time limit of every wait, generous enough for a loaded machine."""
THREADS = 64

needs_watch = pytest.mark.needs(Capability.QUEUES, Capability.WATCH)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="requires os.fork")


def new_run(store: SyncFlowStore) -> UUID:
    run_id = uuid4()
    store.start_run(FLOW, "orders", run_id, "manual")
    return run_id


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition that other threads bring about."""
    pause = threading.Event()
    for _ in range(int(SECONDS / 0.01)):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition did not come true")


def calls_in_progress(store: SyncFlowStore) -> int:
    return sum(call.task is not None for call in list(store._thread._calls))


def loop_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "flowstore-sync"]


@contextmanager
def in_threads(functions: Iterable[Callable[[], Any]]) -> Iterator[list[Any]]:
    """Call each function in a thread of its own; at the end the list has their results or errors."""
    functions = list(functions)
    outcomes: list[Any] = [None] * len(functions)

    def work(number: int, function: Callable[[], Any]) -> None:
        try:
            outcomes[number] = function()
        except BaseException as error:  # noqa: BLE001 - asserted on by the test
            outcomes[number] = error

    threads = [
        threading.Thread(target=work, args=(number, function), daemon=True)
        for number, function in enumerate(functions)
    ]
    for thread in threads:
        thread.start()
    yield outcomes
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive()


class Recorder:
    """An observer of batches, each of which is one transaction of SQLite."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[int] = queue.SimpleQueue()

    def retried(self, operation: str, reason: str, wait: float) -> None: ...

    def batch(self, operation: str, size: int, waited: float) -> None:
        self.batches.put(size)

    def outcome_unknown(self, operation: str, resolution: str, calls: int) -> None: ...


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()

    def wrap(store: Any, config: StoreConfig, plugin: Any) -> Any:
        config.observers.append(recorder)
        return store

    monkeypatch.setattr("flowstore_core.open.wrap_store", wrap)
    return recorder


class InterruptError(Exception):
    """Raised by the signal handler of ``interruptible``, as Celery's soft time limit or Ctrl-C would."""


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let SIGUSR1 raise InterruptError in the main thread."""

    def interrupt(number: int, frame: object) -> None:
        raise InterruptError

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield
    signal.signal(signal.SIGUSR1, before)


def interrupt_main_thread() -> None:
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    signal.pthread_kill(main_thread, signal.SIGUSR1)


# The class


def test_the_operations_are_those_of_the_protocols() -> None:
    pytest.importorskip("ruff")
    assert sync_source.PATH.read_text(encoding="utf-8") == sync_source.generate(), (
        "the protocols have changed; run: python -m tests.sync_source"
    )


def test_the_class_has_every_member_of_the_protocol() -> None:
    def names(kind: type) -> set[str]:
        return {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}

    assert names(FlowStore) - {"aclose"} == names(SyncFlowStore) - {"close"}


def test_a_synchronous_and_an_asynchronous_store_share_a_database(namespace: str) -> None:
    async def read(run_id: UUID) -> object:
        async with open_store(namespace) as store:
            return await store.get_run_detail(run_id)

    with open_store_sync(namespace) as store:
        assert store.backend in repr(store)
        assert store.capabilities >= {Capability.LEASES}
        store.ping()
        run_id = new_run(store)
        assert store.try_claim_step(run_id, "a", owner="me", lease=HOUR)
        assert store.record_step_start(run_id, "a", "http", owner="me") == 1
        store.record_step_complete(run_id, "a", "Succeeded", output_json="{}", attempt=1)
        assert store.complete_run(run_id, RunStatus.SUCCEEDED, expected={"a": "Succeeded"})
        detail = store.get_run_detail(run_id)
        assert detail is not None
        assert detail.steps[0].output_json == "{}"
        if Capability.MULTI_PROCESS in store.capabilities:
            assert asyncio.run(read(run_id)) == detail
    assert repr(store) == f"<flowstore {store.backend}, synchronous (closed)>"


async def test_a_thread_with_a_running_event_loop_can_use_it(namespace: str) -> None:
    with open_store_sync(namespace) as store:
        assert store.get_run_status(new_run(store)) is RunStatus.RUNNING


# Threads


def test_exactly_one_of_64_threads_claims_a_step(namespace: str) -> None:
    with open_store_sync(namespace) as store:
        run_id = new_run(store)
        with in_threads([lambda: store.try_claim_step(run_id, "a")] * THREADS) as claims:
            pass
        assert sorted(claims) == [False] * (THREADS - 1) + [True]
    assert not loop_threads()


def claim_in_64_threads(store: SyncFlowStore, run_id: UUID, lock: AbstractContextManager[object]) -> None:
    """Claim 64 steps, one in each thread; no claim can end before all of them wait."""
    claims = [partial(store.try_claim_step, run_id, f"step {number}") for number in range(THREADS)]
    with ExitStack() as locked:
        locked.enter_context(lock)
        with in_threads(claims) as outcomes:
            wait_until(lambda: calls_in_progress(store) == THREADS)
            locked.close()
    assert outcomes == [True] * THREADS


MAX_TRANSACTIONS = THREADS / 8
"""Some calls are on their way when the lock is taken; all others form a few batches."""


def test_64_threads_share_the_transactions_of_sqlite(recorder: Recorder, tmp_path: Path) -> None:
    with open_store_sync(f"sqlite:///{tmp_path}/flows.db") as store:
        run_id = new_run(store)
        recorder.batches = queue.SimpleQueue()
        claim_in_64_threads(store, run_id, locked_sqlite(tmp_path / "flows.db"))
    sizes = [recorder.batches.get() for _ in range(recorder.batches.qsize())]
    assert sum(sizes) == THREADS
    assert len(sizes) <= MAX_TRANSACTIONS


def test_64_threads_share_the_transactions_of_postgresql(fresh: str) -> None:
    query = parse_qs(urlsplit(fresh).query)
    steps = f'"{query["schema"][0]}".steps'
    with asyncio.Runner() as runner, open_store_sync(fresh) as store:
        connecting = asyncpg.connect(host=query["host"][0], user="postgres", database="postgres")
        admin = runner.run(connecting)

        @contextmanager
        def locked() -> Iterator[None]:
            runner.run(admin.execute(f"BEGIN; LOCK TABLE {steps}"))
            yield
            runner.run(admin.execute("COMMIT"))

        run_id = new_run(store)
        claim_in_64_threads(store, run_id, locked())
        # xmin is the transaction that wrote the row.
        count = f"SELECT count(*), count(DISTINCT xmin::text) FROM {steps}"
        rows, transactions = runner.run(admin.fetchrow(count))
        runner.run(admin.close())
    assert rows == THREADS
    assert transactions <= MAX_TRANSACTIONS


@contextmanager
def locked_sqlite(path: Path) -> Iterator[None]:
    """Keep every write to the database waiting."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        database.execute("ROLLBACK")
        database.close()


@needs_watch
def test_waiting_blocks_the_calling_thread_only(namespace: str) -> None:
    with open_store_sync(namespace) as store:
        run_id = new_run(store)
        with in_threads([lambda: store.wait_for_run(run_id, timeout=HOUR)] * 8) as statuses:
            wait_until(lambda: calls_in_progress(store) == 8)
            assert store.complete_run(run_id, RunStatus.FAILED)
        assert statuses == [RunStatus.FAILED] * 8


def test_its_own_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrapper:
        """Calls the synchronous store, as a log handler or an observer might."""

        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def ping(self) -> None:
            for call in (store.get_runs, store.close):
                with pytest.raises(ConfigurationError, match="cannot be used in its own thread"):
                    call()

    monkeypatch.setattr("flowstore_core.open.wrap_store", lambda store, config, plugin: Wrapper(store))
    with open_store_sync("memory://") as store:
        store.ping()


def test_the_context_of_the_caller_travels_with_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = ContextVar("variable", default="nothing")
    seen: list[str] = []

    class Wrapper:
        def __init__(self, store: Any) -> None:
            self._store = store

        def __getattr__(self, name: str) -> Any:
            return getattr(self._store, name)

        async def ping(self) -> None:
            seen.append(variable.get())
            variable.set("changed by the call")

    monkeypatch.setattr("flowstore_core.open.wrap_store", lambda store, config, plugin: Wrapper(store))
    with open_store_sync("memory://") as store:

        def ping(value: str) -> str:
            variable.set(value)
            store.ping()
            return variable.get()

        values = [f"thread {number}" for number in range(8)]
        with in_threads([partial(ping, value) for value in values]) as outcomes:
            pass
        store.ping()
    assert sorted(seen) == sorted([*values, "nothing"])
    assert outcomes == values


# Errors


def test_an_error_has_its_class_its_attributes_and_the_frames_of_both_threads(namespace: str) -> None:
    run_id = uuid4()
    with open_store_sync(namespace) as store:
        with pytest.raises(RunNotFoundError, match=str(run_id)) as raised:
            store.try_claim_step(run_id, "a")
        with pytest.raises(InvalidArgumentError, match="skip must be") as invalid:
            store.get_runs(skip=-1)
    assert raised.value.run_id == run_id
    assert raised.value.__context__ is None
    assert invalid.value.argument == "skip"
    frames = traceback.extract_tb(raised.value.__traceback__)
    files = [Path(frame.filename).name for frame in frames]
    assert files[:4] == ["test_sync.py", "store.py", "loop_thread.py", "validated_store.py"]
    assert [frame.name for frame in frames][1:4] == ["try_claim_step", "call", "try_claim_step"]


def test_an_error_is_freed_without_the_garbage_collector() -> None:
    class MarkedError(RunNotFoundError):
        pass

    async def fail() -> None:
        raise MarkedError(uuid4())

    with open_store_sync("memory://") as store:
        gc.disable()
        try:
            try:
                store._thread.call(fail)
            except MarkedError as error:
                freed = weakref.ref(error)
            assert freed() is None
        finally:
            gc.enable()


@pytest.mark.parametrize(
    ("url", "error"),
    [("nowhere://", UnknownBackendError), ("memory://?size=3", ConfigurationError)],
)
def test_an_error_of_opening_leaves_no_thread(url: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        open_store_sync(url)
    assert not loop_threads()


# Interruptions


def test_an_interrupted_call_is_undone(recorder: Recorder, interruptible: None, tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    with open_store_sync(f"sqlite:///{path}") as store:
        run_id = new_run(store)
        recorder.batches = queue.SimpleQueue()

        def interrupt() -> None:
            # Without an owner: only the undo can release the claim (CON-4).
            assert recorder.batches.get(timeout=SECONDS) == 1
            interrupt_main_thread()

        with locked_sqlite(path), in_threads([interrupt]), pytest.raises(InterruptError):
            store.try_claim_step(run_id, "a")
    assert recorder.batches.qsize() == 1, "the claim was won, and released by one more transaction"
    with open_store_sync(f"sqlite:///{path}") as store:
        assert store.get_step_claims(run_id) == ()


@needs_watch
def test_an_interrupted_wait_ends_in_the_event_loop(namespace: str, interruptible: None) -> None:
    with open_store_sync(namespace) as store:
        run_id = new_run(store)

        def interrupt() -> None:
            wait_until(lambda: calls_in_progress(store) == 1)
            interrupt_main_thread()

        with in_threads([interrupt]), pytest.raises(InterruptError):
            store.wait_for_run(run_id, timeout=HOUR)
        assert calls_in_progress(store) == 0
        pending = store._thread.call(other_tasks)
        wait_until(lambda: all(task.done() for task in pending))


async def other_tasks() -> list[asyncio.Task[Any]]:
    return [task for task in asyncio.all_tasks() if "wait_for_run" in repr(task)]


@needs_watch
def test_a_signal_handler_can_call_the_store(namespace: str) -> None:
    with open_store_sync(namespace) as store:
        run_id = new_run(store)

        def complete(number: int, frame: object) -> None:
            store.complete_run(run_id, RunStatus.SUCCEEDED)

        def send() -> None:
            wait_until(lambda: calls_in_progress(store) == 1)
            interrupt_main_thread()

        before = signal.signal(signal.SIGUSR1, complete)
        try:
            with in_threads([send]):
                assert store.wait_for_run(run_id, timeout=HOUR) is RunStatus.SUCCEEDED
        finally:
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("moment", ["while the thread starts", "while the store opens"])
def test_an_interrupted_opening_closes_the_store(
    interruptible: None, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    is_opening, may_open = threading.Event(), threading.Event()
    start = threading.Thread.start

    def start_slowly(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "flowstore-sync":
            threading.Event().wait(SECONDS)

    def wrap(store: Any, config: StoreConfig, plugin: Any) -> Any:
        is_opening.set()
        assert may_open.wait(SECONDS)
        return store

    def interrupt() -> None:
        assert is_opening.wait(SECONDS)
        interrupt_main_thread()

    monkeypatch.setattr("flowstore_core.open.wrap_store", wrap)
    if moment == "while the thread starts":
        monkeypatch.setattr(threading.Thread, "start", start_slowly)
    with in_threads([interrupt]), pytest.raises(InterruptError):
        open_store_sync("memory://")
    (thread,) = loop_threads()
    may_open.set()
    thread.join(SECONDS)
    assert not thread.is_alive()


# The end


def test_a_closed_store_refuses_calls_and_checks_arguments_first(namespace: str) -> None:
    store = open_store_sync(namespace)
    with in_threads([store.close] * 4) as outcomes:
        pass
    assert outcomes == [None] * 4
    store.close()
    for call in (store.ping, store.get_runs, lambda: store.get_run_status(uuid4())):
        with pytest.raises(StoreClosedError):
            call()
    with pytest.raises(InvalidArgumentError):
        store.get_runs(skip=-1)


@needs_watch
def test_closing_ends_waiting_calls(namespace: str) -> None:
    store = open_store_sync(namespace)
    with in_threads([lambda: store.wait_for_steps(["default"], timeout=HOUR)] * 8) as outcomes:
        wait_until(lambda: calls_in_progress(store) == 8)
        store.close()
    assert [type(outcome) for outcome in outcomes] == [StoreClosedError] * 8


def test_calls_that_race_with_closing_end(namespace: str) -> None:
    store = open_store_sync(namespace)
    run_id = new_run(store)

    def call_until_closed(number: int) -> int:
        for made in range(1_000_000):
            try:
                assert store.try_claim_step(run_id, f"{number}-{made}")
            except StoreClosedError:
                return made
        raise AssertionError("the store was not closed")

    callers = [partial(call_until_closed, number) for number in range(16)]
    with in_threads(callers) as outcomes:
        wait_until(lambda: len(store.get_claimed_step_keys(run_id)) > 16)
        store.close()
    assert all(isinstance(outcome, int) for outcome in outcomes), outcomes


def test_a_call_that_never_ends_ends_with_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_thread, "CLOSING_SECONDS", 0.01)
    store = open_store_sync("memory://")
    with in_threads([lambda: store._thread.call(asyncio.Event().wait)]) as outcomes:
        wait_until(lambda: calls_in_progress(store) == 1)
        store.close()
    assert isinstance(outcomes[0], StoreClosedError)


def test_a_call_that_starts_too_late_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store_sync("memory://")
    # As if the loop had ended after the call was scheduled.
    monkeypatch.setattr(loop_thread._Call, "start", lambda call: None)
    with in_threads([store.ping, lambda: store.get_runs(skip=-1)]) as outcomes:
        wait_until(lambda: len(store._thread._calls) == 2)
        store.close()
    assert [type(outcome) for outcome in outcomes] == [StoreClosedError, InvalidArgumentError]


def test_a_call_that_ends_while_the_store_closes_has_its_result() -> None:
    store = open_store_sync("memory://")

    async def end_late() -> str:
        await store._thread._stopping.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        return "the result"

    with in_threads([lambda: store._thread.call(end_late)]) as outcomes:
        wait_until(lambda: calls_in_progress(store) == 1)
        store.close()
    assert outcomes == ["the result"]


def test_an_error_of_closing_is_raised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store_sync("memory://")

    async def fail() -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(store._store, "aclose", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        store.close()
    store.close()


def test_a_store_that_is_not_closed_warns_and_ends(namespace: str) -> None:
    store = open_store_sync(namespace)
    new_run(store)
    (thread,) = loop_threads()
    with pytest.warns(ResourceWarning, match="unclosed <flowstore"):
        del store
    thread.join(SECONDS)
    assert not thread.is_alive()


@needs_fork
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_process_is_refused_and_does_not_close_the_store(namespace: str) -> None:
    with open_store_sync(namespace) as store:
        run_id = new_run(store)
        reading, writing = os.pipe()
        if (child := os.fork()) == 0:
            try:
                # A call that hangs ends with the child.
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(int(SECONDS))
                os.write(writing, json.dumps(errors_in_child(store)).encode())
            finally:
                os._exit(0)
        os.close(writing)
        os.waitpid(child, 0)
        errors = json.loads(os.read(reading, 10_000))
        os.close(reading)
        assert errors == [
            "ConfigurationError: a store cannot be used in a forked process; open a new store there",
            "InvalidArgumentError: skip must be an int from 0 to 9,223,372,036,854,775,807; got one outside",
            None,
            None,
        ]
        assert store.try_claim_step(run_id, "a")


def errors_in_child(store: SyncFlowStore) -> list[str | None]:
    errors: list[str | None] = []
    for call in (store.ping, lambda: store.get_runs(skip=-1), store.close, store.__del__):
        try:
            call()
            errors.append(None)
        except Exception as error:  # noqa: BLE001 - reported to the parent
            errors.append(f"{type(error).__name__}: {error}")
    return errors


NEVER_CLOSED = """
import sys, threading
from datetime import timedelta
from flowstore import new_run_id, open_store_sync

store = open_store_sync(sys.argv[1])
run_id = new_run_id()
store.start_run(run_id, "orders", run_id, "manual")

def wait():
    while True:
        store.wait_for_run(run_id, timeout=timedelta(seconds=0.001))
        waited.set()

waited = threading.Event()
threading.Thread(target=wait, daemon=True).start()
waited.wait()
print(run_id)
"""

INTERRUPTED = """
import sys, threading
from datetime import timedelta
from flowstore import new_run_id, open_store_sync

with open_store_sync(sys.argv[1]) as store:
    run_id = new_run_id()
    store.start_run(run_id, "orders", run_id, "manual")
    announcing = threading.Event()

    def announce():
        while not any(call.task for call in list(store._thread._calls)):
            announcing.wait(0.01)
        print("waiting", flush=True)

    threading.Thread(target=announce).start()
    store.wait_for_run(run_id, timeout=timedelta(hours=1))
"""


@needs_watch
def test_a_program_may_end_without_closing(namespace: str) -> None:
    command = [sys.executable, "-c", NEVER_CLOSED, namespace]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with open_store_sync(namespace) as store:
        if Capability.DURABLE in store.capabilities:
            assert store.get_run_status(UUID(done.stdout.strip())) is RunStatus.RUNNING


@needs_watch
def test_ctrl_c_ends_a_program_that_waits(namespace: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, namespace]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "waiting\n"
            program.send_signal(signal.SIGINT)
            _, stderr = program.communicate(timeout=SECONDS)
        finally:
            program.kill()
    assert program.returncode == -signal.SIGINT
    assert stderr.endswith("KeyboardInterrupt\n")
    assert "loop_thread.py" in stderr
