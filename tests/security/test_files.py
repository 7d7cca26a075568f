"""SQLite files have any name, are accessible only by their owner, and are never symbolic links."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from flowstore_core import ConfigurationError, FlowStore, StoreUnavailableError, open_store
from flowstore_core.plugins import find_backend
from flowstore_sqlite.file_access import create_file
from tests.calls import new_run


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def _listing(folder: Path) -> dict[str, bytes]:
    return {path.name: b"" if path.is_dir() else path.read_bytes() for path in folder.iterdir()}


def _path(path: Path) -> str:
    return f"sqlite:///{quote(str(path))}"


async def _use(store: FlowStore) -> None:
    # Uses two connections, so that the log and the lock file of the writer queue exist.
    run_id = await new_run(store)
    assert await store.get_run_status(run_id)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077, 0o177, 0o277, 0o777])
async def test_only_the_owner_can_access_files_with_any_umask(mask: int, tmp_path: Path) -> None:
    with _umask(mask):
        async with open_store(f"sqlite:///{tmp_path}/flows.db") as store:
            await _use(store)
            modes = {name: _mode(tmp_path / name) for name in os.listdir(tmp_path)}
        async with find_backend("sqlite")[1].scratch(f"sqlite:///{tmp_path}/flows.db") as url:
            folder = Path(url.removeprefix("sqlite:///")).parent
            assert _mode(folder) & 0o077 == 0
    assert {"flows.db", "flows.db-wal", "flows.db-shm", "flows.db-turn"} == set(modes)
    assert modes["flows.db"] == 0o600
    for name, mode in modes.items():
        assert mode & 0o177 == 0, f"{name} has mode {mode:o}"


async def test_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    path.touch()
    path.chmod(0o664)
    async with open_store(_path(path)) as store:
        await _use(store)
        assert _mode(path) == 0o664
        # SQLite gives its files the mode of the database, so that its users can share them.
        assert _mode(tmp_path / "flows.db-wal") == 0o664
    assert _mode(path) == 0o664


@pytest.mark.parametrize("migrate", [True, False])
async def test_a_symbolic_link_is_refused(migrate: bool, tmp_path: Path) -> None:
    """Otherwise a user who can write to the folder could redirect data to another file."""
    target_folder = tmp_path / "other"
    target_folder.mkdir()
    async with open_store(f"sqlite:///{target_folder}/flows.db") as store:
        await _use(store)
    before = _listing(target_folder)
    link = tmp_path / "flows.db"
    for target in (
        target_folder / "flows.db",
        target_folder / "absent.db",
        target_folder,
        Path("/dev/null"),
        link,
    ):
        link.symlink_to(target)
        with pytest.raises(ConfigurationError, match="symbolic link"):
            async with open_store(_path(link), migrate=migrate):
                pytest.fail("open_store succeeded")
        link.unlink()
    assert _listing(target_folder) == before
    assert _listing(tmp_path) == {"other": b""}


@pytest.mark.parametrize("present", [True, False])
async def test_a_symbolic_link_created_while_opening_is_refused(
    present: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link created between check and open: SQLite reports the resolved path before it reads a byte."""
    target_folder = tmp_path / "other"
    target_folder.mkdir()
    target = target_folder / "target.db"
    if present:
        async with open_store(_path(target)) as store:
            await _use(store)
    before = _listing(target_folder)

    def create_link(path: str) -> None:
        create_file(path)
        os.unlink(path)
        os.symlink(target, path)

    monkeypatch.setattr("flowstore_sqlite.open.create_file", create_link)
    with pytest.raises((ConfigurationError, StoreUnavailableError)) as caught:
        async with open_store(f"sqlite:///{tmp_path}/flows.db"):
            pytest.fail("open_store succeeded")
    if present:
        assert "symbolic link" in str(caught.value)
    assert _listing(target_folder) == before


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-turn", "-journal"])
async def test_symbolic_links_in_place_of_sidecar_files_are_not_followed(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (tmp_path / f"flows.db{suffix}").symlink_to(target)
    try:
        async with open_store(f"sqlite:///{tmp_path}/flows.db", busy_timeout=0) as store:
            await _use(store)
    except StoreUnavailableError:
        # SQLite does not open such a log. The writer queue is optional.
        assert suffix != "-turn"
    assert target.read_bytes() == b"precious"
    assert _mode(target) & 0o111 == 0


async def test_a_parent_directory_may_be_a_symbolic_link(tmp_path: Path) -> None:
    """As /tmp on some systems. A user who can change a parent folder can replace the file anyway."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    async with open_store(f"sqlite:///{tmp_path}/link/../link/flows.db") as store:
        await _use(store)
    async with open_store(f"sqlite:///{tmp_path}/real/flows.db") as store:
        assert len(await store.get_runs()) == 1


@pytest.mark.parametrize(
    "kind", ["directory", "pipe", "device", "child of a file", "missing parent", "too long"]
)
async def test_a_path_that_is_not_a_regular_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/null")
    elif kind == "child of a file":
        path.touch()
        path = path / "flows.db"
    elif kind == "missing parent":
        path = tmp_path / "absent" / "flows.db"
    else:
        path = tmp_path / ("x" * 300)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((ConfigurationError, StoreUnavailableError)):
        async with open_store(_path(path)):
            pytest.fail("open_store succeeded")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("content", [b"hello", b"no database" * 1000, b"\0" * 5000])
async def test_a_file_that_is_not_a_database_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "flows.db"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="is not an SQLite database") as caught:
        async with open_store(_path(path)):
            pytest.fail("open_store succeeded")
    assert caught.value.__context__ is None
    assert _listing(tmp_path) == {"flows.db": content}


NAMES = [
    "flows?mode=memory&cache=shared.db",
    "flows#fragment.db",
    "two words.db",
    "100%.db",
    "%41.db",
    "file:flows.db?vfs=none",
    ":memory:x",
    "it's; DROP TABLE runs; --.db",
    'quote".db',
    "äöü-\N{SNOWMAN}.db",
    "back\\slash.db",
    "-wal",
]


@pytest.mark.parametrize("name", NAMES)
async def test_special_characters_in_a_file_name_are_kept(name: str, tmp_path: Path) -> None:
    async with open_store(_path(tmp_path / name)) as store:
        await _use(store)
        assert name in os.listdir(tmp_path)
        await store.aclose()
    assert set(os.listdir(tmp_path)) == {name, f"{name}-turn"}


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite://host/flows.db",
        "sqlite:///a%00b.db",
        "sqlite:///?mode=memory",
        "sqlite:///x.db?mode=memory",
        "sqlite:///x.db?vfs=unix-none",
        "sqlite:///x.db?immutable=1",
    ],
)
async def test_a_url_that_does_not_name_one_file_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError):
        async with open_store(url):
            pytest.fail("open_store succeeded")
    assert os.listdir(tmp_path) == []


def test_a_file_of_another_user_is_not_changed() -> None:
    """The error names the permissions, and the mode of the file is unchanged."""
    if os.geteuid() != 0:
        pytest.skip("only root can switch to another user")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder) / "flows.db"
        path.touch()
        path.chmod(0o600)
        output = _open_as_nobody(path)
        assert "StoreUnavailableError" in output
        assert "permissions" in output
        assert _mode(path) == 0o600


def _open_as_nobody(path: Path) -> str:
    program = (
        "import asyncio, os, sys\n"
        "from flowstore_core import open_store, FlowStoreError\n"
        "import flowstore_sqlite.open\n"
        "async def main(url):\n"
        "    try:\n"
        "        async with open_store(url): print('opened')\n"
        "    except FlowStoreError as error: print(type(error).__name__, error)\n"
        # Import everything first: the user nobody may be unable to read the files of the interpreter.
        "asyncio.run(main(sys.argv[1] + '-first'))\n"
        "os.setuid(65534)\n"
        "asyncio.run(main(sys.argv[1]))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, _path(path)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return ran.stdout
