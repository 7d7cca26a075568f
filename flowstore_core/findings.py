"""What is wrong with a store, or may become so: the records of ``flowstore doctor``.

What any store can be asked, the command asks through the protocols. What only a backend knows, such as
the settings of its server or the permissions of its file, it learns from two optional members of the
backend's descriptor::

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Finding]: ...
    async def fix(self, config: StoreConfig, findings: Sequence[Finding]) -> Sequence[str]: ...

``diagnose`` changes nothing, and works also where the store cannot be opened: that is when it is needed
most. Unless ``thorough`` it costs a few seconds at most, however large the store is. ``fix`` gets those of
its own findings that say with ``fix`` what would be done, does that, and answers what it did, a line for
each; it must be safe while others use the store.
"""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
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
    blocks: bool = False
    """Whether the store must not be opened before it is dealt with: opening would make it worse."""
