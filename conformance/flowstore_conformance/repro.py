"""Programs that reproduce failures: written to files, and run on the memory backend for comparison."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

from flowstore_conformance.report import Report

REPLAY_URL = "memory://replay"
"""A named store, so that a program which opens several stores gets one namespace."""

REPLAY_SECONDS = 20.0

MAX_CHARACTERS = 8_000
"""Maximum length of a program's output in a report."""


async def replay_on_memory(program: str) -> str:
    """Run a program on the memory backend in a separate process and return its output."""
    with tempfile.TemporaryDirectory(prefix="flowstore-program-") as folder:
        path = os.path.join(folder, "program.py")
        await asyncio.to_thread(Path(path).write_text, program, encoding="utf-8")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FLOWSTORE_")}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            path,
            REPLAY_URL,
            cwd=folder,
            env={**environment, "PYTHONIOENCODING": "utf-8"},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(REPLAY_SECONDS):
                printed, _ = await process.communicate()
        except TimeoutError:
            return f"(the program did not end within {REPLAY_SECONDS:.0f} s on {REPLAY_URL})"
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    text = printed.decode("utf-8", "replace").rstrip()
    text = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}\n..."
    return text if not process.returncode else f"{text}\n(exit code {process.returncode})".lstrip()


def write_programs(report: Report, folder: Path) -> Report:
    """Write the program of each failure to a folder, and add the file names to the report."""
    results = []
    for result in report.results:
        failure = result.failure
        if failure is not None and failure.program is not None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{failure.clause.lower().replace('-', '_')}_{result.check.name}.py"
            path.write_text(failure.program, encoding="utf-8")
            failure = dataclasses.replace(failure, program_file=str(path))
            result = dataclasses.replace(result, failure=failure)
        results.append(result)
    return dataclasses.replace(report, results=tuple(results))
