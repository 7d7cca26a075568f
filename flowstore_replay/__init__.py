"""flowstore_replay: the reference engine, and the replay of recorded workflows on real processes.

Engine authors: read ``engine.py`` and ``requests.py``. The other modules feed and check it: ``wfcommons.py``
reads recorded workflows, ``work.py`` simulates the work, ``worker.py`` is one worker process, ``replay.py``
starts and kills workers, ``verify.py`` checks the final state in the store.
"""

import logging

from flowstore_replay.engine import Engine, Work, WorkFailed
from flowstore_replay.replay import Observer, Options, Replay, ReplayError, ReplayProgress
from flowstore_replay.requests import Requests
from flowstore_replay.verify import Check, Summary, verify
from flowstore_replay.wfcommons import (
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
    "ReplayProgress",
    "Requests",
    "Summary",
    "Task",
    "Work",
    "WorkFailed",
    "Workflow",
    "WorkflowError",
    "load_workflow",
    "read_workflow",
    "shipped_workflow",
    "verify",
]

# Silent unless the application configures logging.
logging.getLogger("flowstore_replay").addHandler(logging.NullHandler())
