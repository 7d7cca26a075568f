"""SQLite, executemany without callers: the upper bound for group commit.

256 lifecycles in one transaction: five calls of executemany (seven statements), one COMMIT, one sync; no
callers, no thread, no results. The benchmark of claims works in the same way.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter, time_ns

from benchmarks.baselines import sqlite_tables as tables
from benchmarks.results import Sample
from benchmarks.workload import INPUT, OUTPUT, Step, WrongAnswerError, make_steps

BATCH = 256


class SetBased(tables.Records):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        tables.create(path)
        self._db = tables.connect(path)

    def close(self) -> None:
        self._db.close()

    async def lifecycles(self, amount: int) -> Sample:
        amount = -(-amount // BATCH) * BATCH
        run_ids, steps = make_steps(amount)
        await self.add_runs(run_ids)
        began = perf_counter()
        for start in range(0, amount, BATCH):
            self._lifecycles(steps[start : start + BATCH])
        seconds = perf_counter() - began
        return _counted(amount, seconds, await self.count_completed(run_ids))

    async def claims(self, amount: int) -> Sample:
        amount = -(-amount // BATCH) * BATCH
        run_ids, steps = make_steps(amount)
        await self.add_runs(run_ids)
        began = perf_counter()
        for start in range(0, amount, BATCH):
            self._db.execute("BEGIN IMMEDIATE")
            now = time_ns()
            self._db.executemany(
                tables.CLAIM, [(run_id.bytes, key, now) for run_id, key in steps[start : start + BATCH]]
            )
            self._db.execute("COMMIT")
        seconds = perf_counter() - began
        return _counted(amount, seconds, await self.count_claimed(run_ids))

    def _lifecycles(self, steps: list[Step]) -> None:
        db, now = self._db, time_ns()
        keys = [(run_id.bytes, key) for run_id, key in steps]
        db.execute("BEGIN IMMEDIATE")
        db.executemany(tables.DISPATCH, [(*key, now) for key in keys])
        db.executemany(tables.ANNOTATE, [("job-4711", *key) for key in keys])
        db.executemany(tables.CLAIM, [(*key, now) for key in keys])
        db.executemany(tables.ADD_ATTEMPT, [(*key, 1, INPUT, now) for key in keys])
        db.executemany(tables.PUT_STEP, [(*key, "task", 1, INPUT, now) for key in keys])
        closing = [("Succeeded", OUTPUT, now, *key, 1) for key in keys]
        db.executemany(tables.CLOSE_STEP, closing)
        db.executemany(tables.CLOSE_ATTEMPT, closing)
        db.execute("COMMIT")


def _counted(amount: int, seconds: float, found: int) -> Sample:
    if found != amount:
        raise WrongAnswerError(f"expected {amount}, found {found}")
    return Sample(amount, rate=amount / seconds)
