"""The job that tests the lowest allowed versions takes them from pyproject.toml, and CI runs it."""

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
        "project": {"name": "ours", "dependencies": list(dependencies), "optional-dependencies": extras},
    }


def test_every_direct_dependency_is_pinned_to_its_lower_bound(job: ModuleType) -> None:
    given = project(
        "Some_Thing>=2.1,<9",
        one=["other[extra]>=3; sys_platform == 'linux'"],
        two=["ours[one]", "some-thing>=2.1"],
    )
    assert job.lower_bounds(given) == {"builder": "1", "some-thing": "2.1", "other": "3"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (project("thing"), "thing has no lower bound"),
        (project("thing<3"), "thing<3 has no lower bound"),
        (project("thing==3"), "thing==3 has no lower bound"),
        (project("thing>=2", one=["thing>=3"]), "thing has two lower bounds: 2 and 3"),
    ],
)
def test_a_dependency_without_one_lower_bound_is_refused(
    given: dict[str, Any], said: str, job: ModuleType
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        job.lower_bounds(given)


def test_the_bounds_are_those_of_the_project(job: ModuleType) -> None:
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
    for file, wanted in (
        (".ci/run", f"sys.version_info[:2] != ({oldest.replace('.', ', ')})"),
        (".ci/run", "run python .ci/lowest_versions.py"),
        (".github/workflows/ci.yml", f'python: ["{oldest}"'),
        (".github/workflows/ci.yml", "run: .ci/run"),
    ):
        assert wanted in (ROOT / file).read_text(encoding="utf-8"), (file, wanted)
