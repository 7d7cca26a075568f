"""Small C libraries, preloaded into a process to observe or change its system calls."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from flowstore_chaos.context import SkippedError

_SOURCES = Path(__file__).with_name("preload")


def build(name: str, folder: Path) -> Path:
    """Compile ``preload/<name>.c``. Raises SkippedError if that is not possible."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if sys.platform != "linux" or compiler is None:
        raise SkippedError("needs Linux and a C compiler")
    library = folder / f"{name}.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCES / f"{name}.c")]
    made = subprocess.run([*command, "-ldl", "-lpthread"], capture_output=True, text=True, check=False)
    if made.returncode:
        raise SkippedError(f"the C compiler cannot build {name}.c: {made.stderr.strip()[-300:]}")
    return library


def preloaded(library: Path, **variables: str) -> dict[str, str]:
    """The environment of a process with the library preloaded."""
    before = os.environ.get("LD_PRELOAD", "")
    return {**os.environ, "LD_PRELOAD": f"{library} {before}".strip(), **variables}
