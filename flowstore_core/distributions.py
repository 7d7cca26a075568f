"""The metadata of installed distributions, read one by one, so that a broken one does not hide the others.

``importlib.metadata.entry_points`` fails at the first broken distribution, such as a stray ``dist-info``
directory without a name or an ``entry_points.txt`` that is not UTF-8.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, DistributionFinder, EntryPoint, version

ENTRY_POINTS = "entry_points.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokenDistribution:
    """A distribution whose entry points cannot be read."""

    name: str
    problem: str
    groups: tuple[str, ...] = ()
    """The requested groups that its entry points mention."""


def read_entry_points(groups: Collection[str]) -> tuple[list[EntryPoint], list[BrokenDistribution]]:
    """The entry points of these groups, and the unreadable distributions that mention one of the groups."""
    found: list[EntryPoint] = []
    broken: list[BrokenDistribution] = []
    for distribution in _list_distributions():
        mentioned: list[str] = []
        try:
            mentioned = _mentioned(distribution, groups)
            # Most distributions mention none of the groups; parsing is skipped for them.
            if mentioned:
                found += [entry for entry in distribution.entry_points if entry.group in groups]
        except Exception as error:  # noqa: BLE001 - reported if it may concern the groups
            if isinstance(error, UnicodeDecodeError):
                # Finds the group's name in any encoding that contains ASCII, and in UTF-16.
                text = error.object.replace(b"\0", b"").decode("ascii", "replace")
                mentioned = [group for group in groups if f"[{group}]" in text]
            if mentioned:
                broken.append(_broken(distribution, error, mentioned))
    return found, broken


def list_broken_distributions() -> list[BrokenDistribution]:
    """All distributions whose entry points cannot be read, of any group."""
    broken = []
    for distribution in _list_distributions():
        try:
            list(distribution.entry_points)
        except Exception as error:  # noqa: BLE001 - reported
            broken.append(_broken(distribution, error, ()))
    return broken


def distribution_name(distribution: Distribution) -> str:
    """The name from the metadata, or from the directory if the metadata cannot be read."""
    try:
        names = distribution.metadata.get_all("Name", [])
        return str(names[0])
    except Exception:  # noqa: BLE001 - falls back to the directory
        return _directory_name(distribution)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed or its metadata is broken."""
    try:
        return version(name) or None
    except Exception:  # noqa: BLE001 - documented as None
        return None


def read_requirements(name: str) -> list[str]:
    """The requirements of an installed distribution; empty if its metadata cannot be read."""
    try:
        return list(Distribution.from_name(name).requires or ())
    except Exception:  # noqa: BLE001 - documented as empty
        return []


def _list_distributions() -> Iterator[Distribution]:
    """The installed distributions; of several with one name only the first on the path."""
    seen = set()
    for finder in sys.meta_path:
        find = getattr(finder, "find_distributions", None)
        if find is None:
            continue
        try:
            for distribution in find(DistributionFinder.Context()):
                name = _directory_name(distribution)
                if name not in seen:
                    seen.add(name)
                    yield distribution
        except Exception:  # noqa: BLE001 - a broken import hook must not hide the results of the others
            continue


def _mentioned(distribution: Distribution, groups: Collection[str]) -> list[str]:
    text = distribution.read_text(ENTRY_POINTS) or ""
    return [group for group in groups if f"[{group}]" in text]


def _broken(distribution: Distribution, error: Exception, groups: Collection[str]) -> BrokenDistribution:
    return BrokenDistribution(
        name=distribution_name(distribution),
        problem=f"its entry points cannot be read ({type(error).__name__})",
        groups=tuple(groups),
    )


def _directory_name(distribution: Distribution) -> str:
    # The key by which importlib.metadata drops duplicates. It comes from the directory, so no file is read.
    try:
        return str(distribution._normalized_name)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - neither a name nor metadata
        return str(getattr(distribution, "_path", "unknown"))
