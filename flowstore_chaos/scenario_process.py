"""The subprocess of one row: ``python -m flowstore_chaos.scenario_process``, started by result.py.

A subprocess can be killed when it hangs, and its leaks are measurable.
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

from flowstore_chaos.context import RunContext, SkippedError
from flowstore_chaos.leaks import ResourceSnapshot, kill_tree
from flowstore_chaos.scenarios import load_scenario

PROGRESS_INTERVAL = 0.5


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--scenario", required=True)
    options.add_argument("--backend", required=True)
    options.add_argument("--seed", type=int, required=True)
    options.add_argument("--planned", type=int, required=True)
    options.add_argument("--mutant", action="store_true")
    options.add_argument("--folder", type=Path, required=True)
    arguments = options.parse_args()
    # Drivers log every connection that a fault breaks.
    logging.disable(logging.CRITICAL)
    scenario = load_scenario(arguments.scenario)
    folder = Path(tempfile.mkdtemp(prefix="flowstore-chaos-", dir=arguments.folder))
    # The PostgreSQL wheel puts its lock file there, and warns without it.
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    reported_at = 0.0

    def on_progress(injected: int) -> None:
        nonlocal reported_at
        if time.monotonic() - reported_at > PROGRESS_INTERVAL:
            reported_at = time.monotonic()
            _send({"injected": injected})

    context = RunContext(
        backend=arguments.backend,
        seed=arguments.seed,
        planned=arguments.planned,
        is_mutant=arguments.mutant,
        folder=folder,
        on_progress=on_progress,
    )
    skipped = None
    try:
        before = ResourceSnapshot.now()
        asyncio.run(scenario.run(context))
        for leak in before.leaked():
            context.counts.count_leak(leak)
    except SkippedError as error:
        skipped = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    _send({"counts": asdict(context.counts), "skipped": skipped})


def _exit_with_parent(folder: Path) -> None:
    """Clean up and exit when the parent exits for any reason; servers would run on otherwise."""
    # Not through sys.stdin: its lock would be held at interpreter shutdown.
    os.read(0, 1)
    kill_tree(os.getpid(), itself=False)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _send(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
