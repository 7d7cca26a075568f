"""What a row counts."""

from __future__ import annotations

from dataclasses import dataclass, field

MOST_FINDINGS = 20
"""So many are told in words; all are counted."""


@dataclass(slots=True)
class Tally:
    """The counts of one row. Every count but the first two must be 0 for the row to pass."""

    landed: int = 0
    """Faults that really happened, not those that were tried."""
    operations: int = 0
    """Calls on the store that were answered."""
    lost: int = 0
    """Acknowledged operations whose effect was not found afterwards."""
    twice: int = 0
    """Effects that happened more than once."""
    wrong: int = 0
    """Answers that cannot be true, errors that the contract does not know, calls that hung."""
    leaks: int = 0
    """Connections, transactions, tasks, threads, files or processes that stayed."""
    details: dict[str, float | str] = field(default_factory=dict)
    """More figures that the row is worth being told, by their names."""
    findings: list[str] = field(default_factory=list)
    """The first of what is counted as lost, twice, wrong or leaked, each in a sentence."""

    def lose(self, what: str) -> None:
        self.lost += 1
        self._find("lost", what)

    def repeat(self, what: str) -> None:
        self.twice += 1
        self._find("done twice", what)

    def mistrust(self, what: str) -> None:
        self.wrong += 1
        self._find("wrong", what)

    def leak(self, what: str) -> None:
        self.leaks += 1
        self._find("leaked", what)

    def add(self, detail: str, amount: float = 1) -> None:
        """Raise a detail that is a count."""
        before = self.details.get(detail, 0)
        if isinstance(before, str):
            raise TypeError(f"detail {detail!r} is a text")
        self.details[detail] = before + amount

    @property
    def clean(self) -> bool:
        return not (self.lost or self.twice or self.wrong or self.leaks)

    def _find(self, kind: str, what: str) -> None:
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(f"{kind}: {what}")
