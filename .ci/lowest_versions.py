"""Install flowstore with every direct dependency at its lower bound, and run tests in that environment.

The bounds are those of pyproject.toml, for the build and for every extra. uv chooses the versions of
indirect dependencies, as it would for a user who pins the direct ones. The conformance suite then runs once
on each database, with its command: that calls every part of a driver that flowstore uses. The PostgreSQL
server has other defaults than usual, so that the same run is also one of those of .ci/environments.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
EXTRA = "test"
SERVER = ("default_transaction_isolation=serializable", "TimeZone=Asia/Kathmandu")
# Of the tests of core, those of pluggy: core imports no other dependency, which import-linter checks.
TESTS = (
    "tests/core/test_distributions.py",
    "tests/core/test_plugins.py",
    "tests/test_cli.py",
    "tests/test_conformance_cli.py",
    "tests/test_conformance_pytest.py",
    "tests/test_documents_codec.py",
    "tests/test_documents_transactions.py",
    "tests/test_memory.py",
    "tests/test_opening.py",
    "tests/test_otel.py",
    "tests/security/test_dashboard.py",
    "tests/test_postgres_connection.py",
)


def lower_bounds(pyproject: dict[str, Any]) -> dict[str, str]:
    """The lower bound of each direct dependency, by name.

    Raises ValueError for a dependency without one, and for one with different bounds in two places.
    """
    bounds: dict[str, str] = {}
    for requirement in _requirements(pyproject):
        name = canonicalize_name(requirement.name)
        if name == pyproject["project"]["name"]:
            continue
        found = [one.version for one in requirement.specifier if one.operator == ">="]
        if len(found) != 1:
            raise ValueError(f"{requirement} has no lower bound; write it as name>=version")
        if bounds.setdefault(name, found[0]) != found[0]:
            raise ValueError(f"{name} has two lower bounds: {bounds[name]} and {found[0]}")
    return bounds


def _requirements(pyproject: dict[str, Any]) -> Iterator[Requirement]:
    project = pyproject["project"]
    for requirements in (
        pyproject["build-system"]["requires"],
        project["dependencies"],
        *project["optional-dependencies"].values(),
    ):
        yield from map(Requirement, requirements)


def main() -> int:
    pins = lower_bounds(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    with tempfile.TemporaryDirectory(prefix="flowstore-lowest-") as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pins.items()))
        python = Path(folder, "venv", "bin", "python")
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, python.parents[1]], check=True)
        install = [*uv, "pip", "install", "--quiet", "--python", python]
        bounds = ["--constraints", constraints, "--build-constraints", constraints]
        subprocess.run([*install, *bounds, "--editable", f"{ROOT}[{EXTRA}]"], check=True)
        subprocess.run([*uv, "pip", "check", "--python", python], check=True)
        # Two processes, because other steps of .ci/run run at the same time.
        tests = [python, "-m", "pytest", "-n", "2", "--dist", "loadgroup", *TESTS]
        failed = subprocess.run(tests, cwd=ROOT, check=False).returncode
        return failed or conformance(python.with_name("flowstore"), Path(folder))


def conformance(flowstore: Path, folder: Path) -> int:
    """Run the suite on each database. Returns the exit code of the first run that does not pass, or 0."""
    with postgresql(flowstore.with_name("python")) as server:
        for arguments in (
            # quick draws random programs itself or with Hypothesis, as the seed decides.
            ("memory://", "--check", "hypothesis_calls_agree_with_the_model"),
            (f"sqlite:///{folder}/flows.db",),
            (server,),
        ):
            command = [flowstore, "conformance", *arguments, "--profile", "quick"]
            if failed := subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode:
                return failed
    return 0


@contextmanager
def postgresql(python: Path) -> Iterator[str]:
    """Start a server with the parameters, from the wheel at its lower bound, and yield its URL."""
    command = [python, ROOT / "tests" / "cluster.py", *SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            if not url:
                raise RuntimeError("the PostgreSQL server did not start; see stderr")
            yield url
        finally:
            # The server ends with its input.
            server.stdin.close()


if __name__ == "__main__":
    sys.exit(main())
