"""The result of a fault scenario on one backend, and the subprocess that produces it."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flowstore_chaos.counts import Counts
from flowstore_chaos.leaks import kill_tree
from flowstore_chaos.scenario import FaultScenario


class Verdict(StrEnum):
    """Passed, failed or not run. A mutant is expected to fail."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScenarioResult:
    """The result of one row, which may have been skipped on this machine."""

    scenario: FaultScenario
    backend: str
    seed: int
    planned: int
    is_mutant: bool
    seconds: float
    counts: Counts
    skipped: str | None = None
    """The missing requirement, if the row was not run."""
    failure: str | None = None
    """Why the row itself failed to run: an exception or a timeout."""

    @property
    def verdict(self) -> Verdict:
        if self.skipped is not None:
            return Verdict.SKIPPED
        completed = self.failure is None and self.counts.injected >= self.planned
        return Verdict.PASSED if completed and self.counts.clean else Verdict.FAILED

    @property
    def as_expected(self) -> bool:
        """Whether the row passed, or a mutant was detected by a count rather than by a failure to run."""
        if self.is_mutant:
            return self.skipped is not None or (self.failure is None and not self.counts.clean)
        return self.verdict is not Verdict.FAILED

    @property
    def command(self) -> str:
        """The command that repeats this row."""
        parts = ["python -m flowstore_chaos", self.scenario.name, "--backend", self.backend]
        parts += ["--seed", str(self.seed), "--planned", str(self.planned)]
        return " ".join(parts + ["--mutants"] * self.is_mutant)


async def run_scenario(
    scenario: FaultScenario, backend: str, *, seed: int, planned: int, is_mutant: bool, folder: Path,
    on_progress: Callable[[int], None],
) -> ScenarioResult:  # fmt: skip
    """Run one row in a subprocess, which is killed at the time limit."""
    command = ["-m", "flowstore_chaos.scenario_process", "--scenario", scenario.name, "--backend", backend]
    command += ["--seed", str(seed), "--planned", str(planned), "--folder", str(folder)]
    command += ["--mutant"] * is_mutant
    started_at = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        # Never written to: end of file tells the subprocess that its parent has exited.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 22,
    )
    assert process.stderr is not None
    stderr_reader = asyncio.create_task(process.stderr.read())
    limit = scenario.seconds_at(planned / scenario.planned)
    last: dict[str, object] = {}
    failure = None
    try:
        async with asyncio.timeout(limit):
            last = await _listen(process, on_progress)
            await process.wait()
    except TimeoutError:
        failure = f"timeout after {limit:.0f} s"
    finally:
        if process.returncode is None:
            kill_tree(process.pid)
            await process.wait()
    text = (await stderr_reader).decode(errors="replace").strip()
    if failure is None and "counts" not in last:
        failure = text[-4000:] or f"the process exited with code {process.returncode}"
    counts = Counts(**last["counts"]) if isinstance(last.get("counts"), dict) else Counts()  # type: ignore[arg-type]
    skipped = last.get("skipped")
    return ScenarioResult(
        scenario=scenario,
        backend=backend,
        seed=seed,
        planned=planned,
        is_mutant=is_mutant,
        seconds=time.monotonic() - started_at,
        counts=counts,
        skipped=skipped if isinstance(skipped, str) else None,
        failure=failure,
    )


async def _listen(
    process: asyncio.subprocess.Process, on_progress: Callable[[int], None]
) -> dict[str, object]:
    assert process.stdout is not None
    last: dict[str, object] = {}
    async for text in process.stdout:
        last = json.loads(text)
        if isinstance(injected := last.get("injected"), int):
            on_progress(injected)
    return last
