"""A plugin whose scratch() returns namespaces with data, for tests of the guard of the suite.

``trap://data`` contains a run. The scratch namespace of ``trap://data`` and of ``trap://redirect`` is
``trap://data``; the scratch() of the other URLs fails or returns a store that cannot be inspected.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN = '''\
import asyncio
import dataclasses
from contextlib import asynccontextmanager
from uuid import UUID

from flowstore_core import StoreUnavailableError, hookimpl
from flowstore_memory.plugin import MemoryBackend


class Uninspectable:
    """A store that cannot be inspected."""

    def __init__(self, store):
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    async def get_runs(self, **arguments):
        raise RuntimeError("no such table")


class Trap:
    name = "trap"
    schemes = frozenset({"trap"})
    capabilities = MemoryBackend.capabilities
    options = frozenset()
    contract_version = 1

    @asynccontextmanager
    async def open(self, config):
        name = config.url.partition("://")[2]
        inner = dataclasses.replace(config, url=f"memory://trap-{name}", scheme="memory")
        async with MemoryBackend().open(inner) as store:
            if name == "data" and not await store.get_runs(flow_id=None, after=None, skip=0, take=1):
                await store.start_run(
                    flow_id=UUID(int=1), flow_name="payroll", run_id=UUID(int=2), trigger_key="manual",
                    trigger_data=None, job_id=None, source_run_id=None,
                )
            yield Uninspectable(store) if name == "uninspectable" else store

    @asynccontextmanager
    async def scratch(self, url):
        name = url.partition("://")[2]
        if name == "broken":
            raise RuntimeError("password=s3cret")
        if name == "down":
            raise StoreUnavailableError("no route")
        yield {"redirect": "trap://data", "hidden": "trap://uninspectable"}.get(name, url)


@hookimpl
def flowstore_backends():
    return [Trap()]
'''


def install_trap(folder: Path) -> None:
    """Install the plugin into a folder, as pip would; it serves ``trap://`` if the folder is on the path."""
    info = folder / "flowstore_trap-1.0.dist-info"
    info.mkdir()
    (folder / "flowstore_trap.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flowstore-trap\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[flowstore]\ntrap = flowstore_trap\n")
