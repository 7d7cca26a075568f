"""Small disks: tmpfs mounts visible only to this process and its children.

They are mounted in a private mount namespace, so that no cleanup is necessary even after a SIGKILL. Without
the permission to mount, a user namespace is created first.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowstore_chaos.context import SkippedError

# From <sched.h> and <sys/mount.h>; os.unshare exists from Python 3.12 on, mount in none.
CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
MNT_DETACH = 2
_BLOCK = 64 * 1024


class SmallDisk:
    """A small file system that can be filled and freed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / ".ballast"

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.folder)
        return status.f_bavail * status.f_frsize

    def fill(self, leave: int) -> None:
        """Write ballast until only ``leave`` bytes are free."""
        with self._ballast.open("ab") as file:
            while (room := self.free_bytes - leave) > 0:
                file.write(b"\0" * min(_BLOCK, room))
                file.flush()

    def free(self) -> None:
        """Delete the ballast."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def mount_tmpfs(folders: Sequence[Path], megabytes: int) -> Iterator[list[SmallDisk]]:
    """Mount a small disk at each folder, for this process and its children. Raises SkippedError."""
    _enter_private_namespace()
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


def _enter_private_namespace() -> None:
    """Move this process to a private mount namespace."""
    if not sys.platform.startswith("linux"):
        raise SkippedError("mounting a small disk needs Linux")
    user, group = os.geteuid(), os.getegid()
    try:
        if user == 0:
            _call("unshare", CLONE_NEWNS)
        else:
            # Not possible in a process with threads, so scenarios mount the disk first.
            _call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
            Path("/proc/self/setgroups").write_text("deny")
            # Keep the ids: PostgreSQL does not run as root.
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
        _call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    except OSError as error:
        raise SkippedError(
            f"mounting a small disk needs root or unprivileged user namespaces ({error.strerror})"
        ) from None


def _call(function: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, function)(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
