"""Waivers: known failures, each with a reason and an expiry date."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from flowstore_conformance.clauses import CLAUSES
from flowstore_core import ConfigurationError

KEYS = frozenset({"clause", "reason", "link", "expires"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiver:
    """A permission for failures of one clause."""

    clause: str
    reason: str
    link: str
    """A link to the issue or change that addresses the failure."""
    expires: date
    """The last day on which the waiver is valid, in UTC."""


class WaiverState(StrEnum):
    """The state of a waiver after a run."""

    USED = "used"
    EXPIRED = "expired"
    NOT_NEEDED = "not needed"
    """The checks of its clause pass or do not apply: remove the waiver."""
    UNDECIDED = "undecided"
    """A check of its clause was inconclusive or did not run."""
    NOT_SELECTED = "not looked at"
    """Its clause was not selected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaiverResult:
    """A waiver and its state."""

    waiver: Waiver
    state: WaiverState

    @property
    def problem(self) -> str | None:
        """Why the waiver fails the run; None if it has no problem."""
        clause, expires = self.waiver.clause, self.waiver.expires
        if self.state is WaiverState.EXPIRED:
            return f"the waiver of {clause} expired on {expires}: fix {clause}, or renew the waiver"
        if self.state is WaiverState.NOT_NEEDED:
            return f"the waiver of {clause} is not needed, because {clause} does not fail: remove it"
        return None


def read_waivers(path: Path) -> tuple[Waiver, ...]:
    """The waivers of a TOML file: tables ``[[waiver]]`` with clause, reason, link and expires.

    Raises ConfigurationError, which names the table, for missing, unknown or duplicate entries.
    """
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"waivers {path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"waivers {path} are not valid TOML: {error}") from None
    entries = table.pop("waiver", [])
    if table or not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ConfigurationError(f"waivers {path} may contain [[waiver]] tables only")
    found: dict[str, Waiver] = {}
    for number, entry in enumerate(entries, 1):
        waiver = _read_waiver(f"waiver {number} of {path}", entry)
        if waiver.clause in found:
            raise ConfigurationError(f"waiver {number} of {path}: {waiver.clause} already has a waiver")
        found[waiver.clause] = waiver
    return tuple(found.values())


def _read_waiver(place: str, entry: dict[str, Any]) -> Waiver:
    if missing := KEYS - entry.keys():
        raise ConfigurationError(f"{place} lacks {', '.join(sorted(missing))}")
    if unknown := entry.keys() - KEYS:
        raise ConfigurationError(f"{place} has unknown keys: {', '.join(sorted(unknown))}")
    for key in ("clause", "reason", "link"):
        if not isinstance(entry[key], str) or not entry[key].strip():
            raise ConfigurationError(f"{place}: {key} must be a non-empty string")
    if entry["clause"] not in CLAUSES:
        raise ConfigurationError(f"{place}: there is no clause {entry['clause']}")
    expires = entry["expires"]
    if not isinstance(expires, date) or isinstance(expires, datetime):
        raise ConfigurationError(f"{place}: expires must be a date such as 2027-01-31, without quotes")
    return Waiver(clause=entry["clause"], reason=entry["reason"], link=entry["link"], expires=expires)
