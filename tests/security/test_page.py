"""docs/security.md: every line names a test that is there, and no test is forgotten."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_that_every_promise_names_its_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "promise | tested by" not in line]
    named = [re.fullmatch(r"\| .+ \| `python -m pytest (\S+)` \|", row) for row in rows]
    assert all(named)
    files = {match[1] for match in named if match}
    assert all((ROOT / file).is_file() for file in files)
    here = {f"tests/security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")}
    assert here - {"tests/security/test_page.py"} <= files


def test_that_the_readme_leads_to_it() -> None:
    assert "(docs/security.md)" in (ROOT / "README.md").read_text()
