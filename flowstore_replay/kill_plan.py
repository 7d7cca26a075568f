"""When to kill a worker, and which: in the middle of a step, spread over the middle of the replay."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from flowstore_core import FlowRunDetail, StepStatus
from flowstore_replay.wfcommons import Workflow

POLL_INTERVAL = 0.1
"""Seconds between two polls of the store by the parent process."""
FINAL_PHASE = 0.85
"""After this fraction of the replay, any busy worker is an acceptable victim."""


def kill_threshold(number: int, of: int) -> float:
    """The progress at which kill ``number`` is due; kills spread evenly from 15 to 75 percent."""
    return 0.15 + 0.6 * (number + 0.5) / of


@dataclass(slots=True, kw_only=True)
class HeldStep:
    """A step that a worker executes, as of the parent's latest poll."""

    run_id: UUID
    key: str
    attempt: int
    seen_at: float
    """Monotonic time of the first poll that found the attempt."""
    seconds: float
    """Duration of the step's work."""

    @property
    def attempt_id(self) -> tuple[UUID, str, int]:
        return self.run_id, self.key, self.attempt

    def remaining(self, now: float) -> float:
        return self.seconds - (now - self.seen_at)


class StepHolders:
    """The step that each worker executes."""

    def __init__(self, workflow: Workflow, speed: float) -> None:
        self._seconds = {task.key: task.seconds / speed for task in workflow.tasks}
        self.held: dict[str, HeldStep] = {}

    def update(self, details: Sequence[FlowRunDetail], alive: Collection[str]) -> None:
        """Replace the state by the store's. The store knows workers by the job_id of their attempts."""
        before, self.held = self.held, {}
        now = time.monotonic()
        for detail in details:
            for step in detail.steps:
                last = step.attempts[-1]
                if last.completed_at is not None or last.job_id is None or last.job_id not in alive:
                    continue
                held = HeldStep(
                    run_id=detail.run_id,
                    key=step.step_key,
                    attempt=last.attempt,
                    seen_at=now,
                    seconds=self._seconds.get(step.step_key, 0.0),
                )
                known = before.get(last.job_id)
                is_same = known is not None and known.attempt_id == held.attempt_id
                self.held[last.job_id] = known if known is not None and is_same else held

    def progress(self, unfinished: Sequence[FlowRunDetail], finished: int, runs: int) -> float:
        """The completed fraction of the recorded time; a step in progress counts partially."""
        # A step without recorded time gets a small weight too.
        weights = {key: seconds + 0.001 for key, seconds in self._seconds.items()}
        run_weight = sum(weights.values())
        completed = run_weight * finished
        for detail in unfinished:
            succeeded = (step for step in detail.steps if step.status is StepStatus.SUCCEEDED)
            completed += sum(weights[step.step_key] for step in succeeded)
        now = time.monotonic()
        completed += sum(held.seconds - max(0.0, held.remaining(now)) for held in self.held.values())
        return completed / (run_weight * runs)

    def victim(self, progress: float, killed_steps: Collection[tuple[UUID, str]]) -> str | None:
        """The worker with the most work remaining, preferring a step whose worker was not killed before.

        None while no step is certain to last until the signal arrives. In the final phase any busy worker
        is accepted.
        """
        now = time.monotonic()
        min_remaining = 2 * POLL_INTERVAL if progress < FINAL_PHASE else 0.0
        candidates = [
            ((held.run_id, held.key) in killed_steps, -held.remaining(now), name)
            for name, held in self.held.items()
            if held.remaining(now) > min_remaining
        ]
        return min(candidates)[2] if candidates else None
