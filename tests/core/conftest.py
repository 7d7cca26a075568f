"""Installation of third-party plugins for the duration of a test."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent

import pytest

Install = Callable[..., None]

# The source of a plugin with a backend that records the calls of its stores.
RECORDING = """
from contextlib import asynccontextmanager
from datetime import timedelta

import flowstore_core as fs

opened = []
closed = []
calls = []


class Store:
    def __init__(self, name):
        self.name = name

    async def ping(self):
        calls.append((self.name, "ping", {}))

    def __getattr__(self, operation):
        if operation.startswith("_") or operation == "capabilities":
            raise AttributeError(operation)

        async def call(**arguments):
            calls.append((self.name, operation, arguments))
            return f"{operation} of {self.name}"

        return call


class Backend:
    name = "mine"
    schemes = frozenset({"mine"})
    capabilities = frozenset(fs.Capability)
    max_skew = timedelta(seconds=1)
    options = frozenset({"colour"})
    contract_version = 1
    store = Store

    @asynccontextmanager
    async def open(self, config):
        opened.append(config)
        try:
            yield self.store("innermost")
        finally:
            closed.append(config)

    @asynccontextmanager
    async def scratch(self, url):
        yield url


@fs.hookimpl
def flowstore_backends():
    return [Backend()]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a distribution with one plugin module, as pip would: files next to a dist-info directory."""
    modules: set[str] = set()

    def install_one(
        name: str,
        code: str,
        *,
        entry: str | None = None,
        entries: str | None = None,
        requires: tuple[str, ...] = (),
    ) -> None:
        # A new directory: the import system caches the contents of those already on the path.
        folder = tmp_path / f"site-{len(modules)}"
        module = f"plugin_of_{name}"
        modules.add(module)
        info = folder / f"dist_of_{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{module}.py").write_text(dedent(code))
        metadata = [f"Metadata-Version: 2.1\nName: dist-of-{name}\nVersion: 1.0"]
        metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
        (info / "METADATA").write_text("\n".join(metadata) + "\n")
        entry_points = entries or f"[flowstore]\n{entry or name} = {module}\n"
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(folder)

    yield install_one
    for module in modules:
        sys.modules.pop(module, None)
    importlib.invalidate_caches()
