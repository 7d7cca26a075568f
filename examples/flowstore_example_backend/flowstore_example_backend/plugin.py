"""The plugin: ``folder:///runs`` is the folder ``runs``, ``folder:////var/runs`` is ``/var/runs``."""

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
    name = "folder"
    schemes = frozenset({"folder"})
    capabilities = frozenset({Capability.OUTPUTS, Capability.DURABLE, Capability.VIRTUAL_CLOCK})
    options = frozenset({"fsync"})
    contract_version = 1

    @asynccontextmanager
    async def open(self, config: StoreConfig) -> AsyncIterator[Any]:
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
                raise StoreUnavailableError("the folder is open already, here or elsewhere") from None
            store = FolderStore(folder, config.clock or _now, fsync=fsync)
            if not fsync:
                # What a store offers may depend on the URL; its own capabilities go first.
                store.capabilities = self.capabilities - {Capability.DURABLE}
            try:
                yield store
            finally:
                await store.aclose()
        finally:
            os.close(lock)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
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
