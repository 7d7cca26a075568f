"""Reading WfFormat, the JSON format of the WfCommons project for recorded workflow executions.

Only what an engine needs is read: the tasks, who waits for whom, and how long each one took. Files,
machines and commands are left aside. Version 1.5 is the one known; a later one that keeps the
structure reads as well.
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

MAX_KEY = 256
"""The longest step key a store takes (INP-1)."""

LONGEST = 1e12
"""Seconds beyond which a recorded time is no time; also keeps out infinities and NaN."""

_NAMESPACE = UUID("6f1d8f0c-2a64-5b0e-9d53-0d4c3f8f6a11")


class WorkflowError(ValueError):
    """The file is no workflow that can be replayed; the message says what is wrong and where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of a workflow: a step of its runs."""

    key: str
    """The task's id; where a store could not hold it, shortened and made unique (``step_key``)."""
    name: str
    """What kind of task it is: the step_type."""
    parents: tuple[str, ...]
    """The keys of the tasks that must have succeeded before this one starts."""
    seconds: float
    """How long it took when it was recorded; 0 where the file does not say."""


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A directed graph of tasks, parents always before their children."""

    name: str
    tasks: tuple[Task, ...]

    @cached_property
    def by_key(self) -> Mapping[str, Task]:
        return {task.key: task for task in self.tasks}

    @cached_property
    def children(self) -> Mapping[str, tuple[Task, ...]]:
        """The tasks that wait for each task, by its key."""
        waiting: dict[str, list[Task]] = {task.key: [] for task in self.tasks}
        for task in self.tasks:
            for parent in set(task.parents):
                waiting.setdefault(parent, []).append(task)
        return {key: tuple(tasks) for key, tasks in waiting.items()}

    @cached_property
    def flow_id(self) -> UUID:
        """The same for the same workflow on every machine, another for another."""
        shape = json.dumps([self.name, [[task.key, *task.parents] for task in self.tasks]])
        return uuid5(_NAMESPACE, shape)

    @property
    def seconds(self) -> float:
        """The recorded seconds of all tasks together."""
        return sum(task.seconds for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """For another process, which then needs no file."""
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
    """Read a file. Raises WorkflowError, also where the file cannot be read."""
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
    """The small workflow that comes with the package."""
    return read_workflow((files("flowstore_replay") / "workflows" / "market-day.json").read_text("utf-8"))


def read_workflow(text: str) -> Workflow:
    """Read a workflow from JSON text. Raises WorkflowError."""
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
    if doubles := sorted({one for one in ids if ids.count(one) > 1} if len(set(ids)) < len(ids) else ()):
        raise WorkflowError(f"two tasks have the id {doubles[0]!r}")
    parents = _parents(ids, entries)
    seconds = _runtimes(root["workflow"].get("execution"))
    return Workflow(
        name=step_key(_text(root, "name", "the document")),
        tasks=tuple(
            Task(
                key=step_key(one),
                name=step_key(_text(entries[index], "name", f"task {one!r}")),
                parents=tuple(step_key(parent) for parent in parents[one]),
                seconds=seconds.get(one, 0.0),
            )
            for one, index in _in_order(ids, parents)
        ),
    )


def step_key(identifier: str) -> str:
    """The key a store can hold for any text: itself, or a shortened one that is unique to it.

    The same text gives the same key on every machine. Over 256 characters, or with U+0000 or lone
    surrogates in it, the tail is replaced by a digest of the whole.
    """
    clean = identifier.encode("utf-8", "replace").decode().replace("\0", "?")
    if clean == identifier and 0 < len(identifier) <= MAX_KEY:
        return identifier
    digest = hashlib.sha256(identifier.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return f"{clean[: MAX_KEY - 17]}~{digest}"


def _specification(root: Mapping[str, Any]) -> Mapping[str, Any]:
    workflow = root.get("workflow")
    if isinstance(workflow, dict) and isinstance(workflow.get("specification"), dict):
        return _object(workflow["specification"], "workflow.specification")
    version = root.get("schemaVersion")
    said = f"its schemaVersion is {version!r}" if isinstance(version, str) else "it names no schemaVersion"
    raise WorkflowError(f"no workflow.specification, so this is not WfFormat 1.5 ({said})")


def _parents(ids: list[str], entries: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Who waits for whom. Some recorders fill in only ``parents`` or only ``children``: both count."""
    found: dict[str, dict[str, None]] = {one: {} for one in ids}
    for one, entry in zip(ids, entries, strict=True):
        for relation in ("parents", "children"):
            for other in _list(entry, relation, f"task {one!r}", optional=True):
                if not isinstance(other, str) or other not in found:
                    raise WorkflowError(
                        f"task {one!r} names {other!r} in {relation}, and there is no such task"
                    )
                child, parent = (one, other) if relation == "parents" else (other, one)
                found[child][parent] = None
    return {child: list(parents) for child, parents in found.items()}


def _in_order(ids: list[str], parents: Mapping[str, list[str]]) -> list[tuple[str, int]]:
    """Each id with its index in the file, parents first."""
    position = {one: index for index, one in enumerate(ids)}
    try:
        return [(one, position[one]) for one in TopologicalSorter(parents).static_order()]
    except CycleError as error:
        circle = " -> ".join(repr(one) for one in reversed(error.args[1]))
        raise WorkflowError(f"the tasks wait for each other in a circle: {circle}") from None


def _runtimes(execution: Any) -> dict[str, float]:
    if execution is None:
        return {}
    found: dict[str, float] = {}
    for entry in _list(_object(execution, "workflow.execution"), "tasks", "execution", optional=True):
        task = _object(entry, "a task of workflow.execution")
        one = _text(task, "id", "a task of workflow.execution")
        seconds = task.get("runtimeInSeconds", 0)
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not abs(seconds) < LONGEST:
            raise WorkflowError(f"runtimeInSeconds of task {one!r} is not a number of seconds")
        # Recorders subtract clocks that may have been set back; a task never took less than nothing.
        found[one] = max(0.0, float(seconds))
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
