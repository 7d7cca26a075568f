"""Reading WfFormat, the JSON format of the WfCommons project for recorded workflow executions.

It reads the tasks, their dependencies and their durations, and ignores files, machines and commands. It
supports version 1.5 and later versions with the same structure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from importlib.resources import files
from pathlib import Path
from typing import Any
from uuid import UUID, uuid5

MAX_KEY_LENGTH = 256
"""Maximum length of a step key (INP-1)."""

MAX_SECONDS = 1e12
"""Maximum duration in seconds; the check also rejects infinities and NaN."""

_NAMESPACE = UUID("6f1d8f0c-2a64-5b0e-9d53-0d4c3f8f6a11")


class WorkflowError(ValueError):
    """The file is not a replayable workflow; the message says why and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of a workflow: a step of its runs."""

    key: str
    """The task's id, or a shortened unique form if a store cannot hold the id (``step_key``)."""
    name: str
    """The kind of task, recorded as the step_type."""
    parents: tuple[str, ...]
    """Keys of the tasks that must succeed before this task starts."""
    seconds: float
    """Recorded duration; 0 if the file has none."""


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A directed acyclic graph of tasks, in topological order."""

    name: str
    tasks: tuple[Task, ...]

    @cached_property
    def by_key(self) -> Mapping[str, Task]:
        return {task.key: task for task in self.tasks}

    @cached_property
    def children(self) -> Mapping[str, tuple[Task, ...]]:
        """The children of each task, by its key."""
        children: dict[str, list[Task]] = {task.key: [] for task in self.tasks}
        for task in self.tasks:
            for parent in set(task.parents):
                children.setdefault(parent, []).append(task)
        return {key: tuple(tasks) for key, tasks in children.items()}

    @cached_property
    def flow_id(self) -> UUID:
        """An id derived from the graph: equal for equal workflows on every machine."""
        shape = json.dumps([self.name, [[task.key, *task.parents] for task in self.tasks]])
        return uuid5(_NAMESPACE, shape)

    @property
    def seconds(self) -> float:
        """Total recorded duration of all tasks."""
        return sum(task.seconds for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Serialise the workflow for another process."""
        tasks = [[task.key, task.name, list(task.parents), task.seconds] for task in self.tasks]
        return {"name": self.name, "tasks": tasks}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Workflow:
        """The inverse of to_json."""
        tasks = (
            Task(key=key, name=name, parents=tuple(parents), seconds=seconds)
            for key, name, parents, seconds in document["tasks"]
        )
        return cls(name=document["name"], tasks=tuple(tasks))


def load_workflow(path: Path) -> Workflow:
    """Read a file. Raises WorkflowError, also if the file is unreadable."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise WorkflowError(f"{path} is not UTF-8 (byte {error.start})") from None
    try:
        return read_workflow(text)
    except WorkflowError as error:
        raise WorkflowError(f"{path}: {error}") from None


def shipped_workflow() -> Workflow:
    """The small workflow shipped with the package."""
    return read_workflow((files("flowstore_replay") / "workflows" / "market-day.json").read_text("utf-8"))


def read_workflow(text: str) -> Workflow:
    """Parse a workflow from JSON text. Raises WorkflowError."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise WorkflowError(f"not JSON: {error}") from None
    except RecursionError:
        raise WorkflowError("nested too deeply to be WfFormat") from None
    root = _object(document, "the document")
    specification = _specification(root)
    entries = [_object(task, "a task") for task in _list(specification, "tasks", "specification")]
    if not entries:
        raise WorkflowError("workflow.specification.tasks is empty: nothing to replay")
    ids = [_text(entry, "id", "a task") for entry in entries]
    if len(set(ids)) < len(ids):
        duplicate = min(task_id for task_id in set(ids) if ids.count(task_id) > 1)
        raise WorkflowError(f"two tasks have the id {duplicate!r}")
    parents = _parents(ids, entries)
    seconds = _runtimes(root["workflow"].get("execution"))
    return Workflow(
        name=step_key(_text(root, "name", "the document")),
        tasks=tuple(
            Task(
                key=step_key(task_id),
                name=step_key(_text(entries[index], "name", f"task {task_id!r}")),
                parents=tuple(step_key(parent) for parent in parents[task_id]),
                seconds=seconds.get(task_id, 0.0),
            )
            for task_id, index in _topological_order(ids, parents)
        ),
    )


