"""Whom to kill, and when: workers in the middle of a step, spread over the middle of the replay."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from flowstore_core import FlowRunDetail, StepStatus
from flowstore_replay.wfformat import Workflow

POLL = 0.1
"""Seconds between two looks of the parent at the store."""
LATE = 0.85
"""From this share of the work on one takes whom one gets."""


def kill_due(number: int, of: int) -> float:
    """At which share of the work the kill is due: evenly from 15 to 75 percent."""
    return 0.15 + 0.6 * (number + 0.5) / of


@dataclass(slots=True, kw_only=True)
class Held:
    """A step that a worker holds, as the parent saw it last."""

    run_id: UUID
    key: str
    attempt: int
    seen_at: float
    seconds: float
    """How long its work takes in all."""

    def left(self, now: float) -> float:
        return self.seconds - (now - self.seen_at)


class Grip:
    """What each worker has its hands on."""

    def __init__(self, workflow: Workflow, speed: float) -> None:
        self._seconds = {task.key: task.seconds / speed for task in workflow.tasks}
        self.held: dict[str, Held] = {}

    def see(self, details: Sequence[FlowRunDetail], alive: Collection[str]) -> None:
        """Take over what the store says now. The store knows workers by the job_id of their attempts."""
        before, self.held = self.held, {}
        now = time.monotonic()
        for detail in details:
            for step in detail.steps:
                last = step.attempts[-1]
                if last.completed_at is not None or last.job_id is None or last.job_id not in alive:
                    continue
                held = Held(
                    run_id=detail.run_id,
                    key=step.step_key,
                    attempt=last.attempt,
                    seen_at=now,
                    seconds=self._seconds.get(step.step_key, 0.0),
                )
                known = before.get(last.job_id)
                same = known and (known.run_id, known.key, known.attempt) == (
                    held.run_id,
                    held.key,
                    held.attempt,
                )
                self.held[last.job_id] = known if known and same else held

    def progress(self, unfinished: Sequence[FlowRunDetail], finished: int, runs: int) -> float:
        """The share of the recorded time that is behind us; a step under way counts by its part."""
        # A step without recorded time still counts for something.
        weights = {key: seconds + 0.001 for key, seconds in self._seconds.items()}
        whole = sum(weights.values())
        done = whole * finished
        for detail in unfinished:
            succeeded = (step for step in detail.steps if step.status is StepStatus.SUCCEEDED)
            done += sum(weights[step.step_key] for step in succeeded)
        now = time.monotonic()
        done += sum(held.seconds - max(0.0, held.left(now)) for held in self.held.values())
        return done / (whole * runs)

    def victim(self, progress: float, hit: Collection[tuple[UUID, str]]) -> str | None:
        """The worker with the most left to do, rather on a step that was not hit before.

        None while nobody's step is certain to last until the signal reaches it; late, anybody's will do.
        """
        now = time.monotonic()
        enough = 2 * POLL if progress < LATE else 0.0
        choice = [
            ((held.run_id, held.key) in hit, -held.left(now), name)
            for name, held in self.held.items()
            if held.left(now) > enough
        ]
        return min(choice)[2] if choice else None
