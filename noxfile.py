"""The project's tasks: ``nox -l`` lists them. They run in the environment of the nox that runs them.

nox -s tests                      everything
nox -s check -- CLM-6 sqlite      one clause on one backend (the backend is optional)
nox -s touched                    the tests that a change affects
nox -s lint types docs
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "tests"]

# The tools of this environment come first, also where it is not activated.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

BACKENDS = ("flowstore_memory", "flowstore_sqlite", "flowstore_postgres", "flowstore_documents")
CONFORMANCE = "tests/test_conformance_builtins.py"
# Twice the two cores that the tests are measured on, because the tests wait during half of their time.
PARALLEL = ("-n", "4", "--dist", "loadgroup")


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests in four processes; arguments go to pytest."""
    session.run("python", "-m", "pytest", *PARALLEL, *session.posargs)


@nox.session
def check(session: nox.Session) -> None:
    """Run the checks of a clause, or the check with a name, on all backends or on one."""
    if not session.posargs:
        session.error("name a clause or a check: nox -s check -- CLM-6 sqlite")
    session.run("python", "-m", "pytest", CONFORMANCE, "-k", " and ".join(session.posargs))


@nox.session
def touched(session: nox.Session) -> None:
    """Run the tests affected by the changes since the branch left main, or the branch given."""
    branch = session.posargs[0] if session.posargs else "main"
    (base,) = _git("merge-base", "HEAD", branch)
    changed = [*_git("diff", "--name-only", base), *_git("ls-files", "--others", "--exclude-standard")]
    selected = sorted(_tests_of(changed))
    if not selected:
        session.log("the change affects no test")
        return
    session.run("python", "-m", "pytest", *PARALLEL, *selected)


@nox.session
def lint(session: nox.Session) -> None:
    """Check the format, the lint rules and the import contracts."""
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Run mypy on the packages, and pyright on the public types."""
    session.run("mypy")
    session.run("pyright", "--verifytypes", "flowstore", "--ignoreexternal")
    session.run("pyright", "--verifytypes", "flowstore_core", "--ignoreexternal")


@nox.session
def docs(session: nox.Session) -> None:
    """Run the tests that compare the documentation with the code."""
    session.run("python", "-m", "pytest", *sorted(_tests_of_docs()))


def _tests_of_docs() -> set[str]:
    return {*map(str, Path("tests").glob("test_docs*.py")), "tests/test_conformance_docs.py"}


def _tests_of(changed: list[str]) -> set[str]:
    """The test files that import a changed module, directly or through other modules.

    Entry points hide the imports of backends, so a change in a backend also selects its conformance
    checks and the test files with its name; a changed page selects the tests of the documentation.
    """
    modules = {_module(path): path for path in _git("ls-files", "*.py")}
    imports = {module: _imports(Path(path)) for module, path in modules.items() if Path(path).exists()}
    affected = {_module(path) for path in changed if path.endswith(".py")}
    queue = list(affected)
    while queue:
        name = queue.pop()
        for module, imported in imports.items():
            if name in imported and module not in affected:
                affected.add(module)
                queue.append(module)
    if "tests.conftest" in affected:
        return {"tests"}
    selected = {modules[name] for name in affected if name in modules}
    selected = {path for path in selected if Path(path).name.startswith("test_") and Path(path).exists()}
    for backend in BACKENDS:
        if any(path.startswith(f"{backend}/") for path in changed):
            name = backend.removeprefix("flowstore_")
            selected.update([CONFORMANCE, *map(str, Path("tests").glob(f"test_*{name}*.py"))])
    if any(path.startswith("conformance/") for path in changed):
        selected.add(CONFORMANCE)
    if any(path.endswith(".md") for path in changed):
        selected |= _tests_of_docs()
    return selected


def _git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def _module(path: str) -> str:
    return path.removeprefix("conformance/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(path: Path) -> set[str]:
    """The modules that a file imports; of ``from a import b`` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found
