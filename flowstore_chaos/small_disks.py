"""A small disk: a tmpfs that only this process and its children see, and that is gone when they are.

It is mounted in a mount namespace of its own, so nothing has to be cleaned up even after a SIGKILL.
Where the user may not mount, a user namespace is tried first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowstore_chaos.trial import SkippedError

# From <sched.h> and <sys/mount.h>; os.unshare exists from Python 3.12 on, mount in none.
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
MNT_DETACH = 2
_BLOCK = 64 * 1024


class SmallDisk:
    """A file system of a few megabytes that can be filled and freed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / ".ballast"

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def fill(self, leave: int) -> None:
        """Fill it with something else until only so many bytes are free."""
        with self._ballast.open("ab") as file:
            while (room := self.free_bytes - leave) > 0:
                file.write(b"\0" * min(_BLOCK, room))
                file.flush()

    def free(self) -> None:
        """Take away what fill has put there."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disks(folders: Sequence[Path], megabytes: int) -> Iterator[list[SmallDisk]]:
    """Mount one at each folder, for this process and its children alone. Raises SkippedError."""
    _leave_namespace()
    mounted: list[SmallDisk] = []
    options = f"size={megabytes}m,mode=0700".encode()
    try:
        for folder in folders:
            folder.mkdir(mode=0o700)
            try:
                _call("mount", b"tmpfs", bytes(folder), b"tmpfs", MS_NOSUID | MS_NODEV, options)
            except OSError as error:
                raise SkippedError(f"no tmpfs can be mounted ({error.strerror})") from None
            mounted.append(SmallDisk(folder))
        yield mounted
    finally:
        for disk in mounted:
            _call("umount2", bytes(disk.folder), MNT_DETACH)


def _leave_namespace() -> None:
    """Give this process a mount namespace of its own, from which nothing gets out."""
    if not sys.platform.startswith("linux"):
        raise SkippedError("mounting a small disk needs Linux")
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            _call("unshare", CLONE_NEWNS)
        else:
            # The kernel refuses this to a process with threads, so the disk comes first in a row.
            _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")
            # The same ids inside and outside: PostgreSQL does not run as root.
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    except OSError as error:
        raise SkippedError(
            f"mounting a small disk needs root, or user namespaces for everybody ({error.strerror})"
        ) from None


def _call(function: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
