"""The work of a replay: sleep for the recorded time, fail sometimes, return a verifiable output."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from uuid import UUID

from flowstore_replay.engine import StepContext, WorkFailed
from flowstore_replay.wfcommons import Task

INJECTED = "injected failure"
"""The message of every WorkFailed of a replay."""


class RecordedWork:
    """Simulates each task in its recorded time divided by ``speed``."""

    def __init__(self, run_ids: Sequence[UUID], *, speed: float, fail_rate: float, seed: int) -> None:
        self._speed = speed
        self._fail_rate = fail_rate
        self._seeds = {run_id: f"{seed}/{number}" for number, run_id in enumerate(run_ids)}

    async def __call__(self, context: StepContext) -> str:
        # Seeded per attempt, so that the order of workers has no influence.
        chance = random.Random(f"{self._seeds[context.run_id]}/{context.task.key}/{context.attempt}")
        seconds = context.task.seconds / self._speed
        if chance.random() < self._fail_rate:
            await asyncio.sleep(seconds * chance.random())
            raise WorkFailed(INJECTED)
        await asyncio.sleep(seconds)
        return output_of(context.task, context.inputs)


def output_of(task: Task, inputs: Mapping[str, str]) -> str:
    """The output of a task: a digest of its key and of its parents' outputs.

    A wrong or missing output changes the outputs of all descendants.
    """
    digest = hashlib.sha256(task.key.encode())
    for parent in sorted(task.parents):
        digest.update(hashlib.sha256(inputs[parent].encode()).digest())
    return json.dumps({"task": task.key, "digest": digest.hexdigest()})
