"""mypy --strict accepts the programs of this folder, which hold the public types to the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(300)
def test_mypy_accepts_every_program() -> None:
    pytest.importorskip("mypy")
    programs = [f"tests/typed/{name}.py" for name in ("backend", "engine", "synchronous")]
    # One process reads the types of flowstore once.
    command = [sys.executable, "-m", "mypy", "--strict", *programs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
