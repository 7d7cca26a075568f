"""Every line of the reliability scorecard at its smallest: green on the stores, red on its broken variant."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowstore_chaos.line import Line
from flowstore_chaos.lines import load_lines
from flowstore_chaos.outcome import Outcome, Verdict, run_row

SEED = 20

# A row ends itself after two minutes at the soonest, and then says why.
pytestmark = pytest.mark.timeout(300)

ROWS = [
    pytest.param(line, backend, id=f"{line.name}-{backend}")
    for line in load_lines()
    for backend in line.backends
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own: it closes those to other users at every start, PostgreSQL's among them."""
    with tempfile.TemporaryDirectory(prefix="flowstore-lines-", ignore_cleanup_errors=True) as name:
        yield Path(name)


async def _row(line: Line, backend: str, folder: Path, *, broken: bool) -> Outcome:
    outcome = await run_row(
        line, backend, seed=SEED, planned=line.least, broken=broken, folder=folder, say=lambda _: None
    )
    if outcome.skipped is not None:
        pytest.skip(outcome.skipped)
    return outcome


@pytest.mark.parametrize(("line", "where"), ROWS)
async def test_line_is_green(line: Line, where: str, folder: Path) -> None:
    outcome = await _row(line, where, folder, broken=False)
    assert outcome.failure is None, outcome.failure
    assert not outcome.tally.findings
    assert outcome.tally.landed >= line.least
    assert outcome.verdict is Verdict.PASSED


@pytest.mark.parametrize(("line", "where"), ROWS)
async def test_line_goes_red_on_its_broken_variant(line: Line, where: str, folder: Path) -> None:
    outcome = await _row(line, where, folder, broken=True)
    # By a count that it is there for, not by breaking down.
    assert outcome.failure is None, outcome.failure
    assert outcome.tally.findings
    assert outcome.good
