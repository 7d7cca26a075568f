"""The distribution: built, installed into a clean environment, and used from an empty directory."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The import packages, by name.
PACKAGES = {
    Path(name).name: ROOT / name
    for name in SETTINGS["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
}

# One worker builds and installs the distribution for all of these tests.
pytestmark = pytest.mark.xdist_group("packaging")

IMPORT_EVERYTHING = """
import importlib, importlib.metadata, importlib.resources, pathlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    folder = pathlib.Path(module.__file__).parent
    assert folder.is_relative_to(sys.prefix), folder
    assert (folder / "py.typed").is_file(), name
for name in ("flowstore_sqlite", "flowstore_postgres"):
    assert list(importlib.resources.files(name).joinpath("migrations").glob("0001_*.sql")), name
assert list(importlib.resources.files("flowstore_replay").joinpath("workflows").glob("*.json"))
print(*sorted(d.name.lower() for d in importlib.metadata.distributions()))
"""

LIFECYCLE = """
import asyncio, sys
from datetime import timedelta
from flowstore import RunStatus, StepStatus, new_claim_token, new_run_id, open_store

async def main(url):
    run_id, token = new_run_id(), new_claim_token()
    async with open_store(url) as store:
        await store.start_run(new_run_id(), "orders", run_id, "manual")
        assert await store.try_claim_step(run_id, "a", owner=token, lease=timedelta(seconds=9))
        attempt = await store.record_step_start(run_id, "a", "http", owner=token)
        await store.record_step_complete(run_id, "a", StepStatus.SUCCEEDED, attempt=attempt)
        assert await store.complete_run(run_id, RunStatus.SUCCEEDED, expected={"a": "Succeeded"})
        print(store.backend, (await store.get_run_detail(run_id)).status)

asyncio.run(main(sys.argv[1]))
"""

WITHOUT_DRIVER = """
import asyncio
from flowstore import BackendLoadError, open_store

async def main():
    try:
        async with open_store("postgresql://someone:secret@nowhere/db"):
            pass
    except BackendLoadError as error:
        print(error)

asyncio.run(main())
"""


@dataclass(frozen=True)
class Site:
    """A clean virtual environment with the wheel, and an empty folder to work in."""

    wheel: Path
    sdist: Path
    bin: Path
    folder: Path

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside the project and without its environment variables."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FLOWSTORE"))}
        return subprocess.run(
            [str(self.bin / command[0]), *command[1:]],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )

    def python(self, code: str, *arguments: str) -> str:
        """Run Python code in the environment and return what it prints."""
        done = self.run("python", "-I", "-W", "error", "-c", code, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def install(self, requirement: str) -> None:
        uv = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(self.bin / "python")]
        constraints = ["--constraints", str(ROOT / "constraints.txt")]
        subprocess.run([*uv, *constraints, requirement], check=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Build the sdist, build the wheel from it, and install the wheel without extras."""
    dist, venv, folder = (tmp_path_factory.mktemp(name) for name in ("dist", "venv", "empty"))
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    installed = Site(wheel=wheel, sdist=sdist, bin=venv / "bin", folder=folder)
    installed.install(str(wheel))
    return installed


def test_the_base_has_two_dependencies_and_contains_every_package(site: Site) -> None:
    # Every package can be imported, except for two that need an extra; features that do report it on use.
    names = [name for name in PACKAGES if name not in {"flowstore_conformance", "flowstore_documents"}]
    assert site.python(IMPORT_EVERYTHING, *names).split() == ["aiosqlite", "flowstore", "pluggy"]


def test_the_wheel_contains_only_the_packages(site: Site) -> None:
    names = zipfile.ZipFile(site.wheel).namelist()
    roots = {name.partition("/")[0] for name in names}
    (metadata,) = roots - {*PACKAGES}
    assert f"{metadata}/licenses/LICENSE" in names
    tracked = {
        str(path.relative_to(package.parent))
        for package in PACKAGES.values()
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if not name.startswith(f"{metadata}/")} == tracked


def test_the_sdist_contains_tests_and_documentation(site: Site) -> None:
    with tarfile.open(site.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "docs/contract.md"}
    assert expected | {"tests/test_packaging.py", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith((".venv", ".git/", "dist"))}


@pytest.mark.parametrize("url", ["memory://", "sqlite:///flows.db"])
def test_a_run_completes_in_the_installed_package(site: Site, url: str) -> None:
    assert site.python(LIFECYCLE, url).split() == [url.partition(":")[0], "Succeeded"]


def test_a_missing_driver_is_reported_with_its_remedy(site: Site) -> None:
    output = site.python(WITHOUT_DRIVER)
    assert "'asyncpg' is not installed" in output
    assert "pip install 'flowstore[postgres]'" in output
    assert "secret" not in output


def test_the_command_line_names_its_missing_extra(site: Site) -> None:
    done = site.run("flowstore", "--help")
    assert done.returncode != 0
    assert "pip install 'flowstore[cli]'" in done.stderr
    assert "Traceback" not in done.stderr

    site.install(f"{site.wheel}[cli]")
    assert "typer" in site.python(IMPORT_EVERYTHING, "flowstore_cli.main")
    done = site.run("flowstore", "backends")
    assert done.returncode == 0, done.stderr
    for scheme in ("memory", "postgresql", "sqlite"):
        assert scheme in done.stdout
    # The base contains the OpenTelemetry wrapper without its dependency.
    assert "pip install 'flowstore[otel]'" in done.stdout
    done = site.run("flowstore", "doctor", "memory://")
    assert (done.returncode, done.stdout) == (0, "no findings: memory://\n")
    done = site.run("flowstore", "new-backend", "mine", "--documents")
    assert done.returncode == 0, done.stderr
    for name in (".github/workflows/conformance.yml", "flowstore_mine/py.typed", "flowstore_mine/space.py"):
        assert (site.folder / "flowstore-mine" / name).is_file()
