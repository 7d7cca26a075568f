"""Broken metadata: ignored in unrelated distributions, reported in those of plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowstore_cli.main import main
from flowstore_core import BackendLoadError, UnknownBackendError, open_store
from flowstore_core.distributions import installed_version, list_broken_distributions, read_requirements
from flowstore_core.plugins import load_plugins
from tests.core.conftest import RECORDING, Install

UTF_16 = "[console_scripts]\nx = y:z\n".encode("utf-16")
LATIN = "[console_scripts]\nmüll = m:x\n".encode("latin-1")
METADATA = b"Metadata-Version: 2.1\nName: stray\nVersion: 1.0\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for packages at the start of the import path."""
    folder_path = tmp_path / "site"
    folder_path.mkdir()
    monkeypatch.syspath_prepend(folder_path)
    return folder_path


def _write(
    site: Path, entry_points: bytes | None, metadata: bytes | None = METADATA, folder: str = "stray-1.0"
) -> None:
    folder_path = site / f"{folder}.dist-info"
    folder_path.mkdir()
    if metadata is not None:
        (folder_path / "METADATA").write_bytes(metadata)
    if entry_points is not None:
        (folder_path / "entry_points.txt").write_bytes(entry_points)


STRAY_DISTRIBUTIONS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda site: _write(site, None, None),
    "nameless": lambda site: _write(site, None, None, folder=""),
    "nameless, with entry points": lambda site: _write(site, b"[a]\nb = c\n", None, folder=""),
    "a file": lambda site: (site / "old.egg-info").write_text("Metadata-Version: 1.0\nName: old\n"),
    "no metadata": lambda site: _write(site, b"[console_scripts]\nx = y:z\n", None),
    "metadata in Latin-1": lambda site: _write(site, b"[a]\nb = c\n", b"Name: stray\nAuthor: M\xfcller\n"),
    "a line without =": lambda site: _write(site, b"[console_scripts]\nhalf\n"),
    "a line before any group": lambda site: _write(site, b"x = y:z\n"),
    "Latin-1": lambda site: _write(site, LATIN),
    "UTF-16": lambda site: _write(site, UTF_16),
    "zero bytes": lambda site: _write(site, b"\0" * 512),
}
UNREADABLE = {"a line without =", "Latin-1", "UTF-16"}


@pytest.mark.parametrize("kind", STRAY_DISTRIBUTIONS)
async def test_invalid_metadata_of_unrelated_distributions_is_ignored(kind: str, site: Path) -> None:
    STRAY_DISTRIBUTIONS[kind](site)
    async with open_store("memory://") as store:
        await store.ping()
    assert {"memory", "sqlite", "postgresql"} <= {plugin.name for plugin in load_plugins()}
    assert all(plugin.error is None for plugin in load_plugins())
    with pytest.raises(UnknownBackendError):
        async with open_store("nobody://"):
            pytest.fail("open_store succeeded")


