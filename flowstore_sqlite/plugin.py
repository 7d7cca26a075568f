"""The plugin: what the SQLite backend is called and offers. The driver is imported when a store opens."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flowstore_core import Backend, Capability, StoreConfig, hookimpl
from flowstore_core.diagnostics import Diagnostic
from flowstore_core.urls import parse_url

if TYPE_CHECKING:
    from flowstore_sqlite.store import SqliteStore


class SqliteBackend:
    """``sqlite:///relative.db`` and ``sqlite:////absolute.db``: one file, shared by many processes.

    The file must lie on a local disk: the write-ahead log does not work on network file systems.

    Options, in the URL's query or as keywords:

    - ``synchronous``: FULL (the default) or NORMAL. NORMAL does not sync the disk at each commit: after
      a power cut the newest writes, claims that were already answered among them, may be gone, so
      such a store does not offer DURABLE. A crash of the process alone loses nothing either way.
    - ``busy_timeout``: how many seconds a write waits while other processes write, 0 to 3600; 30 by
      default. Then StoreUnavailableError; the write has not happened.
    - ``readers``: connections for reading, 1 to 16; 2 by default. Reads never wait for writes.
    """

    name = "sqlite"
    schemes = frozenset({"sqlite"})
    capabilities = frozenset(Capability)
    options = frozenset({"synchronous", "busy_timeout", "readers"})
    contract_version = 1
    drivers = ("aiosqlite",)

    def open(self, config: StoreConfig) -> AbstractAsyncContextManager[SqliteStore]:
        """Open the file, making and migrating it if need be.

        With ``migrate=False`` a file that this process may not write to opens for reading.

        Raises ConfigurationError, SchemaVersionError, StoreUnavailableError.
        """
        from flowstore_sqlite.open import StoreContext

        return StoreContext(config)

    @asynccontextmanager
    async def scratch(self, url: str) -> AsyncIterator[str]:
        """A URL of a database file yet to be made, in a private directory of its own.

        It lies beside the file that ``url`` names, or in the system's directory for temporary files
        where that cannot be written, and keeps the options of ``url``. Only that directory is removed.
        """
        from flowstore_sqlite.url import database_path

        folder = _make_folder(Path(database_path(url)).parent)
        try:
            yield parse_url(url).with_path(str(folder / "scratch.db"))
        finally:
            shutil.rmtree(folder)

    def migrations(self, config: StoreConfig) -> Sequence[tuple[int, str, str]]:
        """Every migration as (number, name, a script that applies and records it), in order."""
        from flowstore_sqlite.deploy import migrations

        return migrations()

    async def schema_version(self, config: StoreConfig) -> int:
        """The schema version of the file; 0 without a file or schema. Makes and changes nothing."""
        from flowstore_sqlite.deploy import schema_version

        return await schema_version(config)

    async def describe(self, config: StoreConfig) -> Mapping[str, str]:
        """How searches find their runs."""
        from flowstore_sqlite.deploy import has_search_index

        indexed = await has_search_index(config)
        return {"search": "by index (FTS5)" if indexed else "reads every run; this SQLite has no FTS5"}

    async def diagnose(self, config: StoreConfig, *, thorough: bool) -> Sequence[Diagnostic]:
        """What is wrong with the file and its neighbours, and rows without a run.

        Not in a process that has the store open: the files are read beside SQLite.
        """
        from flowstore_sqlite.diagnosis import diagnose

        return await diagnose(config, thorough=thorough)

    async def fix(self, config: StoreConfig, findings: Sequence[Diagnostic]) -> Sequence[str]:
        """Narrow permissions and delete the rows without a run, where they were found."""
        from flowstore_sqlite.diagnosis import fix

        return await fix(config, findings)

    async def migrate(self, config: StoreConfig) -> int:
        """Make the file if need be, apply every migration, and return the version it then has."""
        from flowstore_sqlite.deploy import migrate

        return await migrate(config)


def _make_folder(beside: Path) -> Path:
    for place in (beside, None):
        try:
            return Path(tempfile.mkdtemp(prefix=".flowstore-scratch-", dir=place))
        except OSError:
            if place is None:
                raise
    raise AssertionError("unreachable")


@hookimpl
def flowstore_backends() -> Sequence[Backend]:
    return [SqliteBackend()]
