"""Check the distributions under ``integrations`` and ``plugins``, each in a new environment: types, tests.

The integrations are tested on the plugins too. Two distributions are checked at a time: their tests mostly
wait for servers and leases, and their time limits suit a loaded machine. A failure ends only its own check.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))
INTEGRATIONS = sorted(path.parent for path in ROOT.glob("integrations/*/pyproject.toml"))
AT_ONCE = 2


def main() -> int:
    failed = []
    # The plugins take longest, so that they start first.
    with ThreadPoolExecutor(AT_ONCE) as pool:
        checks = {pool.submit(check, folder): folder.name for folder in [*PLUGINS, *INTEGRATIONS]}
        for done in as_completed(checks):
            passed, output = done.result()
            sys.stdout.write(f"\n==> {checks[done]}\n{output}")
            sys.stdout.flush()
            if not passed:
                failed.append(checks[done])
    if failed:
        sys.stdout.write(f"\nthe checks did not pass in: {', '.join(sorted(failed))}\n")
    return 1 if failed else 0


def check(folder: Path) -> tuple[bool, str]:
    """Return whether all commands pass, and their output up to the first that does not."""
    output = ""
    with tempfile.TemporaryDirectory(prefix="flowstore-integration-") as temporary:
        python = Path(temporary, "venv", "bin", "python")
        uv = [sys.executable, "-m", "uv"]
        folders = [ROOT, f"{folder}[test]", *(PLUGINS if folder in INTEGRATIONS else ())]
        editable = [part for path in folders for part in ("--editable", path)]
        install = [*uv, "pip", "install", "--quiet", "--python", python]
        commands: Sequence[Sequence[object]] = (
            [*uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]],
            [*install, "--constraints", ROOT / "constraints.txt", *editable, "mypy"],
            [python, "-m", "mypy"],
            [python, "-m", "pytest"],
        )
        for command in commands:
            done = subprocess.run(
                [str(part) for part in command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            output += done.stdout
            if done.returncode:
                return False, output
    return True, output


if __name__ == "__main__":
    sys.exit(main())
