"""Safe access to the database file: creation, permissions, no symbolic links."""

from __future__ import annotations

import os
import stat
import threading
from enum import Enum
from urllib.parse import quote

from flowstore_core import ConfigurationError, StoreUnavailableError

# Held while a file is created. Closing any descriptor of a file drops all locks of this process on it,
# including those of SQLite, so no thread may open the database while create_file has a descriptor of it.
_creating = threading.Lock()


WAL_SUFFIX = "-wal"
SHM_SUFFIX = "-shm"
JOURNAL_SUFFIX = "-journal"


class Access(Enum):
    """How SQLite opens a file; the values are URI parameters.

    None of them creates a file: SQLite would create it with wider permissions.
    """

    WRITE = "mode=rw"
    READ = "mode=ro"
    FROZEN = "mode=ro&immutable=1"
    """Without locks and write-ahead log, for a file that no process writes to."""


def file_exists(path: str) -> bool:
    """Whether the file exists.

    Raises ConfigurationError for anything but a regular file, such as a symbolic link;
    StoreUnavailableError.
    """
    folder = os.path.dirname(path)
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        if os.path.isdir(folder):
            return False
        raise ConfigurationError(f"directory {folder} does not exist; create it first") from None
    except NotADirectoryError:
        raise ConfigurationError(f"{folder} is not a directory") from None
    except OSError as error:
        raise StoreUnavailableError(
            f"{path} cannot be reached: {error.strerror}; check its directory"
        ) from None
    if stat.S_ISLNK(mode):
        raise ConfigurationError(f"{path} is a symbolic link, which is never followed; name the file itself")
    if not stat.S_ISREG(mode):
        raise ConfigurationError(f"{path} is not a regular file")
    return True


def create_file(path: str) -> None:
    """Create the file, empty and with mode 0600, unless it exists.

    SQLite gives the log and its index the permissions of the file. Raises ConfigurationError,
    StoreUnavailableError.
    """
    with _creating:
        if file_exists(path):
            return
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        try:
            file = os.open(path, flags | getattr(os, "O_CLOEXEC", 0), 0o600)
            try:
                # A umask may remove even the owner's permissions.
                os.fchmod(file, 0o600)
            finally:
                os.close(file)
        except FileExistsError:
            # Created by another process, or replaced by a link: check again.
            file_exists(path)
        except OSError as error:
            raise StoreUnavailableError(
                f"{path} cannot be created: {error.strerror}; check its directory"
            ) from None


def is_same_path(opened: str, path: str) -> bool:
    """Whether SQLite opened the file at this path and not the target of a link.

    SQLite resolves links before it opens a file and reports the resolved path, ``opened``. Directories may
    be links, as /tmp is on some systems.
    """
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name) == opened


def size(path: str) -> int:
    """The size in bytes; 0 for a missing file. Raises OSError."""
    try:
        return os.lstat(path).st_size
    except FileNotFoundError:
        return 0


def find_access(path: str) -> Access:
    """The widest access that this process has to an existing file.

    Even a reader of a database in WAL mode needs the log and its index, and creates them if they are
    missing. A process that may not create them can only read the database file, which is complete if the
    log is empty. Raises StoreUnavailableError.
    """
    may_create = os.access(os.path.dirname(path), os.W_OK)
    has_log = os.path.lexists(path + WAL_SUFFIX) and os.path.lexists(path + SHM_SUFFIX)
    if os.access(path, os.W_OK) and (may_create or has_log):
        return Access.WRITE
    if size(path + WAL_SUFFIX) or size(path + JOURNAL_SUFFIX):
        if not may_create and not os.path.lexists(path + SHM_SUFFIX) and size(path + WAL_SUFFIX):
            raise StoreUnavailableError(
                f"{path}{WAL_SUFFIX} holds the newest commits, and without {path}{SHM_SUFFIX} only a user "
                "who may write to the directory can read them; open and close the store once as such a user"
            )
        return Access.READ
    return Access.FROZEN


def sqlite_uri(path: str, access: Access) -> str:
    return f"file://{quote(os.fsencode(path))}?{access.value}"