@pytest.mark.parametrize("kind", STRAY_DISTRIBUTIONS)
def test_unreadable_metadata_is_listed(kind: str, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    STRAY_DISTRIBUTIONS[kind](site)
    listed = {entry["name"]: entry for entry in _list_backends(capsys)}
    if kind in UNREADABLE:
        assert listed["stray"]["status"] == "unreadable"
        assert "entry points cannot be read" in listed["stray"]["problem"]
        assert listed["stray"]["remedy"] == "reinstall or uninstall stray"
        assert [one.name for one in list_broken_distributions()] == ["stray"]
    else:
        assert {entry["status"] for entry in listed.values()} == {"installed"}
        assert list_broken_distributions() == []


def _list_backends(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    assert main(["backends", "--json"]) == 0
    backends: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return backends


@pytest.mark.parametrize(
    "value", ["my-package.plugin", "", "my_package/plugin.py", "gone_package.plugin", "json:nothing"]
)
async def test_an_invalid_entry_point_of_a_backend_is_reported_with_its_plugin(
    value: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(site, f"[flowstore]\nmine = {value}\n".encode())
    async with open_store("memory://") as store:
        await store.ping()
    with pytest.raises(BackendLoadError, match="mine") as caught:
        async with open_store("mine://x"):
            pytest.fail("open_store succeeded")
    assert "stray" in caught.value.remedy
    with pytest.raises(UnknownBackendError, match="broken plugins: 'mine'"):
        async with open_store("nobody://x"):
            pytest.fail("open_store succeeded")
    (listed,) = [entry for entry in _list_backends(capsys) if entry["name"] == "mine"]
    assert listed["status"] == "broken"


async def test_a_module_missing_from_a_frozen_program_is_reported_with_its_remedy(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(site, b"[flowstore]\nmine = gone_package.plugin\n")
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(BackendLoadError, match=r"gone_package\.plugin.*--collect-all gone_package"):
        async with open_store("mine://x"):
            pytest.fail("open_store succeeded")


@pytest.mark.parametrize("value", ["my-package.tracing", "gone_package.tracing"])
async def test_an_invalid_entry_point_of_a_wrapper_prevents_opening_any_store(value: str, site: Path) -> None:
    _write(site, f"[flowstore_wrappers]\nmine = {value}\n".encode())
    with pytest.raises(BackendLoadError, match="mine"):
        async with open_store("memory://"):
            pytest.fail("open_store succeeded")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("[{}]\nmine = m\nhalf\n", "utf-8"),
        ("# müll\n[{}]\nmine = m\n", "latin-1"),
        ("[{}]\nmine = m\n", "utf-16"),
    ],
)
async def test_unreadable_entry_points_of_a_backend_are_a_broken_plugin(
    text: str, encoding: str, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(site, text.format("flowstore").encode(encoding))
    async with open_store("memory://") as store:
        await store.ping()
    with pytest.raises(UnknownBackendError, match="broken plugins: 'stray'"):
        async with open_store("mine://x"):
            pytest.fail("open_store succeeded")
    (listed,) = [entry for entry in _list_backends(capsys) if entry["name"] == "stray"]
    assert (listed["status"], listed["remedy"]) == ("broken", "reinstall or uninstall stray")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("[{}]\nmine = m\nhalf\n", "utf-8"),
        ("# müll\n[{}]\nmine = m\n", "latin-1"),
        ("[{}]\nmine = m\n", "utf-16"),
    ],
)
async def test_unreadable_entry_points_of_a_wrapper_prevent_opening_any_store(
    text: str, encoding: str, site: Path
) -> None:
    """Skipping a wrapper that encrypts would leak data."""
    _write(site, text.format("flowstore_wrappers").encode(encoding))
    with pytest.raises(BackendLoadError, match=r"stray.*entry points cannot be read") as caught:
        async with open_store("memory://"):
            pytest.fail("open_store succeeded")
    assert caught.value.remedy == "reinstall or uninstall stray"


async def test_a_plugin_works_without_a_readable_distribution_name(install: Install, tmp_path: Path) -> None:
    install("mine", RECORDING)
    (tmp_path / "site-0" / "dist_of_mine-1.0.dist-info" / "METADATA").write_bytes(b"Author: M\xfcller\n")
    async with open_store("mine://x") as store:
        assert store.backend == "mine"
    assert [plugin.distribution for plugin in load_plugins() if plugin.name == "mine"] == ["dist_of_mine"]
    assert installed_version("dist-of-mine") is None
    assert read_requirements("dist-of-mine") == []


async def test_the_first_of_two_versions_on_the_path_is_used(site: Path, install: Install) -> None:
    install("mine", RECORDING)
    # At the end of the path.
    later = site / "later"
    later.mkdir()
    sys.path.append(str(later))
    try:
        _write(later, b"[flowstore]\nmine = gone_package\n", folder="dist_of_mine-0.1")
        async with open_store("mine://x") as store:
            assert store.backend == "mine"
    finally:
        sys.path.remove(str(later))


async def test_a_broken_import_hook_does_not_hide_the_backends(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hook:
        def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
            return None

        def find_distributions(self, context: Any) -> Any:
            raise RuntimeError("no distributions here")

    monkeypatch.setattr(sys, "meta_path", [Hook(), *sys.meta_path])
    async with open_store("memory://") as store:
        await store.ping()


FROZEN = """
import sys
from importlib.metadata import MetadataPathFinder
MetadataPathFinder.find_distributions = classmethod(lambda cls, context=None: iter(()))
import asyncio
from flowstore_core import UnknownBackendError, open_store
async def main():
    try:
        async with open_store("sqlite:///x.db"):
            print("opened")
    except UnknownBackendError as error:
        print(error)
asyncio.run(main())
"""


def test_missing_metadata_is_reported_with_its_remedy(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", FROZEN], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "metadata of flowstore" in ran.stdout
    assert "--copy-metadata flowstore" in ran.stdout
    assert "pip" in ran.stdout


@pytest.mark.parametrize(
    ("scheme", "suggestion"),
    [
        ("postgrse", "postgres"),
        ("sqlite3", "sqlite"),
        ("postgresql+asyncpg", "postgresql"),
        ("mem", "memory"),
    ],
)
async def test_a_misspelt_scheme_gets_a_suggestion(scheme: str, suggestion: str) -> None:
    with pytest.raises(UnknownBackendError) as caught:
        async with open_store(f"{scheme}://me:S3cr3t@x"):
            pytest.fail("open_store succeeded")
    assert f"{scheme!r} (did you mean {suggestion!r}?)" in str(caught.value)
    assert "S3cr3t" not in str(caught.value)


async def test_an_unknown_scheme_without_a_similar_one_gets_no_suggestion() -> None:
    with pytest.raises(UnknownBackendError) as caught:
        async with open_store("nobody://x"):
            pytest.fail("open_store succeeded")
    assert "did you mean" not in str(caught.value)