def step_key(identifier: str) -> str:
    """The step key for an identifier: the identifier itself, or a shortened unique form.

    Deterministic on every machine. If the identifier is longer than 256 characters or contains U+0000 or lone
    surrogates, a digest of the whole replaces its tail.
    """
    clean = identifier.encode("utf-8", "replace").decode().replace("\0", "?")
    if clean == identifier and 0 < len(identifier) <= MAX_KEY_LENGTH:
        return identifier
    digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{clean[: MAX_KEY_LENGTH - 17]}~{digest}"


def _specification(root: Mapping[str, Any]) -> Mapping[str, Any]:
    workflow = root.get("workflow")
    if isinstance(workflow, dict) and isinstance(workflow.get("specification"), dict):
        return _object(workflow["specification"], "workflow.specification")
    version = root.get("schemaVersion")
    version_text = (
        f"its schemaVersion is {version!r}" if isinstance(version, str) else "it names no schemaVersion"
    )
    raise WorkflowError(f"no workflow.specification, so this is not WfFormat 1.5 ({version_text})")


def _parents(ids: list[str], entries: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The parents of each task, from ``parents`` and ``children``: some recorders write only one of them."""
    found: dict[str, dict[str, None]] = {task_id: {} for task_id in ids}
    for task_id, entry in zip(ids, entries, strict=True):
        for relation in ("parents", "children"):
            for other in _list(entry, relation, f"task {task_id!r}", optional=True):
                if not isinstance(other, str) or other not in found:
                    raise WorkflowError(f"task {task_id!r} names the unknown task {other!r} in {relation}")
                child, parent = (task_id, other) if relation == "parents" else (other, task_id)
                found[child][parent] = None
    return {child: list(parents) for child, parents in found.items()}


def _topological_order(ids: list[str], parents: Mapping[str, list[str]]) -> list[tuple[str, int]]:
    """Each id with its index in the file, in topological order."""
    position = {task_id: index for index, task_id in enumerate(ids)}
    try:
        return [(task_id, position[task_id]) for task_id in TopologicalSorter(parents).static_order()]
    except CycleError as error:
        cycle = " -> ".join(repr(task_id) for task_id in reversed(error.args[1]))
        raise WorkflowError(f"the tasks form a dependency cycle: {cycle}") from None


def _runtimes(execution: Any) -> dict[str, float]:
    if execution is None:
        return {}
    found: dict[str, float] = {}
    for entry in _list(_object(execution, "workflow.execution"), "tasks", "execution", optional=True):
        task = _object(entry, "a task of workflow.execution")
        task_id = _text(task, "id", "a task of workflow.execution")
        seconds = task.get("runtimeInSeconds", 0)
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, (int, float))
            or not abs(seconds) < MAX_SECONDS
        ):
            raise WorkflowError(f"runtimeInSeconds of task {task_id!r} is not a number of seconds")
        # Recorders subtract wall clocks, which may have been set back, so a duration can be negative.
        found[task_id] = max(0.0, float(seconds))
    return found


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise WorkflowError(f"{where} is not a JSON object")
    return value


def _list(owner: Mapping[str, Any], name: str, where: str, *, optional: bool = False) -> list[Any]:
    value = owner.get(name)
    if value is None and optional:
        return []
    if not isinstance(value, list):
        raise WorkflowError(f"{name} of {where} is not a list")
    return value


def _text(owner: Mapping[str, Any], name: str, where: str) -> str:
    value = owner.get(name)
    if not isinstance(value, str) or not value:
        raise WorkflowError(f"{where} has no {name}")
    return value
