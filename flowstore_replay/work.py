"""The work of a replay: sleeping as long as was recorded, failing now and then, and a verifiable output."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from uuid import UUID

from flowstore_replay.engine import Job, WorkFailed
from flowstore_replay.wfformat import Task

INJECTED = "injected failure"
"""What a WorkFailed of a replay says."""


class RecordedWork:
    """Does each task again in the time it took, divided by ``speed``."""

    def __init__(self, run_ids: Sequence[UUID], *, speed: float, fail_rate: float, seed: int) -> None:
        self._speed = speed
        self._fail_rate = fail_rate
        self._seeds = {run_id: f"{seed}/{number}" for number, run_id in enumerate(run_ids)}

    async def __call__(self, job: Job) -> str:
        # Decided by the seed alone, not by the order in which workers happen to arrive.
        chance = random.Random(f"{self._seeds[job.run_id]}/{job.task.key}/{job.attempt}")
        seconds = job.task.seconds / self._speed
        if chance.random() < self._fail_rate:
            await asyncio.sleep(seconds * chance.random())
            raise WorkFailed(INJECTED)
        await asyncio.sleep(seconds)
        return output_of(job.task, job.inputs)


def output_of(task: Task, inputs: Mapping[str, str]) -> str:
    """The output of a task: a digest of its key and of its parents' outputs.

    So one wrong or missing output anywhere changes every output that follows from it.
    """
    digest = hashlib.sha256(task.key.encode())
    for parent in sorted(task.parents):
        digest.update(hashlib.sha256(inputs[parent].encode()).digest())
    return json.dumps({"task": task.key, "digest": digest.hexdigest()})
