"""Prove the source mutants, or run the conformance suite on them.

``python -m tests.source_mutants --prove`` runs each mutant's proof on the correct code, where it must pass,
and on the mutant, where it must fail. ``--profile quick`` or ``standard`` runs the suite on each mutant until
a check reports one of the mutant's clauses; with ``--own`` only the checks that cite these clauses run.
``--results FILE`` adds the outcomes to a JSON file, and ``--publish`` writes docs/source-mutants.md from that
file. ``--backend`` and names select mutants; ``--survivors`` those that the file does not show as killed by
quick.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import Cluster
from tests.source_mutants import BACKENDS, ROOT, SourceMutant, all_source_mutants, copy_with_changes
from tests.source_mutants.matrix import MATRIX, render

PROOF_SECONDS = 180.0
"""The time limit of a proof, generous enough for a loaded machine."""
HANG_SECONDS = 30.0
"""The time limit of a proof on a mutant that hangs, after the same proof passed on the correct code."""
SUITE_SECONDS = {"quick": 1800.0, "standard": 7200.0}
SEED = 20260314


@dataclass(frozen=True, slots=True)
class ChildOutcome:
    """The outcome of a child process."""

    result: dict[str, Any] | None
    """None if the child crashed or ran into its time limit before it wrote a result."""
    timed_out: bool
    stderr: str


def run_child(
    mutant: SourceMutant, url: str, task: Sequence[str], *, correct: bool = False, seconds: float
) -> ChildOutcome:
    """Run child.py on a mutant, or on the correct code."""
    with tempfile.TemporaryDirectory(prefix="flowstore-mutant-", ignore_cleanup_errors=True) as name:
        folder, outcome, errors = (Path(name) / part for part in ("packages", "outcome.json", "errors.txt"))
        folder.mkdir()
        if not correct:
            copy_with_changes(mutant, folder)
        arguments = [str(ROOT if correct else folder), str(outcome), task[0], mutant.backend, mutant.name]
        with errors.open("w", encoding="utf-8") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.source_mutants.child", *arguments, url, *task[1:]],
                # The working directory precedes PYTHONPATH.
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(map(str, (folder, ROOT, ROOT / "conformance"))),
                    "PYTHONDONTWRITEBYTECODE": "1",
                },
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                # A new process group, so that the children of the child are killed with it.
                start_new_session=True,
            )
        timed_out = False
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        result = json.loads(outcome.read_text(encoding="utf-8")) if outcome.exists() else None
        return ChildOutcome(result, timed_out, errors.read_text(encoding="utf-8"))


def prove(mutant: SourceMutant, url: str) -> tuple[bool, str]:
    """Whether the proof passes on the correct code and fails on the mutant, and an explanation."""
    right = run_child(mutant, url, ["prove"], correct=True, seconds=PROOF_SECONDS)
    if right.result is None:
        return False, f"no result on the correct code: {_failure_of(right)}"
    if not right.result["passed"]:
        return False, f"fails on the correct code: {right.result['message']}"
    wrong = run_child(mutant, url, ["prove"], seconds=HANG_SECONDS if mutant.hangs else PROOF_SECONDS)
    if wrong.result is None:
        if wrong.timed_out and mutant.hangs:
            return True, "hangs on the mutant"
        return False, f"no result on the mutant: {_failure_of(wrong)}"
    if wrong.result["passed"]:
        return False, "passes on the mutant"
    return True, wrong.result["message"]


def measure(mutant: SourceMutant, url: str, profile: str, seed: int, *, own: bool) -> dict[str, Any]:
    """The outcome of the suite on a mutant: killed, found by another clause, survived, or an error."""
    child = run_child(
        mutant,
        url,
        ["measure", profile, str(seed), *(["own"] if own else [])],
        seconds=SUITE_SECONDS[profile],
    )
    outcome: dict[str, Any] = {
        "backend": mutant.backend,
        "name": mutant.name,
        "profile": profile,
        "seed": seed,
    }
    if child.result is None:
        return {**outcome, "verdict": "error", "message": _failure_of(child)}
    failures = child.result["failures"]
    named = [one for one in failures if one["clause"] in mutant.clauses]
    verdict = "killed" if named else "other clause" if failures else "survived"
    first: dict[str, Any] = next(iter(named or failures), {})
    # The seconds are those until the first such failure, or of the whole suite.
    return {**outcome, "verdict": verdict, **child.result, **first}


def _failure_of(child: ChildOutcome) -> str:
    """Why a child wrote no outcome, with the last line of its stderr."""
    ended = "ran into the time limit" if child.timed_out else "the process failed"
    lines = child.stderr.strip().splitlines()
    return ": ".join([ended, *lines[-1:]])


def save(path: Path, outcome: dict[str, Any]) -> None:
    """Add an outcome to a file of results, in place of an earlier one of the same mutant and profile."""
    key = ("backend", "name", "profile")
    kept = [
        one for one in read_results(path) if [one[part] for part in key] != [outcome[part] for part in key]
    ]
    kept.append(outcome)
    kept.sort(key=lambda one: [one[part] for part in key])
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def read_results(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    results: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.source_mutants", description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--prove", action="store_true")
    parser.add_argument("--profile", choices=SUITE_SECONDS)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--survivors", action="store_true")
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    mutants = all_source_mutants()
    if unknown := set(arguments.names) - {one.name for one in mutants}:
        parser.error(f"there is no mutant {', '.join(sorted(unknown))}")
    if (arguments.publish or arguments.survivors) and arguments.results is None:
        parser.error("--publish and --survivors need --results")
    chosen = [
        one
        for one in mutants
        if (not arguments.names or one.name in arguments.names) and arguments.backend in (None, one.backend)
    ]
    if arguments.survivors:
        killed = {
            (one["backend"], one["name"])
            for one in read_results(arguments.results)
            if one["profile"] == "quick" and one["verdict"] == "killed"
        }
        chosen = [one for one in chosen if (one.backend, one.name) not in killed]
    good = True
    if arguments.prove or arguments.profile:
        good = run_all(chosen, arguments)
    if arguments.publish:
        MATRIX.write_text(render(mutants, read_results(arguments.results)), encoding="utf-8")
    return 0 if good else 1


def run_all(mutants: Sequence[SourceMutant], arguments: argparse.Namespace) -> bool:
    """Prove or measure mutants and print each outcome. Returns whether every one is good."""
    cluster = Cluster() if any(one.backend == "postgresql" for one in mutants) else None
    bad = 0

    def work(mutant: SourceMutant) -> tuple[bool, str]:
        url = cluster.url if cluster and mutant.backend == "postgresql" else f"sqlite:///{folder}/mutants.db"
        if arguments.prove:
            proven, why = prove(mutant, url)
            return proven, f"{'proven' if proven else 'NOT PROVEN'}: {why}"
        outcome = measure(mutant, url, arguments.profile, arguments.seed, own=arguments.own)
        outcomes.append(outcome)
        columns = [str(outcome.get(part, "")) for part in ("verdict", "clause", "check", "seconds")]
        return outcome["verdict"] == "killed", " ".join(filter(None, columns))

    outcomes: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as workers:
            if cluster:
                # Wait for its start once, not in each worker.
                assert cluster.url
            running = {workers.submit(work, one): one for one in mutants}
            for done in as_completed(running):
                mutant = running[done]
                good, text = done.result()
                bad += not good
                sys.stdout.write(f"{mutant.backend} {mutant.name}: {text}\n")
                sys.stdout.flush()
                while outcomes and arguments.results is not None:
                    save(arguments.results, outcomes.pop())
    finally:
        if cluster:
            cluster.stop()
    sys.stdout.write(f"{len(mutants) - bad} of {len(mutants)}\n")
    return not bad


if __name__ == "__main__":
    sys.exit(main())
