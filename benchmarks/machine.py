"""The machine and its versions, without names of hosts or folders."""

from __future__ import annotations

import os
import platform
import sqlite3
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def describe(*distributions: str) -> dict[str, str]:
    """The machine, and the versions of Python, SQLite and the distributions."""
    found = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "SQLite": sqlite3.sqlite_version,
    }
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        return platform.processor() or "unknown"
    return platform.processor() or "unknown"


def disk_folder(chosen: Path | None) -> Path:
    """A folder on a real disk: ``chosen``, or the first of /tmp, the working directory and the home folder.

    On a file system in memory every sync would be free.
    """
    if chosen is not None:
        return chosen
    candidates = [Path(tempfile.gettempdir()), Path.cwd(), Path.home()]
    return next((path for path in candidates if file_system(path) not in IN_MEMORY), candidates[0])


def file_system(folder: Path) -> str:
    """The type of a folder's file system, or "unknown"."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    path = folder.resolve()
    best, kind = -1, "unknown"
    for line in mounts:
        _, point, found, *_ = line.split(" ")
        if path.is_relative_to(point) and len(Path(point).parts) >= best:
            best, kind = len(Path(point).parts), found
    return kind
