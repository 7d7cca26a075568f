"""What is wrong with a store, or may become so: the records of ``flowstore doctor``.

What any store can be asked, the command asks through the protocols. What only a backend knows, such as
the settings of its server or the permissions of its file, it learns from two optional members of the
backend's descriptor::

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]: ...
    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]: ...

``diagnose`` changes nothing, and works also where the store cannot be opened: that is when it is needed
most. Unless ``thorough`` it costs a few seconds at most, however large the store is. ``fix`` gets those of
its own findings that say with ``fix`` what would be done, does that, and answers what it did, a line for
each; it must be safe while others use the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    NOTE = "note"
    """Good to know; nothing is wrong."""
    WARNING = "warning"
    """Something stands still, or may be lost one day."""
    ERROR = "error"
    """What the contract promises is not kept, or the store cannot be used."""


# In order, the worst last.
SEVERITIES = (Severity.NOTE, Severity.WARNING, Severity.ERROR)

MAX_EXAMPLES = 3
"""So many examples are enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """One thing that is wrong, what it means, and what to do about it.

    No text holds a password or the content of a row; ``examples`` may hold run ids and step keys.
    """

    code: str
    """A stable name for scripts, such as ``fsync-off``."""
    severity: Severity
    summary: str
    """What was found, in a few words."""
    meaning: str
    """What follows from it."""
    remedy: str
    """What to do: a command as it is to be typed, where there is one."""
    count: int | None = None
    """How many, where it is a number of things."""
    examples: tuple[str, ...] = ()
    """The first few of them."""
    fix: str | None = None
    """What ``fix`` would do about it; None where nothing is safe to do by itself."""
    prevents_open: bool = False
    """Whether the store must not be opened before it is dealt with: opening would make it worse."""


def orphaned_rows(table: str, runs: Sequence[str], *, never_started: bool, limit: int) -> Diagnostic:
    """Rows of a table that belong to no run, for backends whose ``fix`` deletes them.

    ``runs`` are the run ids that they name, of which at most ``most`` were asked for. ``forgotten``: they
    were registered ahead of a run that never started (RET-4); else no call can have left them behind.
    """
    many = f"{len(runs):,}{' or more' if len(runs) == limit else ''}"
    if never_started:
        meaning = "Their run never started; they are older than an hour, so it will not. They take space."
        if table == "idempotency_keys":
            meaning += " A trigger with such a key starts the run under the id that is registered."
    else:
        meaning = (
            "No call leaves these behind: rows of table runs were deleted by hand, or a restore lost some."
        )
    return Diagnostic(
        code=f"orphans-{table.replace('_', '-')}",
        severity=Severity.WARNING,
        summary=f"{many} rows of table {table} belong to no run",
        meaning=meaning,
        remedy="flowstore doctor --fix",
        count=len(runs),
        examples=tuple(dict.fromkeys(runs))[:MAX_EXAMPLES],
        fix=f"delete the rows of table {table} that belong to no run",
    )


def wrong_counters(flows: int, days: int) -> Sequence[Diagnostic]:
    """Counters that differ from the stored runs, for backends whose ``fix`` corrects them.

    ``flows`` and ``days`` are the numbers of flows and days whose counters are wrong.
    """
    if not flows and not days:
        return ()
    return (
        Diagnostic(
            code="counters-wrong",
            severity=Severity.ERROR,
            summary=f"the counters of {flows:,} flows and {days:,} days differ from the stored runs",
            meaning="Totals of pages, dashboard statistics and timeseries are wrong. Rows were loaded or "
            "changed while triggers were off, a table was edited by hand, or a dump was restored in part.",
            remedy="flowstore doctor --fix",
            count=flows + days,
            fix="correct the counters by counting the runs",
        ),
    )
