"""``flowstore new-backend``: the packages that it writes work at once, and it overwrites nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flowstore_conformance.method_signatures import compare

from flowstore_cli.main import main
from flowstore_core import Capability
from flowstore_documents.space_checks import SPACE_CHECKS

# One worker makes the environment for all of these tests.
pytestmark = [pytest.mark.xdist_group("new backend"), pytest.mark.timeout(600)]

NAMES = {"by hand": "mine", "documents": "kv"}
OPTIONS = {"by hand": [], "documents": ["--documents"]}


@dataclass(frozen=True)
class Environment:
    """A new virtual environment that sees the packages of this one, and a folder to work in."""

    bin: Path
    folder: Path

    def run(self, command: str, folder: str = ".", **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command line as a user would paste it, without a package index."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "FLOWSTORE"))}
        path = os.pathsep.join([str(self.bin), str(Path(sys.executable).parent), inherited["PATH"]])
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder / folder,
            env={**inherited, **offline, "PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    venv, folder = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("work")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return Environment(bin=venv / "bin", folder=folder)


@pytest.fixture(scope="module")
def created(environment: Environment) -> dict[str, list[str]]:
    """Both kinds, made and installed; the commands that were printed, by kind."""
    commands = {}
    for kind, name in NAMES.items():
        options = " ".join(OPTIONS[kind])
        done = environment.run(f"python -m flowstore_cli.main new-backend {name} {options}")
        assert (done.returncode, done.stderr) == (0, "")
        commands[kind] = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
        installed = environment.run(commands[kind][0])
        assert installed.returncode == 0, installed.stderr
    return commands


def _outcomes(report: Path) -> dict[str, list[tuple[str, str]]]:
    """The outcome and message of each test, by the clause that it is named after, or by its function."""
    found: dict[str, list[tuple[str, str]]] = {}
    for case in ET.parse(report).iter("testcase"):
        name = case.attrib["name"]
        clause = re.search(r"\[([A-Z]{3}(?:-\d+)?)-", name)
        inner = next(iter(case), None)
        outcome = ("passed", "") if inner is None else (inner.tag, inner.attrib.get("message", ""))
        found.setdefault(clause[1] if clause else name.partition("[")[0], []).append(outcome)
    return found


def test_a_store_by_hand_passes_the_clauses_that_its_readme_names(
    environment: Environment, created: dict[str, list[str]]
) -> None:
    report = environment.run(created["by hand"][2]).stdout
    assert "VIOLATES: core cannot call" in report
    assert not re.search(r"^\S+ +(FAIL|INCONCLUSIVE)", report, re.M), report
    readme = (environment.folder / "flowstore-mine" / "README.md").read_text()
    (named,) = re.findall(r"These clauses pass: (.*?)\. ", " ".join(readme.split()))
    assert set(re.findall(r"[A-Z]{3}-\d+", named)) == set(re.findall(r"^(\S+) +PASS ", report, re.M))


def test_the_tests_of_a_store_by_hand_run_the_checks_whose_operations_exist(
    environment: Environment, created: dict[str, list[str]], tmp_path: Path
) -> None:
    report = tmp_path / "junit.xml"
    done = environment.run(created["by hand"][1], "flowstore-mine", PYTEST_ADDOPTS=f"--junit-xml={report}")
    assert done.returncode == 0, done.stdout
    results = [result for results in _outcomes(report).values() for result in results]
    assert {outcome for outcome, _ in results} == {"passed", "skipped"}
    assert len([None for outcome, _ in results if outcome == "passed"]) > 20
    assert len([None for _, text in results if "is missing" in text]) > 60


def test_the_documents_pass_every_clause_of_their_capabilities(
    environment: Environment, created: dict[str, list[str]], tmp_path: Path
) -> None:
    # The toolkit's own tests run the whole suite on such a space.
    report = tmp_path / "junit.xml"
    clauses = "CLM-1", "QUE-1", "WAT-1"
    selected = " ".join(f"--flowstore-clause={clause}" for clause in clauses)
    done = environment.run(
        created["documents"][1], "flowstore-kv", PYTEST_ADDOPTS=f"--junit-xml={report} {selected}"
    )
    assert done.returncode == 0, done.stdout
    outcomes = _outcomes(report)
    assert outcomes.keys() >= {*clauses}
    assert all(("passed", "") in outcomes[clause] for clause in clauses)
    assert outcomes["test_the_space"] == [("passed", "")] * len(SPACE_CHECKS)


@pytest.mark.parametrize("kind", NAMES)
def test_the_backend_is_installed_and_the_suite_runs(
    environment: Environment, created: dict[str, list[str]], kind: str
) -> None:
    listed = environment.run("python -m flowstore_cli.main backends")
    assert re.search(rf"^{NAMES[kind]} .*installed", listed.stdout, re.M), listed.stdout
    done = environment.run(f"{created[kind][2]} --clause IDM-1")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^IDM-1 +PASS", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("kind", NAMES)
def test_the_checks_of_the_ci_job_pass(
    environment: Environment, created: dict[str, list[str]], kind: str
) -> None:
    folder = f"flowstore-{NAMES[kind]}"
    workflow = environment.folder / folder / ".github" / "workflows" / "conformance.yml"
    commands = re.findall(r"^ +- run: (.*)$", workflow.read_text(), re.M)
    assert commands == [
        "pip install '.[test]'",
        "ruff format --check . && ruff check . && mypy",
        "pytest",
    ]
    # The second kind reads what mypy knows of flowstore from the first one's cache.
    done = environment.run(commands[1], folder, MYPY_CACHE_DIR=str(environment.folder / "mypy"))
    assert done.returncode == 0, done.stdout


def test_breaking_a_passing_clause_fails_the_tests(
    environment: Environment, created: dict[str, list[str]]
) -> None:
    claims = environment.folder / "flowstore-mine" / "flowstore_mine" / "claims.py"
    right = claims.read_text()
    wrong = right.replace("return owner is not None and step.claim.owner == owner", "return True")
    assert wrong != right
    claims.write_text(wrong)
    try:
        done = environment.run(f"{created['by hand'][1]} -k CLM-1", "flowstore-mine")
    finally:
        claims.write_text(right)
    assert done.returncode == 1
    assert "FAIL CLM-1" in done.stdout
    assert "repeat    flowstore conformance mine://" in done.stdout


def test_the_report_shows_what_to_write_next(environment: Environment, created: dict[str, list[str]]) -> None:
    done = environment.run(f"{created['by hand'][2]} --clause CTL-1")
    assert done.returncode == 1
    assert "controls.configure_run is missing" in done.stdout
    assert "async def configure_run(self, run_id, flow_id, trigger_key, *," in done.stdout
    assert "clauses   CTL-1; flowstore_core/controls.py has its types" in done.stdout


# In this process


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith(("flowstore_mine", "flowstore_x"))]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["x", "x" * 30])
@pytest.mark.parametrize("kind", NAMES)
def test_the_format_does_not_depend_on_the_name(folder: Path, name: str, kind: str) -> None:
    assert main(["new-backend", name, *OPTIONS[kind]]) == 0
    texts = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert not any("yourdb" in text.lower() for text in texts)
    for command in (["format", "--check"], ["check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, f"flowstore-{name}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_methods_of_the_store_by_hand_have_the_signatures_of_the_protocol(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["new-backend", "mine"]) == 0
    monkeypatch.syspath_prepend(str(folder / "flowstore-mine"))
    from flowstore_mine.store import MineStore  # type: ignore[import-not-found]

    findings = compare(MineStore(None, None), {Capability.VIRTUAL_CLOCK})
    assert {one.problem for one in findings} == {"is missing"}
    assert len(findings) == 9


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "NAME must have 1 to 30 lower-case letters and digits"),
        ("Mine", "NAME must have 1 to 30"),
        ("my-db", "NAME must have 1 to 30"),
        ("1db", "NAME must have 1 to 30"),
        ("m\n", "NAME must have 1 to 30"),
        ("m" * 31, "NAME must have 1 to 30"),
        ("postgresql", "the scheme 'postgresql' is that of a backend of flowstore"),
        ("core", "the package flowstore_core is already installed"),
    ],
)
def test_a_name_that_cannot_be_used_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, said: str
) -> None:
    assert main(["new-backend", name]) == 2
    assert said in capsys.readouterr().err
    assert not list(folder.iterdir())


def _existing_folder(folder: Path) -> None:
    (folder / "flowstore-mine").mkdir()


def _existing_file(folder: Path) -> None:
    (folder / "flowstore-mine").write_text("mine")


@pytest.mark.parametrize("make", [_existing_folder, _existing_file])
def test_nothing_is_overwritten(
    folder: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    make(folder)
    assert main(["new-backend", "mine"]) == 2
    assert "flowstore-mine exists; choose another --directory" in capsys.readouterr().err
    assert [path.name for path in folder.rglob("*")] == ["flowstore-mine"]
    assert main(["new-backend", "mine", "--directory", "other"]) == 0
    assert (folder / "other" / "flowstore_mine" / "store.py").is_file()


def test_a_directory_that_cannot_be_created_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["new-backend", "mine", "--directory", "missing/mine"]) == 2
    assert "missing/mine cannot be created: No such file or directory" in capsys.readouterr().err
