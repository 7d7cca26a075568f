"""The CI job for the lowest allowed versions, which it reads from pyproject.toml."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / ".ci" / "lowest_versions.py"


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lowest_versions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(*dependencies: str, **extras: list[str]) -> dict[str, Any]:
    return {
        "build-system": {"requires": ["builder>=1"]},
        "project": {"name": "example", "dependencies": list(dependencies), "optional-dependencies": extras},
    }


def test_every_direct_dependency_is_pinned_to_its_lower_bound(job: ModuleType) -> None:
    settings = project(
        "Some_Thing>=2.1,<9",
        one=["other[extra]>=3; sys_platform == 'linux'"],
        two=["example[one]", "some-thing>=2.1"],
    )
    assert job.lower_bounds(settings) == {"builder": "1", "some-thing": "2.1", "other": "3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (project("thing"), "thing has no lower bound"),
        (project("thing<3"), "thing<3 has no lower bound"),
        (project("thing==3"), "thing==3 has no lower bound"),
        (project("thing>=2", one=["thing>=3"]), "thing has two lower bounds: 2 and 3"),
    ],
)
def test_a_dependency_without_one_lower_bound_is_refused(
    settings: dict[str, Any], message: str, job: ModuleType
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        job.lower_bounds(settings)


def test_the_bounds_come_from_pyproject(job: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    bounds = job.lower_bounds(tomllib.loads(text))
    assert {"pluggy", "aiosqlite", "asyncpg", "typer", "rich", "hypothesis", "opentelemetry-api"} <= set(
        bounds
    )
    for name, version in bounds.items():
        assert re.search(rf'"{re.escape(name)}(\[\w+\])?>={re.escape(version)}["; ]', text), name


def test_ci_runs_the_job_on_the_oldest_python(job: ModuleType) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert job.EXTRA in settings["optional-dependencies"]
    for name in job.TESTS:
        assert (ROOT / name).exists(), name
    oldest = settings["requires-python"].removeprefix(">=")
    for file, expected in (
        (".ci/run", f"sys.version_info[:2] != ({oldest.replace('.', ', ')})"),
        (".ci/run", "run python .ci/lowest_versions.py"),
        (".github/workflows/ci.yml", f'python: ["{oldest}"'),
        (".github/workflows/ci.yml", "run: .ci/run"),
    ):
        assert expected in (ROOT / file).read_text(encoding="utf-8"), (file, expected)
