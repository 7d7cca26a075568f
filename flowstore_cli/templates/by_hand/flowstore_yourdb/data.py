"""The stored data: dictionaries in this process, until you replace them by your database.

Every operation checks first, writes last and awaits nothing in between, so it is atomic (CON-1). In a
database each operation is one transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from flowstore_core import (
    FlowRunRecord,
    FlowStepAttemptRecord,
    RunNotFoundError,
    StepClaim,
    StepDispatch,
    StepStatus,
)


@dataclass
class Step:
    """A step key of a run. Claims and dispatches may exist before the step has started."""

    attempts: list[FlowStepAttemptRecord] = field(default_factory=list)
    claim: StepClaim | None = None
    dispatch: StepDispatch | None = None
    started_owner: str | None = None
    """The owner that started the newest attempt under its present claim (STP-3)."""

    @property
    def status(self) -> StepStatus | None:
        """None if the step has not started."""
        return self.attempts[-1].status if self.attempts else None

    @property
    def is_terminal(self) -> bool:
        return self.status is not None and self.status.is_terminal


@dataclass
class Run:
    """A run with its steps."""

    record: FlowRunRecord
    steps: dict[str, Step] = field(default_factory=dict)


@dataclass
class Data:
    """The data of one namespace."""

    runs: dict[UUID, Run] = field(default_factory=dict)
    keys: dict[tuple[UUID, str, str], UUID] = field(default_factory=dict)
    """The run of each idempotency key, by flow, trigger and key (IDM-1)."""


class OpenData:
    """One open of a namespace, with its clock. Base class of the noun classes."""

    def __init__(self, data: Data, now: Callable[[], datetime]) -> None:
        self._data = data
        self._now = now

    def _run(self, run_id: UUID) -> Run:
        """The run. Raises RunNotFoundError, for operations that need an existing run (UNK)."""
        run = self._data.runs.get(run_id)
        if run is None:
            raise RunNotFoundError(run_id)
        return run

    def _steps(self, run_id: UUID) -> Mapping[str, Step]:
        """The steps by key, ordered by key; empty for an unknown run (UNK)."""
        run = self._data.runs.get(run_id)
        return {} if run is None else dict(sorted(run.steps.items()))
