"""The child process, in which a mutant replaces the backend.

``python -m tests.source_mutants.child FOLDER OUTCOME TASK BACKEND NAME URL [PROFILE SEED]`` proves or
measures one mutant and writes the outcome as JSON to the file OUTCOME. FOLDER has the copies of the changed
packages, or is the root of the repository for the correct code; it precedes every other folder of PYTHONPATH.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from flowstore_core.plugins import find_backend
from tests.source_mutants import SourceMutant, find_source_mutant


def main(arguments: Sequence[str]) -> None:
    folder, outcome, task, backend, name, url, *rest = arguments
    mutant = find_source_mutant(backend, name)
    _check_origin(mutant, Path(folder))
    if task == "prove":
        asyncio.run(prove(mutant, url, Path(outcome)))
    else:
        _write(
            Path(outcome),
            asyncio.run(measure(mutant, url, profile=rest[0], seed=int(rest[1]), own="own" in rest)),
        )


def _write(outcome: Path, result: dict[str, Any]) -> None:
    outcome.write_text(json.dumps(result), encoding="utf-8")


def _check_origin(mutant: SourceMutant, folder: Path) -> None:
    """Raise ImportError if another copy of a changed package has been imported, such as an installed one."""
    for package in {one.file.partition("/")[0] for one in mutant.changes}:
        origin = import_module(package).__file__
        if origin is None or not Path(origin).resolve().is_relative_to(folder.resolve()):
            raise ImportError(f"{package} was imported from {origin}, not from {folder}")


async def prove(mutant: SourceMutant, url: str, outcome: Path) -> None:
    """Run the proof in a fresh namespace. Only an AssertionError fails it; any other exception surfaces."""
    async with find_backend(mutant.backend)[1].scratch(url) as fresh:
        result = {"passed": True, "message": ""}
        try:
            await mutant.proof(fresh)
        except AssertionError as error:
            message = str(error).partition("\n")[0] or "an assertion failed"
            result = {"passed": False, "message": message}
        # Before the namespace is dropped, which may wait for a lock that the mutant still holds.
        _write(outcome, result)


async def measure(mutant: SourceMutant, url: str, *, profile: str, seed: int, own: bool) -> dict[str, Any]:
    """Run the suite until a check reports one of the mutant's clauses.

    The checks that cite these clauses run first, and the cheapest kinds of check before the others. ``own``
    runs no others.
    """
    from flowstore_conformance.registry import rotate
    from flowstore_conformance.results import CheckResult
    from flowstore_conformance.suite import run_suite, select_checks

    from tests.mutants.run_mutants import ordered

    every = select_checks()
    if profile == "quick":
        every = rotate(every, seed, find_backend(mutant.backend)[1].capabilities)
    checks = sorted(
        ordered([one for one in every if not own or set(one.clauses) & set(mutant.clauses)]),
        key=lambda check: not set(check.clauses) & set(mutant.clauses),
    )
    begun = time.monotonic()
    stop = asyncio.Event()
    failures: list[dict[str, Any]] = []

    def progress(result: CheckResult, number: int, total: int) -> None:
        failure = result.failure
        if failure is None or stop.is_set():
            return
        failures.append(
            {
                "check": result.check.name,
                "clause": failure.clause,
                "message": failure.message.partition("\n")[0],
                "seconds": round(time.monotonic() - begun, 1),
            }
        )
        if failure.clause in mutant.clauses:
            stop.set()

    report = await run_suite(
        url, profile=profile, seed=seed, checks=checks, repeats=0, progress=progress, stop=stop
    )
    return {
        "failures": failures,
        "seconds": round(time.monotonic() - begun, 1),
        # Undecided checks make a survivor doubtful.
        "inconclusive": [one.check.name for one in report.results if one.status == "INCONCLUSIVE"],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
