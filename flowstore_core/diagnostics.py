"""Problems of a store, as ``flowstore doctor`` reports them.

The command finds problems of any store through the protocols. Problems that only a backend can detect, such
as server settings or file permissions, come from ``Diagnosable.diagnose`` and ``Fixable.fix`` of the
backend's descriptor; see ``flowstore_core.backend``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """The severity of a diagnostic."""

    NOTE = "note"
    """Information; nothing is wrong."""
    WARNING = "warning"
    """Work has stalled, or data is at risk."""
    ERROR = "error"
    """A promise of the contract is broken, or the store cannot be used."""


# From mildest to worst.
SEVERITIES = (Severity.NOTE, Severity.WARNING, Severity.ERROR)

MAX_EXAMPLES = 3
"""Maximum number of examples in a diagnostic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnostic:
    """A problem, its consequence and its remedy.

    No text contains a password or the content of a row; ``examples`` may contain run ids and step keys.
    """

    code: str
    """A stable name for scripts, such as ``fsync-off``."""
    severity: Severity
    summary: str
    """The problem, in a few words."""
    meaning: str
    """The consequence."""
    remedy: str
    """The remedy: a complete command if there is one."""
    count: int | None = None
    """The number of affected items, if they can be counted."""
    examples: tuple[str, ...] = ()
    """The first of the affected items, at most MAX_EXAMPLES."""
    fix: str | None = None
    """The action that ``Fixable.fix`` would take; None if no automatic action is safe."""
    prevents_open: bool = False
    """True if opening the store before the problem is solved would make it worse."""


def orphaned_rows(table: str, runs: Sequence[str], *, never_started: bool, limit: int) -> Diagnostic:
    """Report rows of a table that belong to no run, for backends whose ``fix`` deletes them.

    ``runs`` are the run ids of these rows, from a query limited to ``limit`` rows. With ``never_started`` the
    rows were registered for a run that never started (RET-4); otherwise no operation leaves such rows behind.
    """
    many = f"{len(runs):,}{' or more' if len(runs) == limit else ''}"
    if never_started:
        meaning = "Their run did not start within an hour, so it never will. They take space."
        if table == "idempotency_keys":
            meaning += " A trigger with such a key starts the run under the registered id."
    else:
        meaning = "No operation leaves such rows: runs were deleted by hand, or a restore was incomplete."
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
    """Report counters that differ from the stored runs, for backends whose ``fix`` corrects them.

    ``flows`` and ``days`` are the numbers of flows and days with wrong counters.
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
