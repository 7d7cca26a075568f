"""Runs: their records and the promises of starting, completing and listing them (RUN, QRY)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, Protocol
from uuid import UUID

from flowstore_core.errors import InvalidArgumentError
from flowstore_core.redaction import redacted_repr
from flowstore_core.status import RunStatus, StepStatus
from flowstore_core.steps import FlowStepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """A place in the order of QRY-1: that of a run which started then and has this id.

    A value, not a pointer: it stays what it is when the run goes, and any two values make one. Pages
    that each begin behind the last run of the page before (``after=page.runs[-1].position``) cost the
    same however far down they lie, and miss and repeat nothing while runs come and go.
    """

    started_at: datetime
    run_id: UUID

    def __str__(self) -> str:
        """One word that ``parse`` reads: the moment in UTC, an underscore, the id."""
        moment = self.started_at.astimezone(UTC).replace(tzinfo=None)
        return f"{moment.isoformat(timespec='microseconds')}Z_{self.run_id}"

    @classmethod
    def parse(cls, text: str) -> RunPosition:
        """The position that ``str`` wrote. Raises InvalidArgumentError."""
        moment, _, number = text.rpartition("_")
        try:
            started_at = datetime.fromisoformat(moment)
            if started_at.utcoffset() is not None:
                return cls(started_at=started_at.astimezone(UTC), run_id=UUID(number))
        except (ValueError, OverflowError):
            # One answer for all that is wrong with it.
            pass
        raise InvalidArgumentError(
            "position", "a moment in UTC, an underscore and a run id, such as 2026-03-14T12:00:00Z_RUN-ID"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRunRecord:
    """One run as it was when it was read (RUN-3)."""

    __repr__ = redacted_repr

    run_id: UUID
    flow_id: UUID
    flow_name: str
    status: RunStatus
    trigger_key: str
    trigger_data: str | None
    job_id: str | None
    started_at: datetime
    completed_at: datetime | None
    """None while the run is Running."""
    source_run_id: UUID | None
    """The run that this one was derived from, if any; it need not be stored."""

    @property
    def position(self) -> RunPosition:
        """Where it stands in the order of QRY-1."""
        return RunPosition(started_at=self.started_at, run_id=self.run_id)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FlowRunDetail(FlowRunRecord):
    """A run with its steps and their attempts, from one snapshot (QRY-3)."""

    steps: tuple[FlowStepRecord, ...]
    """By started_at, then step_key."""


class RunPage(NamedTuple):
    """One page of runs, from one snapshot (QRY-3). Unpacks: ``runs, total = page``."""

    runs: tuple[FlowRunRecord, ...]
    total_count: int
    """The number of all matching runs."""


class RunLifecycle(Protocol):
    """Starting, completing and reading runs."""

    async def start_run(
        self,
        flow_id: UUID,
        flow_name: str,
        run_id: UUID,
        trigger_key: str,
        *,
        trigger_data: str | None = None,
        job_id: str | None = None,
        source_run_id: UUID | None = None,
    ) -> FlowRunRecord:
        """Store a new Running run and return it (RUN-1).

        Raises RunAlreadyExistsError, changing nothing, when run_id is stored already. Atomic.
        """
        ...

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus | str,
        *,
        expected: Mapping[str, StepStatus | str] | None = None,
    ) -> bool:
        """Move a Running run to Succeeded, Failed or Cancelled; True for the one call that did (RUN-2).

        False ever after: the first terminal status wins. With ``expected``, every step_key with its
        status, it is also False, and nothing changes, unless the statuses are exactly these and no
        live claim and no dispatch lies on a key outside them: a run cannot finish under a step that
        was just retried or dispatched. Check and change are one atomic act.

        Raises RunNotFoundError.
        """
        ...

    async def get_runs(
        self,
        flow_id: UUID | None = None,
        *,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
    ) -> Sequence[FlowRunRecord]:
        """Runs, of one flow if given, newest first: started_at, then run_id, descending (QRY-1).

        With ``after`` only those strictly behind that position; ``skip`` counts from there.
        """
        ...

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        """A run with steps and attempts from one snapshot (QRY-3); None if unknown."""
        ...

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        """The status of a run; None if unknown."""
        ...

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        """The Running runs in the order of QRY-1, at most ``take`` (None: all) (QRY-6)."""
        ...

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        """The runs whose source_run_id this is, one generation only, in the order of QRY-1 (QRY-6)."""
        ...


class RunPages(Protocol):
    """Paging and searching runs; part of capability DASHBOARD."""

    async def get_runs_page(
        self,
        flow_id: UUID | None = None,
        *,
        status: RunStatus | str | None = None,
        after: RunPosition | None = None,
        skip: int = 0,
        take: int = 50,
        search: str | None = None,
    ) -> RunPage:
        """One page of the matching runs and the count of all of them, from one snapshot (QRY-1 to 3).

        ``after`` and ``skip`` are as in get_runs; the count is that of all that match, wherever the
        page begins.

        ``search`` is a plain substring: ASCII letters match in either case, everything else exactly.
        It looks at the run id (hyphenated), flow name, trigger key, status and job id of the run, and
        at the keys, error messages and outputs of what get_run_detail would show; of error messages
        and outputs at the first 64 KiB of their UTF-8. An empty search filters nothing.
        """
        ...


SEARCHED_BYTES = 64 * 1024
"""How much of the UTF-8 of each error message and output search looks at (QRY-2)."""

_FOLD = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def fold_ascii(text: str) -> str:
    """Lower-case the ASCII letters and nothing else (QRY-2)."""
    return text.translate(_FOLD)


def search_matches(needle: str, short: Sequence[str | None], long: Sequence[str | None]) -> bool:
    """Whether a folded needle lies in any of the short texts, or in the searched part of the long ones.

    The rule of QRY-2 for backends that have no query language of their own.
    """
    if any(text is not None and needle in fold_ascii(text) for text in short):
        return True
    wanted = needle.encode()
    return any(text is not None and wanted in fold_ascii(text).encode()[:SEARCHED_BYTES] for text in long)
