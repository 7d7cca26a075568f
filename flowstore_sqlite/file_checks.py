"""Checks of the database file, its log and its directory, without opening the database.

Must not run in a process that has the store open: closing any descriptor of a file drops all locks of the
process on it, including those of SQLite.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from flowstore_core.diagnostics import Diagnostic, Severity
from flowstore_sqlite.file_access import SHM_SUFFIX, WAL_SUFFIX
from flowstore_sqlite.writer_queue import LOCK_SUFFIX

# The database itself, its write-ahead log, the index of the log, and the lock of writer_queue.py.
FILE_SUFFIXES = ("", "-wal", "-shm", LOCK_SUFFIX)
MOUNTS = Path("/proc/self/mountinfo")
PROCESSES = Path("/proc")

# File system types as named by Linux. The write-ahead log needs shared memory and working locks.
NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "glusterfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
    }
)
IN_MEMORY = frozenset({"ramfs", "tmpfs"})

HEADER_BYTES = 100
WAL_HEADER_BYTES = 32
FRAME_HEADER_BYTES = 24
MAGIC = b"SQLite format 3\0"
WAL_MAGIC = (0x377F0682, 0x377F0683)


def exists(path: str) -> bool:
    """Whether the path is a regular file and no link."""
    return os.path.isfile(path) and not os.path.islink(path)


def check_files(path: str) -> Iterator[Diagnostic]:
    """Check the files as they are now."""
    links = [path + suffix for suffix in FILE_SUFFIXES if os.path.islink(path + suffix)]
    if links:
        yield _symlink_found(links)
        return
    yield from _check_removed_files(path)
    if not exists(path):
        return
    yield from _check_file_system(path)
    yield from _check_modes(path)
    yield from _check_folder(path)
    yield from _check_wal(path)


def _symlink_found(links: list[str]) -> Diagnostic:
    return Diagnostic(
        code="symlink",
        prevents_open=True,
        severity=Severity.ERROR,
        summary=f"{links[0]} is a symbolic link",
        meaning="A user who may change the link decides which file is written. flowstore does not follow it.",
        remedy="name the file itself in the URL; to see where the link leads: "
        + shlex.join(["ls", "-l", *links]),
        count=len(links),
        examples=tuple(links),
    )


def _check_file_system(path: str) -> Iterator[Diagnostic]:
    kind = file_system(path)
    if kind in NETWORK or kind.startswith("fuse.sshfs"):
        yield Diagnostic(
            code="network-file-system",
            severity=Severity.ERROR,
            summary=f"the file is on a network file system ({kind})",
            meaning="The write-ahead log needs shared memory and locks of one machine. On a network the file "
            "is damaged sooner or later.",
            remedy="stop every process, move file and -wal together to a local disk, and change the URL; for "
            "several machines use PostgreSQL",
        )
    elif kind in IN_MEMORY:
        yield Diagnostic(
            code="memory-disk",
            severity=Severity.WARNING,
            summary=f"the file is in memory ({kind})",
            meaning="It is gone when the machine stops.",
            remedy="move file and -wal to a disk, and change the URL",
        )


def file_system(path: str) -> str:
    """The type of the file system of a path, as named by Linux; empty where it is unknown."""
    try:
        device = os.stat(path).st_dev
        number = f"{os.major(device)}:{os.minor(device)}"
        mounts = MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
    for line in mounts.splitlines():
        # id, parent, device, root, mount point, options..., "-", type, source, more options
        front, _, back = line.partition(" - ")
        if front.split()[2:3] == [number]:
            return back.split()[0]
    return ""


def _check_modes(path: str) -> Iterator[Diagnostic]:
    wide = []
    for suffix in FILE_SUFFIXES:
        try:
            mode = stat.S_IMODE(os.stat(path + suffix).st_mode)
        except OSError:
            continue
        if mode & 0o077:
            wide.append((path + suffix, mode))
    if not wide:
        return
    names = [name for name, _ in wide]
    if all(mode & 0o077 == 0o060 for _, mode in wide):
        # Read and write permission for a group is a choice; read permission alone would be useless.
        yield Diagnostic(
            code="mode-group",
            severity=Severity.NOTE,
            summary=f"the group of {names[0]} may read and write it (mode {wide[0][1]:04o})",
            meaning="That is right if the group shares the store.",
            remedy=f"if it does not: {shlex.join(['chmod', '0600', *names])}",
            count=len(names),
            examples=tuple(names[1:]),
        )
        return
    yield Diagnostic(
        code="mode-wide",
        severity=Severity.WARNING,
        summary=f"others may use {names[0]} (mode {wide[0][1]:04o}; 0600 is right)",
        meaning="Payloads, outputs and error messages can be read or changed by other users of the machine.",
        remedy=shlex.join(["chmod", "0600", *names]),
        count=len(names),
        examples=tuple(names[1:]),
        fix=f"set the mode of {', '.join(names)} to 0600",
    )


def _check_folder(path: str) -> Iterator[Diagnostic]:
    folder = os.path.dirname(path)
    mode = os.stat(folder).st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield Diagnostic(
            code="folder-open",
            severity=Severity.WARNING,
            summary=f"every user may write to directory {folder}",
            meaning="Any user of the machine can replace the file.",
            remedy=shlex.join(["chmod", "o-w", folder]),
        )


def _read(path: str, size: int) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read(size)
    except FileNotFoundError:
        return None


def _check_wal(path: str) -> Iterator[Diagnostic]:
    header, log = _read(path, HEADER_BYTES), _read(path + "-wal", WAL_HEADER_BYTES)
    if header and not header.startswith(MAGIC):
        yield Diagnostic(
            code="not-a-database",
            prevents_open=True,
            severity=Severity.ERROR,
            summary=f"{path} is no SQLite database, or its header was overwritten",
            meaning="It cannot be opened.",
            remedy="restore a backup, or correct the URL",
        )
        return
    if log and (reason := _wal_mismatch(path, header or b"", log)):
        yield Diagnostic(
            code="log-foreign",
            prevents_open=True,
            severity=Severity.ERROR,
            summary=f"{path}-wal does not belong to the database: {reason}",
            meaning="A log holds the newest commits of one database. Beside another one it is ignored "
            "or damages it. File and -wal must be moved, copied and restored together.",
            remedy="stop every process; put the right log in its place, or set this one aside: "
            + shlex.join(["mv", f"{path}-wal", f"{path}-wal.aside"]),
        )
    elif log is None and os.path.exists(path + "-shm"):
        yield Diagnostic(
            code="log-missing",
            prevents_open=True,
            severity=Severity.WARNING,
            summary=f"{path}-wal is gone, though {path}-shm is there",
            meaning="SQLite removes both or none. If the log was deleted, the newest commits are lost, "
            "acknowledged claims and results among them.",
            remedy="put the log back if you have it; else accept the loss: "
            + shlex.join(["rm", f"{path}-shm"]),
        )
    if os.path.exists(path + "-journal"):
        yield Diagnostic(
            code="journal-foreign",
            prevents_open=True,
            severity=Severity.WARNING,
            summary=f"{path}-journal is there",
            meaning="flowstore uses a write-ahead log and creates no such file. Another program was writing "
            "to the database, or the journal is that of another database; SQLite may roll it back.",
            remedy="find out which program created it before you open the store; "
            + shlex.join(["ls", "-l", f"{path}-journal"]),
        )


def _check_removed_files(path: str) -> Iterator[Diagnostic]:
    """Find processes of this user that still use files removed from this path (Linux only)."""
    removed = {f"{os.path.realpath(path)}{suffix} (deleted)" for suffix in ("", WAL_SUFFIX, SHM_SUFFIX)}
    processes = []
    for folder in PROCESSES.glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            # The process may end meanwhile or belong to another user.
            if any(os.readlink(file) in removed for file in folder.iterdir()):
                processes.append(folder.parent.name)
    if not processes:
        return
    yield Diagnostic(
        code="file-removed",
        severity=Severity.ERROR,
        summary=f"a file that was removed from {path} is still in use",
        meaning="The database or its log was deleted, or a backup was put in its place, while a process had "
        "it open. A store of flowstore then refuses every call; another program loses all that it writes.",
        remedy="stop such a process without killing it, then start it again: "
        + shlex.join(["kill", "-TERM", *processes]),
        count=len(processes),
        examples=tuple(f"process {process}" for process in processes),
        prevents_open=not exists(path),
    )


def _wal_mismatch(path: str, header: bytes, log: bytes) -> str | None:
    """Why the log cannot belong to the database with this header; None if it may."""
    if len(log) < WAL_HEADER_BYTES or int.from_bytes(log[:4]) not in WAL_MAGIC:
        return "it is no write-ahead log"
    if len(header) < HEADER_BYTES:
        # The first pages of a new database may be only in the log.
        return None
    # The page size 65536 does not fit into two bytes and is stored as 1.
    pages = int.from_bytes(header[16:18])
    size = int.from_bytes(log[8:12])
    if size != (65536 if pages == 1 else pages):
        return "its pages have another size"
    if header[18:20] != b"\2\2":
        return "the database is in another journal mode"
    counters = _change_counters(f"{path}-wal", log, size)
    if (_read(path, HEADER_BYTES), _read(f"{path}-wal", WAL_HEADER_BYTES)) != (header, log):
        # They changed between the two reads, so they cannot be compared.
        return None
    # Each commit that writes the first page raises the change counter by at most one. When the log restarts,
    # the database contains all earlier commits.
    counter = _change_counter(header)
    if counters and counter + 1 < counters[0]:
        return "it continues a newer state of the database, as beside a restored backup"
    if counters and counters[-1] < counter:
        return "it is older than the database"
    return None


def _change_counter(page: bytes) -> int:
    return int.from_bytes(page[24:28])


def _change_counters(path: str, log: bytes, page_size: int) -> list[int]:
    """The change counter of each copy of the first page in the log, in order."""
    found = []
    with open(path, "rb") as file:
        file.seek(WAL_HEADER_BYTES)
        # A frame belongs to this log if its header repeats the salt of the header of the log.
        while len(frame := file.read(FRAME_HEADER_BYTES)) == FRAME_HEADER_BYTES and frame[8:16] == log[16:24]:
            if int.from_bytes(frame[:4]) == 1 and len(page := file.read(HEADER_BYTES)) == HEADER_BYTES:
                found.append(_change_counter(page))
                file.seek(page_size - HEADER_BYTES, os.SEEK_CUR)
            else:
                file.seek(page_size, os.SEEK_CUR)
    return found


def fix(path: str, finding: Diagnostic) -> Iterator[str]:
    """Set the mode of the files to 0600, if the finding says so."""
    if finding.code != "mode-wide":
        return
    for suffix in FILE_SUFFIXES:
        name = path + suffix
        try:
            # The file may have become a link since the check.
            file = os.open(name, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        except FileNotFoundError:
            continue
        except OSError as error:
            yield f"could not open {name}: {error.strerror}"
            continue
        try:
            if stat.S_IMODE(os.fstat(file).st_mode) & 0o077:
                os.fchmod(file, 0o600)
                yield f"set the mode of {name} to 0600"
        except OSError as error:
            yield f"could not change the mode of {name}: {error.strerror}"
        finally:
            os.close(file)
