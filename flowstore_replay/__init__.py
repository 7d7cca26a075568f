"""flowstore_replay: the reference engine, and the replay of recorded workflows on real processes.

Engine authors: read ``engine.py``. Everything else here gives it something to do: ``wfformat.py``
reads recorded workflows, ``work.py`` is the work, ``worker.py`` one worker process, ``replay.py``
starts and kills workers, ``verify.py`` asks the store what became of it all.
"""

import logging

from flowstore_replay.engine import Engine, Work, WorkFailed
from flowstore_replay.replay import Observer, Options, Replay, ReplayError, View
from flowstore_replay.verify import Check, Summary, verify
from flowstore_replay.wfformat import (
    Task,
    Workflow,
    WorkflowError,
    load_workflow,
    read_workflow,
    shipped_workflow,
)

__all__ = [
    "Check",
    "Engine",
    "Observer",
    "Options",
    "Replay",
    "ReplayError",
    "Summary",
    "Task",
    "View",
    "Work",
    "WorkFailed",
    "Workflow",
    "WorkflowError",
    "load_workflow",
    "read_workflow",
    "shipped_workflow",
    "verify",
]

# Quiet unless the application asks for it.
logging.getLogger("flowstore_replay").addHandler(logging.NullHandler())
