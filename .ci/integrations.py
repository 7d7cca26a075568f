"""Check the distributions under ``integrations`` and ``plugins``, each in a new environment: types, tests.

The integrations are tested on the plugins too.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> int:
    plugins = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
    integrations = sorted(path.parent for path in ROOT.glob("integrations/*/pyproject.toml"))
    for folder in [*integrations, *plugins]:
        with tempfile.TemporaryDirectory(prefix="flowstore-integration-") as temporary:
            python = Path(temporary, "venv", "bin", "python")
            uv = [sys.executable, "-m", "uv"]
            subprocess.run(
                [*uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True
            )
            folders = [ROOT, f"{folder}[test]", *(plugins if folder in integrations else ())]
            editable = [part for path in folders for part in ("--editable", str(path))]
            subprocess.run(
                [*uv, "pip", "install", "--quiet", "--python", python, *editable, "mypy"], check=True
            )
            for command in (["mypy"], ["pytest"]):
                done = subprocess.run([python, "-m", *command], cwd=folder, check=False)
                if done.returncode:
                    return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
