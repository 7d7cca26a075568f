"""The counts of a row."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_FINDINGS = 20
"""Maximum number of findings kept as text; all are counted."""


@dataclass(slots=True)
class Counts:
    """The counts of one row. To pass, every count except the first two must be 0."""

    injected: int = 0
    """Faults that took effect; failed attempts do not count."""
    operations: int = 0
    """Calls on the store that returned a result."""
    lost: int = 0
    """Acknowledged operations without their effect."""
    duplicates: int = 0
    """Effects that happened more than once."""
    wrong: int = 0
    """Impossible results, errors outside of the contract, hung calls."""
    leaks: int = 0
    """Connections, transactions, tasks, threads, files or processes that were not released."""
    details: dict[str, float | str] = field(default_factory=dict)
    """Further figures of the row, by name."""
    findings: list[str] = field(default_factory=list)
    """The first findings, each as a sentence."""

    def count_lost(self, finding: str) -> None:
        self.lost += 1
        self._find("lost", finding)

    def count_duplicate(self, finding: str) -> None:
        self.duplicates += 1
        self._find("duplicate", finding)

    def count_wrong(self, finding: str) -> None:
        self.wrong += 1
        self._find("wrong", finding)

    def count_leak(self, finding: str) -> None:
        self.leaks += 1
        self._find("leaked", finding)

    def add_detail(self, detail: str, amount: float = 1) -> None:
        """Add to a numeric detail."""
        before = self.details.get(detail, 0)
        if isinstance(before, str):
            raise TypeError(f"detail {detail!r} is a text")
        self.details[detail] = before + amount

    @property
    def clean(self) -> bool:
        return not (self.lost or self.duplicates or self.wrong or self.leaks)

    def _find(self, kind: str, finding: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(f"{kind}: {finding}")
