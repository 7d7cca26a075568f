"""How a row came out."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from flowstore_chaos.leaks import kill_tree
from flowstore_chaos.line import Line
from flowstore_chaos.tally import Tally


class Verdict(StrEnum):
    """Green, red, or not run; of a broken variant red is what is wanted."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A row that was run, or that this machine could not run."""

    line: Line
    backend: str
    seed: int
    planned: int
    broken: bool
    seconds: float
    tally: Tally
    skipped: str | None = None
    """What the machine lacks, if the row was not run."""
    failure: str | None = None
    """Why the row itself broke down: an exception, or its time was up."""

    @property
    def verdict(self) -> Verdict:
        if self.skipped is not None:
            return Verdict.SKIPPED
        full = self.failure is None and self.tally.landed >= self.planned
        return Verdict.PASSED if full and self.tally.clean else Verdict.FAILED

    @property
    def good(self) -> bool:
        """Whether it is as it should be: a broken variant must be found out by a count, not break down."""
        if self.broken:
            return self.skipped is not None or (self.failure is None and not self.tally.clean)
        return self.verdict is not Verdict.FAILED

    @property
    def command(self) -> str:
        """What re-runs this row."""
        parts = ["python -m flowstore_chaos", self.line.name, "--backend", self.backend]
        parts += ["--seed", str(self.seed), "--planned", str(self.planned)]
        return " ".join(parts + ["--broken"] * self.broken)


async def run_row(
    line: Line, backend: str, *, seed: int, planned: int, broken: bool, folder: Path,
    say: Callable[[int], None],
) -> Outcome:  # fmt: skip
    """Run one row in a process of its own; it is killed when its time is up."""
    command = ["-m", "flowstore_chaos.row", "--line", line.name, "--backend", backend, "--seed", str(seed)]
    command += ["--planned", str(planned), "--folder", str(folder), *["--broken"] * broken]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        # Never written to: its end tells the row that nobody waits for it any more.
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1 << 22,
    )
    assert process.stderr is not None
    complaints = asyncio.create_task(process.stderr.read())
    limit = line.seconds_at(planned / line.planned)
    last: dict[str, object] = {}
    failure = None
    try:
        async with asyncio.timeout(limit):
            last = await _listen(process, say)
            await process.wait()
    except TimeoutError:
        failure = f"it did not end within {limit:.0f} s"
    finally:
        if process.returncode is None:
            kill_tree(process.pid)
            await process.wait()
    said = (await complaints).decode(errors="replace").strip()
    if failure is None and "tally" not in last:
        failure = said[-4000:] or f"its process ended with code {process.returncode}"
    tally = Tally(**last["tally"]) if isinstance(last.get("tally"), dict) else Tally()  # type: ignore[arg-type]
    skipped = last.get("skipped")
    return Outcome(
        line=line,
        backend=backend,
        seed=seed,
        planned=planned,
        broken=broken,
        seconds=time.monotonic() - began,
        tally=tally,
        skipped=skipped if isinstance(skipped, str) else None,
        failure=failure,
    )


async def _listen(process: asyncio.subprocess.Process, say: Callable[[int], None]) -> dict[str, object]:
    assert process.stdout is not None
    last: dict[str, object] = {}
    async for text in process.stdout:
        last = json.loads(text)
        if isinstance(landed := last.get("landed"), int):
            say(landed)
    return last
