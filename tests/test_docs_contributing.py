"""CONTRIBUTING.md and docs/glossary.md agree with the code: tasks, recipes, names."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowstore_sqlite
from flowstore_core.operations import Operation
from tests import test_operations

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text()
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()


def _recipe(title: str) -> str:
    return " ".join(re.split(r"\n##+ ", PAGE.partition(f"\n### {title}\n")[2])[0].split())


def _sessions() -> set[str]:
    """The sessions of the noxfile, parsed because nox may not be installed."""
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any(ast.unparse(one).startswith("nox.session") for one in node.decorator_list)
    }


def test_every_task_is_documented_and_exists() -> None:
    assert set(re.findall(r"nox -s (\w+)", PAGE)) == _sessions()


def test_every_option_of_pytest_in_the_page_works() -> None:
    commands = re.findall(r"`\.venv/bin/python -m (pytest tests/[^`]+)`", PAGE)
    assert len(commands) == 2
    for command in commands:
        arguments = [one for one in shlex.split(command)[1:] if one != "--collect-only"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        assert "CLM-6" in done.stdout


def test_the_recipe_for_an_operation_names_every_required_part() -> None:
    new = Operation(name="do_something_new", clauses=("NEW-1",), writes=True)
    recipe = _recipe("Add an operation")
    missing_parts = list(test_operations.missing(new))
    assert len(missing_parts) > 10
    for part in missing_parts:
        assert part.partition(",")[0].replace("NEW-1", "its clause") in recipe, part
    assert "def test_every_operation_has_all_its_parts" in Path(test_operations.__file__).read_text()


def test_the_recipe_for_a_migration_works(tmp_path: Path) -> None:
    recipe = _recipe("Add a migration")
    named = re.search(r"`(\d{4})(_\w+\.sql)`", recipe)
    head = re.search(r"`(-- works_from: \d+)`", recipe)
    assert named is not None
    assert head is not None
    shutil.copytree(Path(flowstore_sqlite.__file__).parent, tmp_path / "flowstore_sqlite")
    migrations = tmp_path / "flowstore_sqlite" / "migrations"
    number = len(list(migrations.glob("*.sql"))) + 1
    text = f"{head[1]}\nCREATE TABLE new_table (id INTEGER) STRICT;\n"
    (migrations / f"{number:04}{named[2]}").write_text(text)

    def flowstore(*arguments: str) -> str:
        command = [sys.executable, "-m", "flowstore_cli.main", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "FLOWSTORE_URL": "sqlite:///scratch.db"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "new_table" in flowstore("migrate", "sql")
    assert f"to {number}" in flowstore("migrate", "up")
    assert f"version {number} of {number}" in flowstore("migrate", "status")


def test_the_commands_of_the_recipe_for_a_check_work() -> None:
    recipe = _recipe("Debug one check")
    command = re.search(r"`\.venv/bin/(flowstore conformance [^`]+)`", recipe)
    assert command is not None
    words = shlex.split(command[1])[1:]
    done = subprocess.run(
        [sys.executable, "-m", "flowstore_cli.main", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "CLM-6" in done.stdout


def _rows() -> list[list[str]]:
    lines = [line for line in GLOSSARY.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_glossary_has_each_term_once_with_one_sentence() -> None:
    terms = [row[0] for row in _rows()]
    assert len(terms) == len(set(terms)) >= 20
    assert all(row[1].endswith(".") and ". " not in row[1] for row in _rows())


@pytest.mark.parametrize("row", _rows(), ids=lambda row: row[0])
def test_every_name_in_the_glossary_exists(row: list[str]) -> None:
    name = row[2].strip("`")
    module, attributes = name, list[str]()
    while True:
        try:
            target: object = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            attributes.insert(0, last)
    for attribute in attributes:
        target = getattr(target, attribute)
