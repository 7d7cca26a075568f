"""Reading WfFormat: the shipped workflow, recorded ones, and invalid files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flowstore_replay import Workflow, WorkflowError, load_workflow, read_workflow, shipped_workflow
from flowstore_replay.wfcommons import step_key

INSTANCES = Path(
    os.environ.get("FLOWSTORE_WFINSTANCES") or Path(__file__).parents[2] / "shared" / "data" / "wfinstances"
)


def document(*tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "schemaVersion": "1.5",
        "workflow": {"specification": {"tasks": list(tasks)}, **more},
    }


def task(name: str, *parents: str, **more: Any) -> dict[str, Any]:
    return {"id": name, "name": name, "parents": list(parents), "children": [], **more}


def execution(**seconds: Any) -> dict[str, Any]:
    tasks = [{"id": one, "runtimeInSeconds": value} for one, value in seconds.items()]
    return {"makespanInSeconds": 1, "executedAt": "now", "tasks": tasks}


def read(*tasks: dict[str, Any], **more: Any) -> Workflow:
    return read_workflow(json.dumps(document(*tasks, **more)))


def test_the_shipped_workflow_has_ten_tasks_and_a_join() -> None:
    workflow = shipped_workflow()
    assert workflow.name == "market-day"
    assert len(workflow.tasks) == 10
    assert 300 <= workflow.seconds <= 1000
    assert max(len(one.parents) for one in workflow.tasks) >= 4
    assert workflow.flow_id == shipped_workflow().flow_id


@pytest.mark.parametrize(
    ("name", "tasks"), [("epigenomics", 41), ("helloworld", 10), ("sarek", 26), ("scrnaseq", 14)]
)
def test_recorded_instances_are_read(name: str, tasks: int) -> None:
    instances = sorted(INSTANCES.glob(f"{name}*.json"))
    if not instances:
        pytest.skip(f"no recorded instances at {INSTANCES} (FLOWSTORE_WFINSTANCES overrides the folder)")
    workflow = load_workflow(instances[0])
    assert len(workflow.tasks) == tasks
    known: set[str] = set()
    for one in workflow.tasks:
        assert known.issuperset(one.parents), "a parent follows its child"
        known.add(one.key)
    assert workflow.seconds > 100


def test_parents_precede_children_for_any_order_of_the_file() -> None:
    workflow = read(task("c", "b"), task("b", "a"), task("a"))
    assert [one.key for one in workflow.tasks] == ["a", "b", "c"]


def test_edges_may_be_given_by_parents_or_children() -> None:
    workflow = read(task("a", children=["b"]), task("b"), {"id": "c", "name": "c", "parents": ["b"]})
    assert {one.key: one.parents for one in workflow.tasks} == {"a": (), "b": ("a",), "c": ("b",)}


def test_an_edge_given_by_parent_and_child_is_read_once() -> None:
    workflow = read(task("a", children=["b"]), task("b", "a"))
    assert workflow.by_key["b"].parents == ("a",)


def test_negative_and_missing_durations_are_zero() -> None:
    workflow = read(task("a"), task("b"), task("c"), execution=execution(a=1.5, b=-0.1))
    assert [one.seconds for one in workflow.tasks] == [1.5, 0.0, 0.0]


def test_a_workflow_without_recorded_execution_takes_no_time() -> None:
    assert read(task("a")).seconds == 0


def test_long_ids_become_unique_and_stable_keys() -> None:
    one, other = "x" * 300 + "1", "x" * 300 + "2"
    workflow = read(task(one), task(other, one))
    keys = [task.key for task in workflow.tasks]
    assert all(len(key) == 256 for key in keys)
    assert len(set(keys)) == 2
    assert workflow.by_key[keys[1]].parents == (keys[0],)
    assert keys == [step_key(one), step_key(other)]
    assert step_key("x" * 256) == "x" * 256


@pytest.mark.parametrize("name", ["a\0b", "a\ud800b"])
def test_ids_invalid_for_stores_are_replaced(name: str) -> None:
    key = read(task(name)).tasks[0].key
    key.encode()
    assert "\0" not in key
    assert key != step_key(name + "x")


INVALID = {
    "not JSON": ("{", "not JSON"),
    "not an object": ("[]", "the document is not a JSON object"),
    "nested too deeply": ("[" * 100_000, "nested"),
    "no workflow": ('{"name": "x"}', "no workflow.specification"),
    "an older format": (
        json.dumps({"name": "x", "schemaVersion": "1.3", "workflow": {"tasks": []}}),
        "not WfFormat 1.5 (its schemaVersion is '1.3')",
    ),
    "no tasks": (json.dumps(document()), "tasks is empty"),
    "tasks are not a list": (
        json.dumps({"name": "x", "workflow": {"specification": {"tasks": {}}}}),
        "tasks of specification is not a list",
    ),
    "a task without id": (json.dumps(document({"name": "a"})), "a task has no id"),
    "a task without name": (json.dumps(document({"id": "a"})), "task 'a' has no name"),
    "an id that is not text": (json.dumps(document({"id": 1, "name": "a"})), "a task has no id"),
    "two tasks with one id": (json.dumps(document(task("a"), task("a"))), "two tasks have the id 'a'"),
    "a missing parent": (
        json.dumps(document(task("a", "z"))),
        "task 'a' names the unknown task 'z' in parents",
    ),
    "a missing child": (json.dumps(document(task("a", children=["z"]))), "'z' in children"),
    "parents are not a list": (json.dumps(document({**task("a"), "parents": "b"})), "parents of task 'a'"),
    "a cycle": (
        json.dumps(document(task("a", "c"), task("b", "a"), task("c", "b"))),
        "form a dependency cycle",
    ),
    "a task that depends on itself": (json.dumps(document(task("a", "a"))), "cycle: 'a' -> 'a'"),
    "a duration that is not a number": (
        json.dumps(document(task("a"), execution=execution(a="1"))),
        "runtimeInSeconds of task 'a'",
    ),
    "an infinite duration": (
        json.dumps(document(task("a"), execution=execution(a=float("inf")))),
        "runtimeInSeconds of task 'a'",
    ),
    "a duration with too many digits": (
        json.dumps(document(task("a"), execution=execution(a=10**400))),
        "runtimeInSeconds of task 'a'",
    ),
}


@pytest.mark.parametrize("case", INVALID)
def test_an_invalid_file_is_explained(case: str) -> None:
    text, expected = INVALID[case]
    with pytest.raises(WorkflowError) as caught:
        read_workflow(text)
    assert expected in str(caught.value)


def test_a_file_is_named_in_its_errors(tmp_path: Path) -> None:
    missing = tmp_path / "missing.json"
    with pytest.raises(WorkflowError, match=r"missing\.json cannot be read: No such file"):
        load_workflow(missing)
    missing.write_bytes(b"\xff\xfe{}")
    with pytest.raises(WorkflowError, match=r"missing\.json is not UTF-8"):
        load_workflow(missing)
    missing.write_bytes(b"\xef\xbb\xbf" + json.dumps(document()).encode())
    with pytest.raises(WorkflowError, match=r"missing\.json: .*tasks is empty"):
        load_workflow(missing)
