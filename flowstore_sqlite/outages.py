"""Locks and removes a database file, for conformance checks."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from functools import partial

from flowstore_core.urls import parse_url
from flowstore_sqlite.url import database_path

BUSY_TIMEOUT = 0.2
"""Seconds that writes of the stores at the injector's URL wait for the write lock."""


class FileOutageInjector:
    """Implements OutageInjector; see flowstore_core.backend."""

    def __init__(self, url: str) -> None:
        parts = parse_url(url)
        self.url = parts.with_more_options({"busy_timeout": str(BUSY_TIMEOUT)})
        self._path = database_path(url)
        self.interruptions: Mapping[str, Callable[[], AbstractAsyncContextManager[None]]] = {
            "the file was removed": partial(_removed, self._path),
            "the write-ahead log was removed": partial(_removed, f"{self._path}-wal"),
        }

    @asynccontextmanager
    async def lock(self) -> AsyncIterator[None]:
        with closing(sqlite3.connect(self._path, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield
            finally:
                db.execute("ROLLBACK")


@asynccontextmanager
async def _removed(path: str) -> AsyncIterator[None]:
    os.remove(path)
    yield
