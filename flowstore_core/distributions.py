"""The metadata of installed distributions, read so that a broken one never hides the others.

``importlib.metadata.entry_points`` raises the first error that it meets: one stray ``dist-info`` directory
without a name, or one ``entry_points.txt`` in another encoding, is enough. Here every distribution is read
on its own.
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
    """The groups of interest that its entry points mention."""


def read_entry_points(groups: Collection[str]) -> tuple[list[EntryPoint], list[BrokenDistribution]]:
    """The entry points of these groups, and the distributions that mention one and cannot be read."""
    found: list[EntryPoint] = []
    broken: list[BrokenDistribution] = []
    for distribution in _list_distributions():
        mentioned: list[str] = []
        try:
            mentioned = _mentioned(distribution, groups)
            # Most distributions mention none, and are not parsed.
            if mentioned:
                found += [entry for entry in distribution.entry_points if entry.group in groups]
        except Exception as error:  # noqa: BLE001 - reported, if it can concern the groups
            if isinstance(error, UnicodeDecodeError):
                # Recognisable in any encoding that has ASCII in it, UTF-16 included.
                text = error.object.replace(b"\0", b"").decode("ascii", "replace")
                mentioned = [group for group in groups if f"[{group}]" in text]
            if mentioned:
                broken.append(_broken(distribution, error, mentioned))
    return found, broken


def list_broken_distributions() -> list[BrokenDistribution]:
    """Every distribution whose entry points cannot be read, whatever they are for."""
    broken = []
    for distribution in _list_distributions():
        try:
            list(distribution.entry_points)
        except Exception as error:  # noqa: BLE001 - reported
            broken.append(_broken(distribution, error, ()))
    return broken


def distribution_name(distribution: Distribution) -> str:
    """The name from the metadata, or from the directory's name where the metadata cannot be read."""
    try:
        names = distribution.metadata.get_all("Name", [])
        return str(names[0])
    except Exception:  # noqa: BLE001 - there is another source
        return _directory_name(distribution)


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not installed or its metadata is broken."""
    try:
        return version(name) or None
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it names no version
        return None


def read_requirements(name: str) -> list[str]:
    """The requirements of an installed distribution; empty if its metadata cannot be read."""
    try:
        return list(Distribution.from_name(name).requires or ())
    except Exception:  # noqa: BLE001 - whatever is wrong with it, it names no requirements
        return []


def _list_distributions() -> Iterator[Distribution]:
    """The installed distributions; of several with one name the first on the path, as Python does it."""
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
        except Exception:  # noqa: BLE001 - a broken import hook must not hide what others find
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
    # Python's own key for the first of several; from the directory's name, so that no file is read.
    try:
        return str(distribution._normalized_name)  # type: ignore[attr-defined]
    except Exception:  # noqa: BLE001 - there is neither a name nor metadata
        return str(getattr(distribution, "_path", "unknown"))
