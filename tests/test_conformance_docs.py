"""docs/conformance.md and the suite's README agree with the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from flowstore_conformance import Level, Profile, Status, read_waivers
from flowstore_conformance.registry import Kind

from flowstore_cli.app import app

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "conformance.md").read_text()
README = (ROOT / "conformance" / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", page, re.M | re.S)


def first_cells(header: str) -> list[str]:
    table = PAGE.partition(f"\n| {header} |")[2].split("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()[2:]]


def options() -> set[str]:
    command: Any = typer.main.get_command(app)
    found = command.commands["conformance"].params
    return {one.opts[0] for one in found if one.opts[0].startswith("--")}


def test_every_option_of_the_command_is_documented() -> None:
    assert {cell.strip("`").split()[0] for cell in first_cells("option")} == options() - {"--help"}


def test_the_tables_are_complete() -> None:
    assert sorted(first_cells("status")) == sorted(Status)
    assert first_cells("level") == [level.value for level in Level]
    assert sorted(first_cells("kind of check")) == sorted(Kind)
    assert all(f"`{profile}`" in PAGE for profile in Profile)


@pytest.mark.parametrize("page", [PAGE, README], ids=["page", "readme"])
def test_commands_use_existing_options(page: str) -> None:
    commands = re.findall(r"flowstore conformance (.*?)(?=\n\S|\n *-? ?\w+:|```)", page, re.S)
    used = set(re.findall(r"(--[\w-]+)", " ".join(commands)))
    assert used
    assert used <= options()


def test_the_waiver_of_the_page_is_valid(tmp_path: Path) -> None:
    (waiver,) = [block for block in blocks(PAGE, "toml") if "[[waiver]]" in block]
    path = tmp_path / "waivers.toml"
    path.write_text(waiver)
    assert read_waivers(path)[0].clause == "QRY-2"


async def test_the_code_of_the_page_runs() -> None:
    (code,) = blocks(PAGE, "python")
    names: dict[str, Any] = {}
    exec(compile(code, "conformance.md", "exec"), names)
    await names["check"]()


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)", README))
def test_links_of_the_readme_resolve(target: str) -> None:
    assert (ROOT / "conformance" / target).exists()
