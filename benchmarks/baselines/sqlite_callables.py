"""SQLite, one callable per call: a thread with one connection runs each call as one function.

The minimal cost of a call with one transaction per call: one trip to the thread, not one per statement. With
``grouped`` the thread commits all waiting functions together. Only busy_timeout orders the processes that
share the file.

InlineCalls runs each function in the thread of its caller and blocks the event loop: the time of SQLite and
the disk alone, a lower bound for any call.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

from benchmarks.baselines import sqlite_tables as tables
from benchmarks.workload import WrongAnswerError
from flowstore_core import StepStatus

T = TypeVar("T")

MAX_GROUP = 512

QueuedCall = tuple[Callable[[sqlite3.Connection], Any], "asyncio.Future[Any]"]
Result = tuple["asyncio.Future[Any]", Any, BaseException | None]


class _Calls(tables.Records):
    """The five calls of a lifecycle, each one function."""

    async def _call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        """Run it in one transaction."""
        raise NotImplementedError

    async def try_record_dispatch(self, run_id: UUID, step_key: str, /) -> bool:
        row = (run_id.bytes, step_key, time.time_ns())
        return await self._call(lambda db: db.execute(tables.DISPATCH, row).rowcount == 1)

    async def annotate_dispatch(self, run_id: UUID, step_key: str, job_id: str, /) -> None:
        row = (job_id, run_id.bytes, step_key)
        await self._call(lambda db: db.execute(tables.ANNOTATE, row))

    async def try_claim_step(self, run_id: UUID, step_key: str, /) -> bool:
        row = (run_id.bytes, step_key, time.time_ns())
        return await self._call(lambda db: db.execute(tables.CLAIM, row).rowcount == 1)

    async def record_step_start(
        self, run_id: UUID, step_key: str, step_type: str, /, *, input_json: str | None = None
    ) -> int:
        key = run_id.bytes

        def start(db: sqlite3.Connection) -> int:
            status = db.execute(tables.RUN_STATUS, (key,)).fetchone()
            if status is None or status[0] != "Running":
                raise WrongAnswerError("the run is not Running")
            attempt = int(db.execute(tables.NEXT_ATTEMPT, (key, step_key)).fetchone()[0])
            now = time.time_ns()
            db.execute(tables.ADD_ATTEMPT, (key, step_key, attempt, input_json, now))
            db.execute(tables.PUT_STEP, (key, step_key, step_type, attempt, input_json, now))
            return attempt

        return await self._call(start)

    async def record_step_complete(
        self,
        run_id: UUID,
        step_key: str,
        status: StepStatus,
        /,
        *,
        output_json: str | None = None,
        attempt: int | None = None,
    ) -> None:
        row = (status.value, output_json, time.time_ns(), run_id.bytes, step_key, attempt)

        def complete(db: sqlite3.Connection) -> None:
            if db.execute(tables.CLOSE_STEP, row).rowcount != 1:
                raise WrongAnswerError("no open attempt of that number")
            db.execute(tables.CLOSE_ATTEMPT, row)

        await self._call(complete)


class CallablePerCall(_Calls):
    def __init__(self, path: Path, *, grouped: bool) -> None:
        super().__init__(path)
        self._max_group = MAX_GROUP if grouped else 1
        self._queue: queue.SimpleQueue[QueuedCall | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work)
        self._thread.start()

    def stop(self) -> None:
        self._queue.put(None)
        self._thread.join()

    async def _call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put((function, future))
        return await future

    def _work(self) -> None:
        db = tables.connect(self._path)
        while (call := self._queue.get()) is not None:
            group = [call]
            ended = False
            while len(group) < self._max_group and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    ended = True
                    break
                group.append(following)
            results = self._transaction(db, group)
            self._loop.call_soon_threadsafe(_deliver, results)
            if ended:
                break
        db.close()

    @staticmethod
    def _transaction(db: sqlite3.Connection, group: list[QueuedCall]) -> list[Result]:
        try:
            db.execute("BEGIN IMMEDIATE")
            results: list[Result] = [(future, function(db), None) for function, future in group]
            db.execute("COMMIT")
        except (sqlite3.Error, WrongAnswerError) as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            return [(future, None, error) for _, future in group]
        return results


class InlineCalls(_Calls):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._db = tables.connect(path)

    def stop(self) -> None:
        self._db.close()

    async def _call(self, function: Callable[[sqlite3.Connection], T]) -> T:
        self._db.execute("BEGIN IMMEDIATE")
        result = function(self._db)
        self._db.execute("COMMIT")
        return result


def _deliver(results: list[Result]) -> None:
    for future, result, error in results:
        if future.cancelled():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


@asynccontextmanager
async def callable_per_call(
    path: Path, *, grouped: bool = False, create: bool = True
) -> AsyncIterator[CallablePerCall]:
    if create:
        tables.create(path)
    baseline = CallablePerCall(path, grouped=grouped)
    try:
        yield baseline
    finally:
        baseline.stop()


@asynccontextmanager
async def inline_calls(path: Path) -> AsyncIterator[InlineCalls]:
    tables.create(path)
    baseline = InlineCalls(path)
    try:
        yield baseline
    finally:
        baseline.stop()
