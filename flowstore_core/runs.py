"""Runs: the records, and the operations that start, complete and list runs (RUN, QRY)."""

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
from flowstore_core.tags import RunTags


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPosition:
    """A position in the order of QRY-1, as a cursor for paging.

    A plain value: it stays valid when its run is deleted, and any datetime and id form one. With
    ``after=page.runs[-1].position`` the cost of a page does not grow with its depth, and the pages skip and
    repeat no run while others are added and deleted.
    """

    started_at: datetime
    run_id: UUID

    def __str__(self) -> str:
        """The form that ``parse`` accepts: the datetime in UTC, an underscore, the id."""
        moment = self.started_at.astimezone(UTC).replace(tzinfo=None)
        return f"{moment.isoformat(timespec='microseconds')}Z_{self.run_id}"

    @classmethod
    def parse(cls, text: str) -> RunPosition:
        """Parse the result of ``str``. Raises InvalidArgumentError."""
        moment, _, number = text.rpartition("_")
        try:
            started_at = datetime.fromisoformat(moment)
            if started_at.utcoffset() is not None:
                return cls(started_at=started_at.astimezone(UTC), run_id=UUID(number))
        except (ValueError, OverflowError):
            pass  # Every malformed text gets the same error.
        raise InvalidArgumentError(
            "position",
            "a datetime with offset, an underscore and a run id, such as 2026-03-14T12:00:00Z_RUN-ID",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRunRecord:
    """A run as of the read (RUN-3)."""

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
    """The run that this run was derived from, if any; it need not be stored."""
    tags: RunTags = ()
    """(key, value) of each tag, ordered by key (TAG-1)."""

    @property
    def position(self) -> RunPosition:
        """Its position in the order of QRY-1."""
        return RunPosition(started_at=self.started_at, run_id=self.run_id)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class FlowRunDetail(FlowRunRecord):
    """A run with its steps and their attempts, from one snapshot (QRY-3)."""

    steps: tuple[FlowStepRecord, ...]
    """Ordered by started_at, then step_key."""


class RunPage(NamedTuple):
    """One page of runs, from one snapshot (QRY-3). Unpacks: ``runs, total = page``."""

    runs: tuple[FlowRunRecord, ...]
    total_count: int
    """The number of all matching runs."""


class RunLifecycle(Protocol):
    """Operations that start, complete and read runs."""

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
        tags: Mapping[str, str] | None = None,
    ) -> FlowRunRecord:
        """Store a new Running run and return it (RUN-1).

        ``tags`` (capability TAGS) are its first tags, at most 32 (TAG-1).

        Atomic. Raises RunAlreadyExistsError, changing nothing, if run_id is already stored.
        """
        ...

    async def complete_run(
        self,
        run_id: UUID,
        status: RunStatus | str,
        *,
        expected: Mapping[str, StepStatus | str] | None = None,
    ) -> bool:
        """Set a Running run to Succeeded, Failed or Cancelled; True for the one call that did (RUN-2).

        The first terminal status wins: every later call returns False. ``expected`` maps every step_key to
        its status. With it, the call changes nothing and returns False unless the run's statuses are
        exactly these and no other key has a live claim or a dispatch: a run cannot complete while one of
        its steps was just retried or dispatched. Check and change are atomic.

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
        tags: Mapping[str, str] | None = None,
    ) -> Sequence[FlowRunRecord]:
        """Runs, newest first: by started_at, then run_id, descending (QRY-1).

        ``flow_id`` selects the runs of one flow. ``after`` starts strictly after a position; ``skip`` counts
        from there. ``tags`` (capability TAGS) selects the runs that have all of these tags (TAG-3).
        """
        ...

    async def get_run(self, run_id: UUID) -> FlowRunRecord | None:
        """A run without its steps (QRY-3); None if unknown. The cost does not grow with the run."""
        ...

    async def get_run_detail(self, run_id: UUID) -> FlowRunDetail | None:
        """A run with its steps and attempts, from one snapshot (QRY-3); None if unknown."""
        ...

    async def get_run_status(self, run_id: UUID) -> RunStatus | None:
        """The status of a run; None if unknown."""
        ...

    async def get_active_runs(self, *, take: int | None = None) -> Sequence[FlowRunRecord]:
        """The Running runs, in the order of QRY-1, at most ``take`` (None: all) (QRY-6)."""
        ...

    async def get_derived_runs(
        self, source_run_id: UUID, *, take: int | None = None
    ) -> Sequence[FlowRunRecord]:
        """The runs with this source_run_id, one generation only, in the order of QRY-1 (QRY-6)."""
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
        tags: Mapping[str, str] | None = None,
    ) -> RunPage:
        """One page of the matching runs and the number of all matching runs (QRY-1, QRY-2, QRY-3, TAG-3).

        Page and number come from one snapshot. ``after`` and ``skip`` work as in get_runs and do not affect
        the number. ``tags`` works as in get_runs.

        ``search`` is a plain substring: ASCII letters match in either case, all other characters exactly.
        It is searched for in the run id (hyphenated), flow name, trigger key, status and job id of the run,
        and in the step keys, error messages and outputs of its get_run_detail; in error messages and
        outputs only within the first 64 KiB of their UTF-8. An empty search matches every run.
        """
        ...


SEARCHED_BYTES = 64 * 1024
"""Length of the searched part of an error message or output, in bytes of UTF-8 (QRY-2)."""

_FOLD = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def fold_ascii(text: str) -> str:
    """Lower-case ASCII letters only (QRY-2)."""
    return text.lower() if text.isascii() else text.translate(_FOLD)


def search_matches(needle: str, short: Sequence[str | None], long: Sequence[str | None]) -> bool:
    """Whether any short text, or the searched part of any long one, contains the folded needle (QRY-2).

    For backends without a query language.
    """
    if any(text is not None and needle in fold_ascii(text) for text in short):
        return True
    wanted = needle.encode()
    return any(text is not None and wanted in fold_ascii(text).encode()[:SEARCHED_BYTES] for text in long)
