"""docs/security.md names an existing test for every promise, and lists every security test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_promise_names_its_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "promise | tested by" not in line]
    matches = [re.fullmatch(r"\| .+ \| `python -m pytest (\S+)` \|", row) for row in rows]
    assert all(matches)
    files = {match[1] for match in matches if match}
    assert all((ROOT / file).is_file() for file in files)
    tests = {f"tests/security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert tests - {"tests/security/test_page.py"} <= files


def test_the_readme_links_to_the_page() -> None:
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()
