"""The plugin: the descriptor of the SQLite backend. The driver is imported when a store opens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.backend import OutageInjector
from flowstore_core.diagnostics import Diagnostic
from flowstore_core.urls import parse_url

if TYPE_CHECKING:
    from flowstore_core.backend import WriteFailureInjector
    from flowstore_sqlite.store import SqliteStore


class SqliteBackend:
    """``sqlite:///relative.db`` and ``sqlite:////absolute.db``: one file, shared by many processes.

    The file must be on a local disk: the write-ahead log does not work on network file systems.

    Options, in the URL's query or as keywords:

    - ``synchronous``: FULL (the default) or NORMAL. NORMAL does not sync the disk at each commit: a power
      failure may lose the newest writes, acknowledged claims included, so such a store does not offer
      DURABLE. A crash of the process loses nothing in either mode.
    - ``busy_timeout``: seconds that a write waits while other processes write, 0 to 3600; 30 by default.
      After that it raises StoreUnavailableError, and the write has not happened.
    - ``readers``: number of read connections, 1 to 16; 2 by default. Reads never wait for writes.
    """

    name = "sqlite"
    schemes = frozenset({"sqlite"})
    capabilities = frozenset(Capability) - {Capability.SHARED_CLOCK}
    options = frozenset({"synchronous", "busy_timeout", "readers"})
    contract_version = 1
    drivers = ("aiosqlite",)

    def open(self, config: StoreConfig) -> AbstractAsyncContextManager[SqliteStore]:
        """Open the file. Creates and migrates it if needed.

        With ``migrate=False`` a file that this process may not write to opens read-only.

        Raises ConfigurationError, SchemaVersionError, StoreUnavailableError.
        """
        from flowstore_sqlite.open import StoreContext

        return StoreContext(config)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """A URL of a new database file in a private directory, with the options of ``url``.

        The directory is beside the file of ``url``, or in the system's directory for temporary files where
        that cannot be written. Leaving the context removes the directory and nothing else.
        """
        from flowstore_sqlite.url import database_path

        folder = _make_folder(Path(database_path(url)).parent)
        try:
            yield parse_url(url).with_path(str(folder / "scratch.db"))
        finally:
            shutil.rmtree(folder)

    async def clear_scratch(self, url: str) -> None:
        from flowstore_sqlite.deploy import clear_file

        await clear_file(url)

    def variants(self, url: str) -> Mapping[str, str]:
        """One reader, for which all reads queue."""
        parts = parse_url(url)
        return {"one reader": parts.with_more_options({"readers": "1"})}

    def non_durable_urls(self, url: str) -> Sequence[str]:
        parts = parse_url(url)
        return [parts.with_more_options({"synchronous": "NORMAL"})]

    @asynccontextmanager
    async def inject_write_failures(self, url: str) -> AsyncIterator[WriteFailureInjector]:
        """Fail statements of the stores that open the file in this process and context."""
        from flowstore_sqlite.fault_injection import fail_statements

        with fail_statements(url) as injector:
            yield injector

    @asynccontextmanager
    async def inject_outages(self, url: str) -> AsyncIterator[OutageInjector]:
        """Hold the write lock, or remove the file or its log."""
        from flowstore_sqlite.outages import FileOutageInjector

        yield FileOutageInjector(url)

    @asynccontextmanager
    async def adjust_schema_version(self, url: str, difference: int) -> AsyncIterator[None]:
        from flowstore_sqlite.deploy import adjust_version

        async with adjust_version(url, difference):
            yield

    def earlier_schema_versions(self) -> Sequence[int]:
        from flowstore_sqlite.schema_migrations import load_migrations

        return [one.version for one in load_migrations()[:-1]]

    async def revert_schema(self, url: str, version: int) -> None:
        from flowstore_sqlite.deploy import revert_schema

        await revert_schema(url, version)

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        """Every migration in order, as (number, name, a script that applies and records it)."""
        from flowstore_sqlite.deploy import migrations

        return migrations()

    async def schema_version(self, config: StoreConfig) -> int:
        """The schema version of the file; 0 without a file or schema. Creates and changes nothing."""
        from flowstore_sqlite.deploy import schema_version

        return await schema_version(config)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """How searches find runs."""
        from flowstore_sqlite.deploy import has_search_index

        indexed = await has_search_index(config)
        return {"search": "by index (FTS5)" if indexed else "reads every run; this SQLite has no FTS5"}

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """Problems of the database file, its log, its pages and its rows.

        Must not run in a process that has the store open: it opens and closes the files, which drops the
        locks that SQLite holds on them.
        """
        from flowstore_sqlite.diagnosis import diagnose

        return await diagnose(config, thorough=thorough)

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        """Narrow permissions, delete orphaned rows and correct counters, as the findings say."""
        from flowstore_sqlite.diagnosis import fix

        return await fix(config, findings)

    async def migrate(self, config: StoreConfig) -> int:
        """Apply all missing migrations and return the schema version. Creates the file if needed."""
        from flowstore_sqlite.deploy import migrate

        return await migrate(config)


def _make_folder(parent: Path) -> Path:
    for folder in (parent, None):
        try:
            return Path(tempfile.mkdtemp(prefix=".flowstore-scratch-", dir=folder))
        except OSError:
            if folder is None:
                raise
    raise AssertionError("unreachable")


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [SqliteBackend()]
