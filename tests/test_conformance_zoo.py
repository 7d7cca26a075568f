"""Every broken backend of the zoo is found, by a check of the clause that names its bug."""

from __future__ import annotations

from pathlib import Path

import pytest
from flowstore_conformance import observation

from tests.zoo import zoo
from tests.zoo.hunt import DIST, find_kill

ZOO = zoo()


@pytest.fixture
def base_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A URL of the built-in backend that an animal is made of."""
    base = ZOO[request.node.callspec.params["name"]].base
    if base == "memory":
        return "memory://"
    if base == "sqlite":
        return f"sqlite:///{tmp_path}/flows.db"
    return str(request.getfixturevalue("postgresql_url"))


@pytest.mark.parametrize("name", ZOO)
async def test_the_suite_finds_it(name: str, base_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DIST)
    # The suite waits long before it believes that a wrong answer stays; here it is known to be one.
    monkeypatch.setattr(observation, "PATIENCE_SECONDS", 0.5)
    kill = await find_kill(ZOO[name], base_url)
    assert kill is not None, f"no check of {ZOO[name].clause} finds: {ZOO[name].description}"


def test_the_zoo_is_large_enough() -> None:
    assert len(ZOO) >= 60
    assert sum(animal.concurrent for animal in ZOO.values()) >= 20
    for base in ("memory", "sqlite", "postgresql"):
        racing = [animal for animal in ZOO.values() if animal.base == base and animal.concurrent]
        assert len(racing) >= 5, base


def test_the_matrix_is_of_this_zoo() -> None:
    matrix = Path(__file__).parents[1] / "docs" / "kill-matrix.md"
    lines = matrix.read_text(encoding="utf-8").splitlines()
    rows = [line.split(" | ")[0].strip("| ") for line in lines if line.startswith("| ")]
    assert rows[1:] == list(ZOO)
