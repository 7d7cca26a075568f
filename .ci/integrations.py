"""Check the distributions under ``integrations`` and ``plugins``, each in a new environment: types, tests."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    projects = [*ROOT.glob("integrations/*/pyproject.toml"), *ROOT.glob("plugins/*/pyproject.toml")]
    for folder in sorted(path.parent for path in projects):
        with tempfile.TemporaryDirectory(prefix="flowstore-integration-") as temporary:
            python = Path(temporary, "venv", "bin", "python")
            uv = [sys.executable, "-m", "uv"]
            subprocess.run(
                [*uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True
            )
            packages = ["--editable", str(ROOT), "--editable", f"{folder}[test]", "mypy"]
            subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, *packages], check=True)
            for command in (["mypy"], ["pytest"]):
                done = subprocess.run([python, "-m", *command], cwd=folder, check=False)
                if done.returncode:
                    return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
