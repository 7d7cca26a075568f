"""The plugin: ``folder:///runs`` opens the folder ``runs``, ``folder:////var/runs`` opens ``/var/runs``."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flowstore_core import Capability, ConfigurationError, StoreUnavailableError
from flowstore_core.backend import Backend, StoreConfig, hookimpl, parse_url
from flowstore_example_backend.store import FolderStore


class FolderBackend:
    """The descriptor of the backend.

    Option ``fsync`` (default true): sync files to disk before a write returns. Without it a power failure may
    lose acknowledged writes, so the store does not declare DURABLE.
    """

    name = "folder"
    schemes = frozenset({"folder"})
    capabilities = frozenset({Capability.OUTPUTS, Capability.DURABLE, Capability.VIRTUAL_CLOCK})
    options = frozenset({"fsync"})
    contract_version = 1

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[Any]:
        """Open the folder exclusively. Creates it if needed. Raises StoreUnavailableError."""
        fsync = config.flag("fsync", True)
        folder = _read_folder(config.url)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreUnavailableError(f"the folder cannot be opened: {error.strerror}") from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreUnavailableError(
                    "the folder is open already, in this process or in another one"
                ) from None
            store = FolderStore(folder, config.clock or _now, fsync=fsync)
            if not fsync:
                # Capabilities may depend on the URL. Those of the store override those of the backend.
                store.capabilities = self.capabilities - {Capability.DURABLE}
            try:
                yield store
            finally:
                await store.aclose()
        finally:
            os.close(lock)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """A URL of a new empty folder beside that of ``url``, which is removed afterwards."""
        parent = _read_folder(url).absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix="flowstore-scratch-", dir=parent)
        try:
            yield parse_url(url).with_path(made)
        finally:
            shutil.rmtree(made)


def _read_folder(url: str) -> Path:
    path = parse_url(url).path
    if not path:
        raise ConfigurationError("a folder URL names a folder: folder:///runs or folder:////var/runs")
    return Path(path)


def _now() -> datetime:
    return datetime.now(UTC)


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [FolderBackend()]
