"""axe-core, from npm: fetched once for a checkout, and never committed."""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

VERSION = "4.10.3"


def load_axe(config: pytest.Config) -> str:
    """The script of axe-core. Skips the test, with the reason, where npm cannot fetch it."""
    assert config.cache is not None
    folder = config.cache.mkdir("axe-core")
    script = folder / f"axe-{VERSION}.min.js"
    if not script.is_file():
        _fetch(folder, script)
    return script.read_text(encoding="utf-8")


def _fetch(folder: Path, script: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed, so axe-core is missing")
    command = [npm, "pack", "--silent", "--pack-destination", str(folder), f"axe-core@{VERSION}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"npm cannot fetch axe-core: {done.stderr.strip()[-200:]}")
    with tarfile.open(folder / f"axe-core-{VERSION}.tgz") as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        # Other workers may be reading it.
        partial = script.with_suffix(".partial")
        partial.write_bytes(member.read())
        partial.replace(script)
