"""One row of the scorecard, run in a process of its own: ``python -m flowstore_chaos.row``, for the parent.

In a process of its own a row can be ended when it hangs, and what it leaks can be seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

from flowstore_chaos.leaks import Holdings, kill_tree
from flowstore_chaos.lines import load_lines
from flowstore_chaos.trial import SkippedError, Trial

SAY_SECONDS = 0.5


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--line", required=True)
    options.add_argument("--backend", required=True)
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--planned", type=int, required=True)
    options.add_argument("--broken", action="store_true")
    options.add_argument("--folder", type=Path, required=True)
    given = options.parse_args()
    # What the drivers log about connections that we cut is no news here.
    logging.disable(logging.CRITICAL)
    line = next(line for line in load_lines() if line.name == given.line)
    folder = Path(tempfile.mkdtemp(prefix="flowstore-chaos-", dir=given.folder))
    # Where the wheel of PostgreSQL puts its lock file; else it warns that it has to choose a place itself.
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    said = 0.0

    def say(landed: int) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            _tell({"landed": landed})

    trial = Trial(
        backend=given.backend,
        seed=given.seed,
        planned=given.planned,
        broken=given.broken,
        folder=folder,
        say=say,
    )
    skipped = None
    try:
        before = Holdings.now()
        asyncio.run(line.run(trial))
        for what in before.leaked():
            trial.tally.leak(what)
    except SkippedError as error:
        skipped = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _tell({"tally": asdict(trial.tally), "skipped": skipped})


def _end_with_parent(folder: Path) -> None:
    """Leave nothing behind when the parent dies, however it does: servers would run on for ever."""
    # Not by sys.stdin, whose lock would be held when the interpreter ends.
    os.read(0, 1)
    kill_tree(os.getpid(), itself=False)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _tell(what: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
